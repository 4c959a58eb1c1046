"""Slots without an expert: who sees that there may be some, and what those do who cannot skip them."""

from __future__ import annotations

import pytest
import torch

from moeify.backends.calls import find_calls
from moeify.backends.exporting import export
from moeify.distributed.loads import measure
from moeify.fitting.figures import gates
from moeify.ir.no_expert import fill_slots
from moeify.nn.routers import ROUTERS
from moeify.passes.lower_experts import LowerExperts
from moeify.passes.lower_to_aten import LowerToAten
from moeify.passes.place_experts import KEY, PlaceExperts
from moeify.passes.shard_experts import ShardExperts
from moeify.pipeline.base import Log
from moeify.pipeline.rules import is_moe
from moeify.verify.fidelity import ExpertLoad
from tests import programs
from tests.onnx_mixtures import scatter
from tests.test_route import routed

LACKING = {"switch{capacity-factor=0.5,jitter=0}": 1, "top-p": 4, "expert-choice": 2}


def mixture(router: str, maker: str = "gated"):
    made = getattr(programs, maker)(router=router, top_k=LACKING.get(router, 2))
    routed(made)
    scatter(made)
    return made


def targets(made) -> list[str]:
    return [str(node.target) for node in made.graph.nodes]


@pytest.mark.parametrize("router", [*LACKING, "softmax-topk", "sigmoid-bias{groups=4,top-groups=2}", "soft", "hash"])
@pytest.mark.parametrize("form", ["fused", "stages", "exported"])
def test_calls_know_whether_slots_may_lack_an_expert(router, form):
    made = programs.gated(router=router, top_k=8 if router == "soft" else LACKING.get(router, 2))
    routed(made)
    if form == "stages":
        LowerExperts().apply(made, Log())
    graph = export(made).module(check_guards=False).graph if form == "exported" else made.graph
    assert [call.lacking for call in find_calls(graph)] == [router in LACKING]


@pytest.mark.parametrize("router", LACKING)
@pytest.mark.parametrize("maker", ["gated", "custom"])
def test_filled_slots_change_nothing(router, maker):
    made = mixture(router, maker)
    ids = torch.randint(40, (3, 7))
    before = made.run(ids)
    assert fill_slots(made) == 1
    torch.testing.assert_close(made.run(ids), before)
    assert sum("clamp" in target for target in targets(made)) == 1
    plain = mixture("softmax-topk", maker)
    assert fill_slots(plain) == 0


@pytest.mark.parametrize("router", LACKING)
def test_in_plain_aten(router):
    made = mixture(router)
    ids = torch.randint(40, (3, 7))
    before = made.run(ids)
    LowerToAten().apply(made, Log())
    assert not any(map(is_moe, made.graph.nodes))
    torch.testing.assert_close(made.run(ids), before)


@pytest.mark.parametrize("router", LACKING)
@pytest.mark.parametrize(
    "order", [[5, 2, 7, 0, 1, 6, 4, 3], [5, 2, 7, 0, 1, 6, 4, 3, 0, 0, 2]], ids=["moved", "copies"]
)
def test_placed(router, order):
    made = mixture(router)
    ids = torch.randint(40, (3, 7))
    before = made.run(ids)
    made.provenance[KEY] = {"layers.0": order}
    PlaceExperts().apply(made, Log())
    torch.testing.assert_close(made.run(ids), before)


def test_ranks_exchange_whole_sets_of_rows():
    made = mixture("top-p")
    ShardExperts(ranks=2).rewrite(made, Log())
    permute = next(node for node in made.graph.nodes if node.target == torch.ops.moeify.permute.default)
    assert permute.args[1].target == torch.ops.aten.clamp.default


def test_in_tvm():
    from moeify.backends.tvm.backend import Tvm, compiled
    from moeify.backends.tvm.importing import import_graph
    from moeify.backends.tvm.lowering import source
    from moeify.backends.tvm.machine import machine
    from tests.tvm_functions import calling

    made = mixture("top-p")
    found = source(made)
    assert not found.calls[0].lacking or found.calls[0].experts.startswith("clamp")
    imported = import_graph(found.module, found.inputs, machine("cpu"), Tvm().families("cpu"))
    run = calling(compiled(imported, machine("cpu"))[0], imported.weights)
    ids = torch.randint(40, (3, 7))
    torch.testing.assert_close(run(ids)[0], made.run(ids), rtol=1e-5, atol=1e-5)


def test_nobody_counts_them():
    load = ExpertLoad(3)
    load.add(torch.tensor([[0, 3], [1, 3], [0, 2]]))
    assert load.share == [0.5, 0.25, 0.25]
    made = mixture("switch{capacity-factor=0.5,jitter=0}")
    (rows,) = measure(made, [(torch.randint(40, (4, 9)),)]).values()
    assert len(rows) == 8
    assert sum(rows) < 36
    router = ROUTERS.parse("topk{init=normal}").build(4, 3, 2, dtype=torch.float32)
    router.choice = lambda scores, k: (torch.tensor([[0, 3], [2, 1]]), torch.tensor([[1.0, 0.0], [0.5, 2.0]]))
    router.reset(torch.Generator().manual_seed(0))
    assert gates(router, torch.zeros(2, 4), 3).tolist() == [[1.0, 0.0, 0.0], [0.0, 2.0, 0.5]]
