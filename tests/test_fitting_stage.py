"""The fit of whole programs: what it is fitted on, what it measures on, what it improves and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from moeify.errors import Refused
from moeify.experts.planning import plan_block
from moeify.fitting import stage
from moeify.fitting.collect import collect
from moeify.fitting.mixture import Mixture
from moeify.ir.program import InputSpec
from moeify.pipeline.default import REWRITE
from moeify.pipeline.runner import run
from tests import programs
from tests.test_make_experts import MAKERS

KINDS = [kind for kind in MAKERS if kind != "custom-norm"]
SPLIT = {"method": "carve", "experts": 3, "shared": 1, "top_k": 1}


def batches(kind: str, count: int = 12) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    if kind == "images":
        return [(torch.randn(2, programs.D, 4, 5, generator=generator),) for _ in range(count)]
    return [(torch.randint(40, (4, 5), generator=generator),) for _ in range(count)]


def split(kind: str, data: list[tuple[Tensor, ...]], count: int = 1, **recipe):
    """A program whose blocks are split, on a profile of the data."""
    options = {**SPLIT, **recipe}
    made = MAKERS[kind](count=count, **options) if count > 1 else MAKERS[kind](**options)
    made.profile = collect(made, data)
    run(made, REWRITE)
    made.materialise()
    return made


def parameters(made) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in made.graph_module.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block_gets_better(kind):
    """On rows that were not fitted to, and for the whole model on inputs of its own."""
    data = batches(kind, 40)
    made = split(kind, data[:36])
    unseen = data[36:]
    fresh = split(kind, data[:36])
    found = stage.fit(made)
    (figures,) = found.values()
    calls = len(made.blocks[0].calls)
    assert (figures.rows, figures.held_out) == tuple(
        calls * n for n in ((648, 72) if kind != "images" else (1296, 144))
    )
    assert figures.kept
    assert figures.repaired_error < 0.9 * figures.error
    before, after = (worst(one, unseen, kind) for one in (fresh, made))
    assert after < before


def worst(made, data, kind: str) -> float:
    """Root mean square error of the whole model's output."""
    dense = MAKERS[kind](**SPLIT)
    return math.sqrt(sum(float((made.run(*x) - dense.run(*x)).square().sum()) for x in data))


@torch.no_grad()
def test_the_figures_are_those_of_the_rows_held_out():
    data = batches("gated")
    made = split("gated", data)
    rows: list[Tensor] = []
    for batch in data:
        rows.append(inputs_of(made, batch))
    held = torch.cat(rows)[-24:]  # a tenth of 240
    block, plan = made.blocks[0], plan_block(made, made.blocks[0])
    before = Mixture.of(block, plan, lambda name: made.parameter(name).detach().clone())
    (figures,) = stage.fit(made).values()
    after = Mixture.of(block, plan, made.parameter)
    scores = held @ made.parameter(f"{block.anchor}.router.weight").t() + made.parameter(f"{block.anchor}.router.bias")
    gates = torch.nn.functional.one_hot(scores.argmax(1), 3).float()
    h = before.hidden(held)
    whole = before.output(h, torch.ones(24, 3))

    def error(mixture: Mixture) -> float:
        return float((mixture.output(h, gates) - whole).norm() / whole.norm())

    assert figures.error == pytest.approx(error(before), rel=1e-4)
    assert figures.repaired_error == pytest.approx(error(after), rel=1e-4)
    best = before.sizes(h).argmax(1)
    assert figures.routing.agreement == pytest.approx(float((best == scores.argmax(1)).float().mean()))
    load = gates.sum(0) / 24
    assert figures.routing.load_cv == pytest.approx(float(load.std(correction=0) / load.mean()))
    entropy = -sum(share * math.log(share) for share in load.tolist() if share)
    assert figures.routing.load_entropy == pytest.approx(entropy / math.log(3), rel=1e-4)


def inputs_of(made, batch) -> Tensor:
    block = made.blocks[0]
    x = torch.nn.functional.embedding(batch[0], made.parameter("embed.weight"))
    norm = [made.parameter(f"{block.path}.norm.{name}") for name in ("weight", "bias")]
    return torch.nn.functional.layer_norm(x, (programs.D,), *norm).flatten(0, 1)


def test_rows_held_out_change_nothing():
    """Other tokens at the end: other figures, the same weights."""
    data = batches("plain", 10)
    other = [*data[:9], (39 - data[9][0],)]
    made = split("plain", data)
    changed = split("plain", data)
    assert changed.profile is not None
    changed.profile.batches[:] = other
    (first,), (second,) = stage.fit(made).values(), stage.fit(changed).values()
    for name, value in parameters(made).items():
        assert torch.equal(value, changed.parameter(name)), name
    assert first.error != second.error


def test_later_blocks_are_fitted_on_what_earlier_ones_give_now():
    data = batches("plain")
    together = split("plain", data, count=2)
    apart = split("plain", data, count=2, overrides=(("layers.0", {"repair": False}),))
    stage.fit(together)
    stage.fit(apart)
    down = "layers.1.experts.down"
    assert not torch.equal(together.parameter(down), apart.parameter(down))
    assert torch.equal(together.parameter("layers.0.router.weight"), apart.parameter("layers.0.router.weight"))


def test_the_seed_decides():
    data = batches("plain")
    router = "topk{score=mlp,hidden=8}"
    made = [split("plain", data, seed=1, router=router) for _ in range(2)]
    for one in made:
        stage.fit(one)
    for name, value in parameters(made[0]).items():
        assert torch.equal(value, made[1].parameter(name)), name


def test_without_repair_only_the_router_changes():
    made = split("gated", batches("gated"), repair=False)
    before = parameters(made)
    (figures,) = stage.fit(made).values()
    changed = {name for name, value in parameters(made).items() if not torch.equal(value, before[name])}
    assert changed == {f"{made.blocks[0].anchor}.router.{name}" for name in ("weight", "bias")}
    assert (figures.repaired_error, figures.kept) == (None, False)


def test_a_repair_that_does_not_help_is_left_out(monkeypatch):
    made = split("gated", batches("gated"))
    router = {"weight", "bias"}
    before = parameters(made)
    monkeypatch.setattr(stage, "repair", lambda mixture, *_: dataclasses.replace(mixture, down_DF=mixture.down_DF * 9))
    (figures,) = stage.fit(made).values()
    assert figures.repaired_error > figures.error
    assert not figures.kept
    changed = {
        name.rpartition(".")[2] for name, value in parameters(made).items() if not torch.equal(value, before[name])
    }
    assert changed == router


def test_padding_is_not_fitted_to():
    """What stands where the mask is zero changes nothing."""
    data = [(ids,) for (ids,) in batches("plain")]
    ones = torch.ones(4, 5, dtype=torch.int64)
    ones[:, 3:] = 0
    results = []
    for filler in (0, 39):
        padded = [(torch.where(ones != 0, ids, filler),) for (ids,) in data]
        made = split("plain", padded, method="split-random")
        with_mask(made, ones)
        assert made.profile is not None
        made.profile.batches[:] = [(ids, ones) for (ids,) in padded]
        (figures,) = stage.fit(made).values()
        assert figures.rows + figures.held_out == 12 * 12
        results.append(parameters(made))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def with_mask(made, mask: Tensor) -> None:
    """An input attention_mask beside the ids, that nothing reads."""
    (ids,) = made.graph.find_nodes(op="placeholder")
    with made.graph.inserting_after(ids):
        node = made.graph.placeholder("attention_mask")
    node.meta["val"] = ids.meta["val"]
    made.inputs = (*made.inputs, InputSpec("attention_mask", torch.int64, made.inputs[0].shape))
    made.example = (*made.example, mask)


def test_all_experts_on_leaves_nothing_to_fit():
    made = split("plain", batches("plain"), top_k=3)
    assert stage.fit(made) == {}


def test_half_precision_is_fitted_in_float32_and_stored_rounded():
    data = batches("gated")
    made = split("gated", data)
    made.graph_module = copy.deepcopy(made.graph_module).bfloat16()  # a clone shares its weights with other tests
    (figures,) = stage.fit(made).values()
    assert figures.repaired_error < figures.error
    assert {value.dtype for value in parameters(made).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("recipe", "data", "message"),
    [
        (
            {**SPLIT, "router": "topk{init=regress}", "method": "split-random"},
            False,
            "is fitted on data, and there are",
        ),
        ({"router": "topk{init=regress}"}, True, "the experts of copy are whole"),
        ({**SPLIT, "router": "hash"}, True, "what the hash router chooses by token ids cannot be fitted to"),
    ],
)
def test_refusals_come_before_any_work(recipe, data, message):
    made = programs.plain(**recipe)
    if data:
        made.profile = collect(made, batches("plain"))
    with pytest.raises(Refused, match=message):
        stage.check(made)


def test_values_that_are_nan_are_refused():
    made = split("plain", batches("plain"))
    made.parameter("layers.0.experts.down").data[0, 0, 0] = math.nan
    with pytest.raises(Refused, match=r"NaN|infinite"):
        stage.fit(made)


@pytest.mark.parametrize(
    ("router", "fits"),
    [("dynamic-k{tau=0.3}", True), ("sigma{init-std=0,scale=2}", False), ("top-p{weight=one,p=0.9}", False)],
)
def test_routers_of_splits(router, fits):
    """What is fitted is: dynamic-k also where --top-k lets it take all experts."""
    data = batches("plain", 12)
    top_k = 3 if fits else 2
    made = split("plain", data, router=router, top_k=top_k)
    before = parameters(made)
    (figures,) = stage.fit(made).values()
    changed = [name for name, value in parameters(made).items() if not torch.equal(value, before[name])]
    assert any(".router." in name for name in changed) == fits
    assert 0 < figures.routing.agreement <= 1
    assert figures.kept
