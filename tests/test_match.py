"""The matcher on the whole zoo: every block that a person counts, nothing else, and the rewrite keeps the numbers."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch

from moeify.ir.program import Program, flat
from moeify.match import find
from moeify.passes.canonicalize import Canonicalize
from moeify.passes.find_ffn import FindFfn
from moeify.pipeline.base import Log
from moeify.pipeline.rules import ALWAYS
from tests.architectures import ARCHITECTURES, Architecture
from tests.architectures.blocks import Plain, Residual
from tests.architectures.kinds import floats

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and torch.export warn about themselves


def _run(program: Program, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return flat(program.graph_module(*program.example))


@pytest.mark.parametrize("one", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def test_every_block_and_nothing_else(one: Architecture) -> None:
    program = one.program(canonical=False)
    before = _run(program)
    Canonicalize().apply(program, Log())
    canonical = _run(program)
    assert all(torch.equal(a, b) for a, b in zip(before, canonical))
    FindFfn().apply(program, Log())
    for rule in ALWAYS:
        rule(program)
    _, wrong = one.compare(program.blocks)
    assert not wrong, "\n".join(wrong)
    for path, reason in one.refused:
        assert any(fnmatchcase(miss.path, path) and reason in miss.reason for miss in program.near_misses), (
            path,
            reason,
            program.near_misses,
        )
    for a, b in zip(before, _run(program)):
        # float32 rounding of one reordered product; decoders end in logits of size 1
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_the_zoo_is_large_enough() -> None:
    assert len([one for one in ARCHITECTURES.values() if not one.held_out]) >= 60
    assert len([one for one in ARCHITECTURES.values() if one.held_out]) >= 15


def test_the_search_is_linear_in_the_number_of_layers() -> None:
    visited = []
    for layers in (12, 24, 48):
        one = Architecture("deep", lambda n=layers: _Deep(n), lambda: floats(2, 6, 8))
        found = find(one.program().graph_module)
        assert len(found.blocks) == layers
        visited.append(found.visited)
    assert visited[2] - visited[1] == 2 * (visited[1] - visited[0])


def test_find_does_not_change_the_graph() -> None:
    program = ARCHITECTURES["fused, chunk"].program()
    before = str(program.graph)
    find(program.graph_module)
    assert str(program.graph) == before


class _Deep(torch.nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            *(Residual(lambda: Plain(torch.nn.functional.gelu)) for _ in range(layers // 2))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)
