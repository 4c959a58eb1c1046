"""How far two tensors are apart."""

from __future__ import annotations

import torch


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """max abs(value - reference) / max abs(reference), in float64; infinite where shapes or finiteness differ.

    Positions where both hold the same infinity (masked scores) count as equal. An empty tensor has no error. Complex
    numbers are compared part by part.
    """
    if value.shape != reference.shape or value.is_complex() != reference.is_complex():
        return float("inf")
    if value.numel() == 0:
        return 0.0
    a, b = wide(value), wide(reference)
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = (a[finite] - b[finite]).abs().max().item()
    scale = b[finite].abs().max().item()
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Its values in float64, the two parts of a complex number along a last axis of their own."""
    plain = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    return plain.double()
