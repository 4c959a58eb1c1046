"""The user's data as batches: a text, images, tensors, and what Python gives."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moeify import frontend
from moeify.cli.profile import profile
from moeify.data import examples, images, text
from moeify.data.examples import Options, open_data
from moeify.errors import BadInputSpec, BadOption, UnreadableFile, UsageError
from moeify.fitting import collect
from moeify.ir.program import InputSpec, Program
from tests import programs


class Encoder(nn.Module):
    """Reads what BERT reads; every position sees all others."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(40, 8), nn.Embedding(2, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.kinds(token_type_ids)
        return x + (x * attention_mask.unsqueeze(-1)).mean(1, keepdim=True)


@pytest.fixture(scope="module")
def encoder() -> Program:
    names = ("input_ids", "attention_mask", "token_type_ids")
    return frontend.capture(Encoder(), [f"{name}=int64[batch=2,seq=4]{{below=2}}" for name in names])


@pytest.fixture(scope="module")
def decoder() -> Program:
    """A causal language model over bytes."""
    model = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256))
    return frontend.capture(model, ["int64[batch=2,seq=4]"])


@pytest.fixture
def vision() -> Program:
    return programs.Program(
        torch.fx.GraphModule(nn.Module(), torch.fx.Graph()),
        (InputSpec("pixels", torch.float32, ("batch", 3, 4, 6)),),
        (torch.zeros(2, 3, 4, 6),),
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT tokenizer of a few words: [CLS] is 2, [SEP] is 3, the first word is 5."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def read(data: Any, program: Program, **options: Any) -> list[tuple[Tensor, ...]]:
    return list(open_data(data, program, Options(**options)).batches)


def rows(batches: list[tuple[Tensor, ...]]) -> Tensor:
    """All rows of the first input, sorted."""
    return torch.stack(sorted(torch.cat([batch[0] for batch in batches]), key=lambda row: row.flatten().tolist()))


# --- text ---------------------------------------------------------------------------------------------------------


def test_a_text_is_cut_into_pieces_in_an_order_of_the_seed(decoder: Program, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(bytes(range(65, 65 + 47)))
    got = read(path, decoder, tokenizer="bytes", sequence=5, batch=4)
    assert [len(batch[0]) for batch in got] == [4, 4, 1]
    assert torch.equal(rows(got), torch.arange(65, 65 + 45).view(9, 5))  # the last 2 bytes are no piece
    again, other = (read(path, decoder, tokenizer="bytes", sequence=5, batch=4, seed=seed) for seed in (0, 1))
    assert torch.equal(again[0][0], got[0][0])
    assert not torch.equal(other[0][0], got[0][0])


def test_an_encoder_gets_special_tokens_masks_and_kinds(encoder: Program, tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("a cat sat a cat sat a cat")
    ((ids, mask, kinds),) = read(path, encoder, tokenizer=str(tokenizer), sequence=5)
    assert sorted(ids.tolist()) == [[2, 5, 6, 7, 3], [2, 5, 6, 7, 3]]
    assert bool((mask == 1).all())
    assert not kinds.any()


def test_the_tokenizer_of_the_model_s_folder(encoder: Program, tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("a cat sat a cat sat")
    found = open_data(path, encoder, Options(sequence=5), model=tokenizer)
    assert len(next(iter(found.batches))[0]) == 2
    assert found.notes == (f"the text is cut by the tokenizer in {tokenizer}",)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"sequence": 3}, UsageError, "is a text"),
        ({"sequence": 300, "tokenizer": "bytes"}, BadInputSpec, "fewer than one piece of 300"),
        ({"sequence": 3, "tokenizer": "no/such/place"}, UsageError, "there is no tokenizer"),
    ],
)
def test_a_text_that_cannot_be_cut(
    decoder: Program, tmp_path: Path, options: dict[str, Any], kind: type[Exception], said: str
) -> None:
    path = tmp_path / "t.txt"
    path.write_text("some words")
    with pytest.raises(kind, match=said):
        read(path, decoder, **options)


def test_a_text_of_another_vocabulary_or_for_another_model(encoder: Program, vision: Program, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("some words")
    with pytest.raises(BadOption, match="the model knows 40"):
        read(path, encoder, tokenizer="bytes", sequence=4)
    with pytest.raises(BadInputSpec, match="which a text does not give"):
        text.inputs_of(torch.zeros(2, 4), [InputSpec("pixels", torch.float32, ("batch", 3))], "ids")
    with pytest.raises(BadInputSpec, match="not 4 tokens"):
        text.inputs_of(torch.zeros(2, 4), [InputSpec("ids", torch.int64, ("batch", 7))], "ids")
    with pytest.raises(BadOption, match="reads no tokens"):
        read(path, vision, tokenizer="bytes")


# --- images -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five plain pictures, red = 10 times their number, in a folder and one below it."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number in range(5):
        name = folder / ("more" if number == 4 else "") / f"{number}.png"
        image.new("RGB", (9, 7), (10 * number, 100, 255)).save(name)
    (folder / "readme").write_text("not a picture")
    return folder


def test_pictures_are_resized_and_scaled(vision: Program, pictures: Path) -> None:
    found = open_data(pictures, vision, Options(batch=2))
    got = [batch[0] for batch in found.batches]
    assert [tuple(batch.shape) for batch in got] == [(2, 3, 4, 6), (2, 3, 4, 6), (1, 3, 4, 6)]
    whole = torch.cat(got)
    red = whole[:, 0, 0, 0].sort().values
    torch.testing.assert_close(red, torch.tensor([(10 * n / 255 - 0.5) / 0.5 for n in range(5)]))
    torch.testing.assert_close(whole[:, 2], torch.ones(5, 4, 6))
    assert "scaled to [-1, 1]" in found.notes[0]


def test_pictures_scaled_by_the_model_s_own_file(vision: Program, pictures: Path, tmp_path: Path) -> None:
    config = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1.0], "rescale_factor": 1 / 255}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    found = open_data(pictures, vision, Options(), model=tmp_path / "model.pt")
    ((batch,),) = found.batches
    torch.testing.assert_close(batch[:, 1].unique(), torch.tensor([(100 / 255 - 0.2) / 0.25]))
    assert "preprocessor_config.json" in found.notes[0]
    given = open_data(pictures, vision, Options(image_mean=(0.0,), image_std=(1.0,)), model=tmp_path)
    torch.testing.assert_close(next(iter(given.batches))[0][:, 2], torch.ones(5, 4, 6))
    assert given.notes == ()


def test_pictures_that_cannot_be_used(vision: Program, decoder: Program, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputSpec, match="is a folder of images"):
        read(pictures, decoder)
    with pytest.raises(BadOption, match="has 2 values"):
        read(pictures, vision, image_mean=(0.1, 0.2))
    with pytest.raises(BadOption, match="must be above 0"):
        images.scaling_of(None, None, (0.0,))
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(UnreadableFile, match="how images are scaled"):
        images.scaling_of(tmp_path, None, None)
    (pictures / "0.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(UnreadableFile, match=r"cannot read the image .*0\.png"):
        read(pictures, vision)
    (tmp_path / "none").mkdir()
    with pytest.raises(UnreadableFile, match="no image in the folder"):
        read(tmp_path / "none", vision)


# --- tensors and Python -------------------------------------------------------------------------------------------


def test_tensors_are_examples_in_rows(decoder: Program, tmp_path: Path) -> None:
    ids = torch.arange(60).view(10, 6)
    save_file({decoder.inputs[0].name: ids, "labels": torch.zeros(3)}, tmp_path / "d.safetensors")
    for data in (tmp_path / "d.safetensors", (ids,), {decoder.inputs[0].name: ids}):
        got = read(data, decoder, batch=4)
        assert [len(batch[0]) for batch in got] == [4, 4, 2]
        assert torch.equal(rows(got), ids)


def test_batches_from_python_come_as_they_are(encoder: Program) -> None:
    ids = torch.arange(8).view(2, 4)
    named = {"token_type_ids": ids * 0, "input_ids": ids, "attention_mask": ids * 0 + 1}
    got = read(iter([named, (ids, ids * 0 + 1, ids * 0)]), encoder)
    assert len(got) == 2
    assert all(torch.equal(a, b) for a, b in zip(got[0], got[1]))


def test_a_model_that_takes_a_fixed_number_of_examples() -> None:
    specs = (InputSpec("x", torch.float32, (4, 3)),)
    program = Program(torch.fx.GraphModule(nn.Module(), torch.fx.Graph()), specs, (torch.zeros(4, 3),))
    got = read((torch.arange(33.0).view(11, 3),), program)
    assert [len(batch[0]) for batch in got] == [4, 4]
    with pytest.raises(BadInputSpec, match="exactly 4 at a time"):
        read((torch.zeros(3, 3),), program)


def test_inputs_without_a_common_first_dimension_are_one_batch() -> None:
    specs = (InputSpec("x", torch.float32, ("batch", 3)), InputSpec("positions", torch.int64, ("seq",)))
    program = Program(torch.fx.GraphModule(nn.Module(), torch.fx.Graph()), specs, ())
    (batch,) = read((torch.zeros(20, 3), torch.arange(5)), program)
    assert [len(value) for value in batch] == [20, 5]


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        ("no/such/file.txt", UnreadableFile, "there is no file or folder"),
        (torch.zeros(3, 4), UsageError, "cannot read data from a Tensor"),
        (3, UsageError, "cannot read data from"),
        ([["words"]], BadInputSpec, "a batch of the data is a list"),
        ([torch.zeros(2, 4)], BadInputSpec, "is float32"),
        ((torch.zeros(2, 4),) * 2, BadInputSpec, "holds 2 tensors"),
    ],
)
def test_data_that_do_not_fit(decoder: Program, data: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        read(data, decoder)


def test_tensors_with_different_numbers_of_examples(encoder: Program) -> None:
    ids = torch.zeros(4, 3, dtype=torch.int64)
    with pytest.raises(BadInputSpec, match="not one row per example"):
        read((ids, ids, ids[:3]), encoder)


def test_defaults_are_those_of_the_command() -> None:
    """The command states them itself, as it starts without torch."""
    said = {name: one.default for name, one in inspect.signature(profile).parameters.items()}
    assert (said["batch"], said["tokens"], said["samples"]) == (examples.BATCH, collect.TOKENS, collect.SAMPLES)
