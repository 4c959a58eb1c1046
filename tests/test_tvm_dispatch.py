"""The plan of a dispatch: groups, their first rows, and the slots in order."""

from __future__ import annotations

import pytest
import torch

from moeify.backends.tvm.cpu import dispatch
from tests.tvm_kernels import Run, compiled, routing

E, K = 6, 2


@pytest.fixture(scope="module")
def run() -> Run:
    def both(emitter, experts):  # type: ignore[no-untyped-def]
        from tvm import relax

        return relax.Tuple(list(dispatch.dispatch(emitter, experts, E)))

    return compiled(both, [(("T", K), torch.int64)])


@pytest.fixture(scope="module")
def from_counts() -> Run:
    return compiled(lambda emitter, counts: dispatch.plan_of_counts(emitter, counts, E), [((E,), torch.int64)])


@pytest.mark.parametrize("tokens", [0, 1, 5, 50])
def test_plan(run: Run, from_counts: Run, tokens: int) -> None:
    experts, _ = routing(tokens, 5, K)  # the last of the six has no rows
    plan, slots = run(experts)
    _, counts, order = torch.ops.moeify.permute(torch.zeros(tokens, 1), experts, E)
    assert slots.tolist() == order.tolist()
    groups = counts.nonzero().flatten()
    assert int(plan[0]) == len(groups)
    assert plan[1 : 1 + len(groups)].tolist() == groups.tolist()
    starts = counts.cumsum(0) - counts
    assert plan[1 + E : 1 + E + len(groups)].tolist() == starts[groups].tolist()
    assert int(plan[1 + E + len(groups)]) == tokens * K
    assert torch.equal(from_counts(counts)[0], plan)
