"""What blocks read, and what an error of theirs does to the model's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.errors import Refused
from moeify.fitting.collect import Steps
from moeify.fitting.objective import Objective
from moeify.fitting.watch import Site, Watch
from moeify.ir.program import Program
from moeify.verify.measure import in_float32


@dataclass(frozen=True)
class Sensitivity:
    """Rows of a block's input [N, D] and gradients [N, D_out] at its output, of all its calls.

    Gradients are scaled so that ``expected_loss`` is a mean over the batches.
    """

    inputs_ND: Tensor
    gradients_ND: Tensor

    def expected_loss(self, errors_ND: Tensor) -> float:
        """The model's loss, in the unit of ``likelihood.Predicted``, when the block's output is off by these.

        ``1/2 sum_t (g_t . e_t)^2`` with the drawn labels' gradients, averaged with its form for errors without a
        direction, ``1/2 sum_t |g_t|^2 |e_t|^2 / D``, which has less variance. Errors of different rows are taken to
        be independent.
        """
        gradients, errors = self.gradients_ND.double(), errors_ND.double()
        along = (gradients * errors).sum(1).square().sum()
        anywhere = (gradients.square().sum(1) * errors.square().sum(1)).sum() / errors.shape[1]
        return float(along + anywhere) / 4


def sensitivities(
    program: Program,
    batches: Sequence[tuple[Tensor, ...]],
    objective: Objective,
    progress: Steps | None = None,
) -> dict[str, Sensitivity]:
    """By anchor, of the selected blocks of a program that find-ffn and select have seen: one run there and back.

    Memory: 4 (D + D_out) bytes a row and block. Raises BadInputSpec when the program does not run on the batches,
    Refused for gradients that are NaN or zero throughout.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {block.anchor: [] for block in program.converted()}

    def keep(site: Site, x_ND: Tensor, dy_ND: Tensor | None) -> None:
        assert dy_ND is not None
        found[site.block.anchor].append((x_ND, dy_ND / len(batches) ** 0.5))

    with torch.enable_grad(), in_float32(program) as module:
        watch = Watch(program, module, objective)
        for batch in batches:
            watch.observe(batch, keep)
            if progress is not None:
                progress.advance()
    made = {}
    for anchor, rows in found.items():
        inputs, gradients = (torch.cat(parts) for parts in zip(*rows))
        if not gradients.isfinite().all() or not gradients.any():
            raise Refused(
                "the gradient of the model's predictions is NaN, infinite or zero at this block, so what it is worth "
                "cannot be said",
                where=program.block(anchor).path,
            )
        made[anchor] = Sensitivity(inputs, gradients)
    return made
