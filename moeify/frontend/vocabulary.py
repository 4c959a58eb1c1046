"""Which embedding reads which integer input, so that example values stay inside its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moeify.frontend.calling import run
from moeify.frontend.inputs import Example, TensorSpec, make_tensor

_TABLE_FIRST = (torch.embedding, torch.embedding_bag)
_LOOKUPS = (*_TABLE_FIRST, nn.functional.embedding, nn.functional.embedding_bag)


class _WatchEmbeddings(TorchFunctionMode):
    """Records the smallest table that is indexed with (a view of) each of the watched tensors."""

    def __init__(self, watched: dict[int, str]) -> None:
        super().__init__()
        self.watched = watched
        self.rows: dict[str, int] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _LOOKUPS:
            order = ("weight", "input") if func in _TABLE_FIRST else ("input", "weight")
            given = {**dict(zip(order, args)), **(kwargs or {})}
            table, index = given["weight"], given["input"] if "input" in given else given["indices"]
            name = self.watched.get(_storage(index))
            if name is not None:
                self.rows[name] = min(self.rows.get(name, table.shape[0]), table.shape[0])
        return func(*args, **(kwargs or {}))


def make_examples(module: nn.Module, specs: Sequence[TensorSpec]) -> list[Example]:
    """Tensors for named specs. Integers without a bound stay below the rows of the embedding that reads them."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    rows: dict[str, int] = {}
    if any(spec.below is None and _is_index(spec) for spec in specs):
        rows = _vocabularies(module, specs, device)
    smallest = min((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=2)
    examples = []
    for spec in specs:
        below = spec.below if spec.below is not None else rows.get(str(spec.name), smallest)
        examples.append(Example(str(spec.name), make_tensor(spec, below, device), spec.dims))
    return examples


def _vocabularies(module: nn.Module, specs: Sequence[TensorSpec], device: torch.device) -> dict[str, int]:
    if device.type == "meta":  # no storage to recognise
        return {}
    tensors = {str(spec.name): make_tensor(spec, 1, device) for spec in specs}
    watch = _WatchEmbeddings({_storage(t): name for name, t in tensors.items()})
    try:
        with torch.no_grad(), watch:
            run(module, tensors)
    except Exception:  # the capture that follows runs the model again and explains what fails
        pass
    return watch.rows


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_index(spec: TensorSpec) -> bool:
    return not spec.dtype.is_floating_point and spec.dtype is not torch.bool
