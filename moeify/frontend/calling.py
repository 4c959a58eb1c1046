"""Calling a model with named tensors only: constants bound, caches left out, outputs made plain."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moeify.frontend.inputs import forward_parameters

# What is passed besides tensors, where forward takes it: no cache objects, outputs with names.
CONSTANTS = {"use_cache": False, "return_dict": True}
_CACHES = ("past_key_values", "cache_params", "past_buckets_states", "mems")


def bind(parameters: Mapping[str, inspect.Parameter], tensors: Mapping[str, Tensor]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of forward: by position where a name cannot be used, by name elsewhere."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    left = dict(tensors)
    by_position = any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters.values())
    for parameter in parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            args += [left.pop(name) for name in list(left) if name.startswith(f"{parameter.name}_")]
        elif parameter.name in left:
            value = left.pop(parameter.name)
            if by_position and parameter.kind is not parameter.KEYWORD_ONLY:
                args.append(value)
            else:
                kwargs[parameter.name] = value
    kwargs.update(left)
    kwargs.update({name: value for name, value in CONSTANTS.items() if name in parameters})
    return tuple(args), kwargs


def plain(output: Any) -> Any:
    """Tensors in tuples, lists and dicts: output classes become dicts, caches and None are left out of those."""
    if isinstance(output, Tensor) or output is None:
        return output
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        names = [f.name for f in dataclasses.fields(output)]
        return {
            name: plain(value) for name in names if name not in _CACHES and (value := getattr(output, name)) is not None
        }
    if isinstance(output, Mapping):
        return {key: plain(value) for key, value in output.items()}
    if isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        return type(output)(plain(value) for value in output)
    return output


def run(module: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """The model's plain output for named tensors."""
    args, kwargs = bind(forward_parameters(module), tensors)
    return plain(module(*args, **kwargs))


@contextlib.contextmanager
def tensors_only(module: nn.Module, names: list[str]) -> Iterator[None]:
    """Within it, ``module(*tensors)`` takes exactly the named tensors and gives a plain output.

    forward is replaced on the instance and put back at the end, so that module paths and parameter names stay the
    user's.
    """
    forward = module.forward
    own = module.__dict__.get("forward")

    parameters = forward_parameters(module)

    def only_tensors(*tensors: Tensor) -> Any:
        args, kwargs = bind(parameters, dict(zip(names, tensors)))
        return plain(forward(*args, **kwargs))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    only_tensors.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
    module.forward = only_tensors
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextlib.contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode, fastpath of nn.MultiheadAttention off; every submodule's own flag is put back at the end."""
    flags = [(m, m.training) for m in module.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for submodule, _ in flags:
        submodule.training = training
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for submodule, flag in flags:
            submodule.training = flag
