"""One lowering as a function of torch tensors: what tests of the CPU's kernels compile and run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import tvm
from torch import Tensor

import moeify.ir.ops  # noqa: F401  # the operators that are compared with
from moeify.backends.tvm.cpu.table import table
from moeify.backends.tvm.families import Experts, Families
from moeify.backends.tvm.machine import Machine, Tile, machine
from tests.tvm_functions import Input, Run, calling, module

ROLES = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")


def compiled(
    emit: Callable[..., Any],
    inputs: Sequence[Input],
    source: Mapping[str, Tensor] | None = None,
    target: Machine | None = None,
) -> Run:
    """``emit(emitter, *inputs)`` gives one value or a tuple of them; compiled by TVM's own pipeline."""
    target = target or machine()
    mod, weights = module(emit, inputs, source, target)
    return calling(tvm.compile(mod, target=target.target), weights)


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
