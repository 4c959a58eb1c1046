"""Least squares with a ridge, from normal equations that are summed as rows come."""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.errors import Refused


class NormalEquations:
    """``Z^T Z`` [U, U] and ``Z^T Y`` [U, D] over rows z [N, U] and y [N, D], in float64.

    8 U (U + D) bytes, and as much again while they are solved.
    """

    def __init__(self, unknowns: int, outputs: int, device: torch.device) -> None:
        self.gram_UU = torch.zeros(unknowns, unknowns, dtype=torch.float64, device=device)
        self.cross_UD = torch.zeros(unknowns, outputs, dtype=torch.float64, device=device)

    def add(self, z_NU: Tensor, y_ND: Tensor) -> None:
        z_NU = z_NU.double()
        self.gram_UU.addmm_(z_NU.t(), z_NU)
        self.cross_UD.addmm_(z_NU.t(), y_ND.double())

    def solve(self, ridge_U: Tensor) -> Tensor:
        """``argmin |Z W - Y|^2 + sum_u ridge_u |W_u|^2`` [U, D].

        Raises Refused for values that are no numbers, or a ridge that leaves unknowns undetermined.
        """
        matrix = self.gram_UU.clone()
        matrix.diagonal().add_(ridge_U)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed or not self.cross_UD.isfinite().all():
            raise Refused("the normal equations have no solution: the block's values are NaN, infinite or all zero")
        return torch.cholesky_solve(self.cross_UD, factor)
