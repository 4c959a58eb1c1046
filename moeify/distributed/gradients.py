"""Gradients of a bound module: added up over the ranks that share a parameter, and their norm.

On a mesh (dp, ep) of W ranks, each with the mean loss of its own tokens, the gradient of the mean over all tokens is:
for a dense parameter the sum over all ranks, divided by W; for an expert the sum over dp, divided by W, since the
backward pass of the exchange has brought the gradients of its whole ep group already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeify.distributed.binding import binding_of
from moeify.distributed.groups import Groups, named
from moeify.errors import NonFiniteValues
from moeify.ir.roles import Transport

_BUCKET = 25 << 20  # bytes reduced at a time: large enough to hide latency, small enough to copy
_WHERE = "sync_gradients"


def sync_gradients(module: nn.Module) -> None:
    """Add up the gradients over the ranks and divide by their number, in place. Every rank calls it after backward.

    A parameter that has a gradient on some ranks only counts as zero on the others; one without any keeps none. Raises
    NonFiniteValues on every rank, naming the ranks whose own gradients hold NaN or infinity, before any is spread.
    """
    bound = binding_of(module)
    groups, experts = bound.groups, bound.sharding.parameters
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    present = _present(groups, trained, experts)
    dense = [_gradient(trained[name]) for name in present if name not in experts]
    stacked = [_gradient(trained[name]) for name in present if name in experts]
    over_all = [group for group in (groups.experts, groups.data) if group is not None]
    _reduce(dense, over_all, groups.size)
    _reduce(stacked, over_all[1:], groups.size)


def gradient_norm(module: nn.Module) -> float:
    """The 2-norm of all gradients after ``sync_gradients``, each parameter of the whole model counted once."""
    bound = binding_of(module)
    names = bound.sharding.parameters
    dense, stacked = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            square = parameter.grad.double().square().sum()
            # Under FSDP a gradient is cut; the sum over its own mesh is that of the whole.
            square = (square.full_tensor() if isinstance(square, DTensor) else square).cpu()
            if name in names:
                stacked += square
            else:
                dense += square
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    stacked = bound.groups.experts.all_reduce(stacked.to(device), "gradient_norm").cpu()
    return float((dense + stacked).sqrt())


def clip_gradients(module: nn.Module, largest: float) -> float:
    """Scale all gradients so that their norm is at most ``largest``; the norm before. ``clip_grad_norm_`` of torch
    cannot do it: a rank does not see the other ranks' experts.
    """
    norm = gradient_norm(module)
    if norm > largest:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(largest / norm)
    return norm


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _present(groups: Groups, trained: Mapping[str, nn.Parameter], experts: frozenset[str]) -> list[str]:
    """The parameters that have a gradient on some rank, in order.

    A rank's own tokens alone make its dense gradients, so these show whose data was not finite; that travels along.
    Where experts alone are trained, theirs show that something was not, if not whose.
    """
    dense = [p.grad for name, p in trained.items() if name not in experts and p.grad is not None]
    shown = dense or [p.grad for p in trained.values() if p.grad is not None]
    finite = all(bool(torch.isfinite(grad).all()) for grad in shown)
    flags = [float(rank == groups.rank and not finite) for rank in groups.ranks]
    flags += [float(p.grad is not None) for p in trained.values()]
    device = next((p.device for p in trained.values()), torch.device("cpu"))
    told = torch.tensor(flags, device=device)
    for group in (groups.experts, groups.data):
        if group is not None:
            told = group.all_reduce(told, _WHERE)
    told_by_rank = told.tolist()
    bad = [rank for rank, flag in zip(groups.ranks, told_by_rank) if flag]
    if bad:
        ranks = named(bad)
        raise NonFiniteValues(
            f"the gradients of {ranks} hold NaN or infinity",
            hint=f"look at the data and the loss of {ranks}; no gradient was spread",
        )
    return [name for name, flag in zip(trained, told_by_rank[groups.size :]) if flag]


def _reduce(gradients: list[Tensor], over: Iterable[Transport], divide_by: int) -> None:
    if divide_by == 1:
        return
    over = list(over)
    for bucket in _buckets(gradients):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        for group in over:
            flat = group.all_reduce(flat, _WHERE)
        flat /= divide_by
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket])):
            grad.copy_(part.view_as(grad))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of one dtype of about ``_BUCKET`` bytes; the same on every rank of a group."""
    bucket: list[Tensor] = []
    held = 0
    for grad in gradients:
        if bucket and (grad.dtype != bucket[0].dtype or held >= _BUCKET):
            yield bucket
            bucket, held = [], 0
        bucket.append(grad)
        held += grad.numel() * grad.element_size()
    if bucket:
        yield bucket
