"""Does the captured graph compute what the model computes?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from moeify.errors import NotExportable
from moeify.frontend.calling import mode, run
from moeify.frontend.inputs import Example
from moeify.frontend.meta import is_meta
from moeify.frontend.reasons import first_line
from moeify.ir.difference import relative_error

LIMIT = 1e-5  # relative, in float32: both run the same operators


def check_graph(
    module: nn.Module,
    graph_module: fx.GraphModule,
    exported: ExportedProgram,
    examples: list[Example],
    notes: list[str],
) -> float | None:
    """The maximum relative error on the examples and on a second set with other dynamic sizes.

    ``dims`` of the examples name what stayed dynamic in the graph. The second set is left out where the model refuses
    it or a guard of the capture excludes it. None on the meta device. Raises NotExportable.
    """
    if is_meta(module):
        notes.append("the graph was not compared with the model: the weights are on the meta device")
        return None
    with torch.no_grad(), mode(module, training=False):
        tensors = {e.name: e.tensor for e in examples}
        expected = run(module, _fresh(tensors))
        if not _same(expected, run(module, _fresh(tensors))):
            raise NotExportable(
                f"{type(module).__name__} gives two different outputs for the same input in eval mode",
                hint="make it deterministic in eval: dropout and noise must look at self.training",
            )
        error = _largest_error(expected, graph_module(*_fresh(tensors).values()))
        _refuse_above_limit(module, error, expected, "on the example inputs")
        larger = {e.name: _enlarged(e) for e in examples}
        if all(larger[e.name].shape == e.tensor.shape for e in examples):
            return error
        try:
            expected = run(module, _fresh(larger))
        except Exception:  # e.g. a window or a table of positions that the example fills exactly
            notes.append("the graph was compared at the sizes of the example only: the model refuses larger ones")
            return error
        guards = getattr(exported.module(), "_guards_fn", None)
        try:
            if guards is not None:
                guards(*larger.values())
        except AssertionError as guard:
            notes.append(f"the graph was compared at the sizes of the example only: {first_line(guard)}")
            return error
        try:
            actual = graph_module(*_fresh(larger).values())
        except Exception as failure:
            raise NotExportable(
                f"the captured graph of {type(module).__name__} does not run at other sizes: {first_line(failure)}",
                hint="fix the sizes: write --input with bare numbers, or pass fixed=True",
            ) from failure
        second = _largest_error(expected, actual)
        _refuse_above_limit(module, second, expected, "at " + _sizes(examples, larger))
        return max(error, second)


def _largest_error(expected: Any, actual: Any) -> float:
    """The largest relative error over all outputs, infinite where one that is no floating-point tensor differs."""
    before, after = pytree.tree_leaves(expected), pytree.tree_leaves(actual)
    if len(before) != len(after):
        return float("inf")
    return max((_error(a, b) for a, b in zip(before, after)), default=0.0)


def _error(a: Any, b: Any) -> float:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if type(a) is type(b) and a == b else float("inf")
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    return relative_error(b, a)


def _same(a: Any, b: Any) -> bool:
    return _largest_error(a, b) <= 1e-6  # threads may change the order of a sum


def _refuse_above_limit(module: nn.Module, error: float, expected: Any, where: str) -> None:
    dtypes = {t.dtype for t in pytree.tree_leaves(expected) if isinstance(t, Tensor) and t.is_floating_point()}
    limit = max([LIMIT, *(4 * torch.finfo(dtype).eps for dtype in dtypes)])
    if not error <= limit:
        raise NotExportable(
            f"the captured graph of {type(module).__name__} does not compute what the model computes: "
            f"relative error {error:.1e} {where}",
            hint="a decision in forward depends on the sizes or values of the input; fix the sizes with --input",
        )


def _fresh(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in tensors.items()}  # a model may write into its inputs


def _enlarged(example: Example) -> Tensor:
    """The tensor with one more row, token, ... in each dynamic dimension; what is there is repeated."""
    tensor = example.tensor
    for dim, name in enumerate(example.dims):
        if isinstance(name, str):
            size = tensor.shape[dim]
            index = torch.arange(size + 1, device=tensor.device) % size
            tensor = tensor.index_select(dim, index)
    return tensor


def _sizes(examples: list[Example], larger: dict[str, Tensor]) -> str:
    sizes = {d: n for e in examples for d, n in zip(e.dims, larger[e.name].shape) if isinstance(d, str)}
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
