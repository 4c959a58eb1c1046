"""``moeify.quality`` and ``moeify quality``: every figure against a direct computation in numpy."""

from __future__ import annotations

import copy
import gc
import json
import sys
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
from moeify.cli.main import main
from moeify.errors import OutputNotWritten

VOCABULARY, WIDTH, BATCH = 20, 8, 4
INPUTS = ["input_ids=int64[batch=2,seq=6]{below=20}", "attention_mask=int64[batch=2,seq=6]{below=2}"]
SPLIT = {"method": "split-random", "experts": 3, "shared": 1, "top_k": 1}
MOE = ["--method", "split-random", "--experts", "3", "--shared", "1", "--top-k", "1"]
FLAGS = [word for spec in INPUTS for word in ("--input", spec)]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Model(nn.Module):
    """A language model whose positions do not see each other, so it is causal; and a head for three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.head, self.pooled = nn.Linear(WIDTH, VOCABULARY), nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.layers(self.embed(input_ids))
        mask = attention_mask[..., None].to(x.dtype)
        return {"logits": self.head(x), "states": x, "pooled": self.pooled((x * mask).sum(1) / mask.sum(1))}


class Unmasked(Model):
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return super().forward(input_ids, torch.ones_like(input_ids))


def drawn(rows: int = 10) -> dict[str, Tensor]:
    """Texts of 3 to 6 tokens in a batch of width 6, padding on the right."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (rows, 6), generator=draw)
    lengths = torch.randint(3, 7, (rows, 1), generator=draw)
    return {"input_ids": ids, "attention_mask": (torch.arange(6) < lengths).long()}


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = Model().eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(2)  # so that an expert left out shows
    return dense, moeify.convert(copy.deepcopy(dense), inputs=INPUTS, **SPLIT)


@pytest.fixture(scope="module")
def report(models: tuple[nn.Module, nn.Module]) -> QualityReport:
    return moeify.quality(*models, drawn(), inputs=INPUTS, batch=BATCH, classes=True)


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


class Classifier(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.layer, self.head = name, Layer(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {self.name: self.head(self.layer(x).mean(1)), "most": x.amax((1, 2))}


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


def test_a_module_and_its_files_give_the_same(models, report: QualityReport, files: Path) -> None:
    paths = (files / "dense.pt", files / "moe.pt2", files / "data.pt")
    found = moeify.quality(*paths, inputs=INPUTS, batch=BATCH, classes=True, allow=[__name__])
    for one, other in zip([*found.blocks, *found.outputs], [*report.blocks, *report.outputs], strict=True):
        for name, value in vars(one).items():
            expected = getattr(other, name)
            if isinstance(value, (float, list)):
                expected = pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert value == expected, name


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


def test_the_dense_model_is_gone_when_the_other_is_read(files: Path, monkeypatch) -> None:
    module = sys.modules["moeify.api.quality"]  # as an attribute of the package it is the function
    captured, read_graph, seen = module.captured, module.read_graph, []

    def capturing(*args):
        program, notes = captured(*args)
        seen.append(weakref.ref(program.graph_module.get_parameter("embed.weight")))
        return program, notes

    def reading(path):
        assert seen[0]() is None
        return read_graph(path)

    monkeypatch.setattr(module, "captured", capturing)
    monkeypatch.setattr(module, "read_graph", reading)
    moeify.quality(files / "dense.pt", files / "moe.pt2", files / "data.pt", inputs=INPUTS, allow=[__name__])
    assert seen


def test_it_stops_after_as_many_tokens_and_leaves_no_file(models, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = moeify.quality(*models, drawn(), inputs=INPUTS, tokens=13, batch=2)
    assert found.batches == 2  # 12 rows each
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OutputNotWritten, match="no such file"):
        Records(tmp_path / "none").add(0, Record([], [], {}))


@pytest.fixture(scope="module")
def files(models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quality")
    torch.save(models[0], path / "dense.pt")
    torch.save(Classifier("logits"), path / "other.pt")
    torch.save(drawn(), path / "data.pt")
    torch.save({**drawn(), "attention_mask": drawn()["attention_mask"] * 0}, path / "padding.pt")
    torch.save({"input_ids": drawn()["input_ids"]}, path / "half.pt")
    (path / "book.txt").write_text("\x01\x02\x03\x04\x05\x06\x07\x08\t\n" * 40)
    allow = ["--allow", __name__]
    assert main(["convert", f"{path}/dense.pt", *MOE, *FLAGS, *allow, "-o", f"{path}/moe.pt2"]) == 0
    gc.collect()
    return path


def words(files: Path, data: str = "data.pt") -> list[str]:
    return [
        "quality",
        f"{files}/dense.pt",
        f"{files}/moe.pt2",
        "--data",
        f"{files}/{data}",
        *FLAGS,
        "--allow",
        __name__,
    ]


def test_what_it_prints(files: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main([*words(files), "--classes"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{files}/moe.pt2 against {files}/dense.pt, in ")
    assert "  block         rows  rms error  cosine  experts  entropy  cv " in out
    assert "  layers.0.mlp  " in out
    assert "  output  of           predictions  agreement  KL, nats  cosine  rms error  largest error\n" in out
    assert "  logits  next tokens  " in out
    assert "  states  embeddings                " in out
    assert "\nperplexity   " in out
    assert f"\ndata         {files}/data.pt, 10 examples; 2 batches were run\n" in out


def test_json(files: Path, report: QualityReport, capsys) -> None:
    assert main([*words(files), "--classes", "--json", "--batch", "4"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["blocks"][0]["rms_error"] == pytest.approx(report.blocks[0].rms_error, rel=1e-4)
    assert said["outputs"][0]["perplexity_ratio"] == pytest.approx(report.outputs[0].perplexity_ratio, rel=1e-4)
    assert (said["missed"], said["batches"]) == ([], 3)


@pytest.mark.parametrize(
    ("demand", "code"),
    [
        (["--at-least-agreement", "0.01"], 0),
        (["--at-least-agreement", "1"], 1),
        (["--at-most-perplexity-ratio", "100"], 0),
        (["--at-most-perplexity-ratio", "0.1"], 1),
    ],
)
def test_demands(files: Path, capsys, demand: list[str], code: int) -> None:
    assert main([*words(files), "--json", *demand]) == code
    assert len(json.loads(capsys.readouterr().out)["missed"]) == code


def test_data_that_the_conversion_learnt_from_are_named(files: Path, tmp_path: Path, capsys) -> None:
    text = ["--data", f"{files}/book.txt", "--tokenizer", "bytes", "--sequence", "6"]
    split = ["--method", "split-coactivation", "--experts", "4", "--top-k", "4"]
    model = [f"{files}/dense.pt", "--allow", __name__]
    assert main(["convert", *model, *split, *FLAGS, *text, "-o", f"{tmp_path}/o.pt2"]) == 0
    assert main(["quality", *model, f"{tmp_path}/o.pt2", *FLAGS, *text]) == 0
    assert f"learnt from {files}/book.txt itself" in capsys.readouterr().out.replace("\n             ", " ")
    assert main(["quality", *model, f"{tmp_path}/o.pt2", *FLAGS, "--data", f"{files}/data.pt"]) == 0
    assert "learnt" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "code", "text"),
    [
        (["{f}/dense.pt", "{f}/moe.pt2"], 2, "--data"),
        (["{f}/dense.pt", "{f}/moe.pt2", "--data", "none.pt"], 3, "there is no file"),
        (["{f}/dense.pt", "{f}/dense.pt", "--data", "{f}/data.pt"], 3, "is not a torch.export archive"),
        (["{f}/moe.pt2", "{f}/moe.pt2", "--data", "{f}/data.pt"], 3, "already converted"),
        (["{f}/dense.pt", "{f}/moe.pt2", "--data", "{f}/half.pt"], 2, "no tensor named 'attention_mask'"),
        (["{f}/dense.pt", "{f}/moe.pt2", "--data", "{f}/padding.pt"], 2, "is padding"),
    ],
)
def test_errors(files: Path, capsys, given: list[str], code: int, text: str) -> None:
    command = ["quality", *(word.format(f=files) for word in given), *FLAGS, "--allow", __name__]
    assert main(command) == code
    assert text in capsys.readouterr().err


def test_models_that_do_not_belong_together(files: Path, models) -> None:
    inputs, batch = ["float32[batch=2,seq=3,8]"], [torch.randn(2, 3, 8)]
    other = Classifier("logits")
    with pytest.raises(moeify.MoeifyError, match="has no mixture of experts"):
        moeify.quality(other, copy.deepcopy(other), batch, inputs=inputs)
    wrong = moeify.convert(nn.Sequential(Layer()), inputs=inputs, experts=2, top_k=1)
    with pytest.raises(moeify.MoeifyError, match="no feed-forward block where"):
        moeify.quality(other, wrong, batch, inputs=inputs)
    unmasked = Unmasked()
    with pytest.raises(moeify.MoeifyError, match=r"given to Model holds 1 tensors and the model reads 2"):
        moeify.quality(unmasked, models[1], [torch.zeros(2, 6, dtype=torch.int64)])


def test_demands_on_a_model_that_predicts_nothing(files: Path, capsys) -> None:
    other = ["quality", f"{files}/other.pt", f"{files}/moe.pt2", "--data", f"{files}/data.pt", "--allow", __name__]
    other += ["--input", "float32[batch=2,seq=3,8]"]
    assert main([*other, "--at-most-perplexity-ratio", "1"]) == 2
    assert "it has no perplexity" in capsys.readouterr().err
