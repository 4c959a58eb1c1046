"""How an architecture is written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.export import Dim

from moeify.frontend.calling import mode, tensors_only
from moeify.ir.block import Block
from moeify.ir.program import Program
from moeify.passes.canonicalize import Canonicalize
from moeify.pipeline.base import Log


@dataclass(frozen=True)
class Blocks:
    """``count`` blocks whose module paths match ``paths``."""

    paths: str
    count: int
    activation: str
    d_ff: int
    gated: bool = False
    rows: str = "token"
    calls: int = 1

    def fits(self, block: Block) -> bool:
        said = (block.activation, block.d_ff, block.gated, block.rows, len(block.calls))
        wanted = (self.activation, self.d_ff, self.gated, self.rows, self.calls)
        return fnmatchcase(block.path, self.paths) and said == wanted


@dataclass(frozen=True)
class Architecture:
    """``build`` makes the model, ``inputs`` the tensors of one call by name; ``blocks`` is the hand count."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    blocks: tuple[Blocks, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()  # (module path, words of the reason) of near misses that must be there
    held_out: bool = False  # not looked at when the rules were written
    fixed: bool = False  # static shapes

    @property
    def expected(self) -> int:
        return sum(group.count for group in self.blocks)

    def make(self) -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        return self.build().eval(), self.inputs()

    def program(self, canonical: bool = True) -> Program:
        """The model captured as the front end does it, without the front end's checks."""
        module, inputs = self.make()
        with mode(module, False), tensors_only(module, list(inputs)):
            shapes = [_dynamic(tensor) for tensor in inputs.values()]
            exported = torch.export.export(
                module,
                tuple(inputs.values()),
                dynamic_shapes=None if self.fixed else tuple(shapes),
                strict=False,
            )
        program = Program(exported.module(check_guards=False), (), tuple(inputs.values()))  # type: ignore[arg-type]
        if canonical:
            Canonicalize().apply(program, Log())
        return program

    def compare(self, blocks: list[Block]) -> tuple[int, list[str]]:
        """How many blocks were found as expected, and what is wrong, one line each."""
        left = [group.count for group in self.blocks]
        wrong = []
        for block in blocks:
            place = next((i for i, group in enumerate(self.blocks) if left[i] and group.fits(block)), None)
            if place is None:
                wrong.append(
                    f"not expected: {block.path} {block.activation} d_ff={block.d_ff} gated={block.gated} "
                    f"rows={block.rows} calls={len(block.calls)}"
                )
            else:
                left[place] -= 1
        wrong += [f"not found: {n} of {group}" for n, group in zip(left, self.blocks) if n]
        return self.expected - sum(left), wrong


def _dynamic(tensor: Tensor) -> dict[int, object]:
    """Batch, and the sequence of tokens or frames."""
    sequence = tensor.dim() == (3 if tensor.is_floating_point() else 2)
    return dict.fromkeys(range(1 + sequence), Dim.AUTO)


def ids(batch: int = 2, length: int = 8, vocabulary: int = 60, name: str = "input_ids") -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randint(3, vocabulary, (batch, length), generator=draw)}


def floats(*shape: int, name: str = "x") -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(1))}
