"""A state_dict and the factory whose module it fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moeify.errors import StateDictMismatch, UnreadableFile, UsageError
from moeify.frontend.importing import user_module

_SHOWN = 5
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts keep it


def is_state_dict(thing: Any) -> bool:
    if not isinstance(thing, Mapping) or not thing:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in thing.items())


def unwrap(thing: Any) -> tuple[Mapping[str, Tensor], str | None] | None:
    """The state_dict in what torch.save wrote, and the key it was found under; None when there is none."""
    if is_state_dict(thing):
        return thing, None
    if isinstance(thing, Mapping):
        for key in _WRAPPERS:
            if is_state_dict(thing.get(key)):
                return thing[key], key
    return None


def build(path: Path, state: Mapping[str, Tensor], factory: str | None) -> nn.Module:
    """The factory's module with the weights of the state_dict. Raises UnreadableFile, StateDictMismatch, UsageError."""
    if factory is None:
        raise UnreadableFile(
            f"{path} is a state_dict: weights without a model",
            hint="say what builds the model: --factory pkg.mod:function",
        )
    module = make(factory)
    own = module.state_dict()
    extra = [name for name in state if name not in own]
    missing = [name for name in own if name not in state]
    shapes = [
        f"{name} ({list(state[name].shape)} in the file, {list(value.shape)} in the model)"
        for name, value in own.items()
        if name in state and isinstance(value, Tensor) and state[name].shape != value.shape
    ]
    if extra or missing or shapes:
        lines = [
            f"\n    {label}: {', '.join(names[:_SHOWN])}{_more(names)}"
            for label, names in (("missing", missing), ("unexpected", extra), ("wrong shape", shapes))
            if names
        ]
        hint = None
        if extra and all(name.startswith("module.") for name in extra):
            hint = "the names start with module.: save model.module.state_dict() of the DataParallel wrapper"
        raise StateDictMismatch(f"{path} does not fit the module that {factory} builds{''.join(lines)}", hint=hint)
    try:
        module.load_state_dict(dict(state), assign=any(p.is_meta for p in module.parameters()))
    except Exception as error:  # sparse tensors, and hooks of the user's own
        reason = " ".join(str(error).split())
        raise StateDictMismatch(f"{path} does not load into the module that {factory} builds: {reason}") from error
    return module


def make(factory: str) -> nn.Module:
    """Call ``pkg.mod:function``. Raises UsageError."""
    module_path, colon, name = factory.partition(":")
    if not colon or not module_path or not name:
        raise UsageError(f"cannot read the factory {factory!r}", hint="write pkg.mod:function")
    try:
        function: Any = user_module(module_path)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:  # the user's module may fail in any way
        raise UsageError(
            f"cannot import the factory {factory}: {type(error).__name__}: {error}",
            hint="run moeify where it can be imported, for example with PYTHONPATH",
        ) from error
    try:
        module = function()
    except Exception as error:
        raise UsageError(f"the factory {factory} fails: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"the factory {factory} returns {type(module).__name__}, not an nn.Module")
    return module


def _more(names: list[str]) -> str:
    return f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
