"""One lowering as a function of torch tensors: what tests of the CPU's kernels compile and run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import tvm
from torch import Tensor
from tvm import relax, tirx

from moeify.backends.tvm.cpu.table import table
from moeify.backends.tvm.emitter import Emitter
from moeify.backends.tvm.families import Experts, Families
from moeify.backends.tvm.machine import Machine, Tile, machine
from moeify.backends.tvm.types import tensor_type
from moeify.backends.tvm.weights import Weights
from moeify.ir import ops  # the operators that are compared with

__all__ = ["Block", "compiled", "machines", "ops", "routing", "small_tile"]

Input = tuple[Sequence[int | str], torch.dtype]
Run = Callable[..., list[Tensor]]
ROLES = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")


def compiled(
    emit: Callable[..., Any],
    inputs: Sequence[Input],
    source: Mapping[str, Tensor] | None = None,
    target: Machine | None = None,
) -> Run:
    """``emit(emitter, *inputs)`` gives one value or a list of them; sizes that are words are known when it runs."""
    target = target or machine()
    names = sorted({size for shape, _ in inputs for size in shape if isinstance(size, str)})
    sizes = {name: tirx.Var(name, "int64") for name in names}
    arguments = [
        relax.Var(f"x{i}", tensor_type([sizes[s] if isinstance(s, str) else s for s in shape], dtype))
        for i, (shape, dtype) in enumerate(inputs)
    ]
    weights = Weights(dict(source or {}).__getitem__)
    builder = relax.BlockBuilder()
    with builder.function("main"):
        with builder.dataflow():
            out = builder.emit_output(emit(Emitter(builder, target, weights), *arguments))
        builder.emit_func_output(out, [*arguments, *[weight.var for weight in weights]])
    main = relax.VirtualMachine(tvm.compile(builder.get(), target=target.target), tvm.cpu())["main"]
    packed = [_tvm(weight.value()) for weight in weights]

    def run(*given: Tensor) -> list[Tensor]:
        result = main(*[_tvm(tensor.clone(memory_format=torch.contiguous_format)) for tensor in given], *packed)
        results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        return [torch.from_dlpack(one).clone() for one in results]

    return run


def _tvm(tensor: Tensor) -> tvm.runtime.Tensor:
    return tvm.runtime.from_dlpack(tensor)


def small_tile(rows: int = 4, columns: int = 8) -> Machine:
    """This machine with another register tile: less code, and more tiles of few rows."""
    return dataclasses.replace(machine(), tile=Tile(rows, columns))


def machines() -> dict[str, Machine]:
    """Every register tile there is, made for this machine, and the oldest CPU of its kind without vector extensions."""
    tiles = {"avx512": Tile(12, 32), "avx2": Tile(6, 16), "neon": Tile(8, 8), "plain": Tile(4, 8)}
    made = {name: dataclasses.replace(machine(), tile=tile) for name, tile in tiles.items()}
    if "x86_64" in str(machine().target.attrs["mtriple"]):
        made["sse"] = machine("llvm -mcpu=x86-64")
    return made


@dataclasses.dataclass(frozen=True)
class Block:
    """Random experts, in torch and lowered. ``stored``: the matrices are rounded to it (and float32 again)."""

    experts: int
    d_model: int
    d_expert: int
    d_out: int
    activation: str = "gelu"
    gated: bool = False
    biases: Sequence[str] = ("up_bias", "gate_bias", "down_bias")
    stored: torch.dtype = torch.float32

    def weights(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        E, D, F, O = self.experts, self.d_model, self.d_expert, self.d_out  # noqa: E741
        sizes = {"up": (E, F, D), "gate": (E, F, D), "down": (E, O, F)}
        sizes |= {"up_bias": (E, F), "gate_bias": (E, F), "down_bias": (E, O)}
        gone = {role for role in sizes if role.endswith("bias") and role not in self.biases}
        gone |= set() if self.gated else {"gate", "gate_bias"}
        # Scaled so that every step keeps the size of its input.
        made = {role: torch.randn(size, generator=draw) for role, size in sizes.items() if role not in gone}
        return {
            role: (value * value.shape[-1] ** -0.5).to(self.stored).float() if value.dim() == 3 else value * 0.5
            for role, value in made.items()
        }

    @property
    def spec(self) -> Experts:
        have = self.weights()
        up, gate, down, *biases = (role if role in have else None for role in ROLES)
        assert up is not None
        assert down is not None
        sizes = (self.experts, self.d_model, self.d_expert, self.d_out)
        return Experts(up, gate, down, *biases, self.activation, *sizes)

    def expected(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """In float64."""
        have = {role: value.double() for role, value in self.weights().items()}
        stacked = [have.get(role) for role in ROLES]
        return torch.ops.moeify.dispatch_ffn(x.double(), experts, weights.double(), *stacked, self.activation)

    def compiled(
        self,
        k: int,
        families: Families | None = None,
        target: Machine | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Run:
        """``dispatch_ffn`` as a function of x, experts and weights."""
        families = families or table(dtype)
        return compiled(
            lambda emitter, x, e, w: families("dispatch_ffn", emitter, x, e, w, self.spec),
            [(("T", self.d_model), torch.float32), (("T", k), torch.int64), (("T", k), torch.float32)],
            self.weights(),
            target,
        )


def routing(tokens: int, experts: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Different experts for each token, drawn evenly, and weights."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=draw).argsort(1)[:, :k]
    return chosen.contiguous(), torch.rand(tokens, k, generator=draw)
