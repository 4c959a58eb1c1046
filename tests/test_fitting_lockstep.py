"""Batches side by side through one program: the values of a plain run, and looking ahead."""

from __future__ import annotations

import torch
from torch import fx

from moeify.fitting.lockstep import Lockstep
from moeify.ir.metadata import outputs, tag
from moeify.pipeline.default import REWRITE
from moeify.pipeline.runner import run
from tests import profiles, programs

IDS = [torch.randint(40, (size, 5), generator=torch.Generator().manual_seed(size)) for size in (2, 3, 1)]


def split(maker: str, **recipe):
    made = getattr(programs, maker)(**{"method": "carve", "experts": 3, "shared": 1, "top_k": 1, **recipe})
    profiles.profiled(made)
    run(made, REWRITE)
    made.materialise()
    return made


def lockstep(made) -> Lockstep:
    return Lockstep(made.graph_module, [(ids,) for ids in IDS], {b.anchor: 3 for b in made.blocks})


class Values(fx.Interpreter):
    """Every value of one run, by name."""

    def __init__(self, made, ids):
        super().__init__(made.graph_module)
        self.found = {}
        with torch.no_grad():
            self.run(ids)

    def run_node(self, n):
        self.found[n.name] = super().run_node(n)
        return self.found[n.name]


def test_values_are_those_of_a_plain_run():
    made = split("gated", count=2)
    plain = [Values(made, ids).found for ids in IDS]
    together = lockstep(made)
    with torch.no_grad():
        for (anchor, _), node in outputs(made.graph).items():
            for values, value in zip(plain, together.run_to(node), strict=True):
                assert torch.equal(values[node.name], value), anchor
        head = made.graph.output_node().all_input_nodes[0]
        for values, value in zip(plain, together.run_to(head), strict=True):
            assert torch.equal(values[head.name], value)


def test_a_weight_that_changes_while_they_stand_is_read_changed():
    made = split("plain", count=2)
    first, second = outputs(made.graph).values()
    together = lockstep(made)
    with torch.no_grad():
        together.run_to(first)
        made.parameter("layers.1.experts.down").data.mul_(2)
        values = together.run_to(second)
    for ids, value in zip(IDS, values, strict=True):
        assert torch.equal(Values(made, ids).found[second.name], value)


def test_little_is_kept():
    made = split("plain", count=2)
    first, _ = outputs(made.graph).values()
    together = lockstep(made)
    with torch.no_grad():
        together.run_to(first)
    # What stands between two blocks: the residual stream and the block's output; sizes are numbers.
    held = [
        [value for node, value in env.items() if isinstance(value, torch.Tensor) and node.op != "get_attr"]
        for env in together._envs
    ]
    for values, ids in zip(held, IDS, strict=True):
        assert sum(value.numel() for value in values) <= 2 * ids.numel() * programs.D


def test_looking_ahead_with_all_experts_on_is_the_dense_model():
    dense = programs.shared_weights()
    made = split("shared_weights")
    places = list(outputs(made.graph).values())
    start = made.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)[0]
    together = lockstep(made)
    with torch.no_grad():
        standing = together.run_to(start)
        for on in ({dense.blocks[0].anchor}, set()):
            found = together.look_ahead(places, on)
            for place, values in zip(places, found, strict=True):
                mark = tag(place)
                before = outputs(dense.graph)[mark.block, mark.call]
                for ids, value in zip(IDS, values, strict=True):
                    want = Values(dense, ids).found[before.name]
                    assert torch.allclose(value, want, atol=1e-5) == bool(on)  # rounding of sums of 24
        again = together.run_to(start)
    assert all(a is b for a, b in zip(standing, again, strict=True))
