"""Every router against its definition computed another way; gradients; no token and one token; export."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.errors import BadOption, BadRecipe, Refused
from moeify.ir.inline import trace
from moeify.ir.weights import generator_for
from moeify.nn.routers import ROUTERS
from moeify.nn.routers.router import Router

D, E, V = 6, 8, 50
TEXTS = [
    ("softmax-topk", 2),
    ("softmax-topk{renormalise=false}", 3),
    ("noisy-topk{init-std=0.5}", 2),
    ("switch", 1),
    ("switch{capacity-factor=0}", 1),
    ("hash", 2),
    ("hash{table=balanced}", 1),
    ("sigma", 2),
    ("sigmoid-bias", 3),
    ("sigmoid-bias{groups=4,top-groups=2,scale=2.5}", 3),
    ("top-p", 4),
    ("top-p{weight=probability}", 4),
    ("top-p{weight=one,p=0.5}", 4),
    ("relu", 8),
    ("cosine{width=5}", 2),
    ("cosine{width=5,renormalise=false}", 2),
    ("soft", 8),
    ("hierarchical{top-groups=2}", 4),
    ("hierarchical{groups=4,renormalise=false}", 2),
    ("gshard", 2),
    ("gshard{capacity-factor=0}", 2),
    ("base", 1),
    ("sinkhorn", 2),
    ("expert-choice", 2),
    ("random", 2),
    ("random{inference=average}", 2),
    ("rl", 2),
]
NO_SCORES = ("hash", "random")


def build(text: str, top_k: int, *, repeat: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> Router:
    router = ROUTERS.parse(text).build(D, E, top_k, dtype=dtype, vocabulary=V)
    router.reset(generator_for(seed, "layer.router"), repeat)
    return router.eval()


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, D, generator=generator) * 5,
        torch.randint(V, (count,), generator=generator),
    )


@pytest.mark.parametrize("renormalise", [True, False])
def test_softmax_topk_is_its_definition(renormalise):
    router = build(f"softmax-topk{{renormalise={str(renormalise).lower()}}}", 3)
    x, _ = tokens(20)
    experts, weights = router(x)
    for row, chosen, gates in zip(x, experts.tolist(), weights):
        z = [math.exp(sum(a * b for a, b in zip(row.tolist(), w))) for w in router.weight.tolist()]
        p = [value / sum(z) for value in z]
        best = sorted(range(E), key=lambda i: -p[i])[:3]
        total = sum(p[i] for i in best) if renormalise else 1.0
        assert chosen == best
        torch.testing.assert_close(gates, torch.tensor([p[i] / total for i in best]))


def test_equal_scores_go_to_the_lower_experts():
    router = build("softmax-topk", 4, repeat=4)
    experts, weights = router(torch.zeros(3, D))
    assert experts.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(weights, torch.full((3, 4), 0.25))


def test_repeated_rows_are_chosen_together():
    router = build("softmax-topk", 4, repeat=2)
    experts, _ = router(tokens(50)[0])
    assert all(
        sorted(row) == sorted({j for e in row for j in (e // 2 * 2, e // 2 * 2 + 1)}) for row in experts.tolist()
    )


def test_noisy_topk_is_its_definition():
    router = build("noisy-topk{init-std=0.5}", 2).train()
    with torch.no_grad():
        router.noise_weight.normal_(generator=torch.Generator().manual_seed(1))
    x, _ = tokens(20)
    torch.manual_seed(3)
    experts, weights = router(x)
    torch.manual_seed(3)
    noise = torch.randn(20, E)
    h = x @ router.weight.t() + noise * torch.log1p(torch.exp(x @ router.noise_weight.t()))
    # KeepTopK as the paper writes it: minus infinity outside the k highest, softmax over all.
    kept = torch.where(h >= h.topk(2).values[:, -1:], h, -torch.inf)
    torch.testing.assert_close(torch.zeros(20, E).scatter(1, experts, weights), torch.softmax(kept, 1))


def test_noisy_topk_starts_at_zero_and_is_quiet_in_evaluation():
    router = build("noisy-topk", 2)
    assert not router.weight.any()
    assert not router.noise_weight.any()
    x, _ = tokens(200)
    assert router(x)[0].tolist() == [[0, 1]] * 200
    assert len(router.train()(x)[0].unique()) == E


def test_switch_is_its_definition():
    router = build("switch", 1)
    x, _ = tokens(30)
    experts, weights = router(x)
    p = torch.softmax(x @ router.weight.t(), 1)
    capacity = math.ceil(30 / E * 1.25)
    seen = [0] * E
    for row, expert, weight in zip(p, experts[:, 0].tolist(), weights[:, 0]):
        best = int(row.argmax())
        kept = seen[best] < capacity
        assert expert == (best if kept else E)  # the number of no expert
        torch.testing.assert_close(weight, row[best] if kept else torch.zeros(()))
        seen[best] += 1
    assert max(seen) > capacity  # or the limit was not tested


def test_switch_without_limit_drops_nothing():
    x, _ = tokens(64)
    assert (build("switch{capacity-factor=0}", 1)(x)[1] > 0).all()


def test_switch_jitters_in_training_only():
    router = build("switch{capacity-factor=0,jitter=0.5}", 1)
    x, _ = tokens(16)
    assert torch.equal(router(x)[1], router(x)[1])
    assert not torch.equal(router.train()(x)[1], router(x)[1])


def test_switch_computes_in_float32():
    router = build("switch", 1, dtype=torch.bfloat16)
    assert router.weight.dtype == torch.float32
    assert router(tokens(4)[0].bfloat16())[1].dtype == torch.bfloat16


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("table", ["random", "balanced"])
def test_hash_reads_k_different_experts_from_its_table(table, top_k):
    router = build(f"hash{{table={table}}}", top_k)
    x, ids = tokens(40)
    experts, weights = router(x, ids)
    assert experts.tolist() == [router.table[i].tolist() for i in ids.tolist()]
    assert all(len(set(row)) == top_k for row in router.table.tolist())
    assert router.table.min() >= 0
    assert router.table.max() < E
    assert (weights == 1 / top_k).all()


def test_balanced_hash_gives_every_expert_the_same_number_of_ids():
    table = build("hash{table=balanced}", 3).table
    for column in table.unbind(1):
        counts = torch.bincount(column, minlength=E)
        assert counts.max() - counts.min() <= 1


def test_hash_chooses_the_shards_of_one_copy_together():
    table = build("hash", 4, repeat=2).table
    assert (table[:, 0::2] % 2 == 0).all()
    assert torch.equal(table[:, 0::2] + 1, table[:, 1::2])


@pytest.mark.parametrize(("text", "top_k"), TEXTS)
def test_the_start_depends_on_seed_and_name_only(text, top_k):
    first, again, other = build(text, top_k), build(text, top_k), build(text, top_k, seed=1)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    if not text.startswith("random"):
        assert any(not torch.equal(v, other.state_dict()[n]) for n, v in first.state_dict().items())


@pytest.mark.parametrize(("text", "top_k"), TEXTS)
def test_gates_sum_to_one_where_the_router_says_so(text, top_k):
    x, ids = tokens(40)
    sums = build(text, top_k)(x, ids)[1].sum(1)
    says = ROUTERS.parse(text).gates_sum_to_one
    assert torch.allclose(sums, torch.ones(40)) == says


@pytest.mark.parametrize(("text", "top_k"), [t for t in TEXTS if not t[0].startswith(NO_SCORES)])
def test_gradients_reach_the_router_by_its_weights_and_by_what_is_observed(text, top_k):
    router = build(text, top_k).train()
    x, ids = tokens(20)
    values = {}
    router.observer = values.update
    weights = router(x.requires_grad_(), ids)[1]
    random = torch.Generator().manual_seed(0)
    if not text.startswith(("rl", "top-p{weight=one")):  # their weights are constants
        (weights * torch.randn(weights.shape, generator=random)).sum().backward(retain_graph=True)
        assert x.grad.abs().sum() > 0
        assert all(p.grad.abs().sum() > 0 for p in router.parameters())
    router.zero_grad()
    floats = [value for value in values.values() if value.requires_grad]
    sum((value * torch.randn(value.shape, generator=random)).sum() for value in floats).backward()
    assert all(p.grad.abs().sum() > 0 for p in router.parameters())


@pytest.mark.parametrize(("text", "top_k"), TEXTS)
def test_what_is_observed(text, top_k):
    router = build(text, top_k).train()
    values = {}
    router.observer = values.update
    torch.manual_seed(1)
    experts, weights = router(*tokens(30))
    wanted = {"experts", "weights"} | (set() if text.startswith(NO_SCORES) else {"logits", "probabilities"})
    wanted |= {"clean", "deviation"} if text.startswith("noisy") else {"baseline"} if text == "rl" else set()
    assert set(values) == wanted
    assert torch.equal(values["weights"], weights)
    used = experts < E
    assert torch.equal(values["experts"][used], experts[used])
    for name in wanted & {"logits", "probabilities", "clean", "deviation"}:
        assert values[name].shape == (30, E)
    router.observer = None
    torch.manual_seed(1)
    again = router(*tokens(30))
    assert torch.equal(again[0], experts)
    assert torch.equal(again[1], weights)


@pytest.mark.parametrize(("text", "top_k"), TEXTS)
@pytest.mark.parametrize("train", [False, True])
def test_a_slot_has_an_expert_exactly_where_it_has_a_weight(text, top_k, train):
    experts, weights = build(text, top_k).train(train)(*tokens(40))
    assert torch.equal(experts < E, weights > 0)
    assert ((experts >= 0) & (experts <= E)).all()
    for row in experts.tolist():
        real = [e for e in row if e < E]
        assert len(set(real)) == len(real)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("text", "top_k"), TEXTS)
def test_weights_have_the_dtype_of_the_tokens(text, top_k, dtype):
    x, ids = tokens(9)
    experts, weights = build(text, top_k, dtype=dtype)(x.to(dtype), ids)
    assert experts.dtype == torch.int64
    assert weights.dtype == dtype


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(("text", "top_k"), TEXTS)
def test_few_tokens(text, top_k, count):
    wide = text == "expert-choice" or text.startswith("random{")  # a slot for every expert
    for train in (False, True):
        experts, weights = build(text, top_k).train(train)(*tokens(count))
        assert experts.shape == weights.shape == (count, E if wide else top_k)


@pytest.mark.parametrize(("text", "top_k"), TEXTS)
def test_export_keeps_the_number_of_tokens_free(text, top_k):
    router = build(text, top_k)
    needs_ids = ROUTERS.parse(text).needs_token_ids
    args = tokens(4) if needs_ids else tokens(4)[:1]
    graph_module = trace(router, args, dynamic=range(len(args)))
    assert all(n.target._schema.name.startswith(("aten::", "moeify::")) for n in graph_module.graph.nodes
               if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload))  # fmt: skip
    for count in (0, 1, 17):
        given = tokens(count, seed=count)
        experts, weights = graph_module(*given[: len(args)])
        expected = router(*given)
        assert torch.equal(experts, expected[0])
        assert torch.equal(weights, expected[1])


def test_switch_refuses_more_than_one_expert_per_token():
    with pytest.raises(BadRecipe) as error:
        build("switch", 2)
    assert str(error.value) == "the switch router chooses one expert per token, not 2\n  hint: --top-k 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "switch{capacity-factor=-1}",
            (
                "switch.capacity-factor is -1.0: it must be a finite number of at least 0\n"
                "  hint: 0 means that there is no limit"
            ),
        ),
        ("switch{jitter=1.5}", "switch.jitter is 1.5: it must be between 0 and 1"),
        ("switch{init-std=inf}", "switch.init-std is inf: it must be a finite number of at least 0"),
        ("softmax-topk{init-std=nan}", "softmax-topk.init-std is nan: it must be a finite number of at least 0"),
        ("noisy-topk{init-std=-1}", "noisy-topk.init-std is -1.0: it must be a finite number of at least 0"),
    ],
)
def test_options_out_of_range(text, message):
    with pytest.raises(BadOption) as error:
        ROUTERS.parse(text)
    assert str(error.value) == message


def test_hash_refuses_an_unknown_table():
    with pytest.raises(BadOption) as error:
        ROUTERS.parse("hash{table=sorted}")
    assert str(error.value) == "hash.table is 'sorted'\n  hint: choose one of balanced, random"


def test_hash_refuses_a_call_without_token_ids():
    with pytest.raises(Refused) as error:
        build("hash", 1)(torch.zeros(2, D))
    assert str(error.value) == "the hash router needs token ids, and this call has none"


def test_hash_refuses_a_model_without_vocabulary():
    with pytest.raises(Refused) as error:
        ROUTERS.parse("hash").build(D, E, 1, dtype=torch.float32)
    assert str(error.value) == "the hash router needs the size of the vocabulary, and there is none here"
