"""Train and eval mode of captured graphs, against the eager model."""

import pytest
import torch
from torch import Tensor, nn

from moeify.frontend import capture
from moeify.ir import devices
from moeify.ir.modes import TrainableGraph, attention_probabilities, is_training, set_training


def trainable(model, inputs):
    program = capture(model, inputs)
    return graph_of(program)


def graph_of(program):
    return TrainableGraph(
        program.graph_module, program.graph, attention_dropout=program.provenance["attention_dropout"]
    )


class Attention(nn.Module):
    def __init__(self, dropout=0.5):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.dropout = dropout

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        p = self.dropout if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p)


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4, 2, batch_first=True, dropout=0.5)

    def forward(self, x):
        return self.lstm(x)[0]


MODELS = {
    "dropout": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU()), "float32[batch=4,8]"),
    "attention": (Attention, "float32[batch=2,seq=6,8]"),
    "lstm": (Lstm, "float32[batch=2,5,4]"),
    "gru": (lambda: nn.GRU(4, 4, 2, batch_first=True, dropout=0.5), "float32[batch=2,5,4]"),
    "dropout2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout2d(0.5)), "float32[batch=2,3,4,4]"),
    "alpha dropout": (lambda: nn.Sequential(nn.Linear(8, 8), nn.AlphaDropout(0.3)), "float32[batch=4,8]"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), "float32[batch=4,8]"),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8)),
        "float32[batch=2,3,4,4]",
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True),
        "float32[batch=2,seq=6,8]",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_both_modes_compute_what_the_model_computes(name):
    build, spec = MODELS[name]
    torch.manual_seed(0)
    model = build()
    program = capture(model, [spec])
    graph = graph_of(program)
    assert list(graph.state_dict())
    assert set(graph.state_dict()) <= set(model.state_dict())
    (x,) = program.example
    for training in (False, True, False):
        model.train(training)
        graph.train(training)
        assert graph.training is training
        stats = {k: v.clone() for k, v in model.state_dict().items()}
        outputs = []
        for runs in (model, graph):
            model.load_state_dict(stats)  # batch norm moves the statistics that both share
            torch.manual_seed(1)
            outputs.append(runs(x))
        expected, actual = (o[0] if isinstance(o, tuple) else o for o in outputs)
        if training or name in ("batch norm",):
            torch.testing.assert_close(actual, expected)
        else:
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["dropout", "attention", "lstm", "dropout2d", "transformer"])
def test_training_is_random_and_eval_is_not(name):
    build, spec = MODELS[name]
    torch.manual_seed(0)
    program = capture(build(), [spec])
    graph = graph_of(program)
    (x,) = program.example
    assert torch.equal(graph(x)[0], graph(x)[0])
    graph.train()
    assert not torch.equal(graph(x)[0], graph(x)[0])
    assert torch.equal(graph.eval()(x)[0], graph(x)[0])
    expected = graph(x)[0]
    graph.drop_dropout()
    torch.testing.assert_close(graph.train()(x)[0], expected)


def test_dropout_drops_the_right_share():
    graph = trainable(nn.Sequential(nn.Linear(8, 4096), nn.Dropout(0.25)), ["float32[batch=16,8]"]).train()
    torch.manual_seed(0)
    dropped = (graph(torch.randn(16, 8)) == 0).float().mean()
    assert abs(dropped - 0.25) < 0.01


def test_running_statistics_move_in_training_only():
    torch.manual_seed(0)
    graph = trainable(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), ["float32[batch=4,8]"])
    before = graph.state_dict()["1.running_mean"].clone()
    graph(torch.randn(4, 8))
    assert torch.equal(graph.state_dict()["1.running_mean"], before)
    graph.train()
    graph(torch.randn(4, 8))
    assert not torch.equal(graph.state_dict()["1.running_mean"], before)


def test_batch_norm_without_statistics_uses_the_batch_in_both_modes():
    model = nn.Sequential(nn.BatchNorm1d(8, track_running_stats=False)).eval()
    graph = trainable(model, ["float32[batch=4,8]"])
    x = torch.randn(4, 8)
    for training in (False, True):
        torch.testing.assert_close(graph.train(training)(x), model.train(training)(x))


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    graph = trainable(MODELS["transformer"][0](), [MODELS["transformer"][1]]).train()
    graph(torch.randn(2, 6, 8)).sum().backward()
    assert all(p.grad is not None for p in graph.parameters())


def test_flags():
    program = capture(Attention(0.5), [MODELS["attention"][1]])
    assert program.provenance["attention_dropout"] == [0.5]
    graph_module = program.graph_module
    assert attention_probabilities(graph_module) == [0.0]
    set_training(graph_module, True, [0.5])
    assert attention_probabilities(graph_module) == [0.5]
    set_training(graph_module, False, [0.5])
    assert attention_probabilities(graph_module) == [0.0]
    with pytest.raises(ValueError, match="2 attention dropouts for 1 attention nodes"):
        set_training(graph_module, True, [0.1, 0.2])
    dropout = capture(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), ["float32[batch=4,8]"]).graph_module
    assert not is_training(dropout)
    set_training(dropout, True)
    assert is_training(dropout)


def test_flags_of_operators_of_our_own():
    ops = pytest.importorskip("moeify.ir.ops")
    assert ops
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    noise = graph.call_function(torch.ops.moeify.normal_like.default, (x, False))
    jitter = graph.call_function(torch.ops.moeify.jitter_like.default, (x, 0.1, False))
    graph.output((noise, jitter))
    module = TrainableGraph(nn.Module(), graph)
    ones = torch.ones(64)
    assert torch.equal(module(ones)[0], ones * 0)
    assert torch.equal(module(ones)[1], ones)
    module.train()
    assert module(ones)[0].std() > 0.5
    assert 0 < module(ones)[1].std() < 0.1


class Positions(nn.Module):
    """Makes tensors of its own, on a device that capture writes down."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1], device=x.device))


def test_what_the_graph_makes_is_made_where_the_model_is() -> None:
    """On a device without memory, which every machine has."""
    exported = torch.export.export(Positions(), (torch.zeros(2, 3, 4),)).module()
    graph = TrainableGraph(exported, exported.graph)
    made = next(node for node in graph.graph.nodes if "arange" in str(node.target))
    devices.place(graph, torch.device("meta"))
    assert made.kwargs["device"] == torch.device("meta")
    devices.follow(graph)  # its weights are on the CPU
    assert made.kwargs["device"] == torch.device("cpu")
    made.meta[devices.STAYS] = True
    graph.to("meta")
    devices.place(graph, torch.device("meta"))
    assert made.kwargs["device"] == torch.device("cpu")
