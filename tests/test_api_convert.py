"""The whole way from a file to a verified artefact, and every way it ends early."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import moeify
from moeify import Recipe
from moeify.api import convert_file, inspect_file, verify_files
from moeify.api.verify import compare
from moeify.errors import (
    BadInputSpec,
    BadRecipe,
    NoBlocks,
    NotDivisible,
    OutputNotWritten,
    UnknownName,
    UnreadableFile,
    UsageError,
    VerificationFailed,
)

SPEC = ["float32[batch=2,seq=4,16]"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
    path = tmp_path_factory.mktemp("models") / "dense.pt"
    torch.save(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), path)
    return path


@pytest.fixture(scope="module")
def converted(dense: Path) -> Path:
    output = dense.with_name("moe.pt2")
    convert_file(dense, output, Recipe(experts=4, top_k=2), inputs=SPEC)
    return output


def test_report_of_an_exact_conversion(dense: Path, tmp_path: Path) -> None:
    report = convert_file(dense, tmp_path / "o.pt2", Recipe(experts=4, top_k=2), inputs=SPEC)
    assert report.verified
    assert report.max_relative_error < 1e-5
    assert [(b.path, b.converted, b.activation, b.d_ff, b.d_expert) for b in report.blocks] == [
        ("layers.0", True, "relu", 32, 32),
        ("layers.1", True, "relu", 32, 32),
    ]
    block = report.blocks[0]
    assert block.parameters_before == 2 * 16 * 32 + 16 + 32
    assert block.parameters_after == 4 * block.parameters_before + 4 * 16
    assert block.flops_per_token_before == 2 * 2 * 16 * 32
    assert block.flops_per_token_after == 2 * block.flops_per_token_before + 2 * 4 * 16
    assert report.parameters_after - report.parameters_before == 2 * (3 * block.parameters_before + 4 * 16)
    with zipfile.ZipFile(tmp_path / "o.pt2") as archive:
        name = next(n for n in archive.namelist() if n.endswith("moeify.json"))
        data = json.loads(archive.read(name))
    assert data["report"]["verified"] is True
    assert data["recipe"]["experts"] == 4
    assert str(tmp_path) not in json.dumps(data["report"]["blocks"])


def test_loaded_graph_equals_the_dense_model_at_other_sizes(dense: Path, converted: Path) -> None:
    model = torch.load(dense, weights_only=False).eval()
    loaded = moeify.load(converted)
    for shape in ((2, 4, 16), (3, 7, 16), (1, 1, 16)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), model(x))


def test_shared_experts_of_one_block_are_reported_and_exact(dense: Path) -> None:
    recipe = Recipe(experts=4, overrides=(("layers.1", {"shared": 2, "shared_gate": True}),))
    report = convert_file(dense, None, recipe, inputs=SPEC)
    assert [block.shared for block in report.blocks] == [0, 2]
    assert report.max_relative_error < 1e-5
    first, second = (block.parameters_after for block in report.blocks)
    assert second - first == 2 * (2 * 16 * 32 + 32) + 16 + 16  # two wide copies, one down bias, one gate row


def test_loaded_graph_trains(converted: Path) -> None:
    model = moeify.load(converted)
    names = set(model.state_dict())
    x, y = torch.randn(8, 6, 16), torch.randn(8, 6, 16)
    assert not model.training
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))  # dropout is on
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.eval()
    losses = []
    for _ in range(5):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert set(model.state_dict()) == names
    assert {n.rpartition(".")[2] for n in names if ".experts." in n} == {"up", "down", "up_bias", "down_bias"}


def test_verify_compares_any_two(dense: Path, converted: Path, tmp_path: Path) -> None:
    same = verify_files(dense, converted, inputs=SPEC)
    assert same.agree
    assert same.max_relative_error < 1e-5
    torch.save({"src": torch.randn(2, 3, 16)}, tmp_path / "data.pt")
    assert verify_files(dense, converted, inputs=SPEC, data=tmp_path / "data.pt").agree
    dropped = tmp_path / "dropped.pt2"
    report = convert_file(dense, dropped, Recipe(method="drop", experts=4), inputs=SPEC)
    assert report.verified
    assert all(b.relative_error > 1e-3 and not b.exact for b in report.blocks)
    different = verify_files(converted, dropped, inputs=SPEC)
    assert not different.agree
    assert different.outputs[0].cosine < 1
    assert verify_files(converted, dropped, inputs=SPEC, tolerance=10).agree


def test_inspect_before_and_after(dense: Path, converted: Path) -> None:
    before = inspect_file(dense, inputs=SPEC, recipe=Recipe(experts=4))
    assert before.dense is not None
    assert before.report.blocks[0].parameters_after > before.report.blocks[0].parameters_before
    assert any(p.is_meta for p in before.program.graph_module.parameters())  # nothing was computed
    after = inspect_file(converted)
    assert after.dense is None
    assert after.report.verified
    assert [b.path for b in after.report.blocks] == [b.path for b in before.report.blocks]
    assert after.report.parameters_after == before.report.parameters_after


def test_graph_and_module_form_are_the_same_model() -> None:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 4, 16)
    fields = {"method": "drop", "experts": 4, "top_k": 2, "seed": 5, "inputs": (x,)}
    graph = moeify.convert(model, form="graph", **fields)
    module = moeify.convert(model, **fields)
    assert module is model
    ours, theirs = graph.state_dict(), module.state_dict()
    new = {name for name in ours if ".experts." in name or ".router." in name}
    assert new
    assert new == {name for name in theirs if ".experts." in name or ".router." in name}
    for name in new:
        assert torch.equal(ours[name], theirs[name]), name
    with torch.no_grad():
        torch.testing.assert_close(graph(x), module(x))


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"method": "coppy"}, UnknownName, "there is no method named 'coppy'\n  hint: did you mean 'copy'?"),
        (
            {"router": "swich"},
            UnknownName,
            "there is no router named 'swich'\n  hint: did you mean 'switch'?",
        ),
        ({"blocks": "nowhere.*"}, NoBlocks, None),
        ({"method": "granular{shards=3}", "experts": 6, "top_k": 3}, NotDivisible, None),
        ({"router": "switch", "top_k": 2}, BadRecipe, None),
    ],
)
def test_refused_recipes_write_nothing(dense: Path, tmp_path: Path, fields, error, text) -> None:
    with pytest.raises(error) as caught:
        convert_file(dense, tmp_path / "o.pt2", Recipe(**fields), inputs=SPEC)
    if text:
        assert str(caught.value) == text
    assert list(tmp_path.iterdir()) == []


def test_no_block_shows_the_nearest_misses(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), tmp_path / "mlp.pt")
    with pytest.raises(NoBlocks) as error:
        convert_file(tmp_path / "mlp.pt", None, Recipe())
    assert error.value.what.startswith("no feed-forward block to convert; nearest misses:\n    ")
    assert error.value.exit_code == 1


def test_wrong_method_implementation_is_caught_and_nothing_is_written(dense, tmp_path, monkeypatch) -> None:
    from moeify.experts.drop import Drop

    monkeypatch.setattr(Drop, "exact", True)  # a method that promises what it does not keep
    with pytest.raises(VerificationFailed) as error:
        convert_file(dense, tmp_path / "o.pt2", Recipe(method="drop"), inputs=SPEC)
    assert error.value.what.startswith(
        "drop with softmax-topk promises to keep the function, and the relative error is "
    )
    assert error.value.where == "layers.0"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(dense: Path, tmp_path: Path, monkeypatch, failure) -> None:
    output = tmp_path / "o.pt2"
    output.write_bytes(b"precious")

    def half(program, file, **kwargs) -> None:
        file.write(b"half")
        raise failure

    monkeypatch.setattr(torch.export, "save", half)
    with pytest.raises((OutputNotWritten, KeyboardInterrupt)) as error:
        convert_file(dense, output, Recipe(experts=2), inputs=SPEC)
    if isinstance(failure, OSError):
        assert error.value.what == f"cannot write {output}: no space left on device"
    assert output.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [output]


def test_a_real_file_size_limit(dense: Path, tmp_path: Path) -> None:
    """The kernel refuses to write more than 8 KiB, as a full disk would. torch alone would end the process."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from moeify import Recipe, convert_file\n"
        "from moeify.errors import OutputNotWritten\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "try: convert_file(sys.argv[1], sys.argv[2], Recipe(experts=2), inputs=[sys.argv[3]])\n"
        "except OutputNotWritten as error: print(error.what)"
    )
    output = tmp_path / "o.pt2"
    done = subprocess.run(
        [sys.executable, "-c", code, str(dense), str(output), SPEC[0]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"cannot write {output}: file too large\n", done.stderr
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def handler():
    """Sets what SIGINT does, which a test run in the background inherits as nothing."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda wanted: signal.signal(signal.SIGINT, wanted)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("wanted", [signal.default_int_handler, signal.SIG_IGN])
def test_a_ctrl_c_while_writing(dense: Path, tmp_path: Path, monkeypatch, handler, wanted) -> None:
    output = tmp_path / "o.pt2"
    output.write_bytes(b"precious")
    save = torch.export.save
    handler(wanted)

    def interrupted(program, file, **kwargs) -> None:
        signal.raise_signal(signal.SIGINT)
        save(program, file, **kwargs)

    monkeypatch.setattr(torch.export, "save", interrupted)
    if wanted is signal.SIG_IGN:
        convert_file(dense, output, Recipe(experts=2), inputs=SPEC)
        assert output.read_bytes() != b"precious"
    else:
        with pytest.raises(KeyboardInterrupt):
            convert_file(dense, output, Recipe(experts=2), inputs=SPEC)
        assert output.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [output]
    assert signal.getsignal(signal.SIGINT) is wanted


def test_outputs_that_cannot_be(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputNotWritten) as error:
        convert_file(dense, tmp_path / "no" / "o.pt2", Recipe(), inputs=SPEC)
    assert error.value.what == f"cannot write {tmp_path}/no/o.pt2: the folder {tmp_path}/no does not exist"
    folder = tmp_path / "f.pt2"
    folder.mkdir()
    for output in (folder, "/"):
        with pytest.raises(OutputNotWritten) as error:
            convert_file(dense, output, Recipe(), inputs=SPEC)
        assert error.value.what == f"cannot write {output}: it is a folder"
    model = tmp_path / "model.pt2"
    model.write_bytes(dense.read_bytes())
    with pytest.raises(UsageError) as error:
        convert_file(model, model, Recipe(), inputs=SPEC)
    assert error.value.what == f"the output {model} is the dense model itself"
    with pytest.raises(UsageError) as error:
        convert_file(dense, tmp_path / "o.onnx", Recipe(), inputs=SPEC)
    assert str(error.value) == f"the output {tmp_path}/o.onnx does not end in .pt2\n  hint: write {tmp_path}/o.pt2"


def test_data_that_does_not_fit(dense: Path, tmp_path: Path) -> None:
    torch.save([torch.randn(2, 3, 8)], tmp_path / "d.pt")
    with pytest.raises(BadInputSpec) as error:
        convert_file(dense, None, Recipe(), inputs=SPEC, data=tmp_path / "d.pt")
    assert "has shape (2, 3, 8), the model reads " in error.value.what


class Positions(nn.Module):
    """Runs on eight tokens at most."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(8, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.table(torch.arange(x.shape[1]))
        return x + self.down(torch.relu(self.up(x)))


def test_data_the_model_does_not_run_on() -> None:
    model, inputs = Positions(), (torch.randn(2, 4, 16),)
    with pytest.raises(BadInputSpec) as error:
        moeify.convert(model, inputs=inputs, data=(torch.randn(2, 9, 16),))
    assert error.value.what == "the model does not run on the data: index out of range in self"
    with pytest.raises(BadInputSpec) as error:
        moeify.convert(model, inputs=inputs, data=(torch.randn(2, 9),))
    assert error.value.what.startswith("data: x has shape (2, 9), the model reads x=float32[")


def test_a_proof_on_nothing_but_nan_is_none() -> None:
    model, inputs = Positions(), (torch.randn(2, 4, 16),)
    with pytest.raises(VerificationFailed) as error:
        moeify.convert(model, inputs=inputs, data=(torch.full((2, 4, 16), 3e38),))  # finite, and its sums are not
    assert error.value.what == (
        "the dense model gives nothing but NaN and infinity on these inputs, so nothing can be compared"
    )


def test_a_converted_archive_is_not_converted_again(converted: Path) -> None:
    with pytest.raises(UnreadableFile) as error:
        convert_file(converted, None, Recipe())
    assert error.value.what == f"{converted} is a .pt2 that moeify has already converted"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "inputs": [{"name": 1}]}'])
def test_a_damaged_moeify_json(converted: Path, tmp_path: Path, text: str) -> None:
    damaged = tmp_path / "damaged.pt2"
    with zipfile.ZipFile(converted) as old, zipfile.ZipFile(damaged, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, text if entry.filename.endswith("moeify.json") else old.read(entry))
    with pytest.raises(UnreadableFile) as error:
        moeify.load(damaged)
    assert error.value.what.startswith(f"the moeify.json in {damaged} is damaged: ")


def test_verify_of_models_that_read_other_inputs(dense: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    torch.save(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), other)
    with pytest.raises(BadInputSpec) as error:
        verify_files(dense, other)
    assert error.value.what == (
        f"the input of {dense}, given to {other}: input has shape (2, 16, 16), the model reads input=float32[batch, 8]"
    )


def test_equal_infinities_are_no_difference() -> None:
    masked = torch.tensor([[1.0, float("-inf")], [2.0, 3.0]])
    [error] = compare([masked], [masked.clone()], 1e-5).outputs
    assert (error.max_abs, error.max_relative, error.cosine) == (0.0, 0.0, 1.0)


def test_print_after_and_dump_dir(dense: Path, tmp_path: Path) -> None:
    shown = []
    convert_file(
        dense, None, Recipe(experts=2), inputs=SPEC, print_after=["find-ffn"], dump_dir=tmp_path / "dumps",
        show=lambda title, text: shown.append((title, text)),
    )  # fmt: skip
    assert [title for title, _ in shown] == ["after find-ffn"]
    assert shown[0][1].count("moe.ffn") == 2
    names = [p.name for p in sorted((tmp_path / "dumps").iterdir())]
    assert names == [
        "01-canonicalize.txt", "02-find-ffn.txt", "03-select.txt", "04-make-experts.txt", "05-route.txt",
        "06-clean-up.txt",
    ]  # fmt: skip
    with pytest.raises(UnknownName) as error:
        convert_file(dense, None, Recipe(), inputs=SPEC, print_after=["find"])
    assert error.value.what == "there is no pass named 'find'"


def test_convert_in_python_refuses_nonsense() -> None:
    with pytest.raises(UsageError) as error:
        moeify.convert(nn.Linear(2, 2), form="onnx")
    assert str(error.value) == "there is no form 'onnx'\n  hint: choose 'module' or 'graph'"
    with pytest.raises(UsageError) as error:
        moeify.convert(nn.Linear(2, 2), Recipe(), experts=3)
    assert str(error.value) == "give a recipe or its fields, not both"
