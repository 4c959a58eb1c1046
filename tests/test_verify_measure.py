"""Errors are measured per block on the dense model's own inputs, and whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moeify import Recipe, frontend
from moeify.ir.program import Program
from moeify.pipeline.default import FIND, REWRITE
from moeify.pipeline.runner import run
from moeify.verify.measure import Recording, relative_error, tolerance_for


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


def found(dtype: torch.dtype = torch.float32) -> Program:
    program = frontend.capture(nn.Sequential(Residual(), Residual()).to(dtype), [f"{str(dtype)[6:]}[batch=2,seq=5,16]"])
    program.recipe = Recipe(experts=4, top_k=2)
    return run(program, FIND)


def test_an_exact_conversion_is_exact() -> None:
    program = found()
    dense = Recording(program, program.example)
    run(program, REWRITE)
    program.materialise()
    errors = dense.block_errors(program)
    assert set(errors) == {block.anchor for block in program.blocks}
    assert len(errors) == 2
    assert all(0 <= e < 1e-5 for e in errors.values())
    assert dense.model_error(program) < 1e-5


def test_damage_to_one_block_shows_in_that_block_and_in_the_model() -> None:
    program = found()
    dense = Recording(program, program.example)
    run(program, REWRITE)
    program.materialise()
    first, second = (block.anchor for block in program.blocks)
    with torch.no_grad():
        program.parameter(f"{first}.experts.down").mul_(1.1)
    errors = dense.block_errors(program)
    assert errors[first] > 1e-2
    assert errors[second] < 1e-5  # it saw the dense model's input, not the damaged one
    assert dense.model_error(program) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(dtype: torch.dtype) -> None:
    program = found(dtype)
    assert tolerance_for(program) == torch.finfo(dtype).eps
    dense = Recording(program, program.example)
    run(program, REWRITE)
    program.materialise()
    assert max(dense.block_errors(program).values()) < 1e-5  # copied weights are not rounded again
    assert program.parameter(f"{program.blocks[0].anchor}.experts.up").dtype == dtype


@pytest.mark.parametrize(
    ("value", "reference", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.2], [1.0, 2.0], 0.1),
        ([0.0], [0.0], 0.0),
        ([1.0], [0.0], math.inf),
        ([math.nan], [1.0], math.inf),
        ([1.0], [math.nan], math.inf),
        ([-math.inf, 1.0], [-math.inf, 1.0], 0.0),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
        ([1.0], [1.0, 2.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_relative_error(value: list[float], reference: list[float], error: float) -> None:
    assert relative_error(torch.tensor(value), torch.tensor(reference)) == pytest.approx(error, rel=1e-5)


def test_complex_numbers_are_compared_part_by_part():
    reference = torch.tensor([3.0 + 4.0j, 1.0 - 2.0j])
    assert relative_error(reference + 0.4j, reference) == pytest.approx(0.1)
    assert relative_error(reference, reference) == 0.0
    assert relative_error(reference.real, reference) == float("inf")
