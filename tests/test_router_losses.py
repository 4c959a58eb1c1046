"""Every router loss against its definition, token by token in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moeify.errors import BadOption, UnknownName
from moeify.nn.losses import LOSSES
from moeify.nn.losses.base import Routed

E, K, T, D = 5, 2, 7, 3
Values = dict[str, Tensor]


def observed(tokens: int = T) -> Values:
    """As a router hands it out, float64; a slot of the last token has no expert."""
    made = torch.Generator().manual_seed(3)
    logits = torch.randn(tokens, E, generator=made, dtype=torch.float64)
    clean = torch.randn(tokens, E, generator=made, dtype=torch.float64)
    deviation = torch.rand(tokens, E, generator=made, dtype=torch.float64) + 0.1
    weights, experts = logits.softmax(1).topk(K)
    if tokens:
        experts[-1, 1], weights[-1, 1] = E, 0.0
    return {
        "logits": logits.requires_grad_(),
        "probabilities": logits.softmax(1),
        "experts": experts,
        "weights": logits.softmax(1).gather(1, experts.clamp_max(E - 1)) * (experts < E),
        "clean": clean.requires_grad_(),
        "deviation": deviation.requires_grad_(),
        "baseline": torch.randn(tokens, generator=made, dtype=torch.float64).requires_grad_(),
        "inputs": torch.randn(tokens, D, generator=made, dtype=torch.float64),
    }


def rows(x: Tensor) -> list:
    return x.detach().tolist()


def cv2(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def loads(values: Values) -> list[int]:
    return [sum(slot == i for slots in rows(values["experts"]) for slot in slots) for i in range(E)]


def mean_probabilities(values: Values) -> list[float]:
    return [sum(p[i] for p in rows(values["probabilities"])) / T for i in range(E)]


def switch(values: Values) -> float:
    f = [load / sum(loads(values)) for load in loads(values)]
    return E * sum(a * b for a, b in zip(f, mean_probabilities(values)))


def gshard(values: Values) -> float:
    c = [sum(slots[0] == i for slots in rows(values["experts"])) for i in range(E)]
    return sum(c[i] / T * m for i, m in enumerate(mean_probabilities(values))) / E


def z(values: Values) -> float:
    return sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in rows(values["logits"])) / T


def importance(values: Values) -> float:
    sums = [0.0] * (E + 1)
    for slots, weights in zip(rows(values["experts"]), rows(values["weights"])):
        for expert, weight in zip(slots, weights):
            sums[expert] += weight
    return cv2(sums[:E])


def load(values: Values) -> float:
    expected = [0.0] * E
    for noisy, clean, deviation in zip(*(rows(values[name]) for name in ("logits", "clean", "deviation"))):
        for i in range(E):
            kth = sorted((noisy[j] for j in range(E) if j != i), reverse=True)[K - 1]
            expected[i] += 0.5 * (1 + math.erf((clean[i] - kth) / deviation[i] / math.sqrt(2)))
    return cv2(expected)


def l1(values: Values) -> float:
    f = [load * E / sum(loads(values)) for load in loads(values)]
    return sum(a * b for a, b in zip(f, mean_probabilities(values)))


def similarity(values: Values) -> float:
    x, p = rows(values["inputs"]), rows(values["probabilities"])
    d = [[math.dist(a, b) for b in x] for a in x]
    most, same, different = max(map(max, d)), 0.0, 0.0
    for s in range(T):
        for t in range(T):
            for i in range(E):
                for j in range(E):
                    if i == j:
                        same += p[s][i] * p[t][j] * d[s][t] / most / E
                    else:
                        different += p[s][i] * p[t][j] * d[s][t] / most / (E * E - E)
    return (0.3 * same - 0.2 * different) / T**2


def reinforce(values: Values) -> float:
    total = 0.0
    for t in range(T):
        p, left, log_pi = rows(values["probabilities"])[t], 1.0, 0.0
        for expert in rows(values["experts"])[t]:
            log_pi += math.log(p[expert] / left)
            left -= p[expert]
        error = rows(REWARD)[t] - rows(values["baseline"])[t]
        huber = error**2 / 2 if abs(error) < 1 else abs(error) - 0.5
        total += -error * log_pi + 2.0 * huber
    return total / T


REWARD = torch.linspace(-3, 2, T, dtype=torch.float64)
DEFINITIONS: dict[str, tuple[Callable[[Values], float], tuple[str, ...]]] = {  # and what gets a gradient
    "switch": (switch, ("logits",)),
    "gshard": (gshard, ("logits",)),
    "z": (z, ("logits",)),
    "importance": (importance, ("logits",)),
    "load": (load, ("logits", "clean", "deviation")),
    "l1": (l1, ("logits",)),
    "similarity{same=0.3,different=0.2}": (similarity, ("logits",)),
    "reinforce{baseline=2}": (reinforce, ("logits", "baseline")),
}


def routed(text: str, tokens: int = T) -> Routed:
    values = observed(tokens)
    if "reinforce" in text and tokens:  # draws without putting back give every slot an expert
        first = values["experts"][-1, 0]
        values["experts"][-1, 1] = (first + 1) % E
    return Routed(values, E, REWARD[:tokens])


@pytest.mark.parametrize("text", DEFINITIONS)
def test_it_is_what_its_definition_says_and_reaches_the_router(text: str) -> None:
    loss, seen = LOSSES.parse(text), routed(text)
    define, reached = DEFINITIONS[text]
    value = loss.of(seen)
    assert value.shape == ()
    assert float(value.detach()) == pytest.approx(define(dict(seen.values)), rel=1e-9)
    leaves = [seen.values[name] for name in reached]
    for name, gradient in zip(reached, torch.autograd.grad(value, leaves)):
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("text", DEFINITIONS)
def test_no_tokens_no_loss(text: str) -> None:
    value = LOSSES.parse(text).of(routed(text, tokens=0))
    assert float(value.detach()) == 0.0
    value.backward()


def test_every_loss_is_held_to_a_definition() -> None:
    assert [text.partition("{")[0] for text in DEFINITIONS] == list(LOSSES)


def test_half_precision_is_summed_in_float32() -> None:
    """4096 in a sum of halves would lose the ones that follow."""
    logits = torch.zeros(9000, 2, dtype=torch.bfloat16)
    values = {"logits": logits, "probabilities": logits.softmax(1), "experts": torch.zeros(9000, 1, dtype=torch.int64)}
    seen = Routed(values, 2)
    assert float(LOSSES.parse("switch").of(seen)) == pytest.approx(1.0, rel=1e-6)
    assert float(LOSSES.parse("z").of(seen)) == pytest.approx(math.log(2) ** 2, rel=1e-6)


def test_scores_that_do_not_sum_to_one_are_shared_out() -> None:
    """Sigmoid scores: only their ratio within a token counts."""
    experts = torch.tensor([[0], [1]])
    p = torch.tensor([[0.9, 0.3], [0.2, 0.2]])
    values = {"probabilities": p, "experts": experts}
    assert float(LOSSES.parse("switch").of(Routed(values, 2))) == pytest.approx(2 * (0.5 * 0.625 + 0.5 * 0.375))


def test_load_where_every_expert_is_kept_has_nothing_to_balance() -> None:
    seen = routed("load")
    values = {**seen.values, "experts": torch.arange(E).expand(T, E)}
    assert float(LOSSES.parse("load").of(Routed(values, E)).detach()) == 0.0


def test_similarity_looks_at_some_tokens_evenly() -> None:
    seen = routed("similarity")
    some = {name: value[::3] for name, value in seen.values.items()}
    found = LOSSES.parse("similarity{tokens=3}").of(seen)
    assert torch.equal(found, LOSSES.parse("similarity").of(Routed(some, E)))


def test_l1_steers_its_coefficient_to_the_wanted_number_of_experts() -> None:
    loss = LOSSES.parse("l1{active=1.5,start=1e-3,rate=2}")
    seen = routed("l1")  # 13 slots of 7 tokens: more than 1.5
    assert loss.next_factor(loss.first_factor, [seen]) == 2e-3
    assert LOSSES.parse("l1{active=1.9,rate=2}").next_factor(1.0, [seen]) == 0.5
    assert not LOSSES.parse("l1").adapts


def test_bad_names_and_options() -> None:
    with pytest.raises(UnknownName, match="did you mean 'switch'"):
        LOSSES.parse("swich")
    with pytest.raises(BadOption, match="the z loss's weight is -1"):
        LOSSES.parse("z{weight=-1}")
