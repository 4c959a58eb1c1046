"""A profile is what a direct computation over all rows at once gives, however the rows are cut into batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moeify import Recipe, frontend
from moeify.errors import BadInputSpec, BadOption, Refused
from moeify.fitting.collect import collect, digest
from moeify.fitting.reservoir import Reservoir
from moeify.ir.hidden import hidden
from moeify.ir.program import Program
from moeify.pipeline.default import FIND
from moeify.pipeline.runner import run
from tests import programs

IDS = torch.randint(40, (60, 5), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(12, programs.D, 4, 5, generator=torch.Generator().manual_seed(1))
KINDS: dict[str, Callable[[], Program]] = {
    "plain": lambda: programs.plain(2),
    "gated": programs.gated,
    "two calls": programs.shared_weights,
    "region": programs.custom,
    "norm in the region": lambda: programs.custom(pointwise=False),
    "channels first": programs.images,
}


def batches(rows: Tensor, size: int) -> list[tuple[Tensor, ...]]:
    return [(part,) for part in rows.split(size)]


def values(made: Program, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """What every node of a program computes."""
    found: dict[str, Any] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Keep(made.graph_module).run(*inputs)
    return found


def direct_rows(made: Program, anchor: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [N, D] and hidden values [N, F] of a block: those of all calls, one call after the other."""
    block, run = made.block(anchor), values(made, (rows,))
    x = torch.cat(
        [(run[c.input].movedim(1, -1) if rows.dim() == 4 else run[c.input]).flatten(0, -2) for c in block.calls]
    )
    name = "block" if rows.dim() == 4 else anchor

    def weight(role: str) -> Tensor:
        return made.parameter(f"{name}.{role}").detach()

    up = F.linear(x, weight("up.weight").flatten(1), weight("up.bias") if block.up_bias else None)
    if block.gated:
        return x, F.silu(F.linear(x, weight("gate.weight"))) * up
    if block.region is None:
        return x, F.gelu(up)
    if block.region_is_pointwise:
        return x, F.prelu(up, weight("act.weight"))
    return x, F.layer_norm(up, up.shape[-1:], weight("act.weight"), weight("act.bias"))


@pytest.mark.parametrize("kind", list(KINDS))
def test_statistics_are_those_of_all_rows_at_once(kind: str) -> None:
    made = KINDS[kind]()
    rows = PIXELS if kind == "channels first" else IDS
    profile = collect(made, batches(rows, 7), top=6)
    assert list(profile.blocks) == [block.anchor for block in made.blocks]
    for anchor, found in profile.blocks.items():
        x, h = direct_rows(made, anchor, rows)
        order = h.abs().argsort(dim=1, descending=True)
        firing = torch.zeros_like(h).scatter_(1, order[:, :6], 1.0)
        quarter = h.square().sort(dim=1, descending=True).values[:, : programs.F // 4].sum(1) / h.square().sum(1)
        assert found.tokens == len(h)
        for have, want in (
            (found.mean_F, h.mean(0)),
            (found.mean_abs_F, h.abs().mean(0)),
            (found.mean_square_F, h.square().mean(0)),
            (found.active_F, (h != 0).float().mean(0)),
            (found.firing_F, firing.mean(0)),
        ):
            torch.testing.assert_close(have, want)
        assert found.top_quarter == pytest.approx(float(quarter.mean()), rel=1e-5)
        assert found.importance_F is None
        assert len(found.inputs_ND) == len(x)  # fewer than are kept: all of them, in another order
        torch.testing.assert_close(found.inputs_ND.sort(0).values, x.sort(0).values)


def test_units_that_are_never_active_are_seen() -> None:
    made = programs.program([programs.Ffn(activation="relu")])
    made.recipe = Recipe()
    with torch.no_grad():
        made.parameter("layers.0.up.bias")[:3] = -100.0
    found = collect(made, batches(IDS, 20)).blocks["layers.0"]
    assert (found.active_F == 0).nonzero().flatten().tolist() == [0, 1, 2]
    assert found.firing_F[:3].sum() == 0
    # Of the 21 units that are left about half are active in a row. Where that is below 10, zeros do not fire.
    assert 5 < float(found.firing_F.sum()) < 10


def test_half_precision_is_profiled_in_float32() -> None:
    """Region and named activation: the same figures as those of the widened model."""
    model = nn.Sequential(Residual(nn.PReLU()), Residual(nn.GELU())).bfloat16()
    rows = torch.randn(40, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    half = found_in(model, "bfloat16[batch=2,seq=3,16]")
    wide = found_in(model.float(), "float32[batch=2,seq=3,16]")
    narrow = collect(half, batches(rows, 8))
    for anchor, found in collect(wide, batches(rows.float(), 8)).blocks.items():
        assert narrow.blocks[anchor].inputs_ND.dtype == torch.float32
        torch.testing.assert_close(narrow.blocks[anchor].mean_square_F, found.mean_square_F, rtol=1e-5, atol=1e-6)
    block = half.blocks[0]
    x = torch.randn(3, 16)
    assert block.region is not None
    assert hidden(block, half.parameter, x).dtype == torch.float32


class Residual(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, 32), activation, nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def found_in(model: nn.Module, *inputs: str) -> Program:
    made = frontend.capture(model.eval(), list(inputs))
    made.recipe = Recipe()
    return run(made, FIND)


# --- the sample of inputs -----------------------------------------------------------------------------------------


def test_which_rows_are_kept_does_not_depend_on_batches() -> None:
    rows = torch.arange(1000.0).unsqueeze(1)
    kept = []
    for size in (1, 7, 1000):
        reservoir = Reservoir(50, seed=3)
        for part in rows.split(size):
            reservoir.add(part, 0)
        kept.append(reservoir.sample())
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    assert len(kept[0].unique()) == 50


def test_a_sample_is_uniform_and_of_the_seed() -> None:
    """Mean of 2,000 of 20,000 uniform rows: its standard deviation is 0.29 / sqrt(2000) = 0.0065."""
    rows = torch.linspace(0, 1, 20_000).unsqueeze(1)
    samples = []
    for seed in (0, 0, 1):
        reservoir = Reservoir(2000, seed)
        for part in rows.split(999):
            reservoir.add(part, 0)
        samples.append(reservoir.sample())
        assert float(samples[-1].mean()) == pytest.approx(0.5, abs=4 * 0.0065)
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_the_sample_of_a_block_with_two_calls_does_not_depend_on_batches() -> None:
    made = programs.shared_weights()
    small, large = (collect(made, batches(IDS, size), samples=40) for size in (4, 60))
    first, second = (next(iter(one.blocks.values())).inputs_ND for one in (small, large))
    assert len(first) == 40
    # Rounding of a product of 8 terms may depend on how many rows there are.
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


# --- padding ------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Tokens with a mask, then a mean over those that are on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(40, 16), Residual(nn.GELU()), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.layer(self.embed(input_ids))
        on = attention_mask.unsqueeze(-1).to(x.dtype)
        return self.head((x * on).sum(1) / on.sum(1))


def test_rows_of_padding_do_not_count() -> None:
    model = Masked()
    made = found_in(model, "input_ids=int64[batch=2,seq=5]", "attention_mask=int64[batch=2,seq=5]")
    mask = torch.ones_like(IDS)
    mask[::3, 2:] = 0
    pairs = list(zip(IDS.split(8), mask.split(8)))
    found = next(iter(collect(made, pairs).blocks.values()))
    with torch.no_grad():
        h = model.layer.mlp[:2](model.embed(IDS))[mask != 0]
    assert found.tokens == len(h) == int(mask.sum())
    torch.testing.assert_close(found.mean_F, h.mean(0))
    assert len(found.inputs_ND) == len(h)


# --- gradients ----------------------------------------------------------------------------------------------------


def importance(run: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
    """mean |h dL/dh| by autograd; ``run`` gives the loss, its argument stands at the hidden value."""
    kept: list[Tensor] = []

    def tap(h: Tensor) -> Tensor:
        kept.append(h.detach().requires_grad_())
        return kept[-1]

    (grad,) = torch.autograd.grad(run(tap), kept)
    return (kept[0].detach() * grad).abs().flatten(0, -2).mean(0)


def sequential(*more: nn.Module) -> tuple[nn.Sequential, Program]:
    model = nn.Sequential(nn.Embedding(40, 16), Residual(nn.GELU()), *more)
    return model, found_in(model, "int64[batch=2,seq=5]")


def through(model: nn.Sequential, tap: Callable[[Tensor], Tensor]) -> Tensor:
    x = model[0](IDS)
    return model[2:](x + model[1].mlp[2](tap(model[1].mlp[:2](x))))


def test_importance_of_next_tokens() -> None:
    model, made = sequential(nn.Linear(16, 40))

    def loss(tap: Callable[[Tensor], Tensor]) -> Tensor:
        logits = through(model, tap)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")

    profile = collect(made, batches(IDS, 8), gradients=True)
    assert profile.facts["loss"] == "cross entropy of next tokens"
    torch.testing.assert_close(profile.blocks["1.mlp"].importance_F, importance(loss))
    assert all(parameter.grad is None for parameter in made.graph_module.parameters())


def test_importance_of_any_output() -> None:
    model, made = sequential()
    profile = collect(made, batches(IDS, 8), gradients=True)
    assert profile.facts["loss"] == "half the squared output"
    want = importance(lambda tap: through(model, tap).square().sum() / 2)
    torch.testing.assert_close(profile.blocks["1.mlp"].importance_F, want)


def test_importance_of_classes() -> None:
    model = Masked()
    made = found_in(model, "input_ids=int64[batch=2,seq=5]", "attention_mask=int64[batch=2,seq=5]")

    def loss(tap: Callable[[Tensor], Tensor]) -> Tensor:
        x = model.embed(IDS)
        logits = model.head((x + model.layer.mlp[2](tap(model.layer.mlp[:2](x)))).mean(1))
        return F.cross_entropy(logits, logits.argmax(-1), reduction="sum")

    profile = collect(made, [(ids, torch.ones_like(ids)) for ids in IDS.split(7)], gradients=True)
    assert profile.facts["loss"] == "cross entropy of the model's own class"
    torch.testing.assert_close(profile.blocks["layer.mlp"].importance_F, importance(loss))


# --- what is refused ----------------------------------------------------------------------------------------------


def test_too_few_rows_are_refused_with_how_many_are_needed() -> None:
    made = programs.plain()
    with pytest.raises(BadInputSpec, match="45 rows are too few") as error:
        collect(made, batches(IDS[:9], 3), top=5)
    assert error.value.where == "layers.0"
    assert "at least 48 rows" in str(error.value.hint)  # ten firings of a unit that fires in 5 of 24 rows
    assert collect(made, batches(IDS[:10], 3), top=5).blocks["layers.0"].tokens == 50


def test_it_stops_when_it_has_seen_enough() -> None:
    profile = collect(programs.plain(), batches(IDS, 4), tokens=50)
    assert profile.blocks["layers.0"].tokens == 60
    assert len(profile.batches) == 3
    assert profile.facts["tokens"] == "60"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"top": 25}, "top is 25"),
        ({"top": 0}, "top is 0"),
        ({"samples": 0}, "the number of samples is 0"),
        ({"tokens": 10}, "10 tokens are too few for 24 hidden units"),
    ],
)
def test_numbers_that_make_no_sense(options: dict[str, int], text: str) -> None:
    with pytest.raises(BadOption, match=text):
        collect(programs.plain(), batches(IDS, 4), **options)


def test_data_that_the_model_does_not_run_on() -> None:
    with pytest.raises(BadInputSpec, match="does not run on the data"):
        collect(programs.plain(), [(IDS + 40,)])


def test_hidden_values_that_overflow() -> None:
    made = programs.plain().clone()
    made.set_parameter("layers.0.up.weight", torch.full((programs.F, programs.D), 3e38))
    with pytest.raises(Refused, match="NaN or infinite"):
        collect(made, batches(IDS, 20))


def test_the_digest_is_of_the_values() -> None:
    made = programs.plain().clone()
    before = digest(made)
    assert before == digest(made)
    made.set_parameter("head.bias", made.parameter("head.bias").detach() + 1e-3)
    assert digest(made) != before
