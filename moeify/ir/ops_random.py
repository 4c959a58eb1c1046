"""Router noise: ``moe.jitter_like``, ``normal_like``, ``gumbel_like``, ``uniform_like``. Operators, so that a train
switch can reach it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.ir.ops_library import define


def _jitter_like(x: Tensor, eps: float, train: bool) -> Tensor:
    if not train:
        return torch.ones_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.contiguous_format).uniform_(1 - eps, 1 + eps)


def _normal_like(x: Tensor, train: bool) -> Tensor:
    if not train:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    return torch.randn_like(x, memory_format=torch.contiguous_format)


def _gumbel_like(x: Tensor, train: bool) -> Tensor:
    if not train:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    # -log of an exponential variable; the smallest positive number keeps a draw of 0 finite.
    drawn = torch.empty_like(x, memory_format=torch.contiguous_format).exponential_()
    return drawn.clamp_min_(torch.finfo(x.dtype).tiny).log_().neg_()


def _uniform_like(x: Tensor, train: bool) -> Tensor:
    if not train:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.contiguous_format).uniform_()


def _like(x: Tensor, *_: float | bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_SEEDED = (torch.Tag.nondeterministic_seeded,)

define("jitter_like(Tensor x, float eps, bool train) -> Tensor", _jitter_like, _like, tags=_SEEDED)
define("normal_like(Tensor x, bool train) -> Tensor", _normal_like, _like, tags=_SEEDED)
define("gumbel_like(Tensor x, bool train) -> Tensor", _gumbel_like, _like, tags=_SEEDED)
define("uniform_like(Tensor x, bool train) -> Tensor", _uniform_like, _like, tags=_SEEDED)
