"""lower-exchange: the graph, the numbers and gradients on real processes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeify.errors import BadOption
from moeify.ir.printer import program_text
from moeify.passes.lower_exchange import LowerExchange
from moeify.passes.shard_experts import ShardExperts
from moeify.pipeline.base import Log
from moeify.pipeline.rules import ALWAYS
from tests import programs, rank_work, ranks, sharded
from tests.test_route import routed


@pytest.mark.parametrize("mode", ["dropless", "capacity"])
def test_graph(golden, mode: str) -> None:
    made = programs.gated()
    routed(made)
    ShardExperts(ranks=2, mode=mode).rewrite(made, Log())
    log = Log()
    LowerExchange("ep-group").apply(made, log)
    for rule in ALWAYS:
        rule(made)
    count = 3 if mode == "dropless" else 2
    assert log.lines == [f"{count} exchanges lowered to functional collectives of the group 'ep-group'"]
    golden(f"lower-exchange-{mode}", program_text(made, "lower-exchange"))


def test_outputs_and_gradients(tmp_path: Path) -> None:
    """On two columns of a mesh, whose groups have two names."""
    results = ranks.results(ranks.run(rank_work.lowered_numbers, 4, tmp_path, ep=2))
    expected = sharded.alone(rank_work.PROGRAM, [rank_work.tokens(rank) for rank in range(4)])
    # The bar of expert parallelism, in float32.
    sharded.compare(results, expected, sharded.experts_of(rank_work.PROGRAM), 2, 1e-6)


def test_needs_a_group() -> None:
    with pytest.raises(BadOption) as caught:
        LowerExchange().apply(programs.gated(), Log())
    assert str(caught.value) == (
        "lower-exchange needs the name of a process group\n  hint: write lower-exchange{group=NAME}"
    )
