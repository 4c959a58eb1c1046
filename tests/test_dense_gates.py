"""The attentive gate, the competitive loss and THOR's consistency loss by their definitions, in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import moeify
from moeify.errors import UsageError
from moeify.nn.attentive import AttentiveGate
from moeify.nn.competitive import competitive
from moeify.nn.routers import ROUTERS
from moeify.training.consistency import consistency
from tests.routed_models import converted, tokens

T, E, F, G, A, C = 6, 4, 5, 3, 2, 7


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in scores)
    return [math.exp(z) / total for z in scores]


def test_attentive_gate() -> None:
    torch.manual_seed(0)
    gate = AttentiveGate(G, F, A).double()
    seen, hidden = drawn(T, G), drawn(T, E, F).requires_grad_()
    logits = gate(seen, hidden)
    query, key = (one.weight.tolist() for one in (gate.query, gate.key))
    for t in range(T):
        q = [sum(w * g for w, g in zip(row, seen[t].tolist())) for row in query]
        for i in range(E):
            k = [sum(w * h for w, h in zip(row, hidden[t, i].tolist())) for row in key]
            assert logits[t, i].item() == pytest.approx(sum(a * b for a, b in zip(q, k)) / math.sqrt(A), rel=1e-12)
    logits.sum().backward()
    assert hidden.grad is not None  # experts learn what the gate looks for
    assert hidden.grad.any()


def test_competitive_loss_is_the_likelihood_of_a_mixture_of_gaussians() -> None:
    logits, outputs, wanted = drawn(T, E), drawn(T, E, C), drawn(T, C)
    value = competitive(logits, 0.5 * (outputs - wanted[:, None]).square().sum(2))
    expected = 0.0
    for t in range(T):
        p = softmax(logits[t].tolist())
        squares = [math.dist(outputs[t, i].tolist(), wanted[t].tolist()) ** 2 for i in range(E)]
        expected -= math.log(sum(p[i] * math.exp(-squares[i] / 2) for i in range(E))) / T
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_competitive_loss_of_cross_entropies_is_that_of_mixed_probabilities() -> None:
    logits, scores, labels = drawn(T, E), drawn(T, E, C), torch.arange(T)
    errors = -scores.log_softmax(2).gather(2, labels.view(T, 1, 1).expand(T, E, 1)).squeeze(2)
    mixed = torch.einsum("te,tec->tc", logits.softmax(1), scores.softmax(2))
    expected = torch.nn.functional.nll_loss(mixed.log(), labels)
    torch.testing.assert_close(competitive(logits, errors), expected)


def test_competitive_loss_survives_experts_that_are_far_off() -> None:
    errors = torch.tensor([[1e4, 1e4 + 1]])
    assert competitive(torch.zeros(1, 2), errors).item() == pytest.approx(1e4, rel=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_consistency_loss(masked: bool) -> None:
    first, second = drawn(2, 3, C).requires_grad_(), (drawn(2, 3, C) * 2 + 0.1).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]) if masked else torch.ones(2, 3)
    value = consistency(first, second, mask if masked else None)
    expected, counted = 0.0, 0
    for b in range(2):
        for t in range(3):
            if mask[b, t]:
                p, q = softmax(first[b, t].tolist()), softmax(second[b, t].tolist())
                expected += sum(a * math.log(a / c) + c * math.log(c / a) for a, c in zip(p, q)) / 2
                counted += 1
    assert value.item() == pytest.approx(expected / counted, rel=1e-12)
    value.backward()
    for one in (first, second):
        assert one.grad is not None
        assert one.grad[mask != 0].any(dim=-1).all()
        assert not one.grad[mask == 0].any()


def test_consistency_of_half_precision_and_of_nothing() -> None:
    half = drawn(4, C).half()
    assert consistency(half, half + 1).dtype == torch.float32
    assert consistency(drawn(2, C), drawn(2, C) + 3, torch.zeros(2)).item() == 0


def test_consistency_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(UsageError) as error:
        consistency(drawn(2, 3, C), drawn(2, 4, C))
    assert str(error.value) == "the two passes gave scores of shapes [2, 3, 7] and [2, 4, 7]"
    with pytest.raises(UsageError) as error:
        consistency(drawn(2, 3, C), drawn(2, 3, C), torch.ones(2))
    assert str(error.value) == "the mask is [2] and the scores are of [2, 3] tokens"


@pytest.mark.parametrize("form", ["module", "graph"])
def test_experts_drawn_at_random_learn_to_agree(form: str) -> None:
    """Two passes of the random router in training mode draw different experts; the loss makes these say the same."""
    model = converted(form, router="random", top_k=1, method="noise{std=0.5,fraction=1}")
    x = tokens()

    def apart() -> float:
        with torch.no_grad():
            return sum(consistency(model(x), model(x)).item() for _ in range(20)) / 20

    torch.manual_seed(0)
    before = apart()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        consistency(model(x), model(x)).backward()
        optimizer.step()
    assert before > 0
    assert apart() < 0.5 * before


def test_methods_that_are_no_routers_say_why() -> None:
    with pytest.raises(UsageError) as error:
        ROUTERS.parse("soft-moe")
    assert str(error.value) == (
        "there is no router 'soft-moe': its experts see weighted means of a sequence's tokens, and a router gives each "
        "token experts of its own\n"
        "  hint: choose 'soft' (all experts for each token) or 'expert-choice' (experts choose whole tokens)"
    )
    with pytest.raises(UsageError) as error:
        moeify.convert(torch.nn.Linear(2, 2), experts=2, router="attentive")
    assert str(error.value) == (
        "there is no router 'attentive': it weighs experts by their hidden values, and a router gives a token its "
        "experts before any has run\n"
        "  hint: choose 'soft', or for a layer of your own that runs every expert, the gate in moeify.nn.attentive"
    )
