"""``moeify.quality``: every figure against a direct computation in numpy."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.api import QualityReport
from moeify.api.quality_runs import Record, Records
from moeify.errors import OutputNotWritten
from tests import quality_models
from tests.quality_models import INPUTS, WIDTH, Classifier, Layer, drawn

models = pytest.fixture(scope="module")(quality_models.models)
report = pytest.fixture(scope="module")(quality_models.report)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def outputs(model: nn.Module, data: dict[str, Tensor]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: value.double().numpy() for name, value in model(**data).items()}


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_blocks_see_the_dense_models_inputs(models, report: QualityReport) -> None:
    """Of the second block too, which the converted model would give others."""
    dense, moe = models
    data = drawn()
    on = data["attention_mask"].bool()
    with torch.no_grad():
        x = dense.embed(data["input_ids"])
        for number, found in enumerate(report.blocks):
            y = dense.layers[number].mlp(x)
            a, b = (value[on].double().numpy() for value in (moe.layers[number].mlp(x), y))
            assert (found.anchor, found.rows) == (f"layers.{number}.mlp", int(on.sum()))
            assert found.rms_error == pytest.approx(np.sqrt(((a - b) ** 2).sum() / (b**2).sum()), rel=1e-5)
            assert found.cosine == pytest.approx(cosines(a, b).mean(), rel=1e-5)
            assert found.rms_error > 0.05
            x = x + y


def test_loads_are_those_of_the_converted_model_as_it_runs(models, report: QualityReport) -> None:
    _, moe = models
    data = drawn()
    with torch.no_grad():
        x = moe.embed(data["input_ids"])
        for layer, found in zip(moe.layers, report.blocks, strict=True):
            experts_NK, _ = layer.mlp.router(x[data["attention_mask"].bool()], None)
            slots = np.bincount(experts_NK.flatten().numpy(), minlength=3)
            share = slots / slots.sum()
            assert found.load == pytest.approx(share.tolist())
            taken = share[share > 0]
            assert found.load_entropy == pytest.approx(-(taken * np.log(taken)).sum() / np.log(3))
            assert found.load_cv == pytest.approx(slots.std() / slots.mean())
            assert found.load_peak == pytest.approx(slots.max() / slots.mean())
            x = layer(x)


def test_predictions_of_next_tokens(models, report: QualityReport) -> None:
    """Those after a token of padding, and of one, do not count."""
    data = drawn()
    (dense, moe) = (log_softmax(outputs(model, data)["logits"][:, :-1]) for model in models)
    mask, targets = data["attention_mask"].numpy(), data["input_ids"].numpy()[:, 1:, None]
    on = (mask[:, 1:] * mask[:, :-1]).astype(bool)
    found = report.outputs[0]
    assert (found.name, found.kind, found.predictions) == ("logits", "next tokens", on.sum())
    assert found.divergence == pytest.approx((np.exp(dense) * (dense - moe)).sum(-1)[on].mean(), rel=1e-5)
    assert found.agreement == pytest.approx((dense.argmax(-1) == moe.argmax(-1))[on].mean())
    assert 0 < found.agreement < 1
    perplexities = [np.exp(-np.take_along_axis(side, targets, -1)[..., 0][on].mean()) for side in (dense, moe)]
    assert [found.dense_perplexity, found.perplexity] == pytest.approx(perplexities, rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(perplexities[1] / perplexities[0], rel=1e-5)


def test_embeddings_and_errors_of_whole_outputs(models, report: QualityReport) -> None:
    data = drawn()
    on = data["attention_mask"].bool().numpy()
    dense, moe = (outputs(model, data) for model in models)
    a, b = moe["states"][on], dense["states"][on]
    found = report.outputs[1]
    assert (found.name, found.kind, found.rows, found.agreement) == ("states", "embeddings", on.sum(), None)
    assert found.cosine == pytest.approx(cosines(a, b).mean(), rel=1e-5)
    assert found.rms_error == pytest.approx(np.sqrt(((a - b) ** 2).sum() / (b**2).sum()), rel=1e-5)
    assert found.max_relative_error == pytest.approx(np.abs(a - b).max() / np.abs(b).max(), rel=1e-5)


def test_classes_where_the_user_says_so(models, report: QualityReport) -> None:
    dense, moe = (log_softmax(outputs(model, drawn())["pooled"]) for model in models)
    found = report.outputs[2]
    assert (found.kind, found.predictions, found.perplexity, found.cosine) == ("classes", 10, None, None)
    assert found.agreement == pytest.approx((dense.argmax(-1) == moe.argmax(-1)).mean())
    assert found.divergence == pytest.approx((np.exp(dense) * (dense - moe)).sum(-1).mean(), rel=1e-5)


def test_without_that_two_dimensions_are_an_embedding(models) -> None:
    found = moeify.quality(*models, drawn(4), inputs=INPUTS).outputs[2]
    assert (found.name, found.kind, found.agreement) == ("pooled", "embeddings", None)


@pytest.mark.parametrize(("name", "kind"), [("logits", "classes"), ("scores", "embeddings")])
def test_an_output_named_logits_is_scores(name: str, kind: str) -> None:
    dense = Classifier(name)
    inputs = ["float32[batch=2,seq=3,8]"]
    moe = moeify.convert(copy.deepcopy(dense), inputs=inputs, experts=2, top_k=1)
    found = moeify.quality(dense, moe, [torch.randn(2, 3, 8)], inputs=inputs).outputs
    assert [(one.name, one.kind) for one in found] == [(name, kind), ("most", "values")]
    assert found[1].max_relative_error == 0
    if kind == "classes":
        assert found[0].agreement == 1  # the copy method keeps the function
        assert found[0].divergence == pytest.approx(0, abs=1e-9)


class Images(nn.Module):
    """A feed-forward block of convolutions whose activation has no name, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(WIDTH, 16, 1), nn.PReLU(), nn.Conv2d(16, WIDTH, 1))
        self.layer = Layer()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        return self.layer(self.layer(x.flatten(2).transpose(1, 2)))


def test_channels_first_and_a_block_that_is_called_twice() -> None:
    """The copy method keeps the function, so rows in another order would show; drop does not."""
    dense, inputs, data = Images(), ["float32[batch=2,8,3,4]"], [torch.randn(2, WIDTH, 3, 4)]
    same = moeify.convert(copy.deepcopy(dense), inputs=inputs, experts=2, top_k=1, form="graph")
    found = moeify.quality(dense, same, data, inputs=inputs)
    assert sorted((one.path, one.rows) for one in found.blocks) == [("layer.mlp", 48), ("mlp", 24)]
    # Two orders above the rounding of float32.
    assert max(one.rms_error for one in [*found.blocks, *found.outputs]) < 1e-5
    assert min(one.cosine for one in found.blocks) == pytest.approx(1)
    other = moeify.convert(copy.deepcopy(dense), inputs=inputs, experts=2, top_k=1, method="drop", form="graph")
    assert min(one.rms_error for one in moeify.quality(dense, other, data, inputs=inputs).blocks) > 1e-3


def test_one_batch_and_one_model_in_memory(models, monkeypatch) -> None:
    """What was given and what was kept for the batches before is gone when the next one comes."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    whole = drawn(12)

    def watched(tensor: Tensor) -> Tensor:
        nonlocal most
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, 12, 2):
            yield watched(whole["input_ids"][start : start + 2].clone()), whole["attention_mask"][start : start + 2]

    read = Records.read

    def reading(self: Records, number: int) -> Record:
        record = read(self, number)
        watched(record.outputs[0])
        return record

    monkeypatch.setattr(Records, "read", reading)
    found = moeify.quality(*models, batches(), inputs=INPUTS)
    assert found.batches == 6
    assert most == 2  # the one that is run, and the next one as it is made


def test_it_stops_after_as_many_tokens_and_leaves_no_file(models, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = moeify.quality(*models, drawn(), inputs=INPUTS, tokens=13, batch=2)
    assert found.batches == 2  # 12 rows each
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OutputNotWritten, match="no such file"):
        Records(tmp_path / "none").add(0, Record([], [], {}))
