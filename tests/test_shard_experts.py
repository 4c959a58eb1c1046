"""shard-experts: the graph, equal on every rank; the weights that stay; what it refuses. Numbers:
test_distributed_*."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from moeify.backends.exporting import export
from moeify.distributed.handshake import graph_hash
from moeify.errors import BadOption, NotDivisible, Refused
from moeify.ir.printer import program_text
from moeify.ir.program import Program
from moeify.ir.shape_check import check_shapes
from moeify.ir.sharding import sharding, share
from moeify.passes.shard_experts import ShardExperts
from moeify.pipeline import PASSES
from moeify.pipeline.base import Log
from moeify.pipeline.rules import ALWAYS
from tests import programs
from tests.test_make_experts import MAKERS
from tests.test_route import routed


def sharded(made: Program, **options) -> list[str]:
    log = Log()
    ShardExperts(**options).rewrite(made, log)
    for rule in ALWAYS:
        rule(made)
    return log.lines


@pytest.mark.parametrize("mode", ["dropless", "capacity"])
def test_graph(golden, mode: str) -> None:
    made = programs.gated(shared=1)
    routed(made)
    sharded(made, ranks=4, mode=mode)
    golden(f"shard-experts-{mode}", program_text(made, "shard-experts"))


@pytest.mark.parametrize("mode", ["dropless", "capacity"])
@pytest.mark.parametrize("maker", ["gated", "shared-weights", "custom", "images"])
def test_shapes_fit(maker: str, mode: str) -> None:
    made = MAKERS[maker]()
    routed(made)
    ShardExperts(ranks=4, rank=1, mode=mode).apply(made, Log())


def test_64_ranks_without_a_process_group() -> None:
    made = programs.plain(2, experts=64)
    routed(made)
    ShardExperts(ranks=64).apply(made, Log())
    two = programs.plain(2, experts=64)
    routed(two)
    sharded(two, ranks=2)
    assert len(made.graph.nodes) == len(two.graph.nodes)
    assert program_text(made, "shard-experts").count("moe.all_to_all_rows(") == 4


def test_the_graph_is_the_same_on_every_rank() -> None:
    hashes = set()
    for rank in range(3):
        made = programs.gated()
        routed(made)
        sharded(made, ranks=3, rank=rank)
        hashes.add(graph_hash(made.graph))
    assert len(hashes) == 1


def test_a_rank_keeps_its_own_experts() -> None:
    whole = programs.gated(experts=7)
    routed(whole)
    whole.materialise()
    kept = []
    for rank in range(3):
        made = programs.gated(experts=7)
        routed(made)
        assert sharded(made, ranks=3, rank=rank)[0].startswith("layers.0: 7 experts over 3 ranks")
        assert made.pending["layers.0.experts.up"].shape[0] == (3, 3, 1)[rank]
        made.materialise()
        kept.append(made.parameter("layers.0.experts.up"))
        assert kept[-1].untyped_storage().nbytes() == kept[-1].numel() * 4
        assert torch.equal(made.parameter("layers.0.router.weight"), whole.parameter("layers.0.router.weight"))
    assert torch.equal(torch.cat(kept), whole.parameter("layers.0.experts.up"))


def test_weights_that_are_there_already_are_cut_too() -> None:
    made = programs.gated(experts=4)
    routed(made)
    made.materialise()
    made.graph_module = copy.deepcopy(made.graph_module)
    up = made.parameter("layers.0.experts.up").detach().clone()
    sharded(made, ranks=2, rank=1)
    assert made.parameter("layers.0.experts.up").is_meta
    made.materialise()
    assert torch.equal(made.parameter("layers.0.experts.up"), up[2:])
    assert made.parameter("layers.0.experts.up").requires_grad


@pytest.mark.parametrize(("experts", "ranks"), [(8, 3), (8, 6), (5, 4), (4, 4), (1, 3)])
def test_shares_are_those_of_chunk(experts: int, ranks: int) -> None:
    parts = torch.arange(experts).chunk(ranks)
    for rank in range(ranks):
        want = parts[rank].tolist() if rank < len(parts) else []
        assert list(range(*share(experts, ranks, rank))) == want


def test_a_loaded_graph(tmp_path) -> None:
    """Its nodes have lost their tags."""
    made = programs.shared_weights()
    routed(made)
    archive = io.BytesIO()
    torch.export.save(export(made), archive)
    archive.seek(0)
    loaded = Program(torch.export.load(archive).module(check_guards=False), made.inputs, made.example)
    assert sharded(loaded, ranks=2) == ["layers.1: 8 experts over 2 ranks, 0 to 4 here"]
    record = sharding(loaded)
    assert record is not None
    (block,) = record.blocks
    assert (block.experts, block.width, block.top_k) == (8, 8, 2)
    assert set(block.parameters) == {f"layers.1.experts.{r}" for r in ("up", "down", "up_bias", "down_bias")}


def test_the_text_reads_back() -> None:
    one = PASSES.parse("shard-experts{ranks=4,rank=3,mode=capacity,factor=1.5,tokens=128}")
    assert one == ShardExperts(4, 3, "capacity", 1.5, 128)
    assert PASSES.parse(str(one)) == one


def test_capacity_of_the_example() -> None:
    made = programs.gated()  # 10 tokens, 2 of 8 experts each
    routed(made)
    assert sharded(made, ranks=2, mode="capacity")[1] == "layers.0: buffers of 4 rows from each rank to each expert"


def test_refusals() -> None:
    def refused(kind: type[Exception], made: Program, **options) -> str:
        with pytest.raises(kind) as caught:
            ShardExperts(**options).rewrite(made, Log())
        return str(caught.value)

    made = programs.gated()
    assert refused(Refused, made, ranks=2) == (
        "the program has no experts to shard\n  hint: convert it first: moeify convert"
    )
    routed(made)
    assert refused(NotDivisible, made, ranks=3, mode="capacity") == (
        "8 experts do not split evenly over 3 ranks, which capacity mode needs\n"
        "  at: layers.0\n"
        "  hint: choose one of 1, 2, 4, 8 ranks, or mode=dropless"
    )
    assert refused(BadOption, made, ranks=2, rank=2) == "shard-experts: there is no rank 2 of 2"
    assert refused(BadOption, made, ranks=2, mode="some") == (
        "shard-experts: there is no mode 'some'\n  hint: choose dropless or capacity"
    )
    sharded(made, ranks=2)
    assert refused(Refused, made, ranks=2) == (
        "the program is sharded over 2 ranks already\n  hint: start from the whole one"
    )


def test_a_weight_that_something_else_reads_is_refused() -> None:
    made = programs.gated()
    routed(made)
    up = next(node for node in made.graph.nodes if node.op == "get_attr" and node.target == "layers.0.experts.up")
    output = made.graph.output_node()
    with made.graph.inserting_before(output):
        total = made.graph.call_function(torch.ops.aten.sum.default, (up,))
        added = made.graph.call_function(torch.ops.aten.add.Tensor, (output.args[0][0], total))
    total.meta["val"], added.meta["val"] = up.meta["val"].sum(), output.args[0][0].meta["val"]
    output.args = ((added,),)
    with pytest.raises(Refused, match=r"layers\.0\.experts\.up is read outside of its experts"):
        ShardExperts(ranks=2).rewrite(made, Log())


@pytest.mark.parametrize(
    ("of", "change", "arguments", "says"),
    [("transpose_groups", torch.ops.aten.view.default, ([30, 8],), "Eq("),
     ("reshape", torch.ops.aten.narrow.default, (1, 0, 7), "RuntimeError")],
    ids=["rows", "width"],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(
    of: str, change: torch._ops.OpOverload, arguments: tuple[object, ...], says: str
) -> None:
    """Rows taken for as many as one process has, after the exchange, or for rows of another width."""
    made = programs.gated()
    routed(made)
    sharded(made, ranks=2)
    rows = next(node for node in made.graph.nodes if of in str(node.target))
    with made.graph.inserting_after(rows):
        fixed = made.graph.call_function(change, (rows, *arguments))
    rows.replace_all_uses_with(fixed, delete_user_cb=lambda user: user is not fixed)
    made.graph_module.recompile()
    with pytest.raises(Refused, match="the shapes of the rewritten program do not fit") as caught:
        check_shapes(made)
    assert says in str(caught.value)
