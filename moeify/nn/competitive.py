"""The loss of the first mixture of experts, in which experts compete for tokens instead of sharing their errors."""

from __future__ import annotations

from torch import Tensor


def competitive(logits_TE: Tensor, errors_TE: Tensor) -> Tensor:
    """``mean_t -log sum_i p_ti exp(-errors_ti)``, p a softmax of the gate's logits over the experts, in nats.

    ``errors`` [T, E] are each expert's own negative log likelihoods of what is wanted: half the squared distance of its
    output makes the loss of the paper, its cross entropy makes that of a classifier which mixes probabilities. The
    gradient of an expert is weighted by how much of the likelihood is its own. All experts must have run, so this is a
    loss for layers that compute every expert. NaN without tokens, as torch's means are.

    Jacobs, Jordan, Nowlan, Hinton, Adaptive mixtures of local experts, Neural Computation 3, 1991, equation 1.3.
    """
    return -(logits_TE.log_softmax(1) - errors_TE).logsumexp(1).mean()
