"""Every router by its definition, token by token in plain Python; the ones older than this file are in test_routers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.nn.routers import ROUTERS
from tests.test_routers import D, E, build, tokens

T = 24


def exp_normalised(scores: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in scores)
    return [math.exp(z) / total for z in scores]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def best(scores: list[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def shares(chosen: dict[int, float]) -> dict[int, float]:
    total = sum(chosen.values())
    return {e: g / total for e, g in chosen.items()}


def scores_of(router: Any, x: Tensor, name: str = "weight") -> list[list[float]]:
    return (x.double() @ router.get_parameter(name).detach().double().t()).tolist()


def chosen_by(router: Any, x: Tensor) -> list[dict[int, float]]:
    """What the router gives each token: weight by expert, slots without one left out."""
    experts, weights = router(x)
    return [{e: g for e, g in zip(*row) if e < E} for row in zip(experts.tolist(), weights.tolist())]


def check(got: list[dict[int, float]], expected: list[dict[int, float]]) -> None:
    assert [set(row) for row in got] == [set(row) for row in expected]
    for mine, its in zip(got, expected):
        assert mine == pytest.approx(its, rel=1e-5)


def spread(router: Any, seed: int = 7) -> Any:
    """Weights far apart, buffers too: what starts equal or near zero hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*router.parameters(), *(b for b in router.buffers() if b.is_floating_point())]:
            value.normal_(0, 0.25, generator=generator)
    return router


def sigma(router: Any, z: list[float]) -> dict[int, float]:
    s = [sigmoid(v) for v in z]
    return {e: s[e] for e in best(s, 2)}


def sigmoid_bias(router: Any, z: list[float]) -> dict[int, float]:
    s = [sigmoid(v) for v in z]
    biased = [v + float(b) for v, b in zip(s, router.bias)]
    groups = [sum(sorted(biased[g : g + 2])[-2:]) for g in range(0, E, 2)]
    allowed = [e for e in range(E) if e // 2 in best(groups, 2)]
    taken = sorted(allowed, key=lambda e: -biased[e])[:3]
    return {e: 2.5 * g for e, g in shares({e: s[e] for e in taken}).items()}


def top_p(router: Any, z: list[float]) -> dict[int, float]:
    p = exp_normalised(z)
    order = best(p, E)
    count = next(n for n in range(1, E + 1) if sum(p[e] for e in order[:n]) >= 0.4)
    taken = {e: p[e] for e in order[: min(count, 4)]}
    kind = router.spec.weight
    return shares(taken) if kind == "share" else taken if kind == "probability" else dict.fromkeys(taken, 1.0)


def relu(router: Any, z: list[float]) -> dict[int, float]:
    return {e: z[e] for e in best(z, 3) if z[e] > 0}


def soft(router: Any, z: list[float]) -> dict[int, float]:
    return dict(enumerate(exp_normalised(z)))


def sinkhorn(router: Any, z: list[float]) -> dict[int, float]:
    p = exp_normalised(z)
    return {e: p[e] for e in best(z, 2)}


DEFINITIONS = {
    "sigma": (sigma, 2),
    "sigmoid-bias{groups=4,top-groups=2,scale=2.5}": (sigmoid_bias, 3),
    "top-p": (top_p, 4),
    "top-p{weight=probability}": (top_p, 4),
    "top-p{weight=one}": (top_p, 4),
    "relu": (relu, 3),
    "soft": (soft, 8),
    "sinkhorn": (sinkhorn, 2),
    "base": (lambda router, z: {e: sigmoid(z[e]) for e in best(z, 1)}, 1),
    "rl": (lambda router, z: dict.fromkeys(best(z, 2), 0.5), 2),
    "gshard{capacity-factor=0}": (lambda router, z: shares({e: exp_normalised(z)[e] for e in best(z, 2)}), 2),
    "random": (lambda router, z: dict.fromkeys(range(3), 1 / 3), 3),
    "random{inference=average}": (lambda router, z: dict.fromkeys(range(E), 1 / E), 3),
}


@pytest.mark.parametrize("text", DEFINITIONS)
def test_each_token_by_itself_in_evaluation(text):
    definition, top_k = DEFINITIONS[text]
    router, x = spread(build(text, top_k)), tokens(T)[0]
    scores = [[]] * T if text.startswith("random") else scores_of(router, x)
    expected = [definition(router, z) for z in scores]
    check(chosen_by(router, x), expected)
    if text.startswith(("top-p", "relu")):
        assert len({len(row) for row in expected}) > 1  # or the number did not vary


@pytest.mark.parametrize("renormalise", [True, False])
def test_cosine(renormalise):
    router, x = spread(build(f"cosine{{width=5,renormalise={str(renormalise).lower()}}}", 2)), tokens(T)[0]
    projected, rows = scores_of(router, x, "projection"), router.weight.tolist()
    scale, expected = math.exp(router.log_scale.item()), []
    for v in projected:
        cosines = [sum(a * b for a, b in zip(v, w)) / (math.hypot(*v) * math.hypot(*w)) for w in rows]
        p = exp_normalised([c * scale for c in cosines])
        taken = {e: p[e] for e in best(p, 2)}
        expected.append(shares(taken) if renormalise else taken)
    check(chosen_by(router, x), expected)


def test_cosine_keeps_its_temperature_above_the_least():
    router, x = build("cosine{width=5}", E), tokens(T)[0]
    with torch.no_grad():
        router.log_scale.fill_(20.0)
    high = chosen_by(router, x)
    with torch.no_grad():
        router.log_scale.fill_(math.log(100))
    check(high, chosen_by(router, x))


@pytest.mark.parametrize("renormalise", [True, False])
def test_hierarchical(renormalise):
    text = f"hierarchical{{groups=4,top-groups=3,renormalise={str(renormalise).lower()}}}"
    router, x = spread(build(text, 3)), tokens(T)[0]
    expected = []
    for z1, z2 in zip(scores_of(router, x, "group_weight"), scores_of(router, x)):
        p1 = exp_normalised(z1)
        groups = {a: p1[a] for a in best(z1, 3)}
        row = {}
        for a, g1 in (shares(groups) if renormalise else groups).items():
            p2 = exp_normalised(z2[2 * a : 2 * a + 2])
            member = best(p2, 1)[0]
            row[2 * a + member] = g1 * (1.0 if renormalise else p2[member])
        expected.append(row)
    check(chosen_by(router, x), expected)


def gshard(z: list[list[float]], draws: list[float], factor: float) -> list[dict[int, float]]:
    """Algorithm 1 of the paper: all first choices, then all second ones."""
    capacity, seen = math.ceil(2 * len(z) * factor / E), [0] * E
    rows: list[dict[int, float]] = [{} for _ in z]
    gates = [shares({e: exp_normalised(row)[e] for e in best(row, 2)}) for row in z]
    for choice in (0, 1):
        for t, gate in enumerate(gates):
            expert = best(z[t], 2)[choice]
            if choice and not draws[t] < 2 * gate[expert]:
                continue
            if seen[expert] < capacity:
                rows[t][expert] = gate[expert]
            seen[expert] += 1
    return rows


@pytest.mark.parametrize("train", [False, True])
def test_gshard(train):
    router, x = spread(build("gshard{capacity-factor=0.75}", 2)).train(train), tokens(T)[0]
    torch.manual_seed(3)
    got = chosen_by(router, x)
    torch.manual_seed(3)
    draws = torch.rand(T, 1).flatten().tolist() if train else [0.0] * T
    expected = gshard(scores_of(router, x), draws, 0.75)
    check(got, expected)
    assert {len(row) for row in expected} == {0, 1, 2}
    unlimited = gshard(scores_of(router, x), draws, 100)
    assert (sum(map(len, unlimited)) < 2 * T) == train  # second experts left out at random


def test_base_gives_every_expert_its_share_at_the_largest_sum_of_scores():
    router, x = spread(ROUTERS.parse("base").build(D, 3, 1, dtype=torch.float32)).train(), tokens(5)[0]
    x[1:] = x[:1] + x[1:] / 10  # tokens that are alike all prefer one expert
    z = scores_of(router, x)
    options = [c for c in itertools.product(range(3), repeat=5) if max(map(c.count, range(3))) <= 2]
    chosen = max(options, key=lambda c: sum(z[t][e] for t, e in enumerate(c)))
    assert len({best(row, 1)[0] for row in z}) == 1
    check(chosen_by(router, x), [{e: sigmoid(z[t][e])} for t, e in enumerate(chosen)])


def test_sinkhorn_balances_in_training():
    router, x = spread(build("sinkhorn{epsilon=0.5}", 1)).train(), tokens(64)[0]
    z = torch.tensor(scores_of(router, x))
    plan = (z / 0.5).exp()
    for _ in range(30):
        plan = plan / plan.sum(0, keepdim=True) / E
        plan = plan / plan.sum(1, keepdim=True) / 64
    p = torch.softmax(z, 1)
    check(chosen_by(router, x), [{e: float(p[t, e])} for t, e in enumerate(plan.argmax(1).tolist())])
    load = torch.bincount(plan.argmax(1), minlength=E)
    assert load.max() < torch.bincount(z.argmax(1), minlength=E).max()


@pytest.mark.parametrize("train", [False, True])
def test_expert_choice(train):
    router, x = spread(build("expert-choice", 2)).train(train), tokens(T)[0]
    p = [exp_normalised(z) for z in scores_of(router, x)]
    expected: list[dict[int, float]] = [{} for _ in p]
    for e in range(E):
        for t in best([row[e] for row in p], math.ceil(T * 2 / E)):
            expected[t][e] = p[t][e]
    check(chosen_by(router, x), expected)
    assert max(map(len, expected)) > 2


def test_random_draws_one_set_for_all_tokens_of_a_call():
    for text in ("random", "random{inference=average}"):
        router, x = build(text, 2).train(), tokens(T)[0]
        seen = set()
        for _ in range(60):
            rows = chosen_by(router, x)
            assert all(row == rows[0] for row in rows)
            assert list(rows[0].values()) == [0.5, 0.5]
            seen.update(rows[0])
        assert seen == set(range(E))


def test_rl_draws_by_its_probabilities_in_training():
    router = spread(build("rl", 1)).train()
    x = tokens(1)[0].expand(20000, D)
    torch.manual_seed(0)
    share = torch.bincount(router(x)[0].flatten(), minlength=E) / 20000
    p = torch.tensor(exp_normalised(scores_of(router, x[:1])[0]))
    assert float((share - p).abs().max()) < 4 * 0.5 / math.sqrt(20000)  # four deviations of a share


def test_rl_observes_a_baseline_that_sends_no_gradient_to_the_token():
    router, x = spread(build("rl", 2)), tokens(T)[0].requires_grad_()
    values: dict[str, Tensor] = {}
    router.observer = values.update
    router(x)
    expected = x @ router.baseline_weight[0] + router.baseline_bias
    torch.testing.assert_close(values["baseline"], expected.detach())
    values["baseline"].sum().backward()
    assert x.grad is None
    assert router.baseline_weight.grad is not None


def test_sigmoid_bias_moves_its_biases_towards_even_loads():
    router = build("sigmoid-bias{gamma=0.5}", 2)
    router.after_step({"experts": torch.tensor([[0, 1], [0, 1], [0, 2], [0, 3]])})
    # Loads 4 2 1 1 0 0 0 0, mean 1.
    assert router.bias.tolist() == [-0.5, -0.5, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5]
    router.zero_grad()
    assert not any(name == "bias" for name, _ in router.named_parameters())


def test_sigmoid_bias_weights_do_not_see_the_bias():
    router, x = build("sigmoid-bias", E), tokens(T)[0]
    before = chosen_by(router, x)
    router.bias.copy_(torch.arange(E))
    check(chosen_by(router, x), before)


@pytest.mark.parametrize(
    ("scores", "tau", "expected"),
    [
        ([4.0, 1.9, 2.0, 3.0], 0.5, [0, 3, 2]),
        ([4.0, 1.9, 2.0, 3.0], 0.0, [0]),
        ([4.0, 1.9, -2.0, 3.0], 1.0, [0, 3, 1]),
        ([-1.0, -3.0, -0.5, -4.0], 0.5, [2]),  # fitted scores may be negative: the largest stays
        ([2.0, 2.0, 2.0, 2.0], 0.0, [0, 1, 2, 3]),
    ],
)
def test_dynamic_k(scores, tau, expected):
    spec = ROUTERS.parse(f"dynamic-k{{init=normal,tau={tau}}}")
    experts, weights = spec.choose(torch.tensor([scores]), 4)
    assert experts[0].tolist() == expected + [4] * (4 - len(expected))
    assert weights[0].tolist() == [1.0] * len(expected) + [0.0] * (4 - len(expected))
    assert spec.choose(torch.tensor([scores]), 2)[0][0].tolist() == (expected + [4])[:2]


def test_sigma_starts_with_weight_one_where_it_says_so():
    assert (build("sigma{init-std=0,scale=2}", 3)(tokens(4)[0])[1] == 1).all()


@pytest.mark.parametrize("text", ["sigmoid-bias", "relu", "hierarchical", "cosine{width=5}", "rl", "soft"])
def test_shards_of_one_copy_are_chosen_together(text):
    top_k = E if text == "soft" else 4
    for row in chosen_by(build(text, top_k, repeat=2), tokens(T)[0]):
        assert {e // 2 * 2 + i for e in row for i in (0, 1)} == set(row)
