"""Capture: the graph computes what the model computes, names are the user's, and the module is left as it was."""

import dataclasses

import pytest
import torch
from torch import nn

from moeify.errors import NotExportable
from moeify.frontend import capture


class Net(nn.Module):
    """A model around one linear layer whose forward a test supplies."""

    def __init__(self, forward=None, **modules):
        super().__init__()
        self.l = nn.Linear(4, 4)
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.lstm = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.2)
        self.out = nn.Linear(8, 50)

    def forward(self, tokens):
        return self.out(self.lstm(self.embed(tokens))[0])


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


PLAIN = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8)),
        ["input=float32[batch, 8]"],
        [],
    ),
    "convnet": (convnet, ["input=float32[batch, 3, 32, 32]"], []),
    "lstm language model": (LanguageModel, ["tokens=int64[batch, 16]"], []),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 2, enable_nested_tensor=False
        ),
        ["src=float32[batch, seq, 8]"],
        [0.1, 0.1],
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_models(name):
    build, inputs, dropout = PLAIN[name]
    torch.manual_seed(0)
    model = build().train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    program = capture(model)
    assert [str(spec) for spec in program.inputs] == inputs
    assert program.provenance["capture_error"] <= 1e-6
    assert program.provenance["attention_dropout"] == dropout
    assert all(m.training for m in model.modules())
    assert "forward" not in model.__dict__
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    read = {node.target for node in program.graph.nodes if node.op == "get_attr"}
    assert {name for name, _ in model.named_parameters()} <= read
    with torch.no_grad():
        torch.testing.assert_close(program.graph_module(*program.example), model.eval()(*program.example))


def test_no_grad_regions_are_inlined_with_their_gradients():
    def forward(self, x):
        y = self.l(x)
        with torch.no_grad():
            scale = y * 2
            with torch.enable_grad():
                scale = scale + 1
        return y * scale

    torch.manual_seed(0)
    model = Net(forward)
    program = capture(model, ["float32[batch=3,4]"])
    x = torch.randn(3, 4)
    expected = torch.autograd.grad(model(x).sum(), model.l.weight)[0]
    actual = torch.autograd.grad(program.graph_module(x).sum(), program.parameter("l.weight"))[0]
    torch.testing.assert_close(actual, expected)
    assert not any("set_grad" in str(node.target) for node in program.graph.nodes)


def test_inputs_in_every_form():
    x = torch.randn(3, 4)
    for inputs in (["float32[batch=3,4]"], ["input=float32[batch=3,4]"], {"input": x}, (x,), [x]):
        program = capture(nn.Linear(4, 4), inputs)
        assert [str(spec) for spec in program.inputs] == ["input=float32[batch, 4]"]
        assert program.example[0].shape == (3, 4)
    assert str(capture(nn.Linear(4, 4), (x,), fixed=True).inputs[0]) == "input=float32[3, 4]"
    assert str(capture(nn.Linear(4, 4), ["float32[3,4]"]).inputs[0]) == "input=float32[3, 4]"


def test_a_single_row_is_doubled():
    program = capture(nn.Linear(4, 4), (torch.randn(1, 4),))
    assert str(program.inputs[0]) == "input=float32[batch, 4]"
    assert program.example[0].shape == (2, 4)

    def one_row(self, x):
        assert x.shape[0] == 1
        return self.l(x)

    program = capture(Net(one_row), (torch.randn(1, 4),))
    assert str(program.inputs[0]) == "x=float32[1, 4]"
    assert "the batch stays fixed at 1: the model does not run on two rows" in program.provenance["notes"]


def test_sequences_of_different_lengths_have_different_names():
    class Pair(Net):
        def forward(self, x, y):
            return self.l(x).mean(1) + y.mean(1)

    program = capture(Pair(), {"x": torch.randn(2, 5, 4), "y": torch.randn(2, 3, 4)})
    assert [str(s) for s in program.inputs] == ["x=float32[batch, seq, 4]", "y=float32[batch, y_seq, 4]"]


@dataclasses.dataclass
class Output:
    y: torch.Tensor
    past_key_values: object = None
    loss: torch.Tensor | None = None


def test_structures_of_outputs():
    x = torch.randn(2, 4)
    cases = {
        "tuple": (lambda s, x: (s.l(x), [x * 2, {"a": x}]), tuple),
        "dict": (lambda s, x: {"y": s.l(x), "z": x + 1}, dict),
        "dataclass": (lambda s, x: Output(s.l(x), object()), dict),
    }
    for forward, kind in cases.values():
        output = capture(Net(forward), (x,)).graph_module(x)
        assert type(output) is kind
    assert set(capture(Net(cases["dataclass"][0]), (x,)).graph_module(x)) == {"y"}


def test_kinds_of_parameters():
    class Star(Net):
        def forward(self, *xs):
            return self.l(xs[0]) + xs[1]

    class Keyword(Net):
        def forward(self, x, /, *, y):
            return self.l(x) + y

    x = torch.randn(2, 4)
    assert [s.name for s in capture(Star(), (x, x)).inputs] == ["xs_0", "xs_1"]
    assert [s.name for s in capture(Keyword(), {"x": x, "y": x}).inputs] == ["x", "y"]


def test_a_model_that_writes_into_its_input():
    def forward(self, x):
        x.add_(1)
        return self.l(x)

    program = capture(Net(forward), (torch.zeros(2, 4),))
    assert torch.equal(program.example[0], torch.zeros(2, 4))


def test_meta_models():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    program = capture(model)
    assert str(program.inputs[0]) == "input=float32[batch, 4]"
    assert program.provenance["capture_error"] is None
    assert program.example[0].device.type == "cpu"
    assert (
        "the graph was not compared with the model: the weights are on the meta device" in (program.provenance["notes"])
    )


def test_a_graph_that_computes_something_else_is_refused():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.l(x) * (2 if torch.compiler.is_exporting() else 1)

    with pytest.raises(NotExportable) as error:
        capture(Counting(), (torch.randn(2, 4),))
    assert str(error.value) == (
        "the captured graph of Counting does not compute what the model computes: relative error 1.0e+00 on the "
        "example inputs\n"
        "  hint: a decision in forward depends on the sizes or values of the input; fix the sizes with --input"
    )


def test_a_size_baked_in_is_refused():
    def forward(self, x):
        return self.l(x) + float(x.shape[0] if not torch.compiler.is_exporting() else 2)

    with pytest.raises(NotExportable) as error:
        capture(Net(forward), (torch.randn(2, 4),))
    assert "does not compute what the model computes" in error.value.what
    assert error.value.what.endswith("at batch=3")
    assert capture(Net(forward), (torch.randn(2, 4),), fixed=True).provenance["capture_error"] == 0.0


def test_sizes_the_model_decides_on_stay_fixed():
    def forward(self, x):
        return self.l(x) if x.shape[0] == 2 else -self.l(x)

    program = capture(Net(forward), ["x=float32[batch=2,4]"])
    assert str(program.inputs[0]) == "x=float32[2, 4]"
    assert "batch of x (dimension 0) stays fixed at 2" in program.provenance["notes"]


def test_training_that_draws_numbers_in_python_is_noted():
    def forward(self, x):
        return self.l(x) * (torch.rand(2, 1) > 0.5) if self.training else self.l(x)

    program = capture(Net(forward), (torch.randn(2, 4),))
    assert (
        "training draws random numbers in Python (rand), which the graph does not repeat"
        in (program.provenance["notes"])
    )


def test_attention_dropout_that_eval_code_leaves_out_is_noted():
    model = Net(lambda s, x: s.m(x, x, x)[0], m=nn.MultiheadAttention(4, 2, 0.3, batch_first=True))
    program = capture(model, (torch.randn(2, 3, 4),))
    assert (
        "1 nn.MultiheadAttention with need_weights: no attention dropout in the graph" in (program.provenance["notes"])
    )


def test_a_model_that_breaks_in_train_mode():
    def forward(self, x):
        if self.training:
            raise ValueError("not for training")
        return self.l(x)

    program = capture(Net(forward), (torch.randn(2, 4),))
    assert (
        "the model does not run in train mode (ValueError: not for training): dropout is unknown"
        in (program.provenance["notes"])
    )


def test_an_example_that_is_a_view_brings_nothing_of_its_base() -> None:
    ids = torch.randint(0, 10, (4, 9))
    program = capture(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)), (ids[:, :-1],))
    assert program.inputs[0].shape == ("batch", "seq")
    assert program.run(ids).shape == (4, 9, 4)
