"""``moe.balanced_assignment`` and ``moe.sinkhorn``: choices that give every expert its share of the tokens.

They look at all tokens at once, so they act in training alone; otherwise every token has its highest score. No gradient
goes through a choice.
"""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from moeify.ir import ops_check
from moeify.ir.assignment import assign
from moeify.ir.ops_library import define


def _balanced_assignment(scores_TE: Tensor, train: bool) -> Tensor:
    """[T]: the expert of each token so that the sum of their scores is the largest among all choices that give no
    expert more than ceil(T / E) tokens. On the CPU; a CUDA tensor is copied there and waited for.
    """
    ops_check.scores("balanced_assignment", scores_TE)
    if not train:
        return scores_TE.argmax(dim=1)
    T, E = scores_TE.shape
    if T == 0:
        return torch.empty(0, dtype=torch.int64, device=scores_TE.device)
    cost_TE = -scores_TE.detach().cpu().double().numpy()
    if not numpy.isfinite(cost_TE).all():
        raise ValueError("moeify::balanced_assignment: the scores are NaN or infinite")
    # Tokens of no cost fill what is left, so that all experts have the same number.
    filled = numpy.concatenate([cost_TE, numpy.zeros((-T % E, E))])
    return torch.from_numpy(assign(filled)[:T]).to(scores_TE.device, torch.int64)


def _balanced_assignment_fake(scores_TE: Tensor, train: bool) -> Tensor:
    return scores_TE.new_empty(scores_TE.shape[0], dtype=torch.int64)


def _sinkhorn(scores_TE: Tensor, epsilon: float, iterations: int, train: bool) -> Tensor:
    """The logarithm of the plan Pi [T, E] that maximises ``<Pi, scores> + epsilon * H(Pi)``, its rows summing to 1 / T
    and its columns to 1 / E: alternating normalisation in log space (Cuturi, arXiv 1306.0895), so many times. Rows are
    normalised last, so they are exact. Outside training the scores themselves.
    """
    ops_check.scores("sinkhorn", scores_TE)
    T, E = scores_TE.shape
    if not train or T == 0:
        return scores_TE.clone(memory_format=torch.contiguous_format)
    log_TE = scores_TE.detach() / epsilon
    for _ in range(iterations):
        log_TE = log_TE - log_TE.logsumexp(dim=0, keepdim=True) - numpy.log(E)
        log_TE = log_TE - log_TE.logsumexp(dim=1, keepdim=True) - numpy.log(T)
    return log_TE


def _sinkhorn_fake(scores_TE: Tensor, epsilon: float, iterations: int, train: bool) -> Tensor:
    return torch.empty_like(scores_TE, memory_format=torch.contiguous_format)


define(
    "balanced_assignment(Tensor scores_TE, bool train) -> Tensor",
    _balanced_assignment,
    _balanced_assignment_fake,
)
define(
    "sinkhorn(Tensor scores_TE, float epsilon, int iterations, bool train) -> Tensor",
    _sinkhorn,
    _sinkhorn_fake,
)
