"""REINFORCE with a learned baseline, for routers that draw their experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from moeify.nn.losses.base import Routed, RouterLoss, Total, divided, here, precise, rows


@dataclass(frozen=True)
class Reinforce(RouterLoss):
    """Policy gradient of a reward for each token against the rl router's baseline, which learns to expect it.

    ``baseline`` is the weight of the baseline's own error beside the policy's.
    """

    name: ClassVar[str] = "reinforce"
    reads: ClassVar[tuple[str, ...]] = ("logits", "experts", "baseline")
    needs_reward: ClassVar[bool] = True

    weight: float = 0.01
    baseline: float = 1.0

    def of(self, routed: Routed) -> Tensor:
        values = routed.values
        assert routed.reward is not None
        policy, error = reinforce(values["logits"], values["experts"], values["baseline"], routed.reward, routed.total)
        return policy + self.baseline * error


def reinforce(
    logits_TE: Tensor, experts_TK: Tensor, baseline_T: Tensor, reward_T: Tensor, total: Total = here
) -> tuple[Tensor, Tensor]:
    """``(-mean_t (R_t - b_t) log pi_t, mean_t huber(R_t - b_t))``; the first has no gradient to b.

    pi_t is the probability of drawing the experts in the order of their columns, each from what is left:
    ``prod_j p_j / (1 - sum of those before)``. Williams 1992; Clark et al. (RL-R), arXiv 2202.01169, appendix.
    """
    left_TE, b_T, R_T = precise(logits_TE), precise(baseline_T), precise(reward_T.detach())
    log_pi_T = left_TE.new_zeros(len(left_TE))
    for expert_T1 in experts_TK.split(1, dim=1):
        log_pi_T = log_pi_T + left_TE.log_softmax(1).gather(1, expert_T1).squeeze(1)
        left_TE = left_TE.scatter(1, expert_T1, -float("inf"))
    tokens = total(rows(b_T))
    policy = -((R_T - b_T).detach() * log_pi_T).sum()
    error = F.huber_loss(b_T, R_T.to(b_T.dtype), reduction="sum")
    return divided(total(policy), tokens), divided(total(error), tokens)
