"""The MoE layer: its formula with every option, its forms, and what it refuses."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from moeify.errors import UsageError
from moeify.ir.activations import TABLE
from moeify.nn.moe import MoE
from moeify.nn.routers.router import Router

D, D_OUT, H, E, K = 6, 10, 8, 4, 2
PLAIN = ("up", "down", "up_bias", "down_bias")
GATED = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")


class TopK(Router):
    """The smallest router; keeps what it was given as token ids."""

    def __init__(self, num_experts: int = E) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, K
        self.weight = nn.Parameter(torch.randn(num_experts, D, dtype=torch.float64))

    def forward(self, x_TD, token_ids_T=None):
        self.seen = None if token_ids_T is None else token_ids_T.shape
        weights, experts = F.linear(x_TD, self.weight).softmax(-1).topk(self.top_k)
        return experts, weights


class Region(nn.Module):
    """An activation without a name, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, u, g=None):
        return torch.sin(self.slope * u) if g is None else torch.sin(self.slope * g) * u


def layer(**options) -> MoE:
    return MoE(D, D_OUT, H, E, TopK(), **{"dtype": torch.float64, "roles": PLAIN, **options})


def dense(weights, activation, x):
    up, gate, down, up_bias, gate_bias, down_bias = weights
    hidden = F.linear(x, up, up_bias)
    if isinstance(activation, nn.Module):
        hidden = activation(hidden) if gate is None else activation(hidden, F.linear(x, gate, gate_bias))
    else:
        act = TABLE[activation]
        hidden = act(hidden) if gate is None else act(F.linear(x, gate, gate_bias)) * hidden
    return F.linear(hidden, down, down_bias)


def reference(moe: MoE, x):
    activation = moe.region or moe.activation
    experts, gates = moe.router(x)
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros(D_OUT, dtype=x.dtype)
        for e, w in zip(experts[t].tolist(), gates[t]):
            y = y + w * dense([None if s is None else s[e] for s in moe.experts.roles()], activation, x[t])
        rows.append(y)
    y = torch.stack(rows)
    if moe.shared is not None:
        always = dense(moe.shared.roles(), activation, x)
        y = y + (always if moe.shared_gate is None else torch.sigmoid(x @ moe.shared_gate.weight[0])[:, None] * always)
    return y if moe.output_bias is None else y + moe.output_bias


OPTIONS = [
    {},
    {"roles": ("up", "down"), "activation": "relu2"},
    {"roles": GATED, "activation": "silu"},
    {"roles": GATED, "activation": "silu", "shared": 5, "shared_gate": True, "output_bias": True},
    {"shared": 16, "hidden_dropout": 0.5},
    {"activation": Region(), "shared": 3},
    {"roles": ("up", "gate", "down"), "activation": Region(), "output_bias": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_formula_and_gradients(options) -> None:
    moe, x = layer(**options).eval(), torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    if moe.output_bias is not None:
        nn.init.normal_(moe.output_bias)
    expected, actual = reference(moe, x), moe(x)
    torch.testing.assert_close(actual, expected)
    leaves = [x, *moe.parameters()]
    want = torch.autograd.grad(expected.square().sum(), leaves)
    got = torch.autograd.grad(actual.square().sum(), leaves)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(D,), (5, D), (2, 3, D), (2, 0, D), (0, D)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    moe, x = layer(), torch.randn(shape, dtype=torch.float64)
    y = moe(x, torch.zeros(shape[:-1], dtype=torch.int64))
    assert y.shape == (*shape[:-1], D_OUT)
    assert moe.router.seen == (x.numel() // D,)
    if x.numel():
        torch.testing.assert_close(y.reshape(-1, D_OUT), reference(moe, x.reshape(-1, D)))


@pytest.mark.parametrize("spatial", [(), (4,), (2, 3)])
def test_channels_first(spatial: tuple[int, ...]) -> None:
    moe, x = layer(layout="channels-first"), torch.randn(2, D, *spatial, dtype=torch.float64)
    y = moe(x)
    assert y.shape == (2, D_OUT, *spatial)
    rows = reference(moe, x.movedim(1, -1).reshape(-1, D))
    torch.testing.assert_close(y.movedim(1, -1).reshape(-1, D_OUT), rows)


@pytest.mark.parametrize("roles", [PLAIN, GATED])
def test_a_norm_over_the_width_of_an_expert_sees_each_shared_copy_alone(roles) -> None:
    class Normed(Region):
        def forward(self, u, g=None):
            return F.layer_norm(super().forward(u, g), (H,))

    moe, x = layer(roles=roles, activation=Normed(), shared=2 * H), torch.randn(5, D, dtype=torch.float64)
    up, gate, down, up_bias, gate_bias, down_bias = moe.shared.roles()
    expected = down_bias
    for part in (slice(0, H), slice(H, 2 * H)):
        gates = (None, None) if gate is None else (gate[part], gate_bias[part])
        one = (up[part], gates[0], down[:, part], up_bias[part], gates[1], None)
        expected = expected + dense(one, moe.region, x)
    routed = copy.deepcopy(moe)
    routed.shared = None
    torch.testing.assert_close(moe(x), routed(x) + expected)


def test_hidden_dropout_in_training_only() -> None:
    moe, x = layer(hidden_dropout=0.5), torch.randn(50, D, dtype=torch.float64)
    assert not torch.equal(moe(x), moe(x))
    moe.eval()
    torch.testing.assert_close(moe(x), reference(moe, x))


def test_hidden_dropout_keeps_the_mean() -> None:
    """With the identity and no bias the layer is linear in the mask, so its mean over many masks is the value."""
    moe = layer(roles=("up", "down"), activation="identity", hidden_dropout=0.25)
    x = torch.randn(1, D, dtype=torch.float64)
    mean = moe(x.expand(20000, D)).mean(0)
    expected = moe.eval()(x)[0]
    assert (mean - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("options", OPTIONS)
def test_deepcopy_and_pickle(options) -> None:
    moe, x = layer(**options).eval(), torch.randn(5, D, dtype=torch.float64)
    for twin in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(twin(x), moe(x))
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in moe.parameters()}


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3], OPTIONS[6]])
def test_export_and_compile(options) -> None:
    moe = layer(**options).eval()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    shapes = ((Dim.AUTO, Dim.AUTO, Dim.STATIC),)
    exported = torch.export.export(moe, (x,), dynamic_shapes=shapes, strict=False).module()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in [(2, 3), (4, 5)]:
        x = torch.randn(*size, D, dtype=torch.float64)
        torch.testing.assert_close(exported(x), moe(x))
        torch.testing.assert_close(compiled(x), moe(x))


def test_compile_a_training_step() -> None:
    moe = layer(hidden_dropout=0.1, shared=4)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(3, D, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())


def test_parameter_names() -> None:
    moe = layer(roles=GATED, activation="silu", shared=5, shared_gate=True, output_bias=True)
    shapes = {name: tuple(parameter.shape) for name, parameter in moe.named_parameters()}
    assert shapes == {
        "output_bias": (D_OUT,),
        "experts.up": (E, H, D),
        "experts.gate": (E, H, D),
        "experts.down": (E, D_OUT, H),
        "experts.up_bias": (E, H),
        "experts.gate_bias": (E, H),
        "experts.down_bias": (E, D_OUT),
        "router.weight": (E, D),
        "shared.up": (5, D),
        "shared.gate": (5, D),
        "shared.down": (D_OUT, 5),
        "shared.up_bias": (5,),
        "shared.gate_bias": (5,),
        "shared.down_bias": (D_OUT,),
        "shared_gate.weight": (1, D),
    }


def test_on_the_meta_device_nothing_is_drawn() -> None:
    moe = layer(device="meta", shared=4)
    assert {p.device.type for name, p in moe.named_parameters() if not name.startswith("router")} == {"meta"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"roles": ("up",)}, "an expert without 'down' is no feed-forward block"),
        ({"roles": ("up", "down", "gate_bias")}, "an expert with a gate_bias has no gate"),
        (
            {"roles": ("up", "down", "side")},
            "an expert has no weight 'side'\n  hint: choose among up, gate, down, up_bias, gate_bias, down_bias",
        ),
        ({"activation": "gleu"}, "there is no activation named 'gleu'\n  hint: did you mean 'gelu'?"),
        (
            {"activation": Region(), "hidden_dropout": 0.1},
            "hidden_dropout is 0.1 and the activation is a module\n  hint: put the dropout inside the module",
        ),
        ({"shared_gate": True}, "shared_gate gates the shared experts, and there are none"),
        ({"layout": "nchw"}, "layout is 'nchw': it must be channels-last or channels-first"),
    ],
)
def test_refusals(options, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        layer(**options)
    assert str(caught.value) == text


def test_a_router_for_another_number_of_experts() -> None:
    with pytest.raises(UsageError) as caught:
        MoE(D, D_OUT, H, E, TopK(3))
    assert str(caught.value) == "the router chooses among 3 experts and there are 4"
