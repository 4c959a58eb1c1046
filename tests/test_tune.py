"""``moeify.tune`` and ``moeify tune`` on small models, on random tokens and on the bytes of a text."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify import frontend
from moeify.api import tune_budget, tune_report, tune_run
from moeify.api.quality_runs import dense_run
from moeify.api.tune_goal import Goal
from moeify.api.tune_report import kept, loss_at, quality_at
from moeify.api.tune_run import Tuned
from moeify.api.tune_time import Clock, Timed, around
from moeify.cli import tune_summary
from moeify.cli.main import main
from moeify.cli.output import Screen
from moeify.errors import BadInputSpec, BadOption, MoeifyError, Refused, UsageError
from moeify.ir.program import Program
from moeify.ir.recipe import Recipe
from moeify.pipeline.default import FIND
from moeify.pipeline.runner import run
from tests import small_llama

VOCABULARY, WIDTH, HIDDEN = 20, 8, 32
INPUTS = ["input_ids=int64[batch=2,seq=6]{below=20}"]
SCALES = (8.0, 1.0, 4.0)  # of the blocks' outputs
WORDS = "it is a truth universally acknowledged that a single man in possession of a good fortune must want a wife. "


class Layer(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
        with torch.no_grad():
            self.mlp[2].weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Model(nn.Module):
    """A causal language model of means over the tokens so far; without ``head``, embeddings."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(*(Layer(scale) for scale in SCALES))
        self.head = nn.Linear(WIDTH, VOCABULARY) if head else None

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        count = torch.ones_like(input_ids).cumsum(1)[..., None].sqrt()
        x = self.layers(self.embed(input_ids).cumsum(1) / count)
        return {"states": x} if self.head is None else {"logits": self.head(x)}


def drawn(rows: int, seed: int) -> dict[str, Tensor]:
    """Tokens that the model itself says, or its perplexity would not know what it lost."""
    model, generator = dense(), torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, 1), generator=generator)
    with torch.no_grad():
        for _ in range(5):
            scores = model(ids)["logits"][:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(scores, 1, generator=generator)], 1)
    return {"input_ids": ids}


def dense(head: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return Model(head).eval()


def tune(model: nn.Module, data: object, **wanted) -> Tuned:
    return moeify.tune(model, data, **{"inputs": INPUTS, "time": False, "seed": 1, **wanted})


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    return tune(dense(), drawn(160, 1), keep=0.98, test=drawn(60, 2), tries=3)


def test_target_is_met_by_a_measured_figure(tuned: Tuned) -> None:
    report = tuned.report
    assert report.measure == "perplexity kept"
    assert report.quality >= 0.98
    assert report.flops < 0.95
    chosen = [point for point in report.frontier if point.chosen]
    assert [(point.quality, point.flops) for point in chosen] == [(report.quality, report.flops)]
    missed = [point for point in report.frontier if point.quality is not None and point.quality < 0.98]
    assert all(point.flops < report.flops for point in missed)
    module = moeify.convert(dense(), tuned.recipe, profile=tuned.profile, inputs=INPUTS)
    again = moeify.quality(dense(), module, drawn(60, 2), inputs=INPUTS, seed=1)
    assert 1 / again.outputs[0].perplexity_ratio == pytest.approx(report.quality, rel=1e-5)  # rounding of batches


def test_the_block_that_matters_least_keeps_the_least(tuned: Tuned) -> None:
    blocks = tuned.report.blocks
    assert [block.path for block in blocks] == [f"layers.{number}.mlp" for number in range(3)]
    assert min(blocks, key=lambda block: block.half_loss) is blocks[1]
    assert min(blocks, key=lambda block: block.share) is blocks[1]


def test_the_recipe_makes_the_same_weights(tuned: Tuned) -> None:
    """From the data alone: the rows that were chosen by and tested on stay out."""
    graph = moeify.convert(dense(), tuned.recipe, data=drawn(160, 1), inputs=INPUTS, form="graph")
    state = graph.state_dict()
    found = tuned.graph.state_dict()
    assert state.keys() == found.keys()
    for name, value in found.items():
        assert torch.equal(value, state[name]), name
    assert tuned.report.rows["fit"] + tuned.report.rows["choose"] == 960


def test_a_profile_is_used_again(tuned: Tuned) -> None:
    model = dense()
    data = drawn(160, 1)
    profile = moeify.profile(model, data, inputs=INPUTS, tokens=600, seed=1)
    again = tune(model, data, keep=0.9, tries=1, profile=profile)
    assert again.profile is profile
    # 13 batches of 8 x 6, and of the other 7 those without an example that the profile has seen: there are equal ones.
    assert again.report.rows["fit"] == 624
    assert 96 <= again.report.rows["choose"] + again.report.rows["test"] <= 336
    with pytest.raises(BadInputSpec, match="without what the profile has seen: 0 tokens in 0 batches"):
        tune(model, data, keep=0.9, profile=moeify.profile(model, data, inputs=INPUTS))


def test_embeddings_and_what_cannot_be_kept() -> None:
    with pytest.raises(Refused) as error:
        tune(dense(head=False), drawn(60, 1), keep=1.0, tries=2)
    assert "no split that was tried keeps 1 (cosine)" in error.value.what
    assert error.value.what.count("of the FLOPs: cosine 0.9") == 1  # the least step of all was not enough


def test_speed_is_expected_without_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="no split of a block is expected to be faster than the dense one at 64 tokens"):
        tune(dense(), drawn(60, 1), speedup=1.1, time_tokens=64)
    monkeypatch.setattr(tune_budget, "seconds", lambda block, choice, *_: choice.active / choice.parts)
    monkeypatch.setattr(tune_budget.Around, "seconds", 0.5, raising=False)
    found = tune(dense(), drawn(60, 1), speedup=1.25, points=2).report
    assert found.speedup >= 1.25
    assert not found.speedup_measured
    assert found.lowerings == []
    done = [point for point in found.frontier if point.quality is not None]
    assert len(done) == 3
    assert done[-1] is found.frontier[-1]
    slower = [point for point in found.frontier if point.expected_time > 1 / 1.25]
    assert all(point.flops > found.flops for point in slower)


class Slow:
    """A clock by which 0.6 of the time is saved that the test below makes tune expect."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def time(self, program: Program) -> Timed:
        told = [program.recipe.for_block(block.path) for block in program.converted()]
        saved = sum(1 - (one.top_k + one.shared) / (one.experts + one.shared) for one in told)
        return Timed(1 - 0.6 * saved / (len(SCALES) + 0.5), ("split",))


def test_the_time_that_is_saved_is_corrected_by_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_budget, "seconds", lambda block, choice, *_: choice.active / choice.parts)
    monkeypatch.setattr(tune_budget.Around, "seconds", 0.5, raising=False)
    monkeypatch.setattr(tune_run, "can_measure", lambda: True)
    monkeypatch.setattr(tune_run, "Clock", Slow)
    found = tune(dense(), drawn(60, 1), speedup=1.25, time=True, tries=3).report
    done = [point for point in found.frontier if point.measured_time is not None]
    assert len(done) == 2  # one to learn from, and the one that is right
    for point in done:
        assert point.expected_time == pytest.approx(point.measured_time)
    fast = [point for point in found.frontier if point.expected_time <= 1 / 1.25]
    assert fast[0].chosen
    assert found.speedup == 1 / fast[0].measured_time
    assert found.frontier[0].expected_time == 1


def test_an_amount_of_work_takes_one_conversion() -> None:
    found = tune(dense(), drawn(160, 1), flops=0.6, test=drawn(60, 2)).report
    assert (found.goal, found.target) == ("flops", 0.6)
    assert [point.flops for point in found.frontier if point.quality is not None] == [found.flops]
    assert found.flops == max(point.flops for point in found.frontier if point.flops <= 0.6)
    with pytest.raises(Refused, match=r"the least that splits into 4 parts leave is \d\d.\d% of the FLOPs"):
        tune(dense(), drawn(160, 1), flops=0.05, parts=4)


@pytest.mark.parametrize("built", [False, True])
def test_clock_times_what_an_export_would_write(tuned: Tuned, built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of GELU blocks never com.microsoft.MoE, which computes it by tanh: that is beyond an export's tolerance."""
    pytest.importorskip("onnxruntime")
    from moeify.backends.onnxruntime import kernel_library

    # Where the library is not, the file's own standard operators run in the place of its kernel.
    monkeypatch.setattr(kernel_library, "is_built", lambda: built)
    program = frontend.capture(dense(), INPUTS)
    with Clock(program, program.example, 128, 1) as clock:
        timed = clock.time(tuned.program)
    assert timed.lowerings == (("kernel",) if built else ("split",))
    assert 0.1 < timed.ratio < 100  # a fraction of 0.1 ms each: that it is timed is all it says
    run(program, FIND)
    with dense_run(program) as one:
        weighed = around(program, one(program.example), program.converted(), 1).lowerings
    assert set(weighed.values()) == {("split", "kernel") if built else ("split",)}


@pytest.mark.parametrize("measure", ["perplexity kept", "agreement", "cosine", "square kept"])
def test_loss_and_quality_are_inverse(measure: str) -> None:
    assert quality_at(measure, loss_at(measure, 0.97)) == pytest.approx(0.97)
    assert loss_at(measure, 1.0) == 0


def test_figures_by_kind(tuned: Tuned) -> None:
    (one,) = tuned.report.outputs
    assert kept(one) == one.dense_perplexity / one.perplexity
    values = copy.copy(one)
    object.__setattr__(values, "kind", "values")
    assert kept(values) == 1 - one.rms_error**2
    assert tune_report.measure_of("classes") == "agreement"


@pytest.mark.parametrize(
    ("goal", "error", "text"),
    [
        (Goal(), UsageError, "say what to tune for"),
        (Goal(keep=0.9, speedup=2), UsageError, "give one of keep, speedup"),
        (Goal(flops=1.0), BadOption, "flops is 1: it must be above 0 and below 1"),
        (Goal(keep=0.0), BadOption, "keep is 0: it must be above 0 and at most 1"),
        (Goal(keep=1.5), BadOption, "keep is 1.5"),
        (Goal(speedup=0.9), BadOption, "speedup is 0.9: it must be above 1"),
        (Goal(keep=0.9, tries=0), BadOption, "tries is 0"),
        (Goal(keep=0.9, parts=2), BadOption, "parts is 2"),
    ],
)
def test_goals_that_make_no_sense(goal: Goal, error: type[MoeifyError], text: str) -> None:
    with pytest.raises(error, match=text):
        goal.check()


def test_too_little_data() -> None:
    with pytest.raises(BadInputSpec, match="the data, 9 examples: 54 tokens in 2 batches leave none to"):
        tune(dense(), drawn(9, 1), keep=0.9)


def test_what_is_shown(tuned: Tuned, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    tune_summary.show(Screen(), tuned.report)
    out = capsys.readouterr().out
    assert "feed-forward blocks split, for keep 0.98" in out
    assert f"perplexity kept {tuned.report.quality:.4f}, measured on the data, 60 examples" in out
    assert out.count("chosen\n") == 1
    shown = tuned.report.shown(4)
    assert shown[0] is tuned.report.frontier[0]
    assert shown[-1] is tuned.report.frontier[-1]
    assert [point for point in shown if point.chosen]
    assert len(shown) < len(tuned.report.frontier)


def test_from_the_command_line(tmp_path: Path, capsys) -> None:
    small_llama.saved(tmp_path / "dense", max_position_embeddings=32, bos_token_id=None, eos_token_id=None)
    (tmp_path / "book.txt").write_text(WORDS * 20)
    common = [str(tmp_path / "dense"), "--data", str(tmp_path / "book.txt"), "--tokenizer", "bytes", "--sequence", "16"]
    files = {name: tmp_path / name for name in ("out.pt2", "r.toml", "plot.png")}
    words = ["-o", str(files["out.pt2"]), "--recipe-out", str(files["r.toml"]), "--plot", str(files["plot.png"])]
    assert main(["tune", *common, "--keep", "0.9", *words, "--no-time", "--tries", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quality"] >= 0.9
    assert found["output"] == str(files["out.pt2"])
    assert found["speedup_measured"] is False
    assert found["stages"].keys() >= {"capture", "profile", "estimate", "convert", "measure"}
    assert files["plot.png"].stat().st_size > 1000
    assert Recipe.from_toml(files["r.toml"]).to_dict() == found["recipe"]
    assert moeify.load(files["out.pt2"]).moeify_report.recipe == found["recipe"]


def test_the_command_line_asks_for_a_target(tmp_path: Path, capsys) -> None:
    (tmp_path / "book.txt").write_text(WORDS)
    assert main(["tune", str(tmp_path), "--data", str(tmp_path / "book.txt")]) == 2
    assert "say what to tune for: a quality, a speed or an amount of work" in capsys.readouterr().err
