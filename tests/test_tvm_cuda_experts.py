"""The CUDA target's experts compute what the operators say, whatever the routing: the same kernels, run on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tvm import relax, tirx

import moeify.ir.ops  # noqa: F401
from moeify.backends.tvm.cuda.table import table
from moeify.backends.tvm.families import Experts
from tests.tvm_cuda import module, on_cpu, relative

# Sums in another order than torch's.
FLOAT = 2e-6
# Results, and hidden values before them, are rounded to float16 (2^-11); both sides read the same float16 values.
HALF = 2e-3


@dataclass(frozen=True)
class Case:
    experts: int
    d_model: int
    d_expert: int
    d_out: int
    k: int
    activation: str
    gated: bool
    biases: tuple[str, ...]
    dtype: torch.dtype = torch.float32

    def weights(self) -> dict[str, torch.Tensor | None]:
        torch.manual_seed(0)
        E, D, F, O = self.experts, self.d_model, self.d_expert, self.d_out  # noqa: E741
        shapes = {"up": (E, F, D), "gate": (E, F, D), "down": (E, O, F), "up_bias": (E, F), "gate_bias": (E, F)}
        shapes["down_bias"] = (E, O)
        absent = {role for role in shapes if role.endswith("bias") and role not in self.biases}
        absent |= set() if self.gated else {"gate"}
        return {r: None if r in absent else (torch.randn(s) * 0.3).to(self.dtype) for r, s in shapes.items()}

    def spec(self) -> Experts:
        names = {role: role if value is not None else None for role, value in self.weights().items()}
        sizes = (self.experts, self.d_model, self.d_expert, self.d_out)
        return Experts(**names, activation=self.activation, num_experts=sizes[0], d_model=sizes[1], d_expert=sizes[2],
                       d_out=sizes[3])  # fmt: skip


# Widths that fill vectors and tiles and that do not, wider than a tile of columns, one expert, one chosen.
CASES = [
    Case(5, 36, 40, 36, 2, "silu", True, ("up_bias", "down_bias")),
    Case(8, 33, 70, 21, 1, "gelu", False, ()),
    Case(3, 16, 130, 64, 3, "relu2", True, ("up_bias", "gate_bias", "down_bias")),
    Case(1, 20, 24, 20, 1, "tanh", False, ("up_bias",)),
    Case(4, 40, 72, 136, 2, "gelu_tanh", True, ("down_bias",), torch.float16),
]


def routings(case: Case) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    E, k = case.experts, case.k
    return {
        "mixed": torch.randint(0, E, (70, k), generator=generator),
        "one token": torch.randint(0, E, (1, k), generator=generator),
        "all to the last": torch.full((67, k), E - 1),  # more than one tile, the others idle, repeated in a token
        "no tokens": torch.zeros((0, k), dtype=torch.int64),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"e{c.experts}-{c.activation}-{str(c.dtype)[6:]}")
def test_dispatch_ffn_on_every_routing(case: Case) -> None:
    weights, t = case.weights(), tirx.Var("t", "int64")
    inputs = {"x": ((t, case.d_model), case.dtype), "experts": ((t, case.k), torch.int64)}
    inputs["weights"] = ((t, case.k), case.dtype)
    run = on_cpu(*module(inputs, lambda e, *xs: table()("dispatch_ffn", e, *xs, case.spec()), weights))
    for name, experts in routings(case).items():
        tokens = experts.shape[0]
        x, scale = torch.randn(tokens, case.d_model).to(case.dtype), torch.rand(tokens, case.k).to(case.dtype)
        wide = [None if w is None else w.float() for w in weights.values()]
        want = torch.ops.moeify.dispatch_ffn(x.float(), experts, scale.float(), *wide, case.activation)
        bound = FLOAT if case.dtype == torch.float32 else HALF
        assert relative(run(x, experts, scale), want) < bound, name


def test_a_block_taken_apart() -> None:
    """permute, experts and grouped_linear over sorted rows, unpermute."""
    case = CASES[0]
    weights, t = case.weights(), tirx.Var("t", "int64")
    families = table()

    def emit(emitter, x, experts, scale):  # type: ignore[no-untyped-def]
        found = families("permute", emitter, x, experts, case.experts)
        rows, counts, order = (emitter.emit(found[i]) for i in range(3))
        hidden = families("grouped_linear", emitter, rows, counts, "up", "up_bias")
        out = families("grouped_linear", emitter, hidden, counts, "down", None)
        whole = families("experts", emitter, rows, counts, case.spec())
        return emitter.emit(
            relax.Tuple([rows, counts, order, out, whole, families("unpermute", emitter, whole, order, scale)])
        )

    inputs = {"x": ((t, 36), torch.float32), "experts": ((t, 2), torch.int64), "scale": ((t, 2), torch.float32)}
    run = on_cpu(*module(inputs, emit, weights))
    experts = torch.randint(0, case.experts, (70, 2))
    x, scale = torch.randn(70, 36), torch.rand(70, 2)
    rows, counts, order, out, whole, back = run(x, experts, scale)
    moe = torch.ops.moeify
    want_rows, want_counts, want_order = moe.permute(x, experts, case.experts)
    assert torch.equal(rows, want_rows)
    assert torch.equal(counts, want_counts)
    assert torch.equal(order, want_order)
    hidden = moe.grouped_linear(rows, counts, weights["up"], weights["up_bias"])
    assert relative(out, moe.grouped_linear(hidden, counts, weights["down"], None)) < FLOAT
    want = moe.experts(rows, counts, *weights.values(), case.activation)
    assert relative(whole, want) < FLOAT
    assert relative(back, moe.unpermute(want, order, scale)) < FLOAT


def test_an_expert_that_does_not_exist_reads_no_memory_of_others() -> None:
    """It is taken as the nearest one: a kernel cannot raise, and must not read out of bounds."""
    case = CASES[0]
    weights, t = case.weights(), tirx.Var("t", "int64")
    inputs = {"x": ((t, 36), torch.float32), "experts": ((t, 2), torch.int64), "scale": ((t, 2), torch.float32)}
    run = on_cpu(*module(inputs, lambda e, *xs: table()("dispatch_ffn", e, *xs, case.spec()), weights))
    x, scale = torch.randn(3, 36), torch.rand(3, 2)
    wild, near = torch.tensor([[-7, 0], [99, 1], [2, 5]]), torch.tensor([[0, 0], [4, 1], [2, 4]])
    assert torch.equal(run(x, wild, scale), run(x, near, scale))


def test_other_types_are_not_taken() -> None:
    case = CASES[0]
    weights = {r: None if w is None else w.double() for r, w in case.weights().items()}
    found = []

    def emit(emitter, x, experts, scale):  # type: ignore[no-untyped-def]
        found.append(table()("dispatch_ffn", emitter, x, experts, scale, case.spec()))
        return x

    inputs = {"x": ((3, 36), torch.float64), "experts": ((3, 2), torch.int64), "scale": ((3, 2), torch.float64)}
    module(inputs, emit, weights)
    assert found == [None]
