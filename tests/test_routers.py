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
from moeify.nn.routers.base import Router

D, E, V = 6, 8, 50
TEXTS = [
    ("softmax-topk", 2),
    ("softmax-topk{renormalise=false}", 3),
    ("noisy-topk{init-std=0.5}", 2),
    ("switch", 1),
    ("switch{capacity-factor=0}", 1),
    ("hash", 2),
    ("hash{table=balanced}", 1),
]


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
        assert expert == row.argmax()
        expected = row[expert] if seen[expert] < capacity else torch.zeros(())
        torch.testing.assert_close(weight, expected)
        seen[expert] += 1
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
    assert any(not torch.equal(v, other.state_dict()[n]) for n, v in first.state_dict().items())


@pytest.mark.parametrize(("text", "top_k"), TEXTS)
def test_gates_sum_to_one_where_the_router_says_so(text, top_k):
    x, ids = tokens(40)
    sums = build(text, top_k)(x, ids)[1].sum(1)
    says = ROUTERS.parse(text).gates_sum_to_one
    assert torch.allclose(sums, torch.ones(40)) == says


@pytest.mark.parametrize(("text", "top_k"), [t for t in TEXTS if not t[0].startswith("hash")])
def test_gradients_reach_the_router(text, top_k):
    router = build(text, top_k).train()
    x, ids = tokens(20)
    weights = router(x.requires_grad_(), ids)[1]
    (weights * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in router.parameters())


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
    experts, weights = build(text, top_k)(*tokens(count))
    assert experts.shape == weights.shape == (count, top_k)


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
