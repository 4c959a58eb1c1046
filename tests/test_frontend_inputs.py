"""Input specifications, guesses, and the example values made from them."""

import pytest
import torch
from torch import nn

from moeify.errors import BadInputSpec
from moeify.frontend import parse_input_spec
from moeify.frontend.guess import guess_examples
from moeify.frontend.trace import resolve

FORM = "write name=dtype[size,...], for example input_ids=int64[batch=2,seq=16]"


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.kinds = nn.Embedding(3, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, ids, kinds, attention_mask=None):
        hidden = self.words(ids) + self.kinds(kinds)
        return self.out(hidden if attention_mask is None else hidden * attention_mask[..., None])


def test_a_spec_is_read():
    spec = parse_input_spec(" input_ids = int64[ batch=2, seq=16 , 3]{below=100}")
    assert spec.name == "input_ids"
    assert spec.dtype is torch.int64
    assert spec.sizes == (2, 16, 3)
    assert spec.dims == ("batch", "seq", 3)
    assert spec.below == 100
    assert str(spec) == "input_ids=int64[batch=2,seq=16,3]{below=100}"
    assert parse_input_spec(str(spec)) == spec
    assert parse_input_spec("float32[]").sizes == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", f"cannot read the input 'hello'\n  hint: {FORM}"),
        ("x=float32[2", f"cannot read the input 'x=float32[2'\n  hint: {FORM}"),
        (
            "x=float23[2]",
            "the input 'x=float23[2]' has the unknown dtype 'float23'\n  hint: did you mean float32?",
        ),
        (
            "x=float32[batch]",
            f"the input 'x=float32[batch]' has the unreadable size 'batch'\n  hint: {FORM}",
        ),
        ("x=float32[2,,3]", f"the input 'x=float32[2,,3]' has the unreadable size ''\n  hint: {FORM}"),
        ("x=float32[-1]", f"the input 'x=float32[-1]' has the unreadable size '-1'\n  hint: {FORM}"),
        (
            "x=float32[0]",
            "the input 'x=float32[0]' has an empty dimension\n  hint: give every size at least 1",
        ),
        (
            "x=float32[batch=1]",
            (
                "the dynamic dimension 'batch' of the input 'x=float32[batch=1]' has the example size 1\n"
                "  hint: give it an example size of 2 or more, or write the bare number to fix it"
            ),
        ),
        (
            "x=int64[2]{max=3}",
            "the input 'x=int64[2]{max=3}' has no option 'max'\n  hint: its options: below",
        ),
        ("x=int64[2]{below=0}", "below wants a whole number of at least 1, not '0'"),
        (
            "x=float32[2]{below=3}",
            "the input 'x=float32[2]{below=3}' bounds values that are not integers with below",
        ),
    ],
)
def test_errors_of_a_spec(text, message):
    with pytest.raises(BadInputSpec) as error:
        parse_input_spec(text)
    assert str(error.value) == message
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            ["idz=int64[2,4]", "kinds=int64[2,4]"],
            "forward of Two has no parameter 'idz'\n  hint: did you mean 'ids'?",
        ),
        (
            ["zzz=int64[2,4]"],
            "forward of Two has no parameter 'zzz'\n  hint: its parameters: ids, kinds, attention_mask",
        ),
        (["ids=int64[2,4]"], "forward of Two needs 'kinds' too\n  hint: add --input kinds=dtype[size,...]"),
        (["ids=int64[2,4]", "ids=int64[2,4]"], "the input 'ids' is given twice"),
        (["int64[2,4]", "int64[2,4]"], f"the input int64[2,4] of 2 has no name\n  hint: {FORM}"),
        (
            ["ids=int64[batch=2,4]", "kinds=int64[batch=3,4]"],
            (
                "the dynamic dimension 'batch' has the example sizes 2 and 3\n"
                "  hint: give dimensions that differ different names"
            ),
        ),
    ],
)
def test_errors_against_the_model(specs, message):
    with pytest.raises(BadInputSpec) as error:
        resolve(Two(), specs, [])
    assert str(error.value) == message


def test_values_fit_the_embedding_that_reads_them():
    specs = [
        "kinds=int64[batch=8,seq=64]",
        "ids=int64[batch=8,seq=64]",
        "attention_mask=int64[batch=8,seq=64]",
    ]
    ids, kinds, mask = resolve(Two(), specs, [])
    assert (ids.name, kinds.name, mask.name) == ("ids", "kinds", "attention_mask")
    assert ids.tensor.max() == 10
    assert kinds.tensor.max() == 2
    assert mask.tensor.eq(1).all()
    bounded, _ = resolve(Two(), ["ids=int64[batch=8,seq=64]{below=5}", "kinds=int64[batch=8,seq=64]"], [])
    assert bounded.tensor.max() == 4


def test_values_repeat():
    first = resolve(nn.Linear(4, 4), ["float32[batch=2,4]"], [])[0]
    assert torch.equal(first.tensor, resolve(nn.Linear(4, 4), ["float32[batch=2,4]"], [])[0].tensor)


class Pool(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, x):
        out = self.first(x)
        return out[0] if isinstance(out, tuple) else out


GUESSES = {
    "embedding": (nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)), "input=int64[batch=2,seq=16]"),
    "mlp": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8)), "input=float32[batch=2,6]"),
    "encoder": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        "src=float32[batch=2,seq=16,8]",
    ),
    "sequence first": (nn.TransformerEncoderLayer(8, 2, 16), "src=float32[seq=16,batch=2,8]"),
    "two inputs": (
        nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
        "tgt=float32[batch=2,seq=16,8] memory=float32[batch=2,seq=16,8]",
    ),
    "lstm": (nn.LSTM(5, 4, batch_first=True), "input=float32[batch=2,seq=16,5]"),
    "gru": (nn.GRU(5, 4), "input=float32[seq=16,batch=2,5]"),
    "conv1d": (nn.Conv1d(3, 4, 3), "input=float32[batch=2,3,length=64]"),
    "conv2d": (nn.Conv2d(3, 4, 3), "input=float32[batch=2,3,32,32]"),
    "conv2d of one size": (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 3)),
        "input=float32[batch=2,1,28,28]",
    ),
    "conv3d": (nn.Conv3d(2, 4, 3), "input=float32[batch=2,2,8,8,8]"),
    "norm first": (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), "input=float32[batch=2,seq=16,8]"),
    "half": (nn.Linear(4, 4).bfloat16(), "input=bfloat16[batch=2,4]"),
    "wrapped": (Pool(nn.LSTM(5, 4, batch_first=True)), "x=float32[batch=2,seq=16,5]"),
}


@pytest.mark.parametrize("name", GUESSES)
def test_guesses(name):
    model, expected = GUESSES[name]
    model.train()
    _, note = guess_examples(model)
    assert note == f"guessed the input {expected}"
    assert all(m.training for m in model.modules())


def test_no_guess_runs():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x, y):
            raise ValueError("x and y must be a pair\nof something")

    with pytest.raises(BadInputSpec) as error:
        guess_examples(Odd())
    assert str(error.value) == (
        "cannot guess an input that Odd runs on: ValueError: x and y must be a pair\n"
        "  hint: give --input x=dtype[batch=2,...] --input y=dtype[batch=2,...]"
    )


def test_a_model_without_known_layers():
    class Bare(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(BadInputSpec) as error:
        guess_examples(Bare())
    assert str(error.value) == ("cannot guess an input that Bare runs on\n  hint: give --input x=dtype[batch=2,...]")
