"""Pickled modules and state_dicts, read by torch's weights-only unpickler with an allowlist of torch.nn.

That unpickler looks names up in the allowlist and nowhere else, so nothing of the file is imported or called.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pickle
import pkgutil
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from moeify.errors import UnreadableFile, UnsafePickle
from moeify.frontend.importing import user_module
from moeify.frontend.reasons import first_line
from moeify.frontend.sniff import PICKLE

_FUNCTIONS = (
    "relu", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "relu6", "hardswish", "hardsigmoid",
    "hardtanh", "softplus", "softsign", "sigmoid", "tanh", "tanhshrink", "logsigmoid", "glu", "softmax", "log_softmax",
)  # fmt: skip
_NEVER = (
    "torch.fx",
    "torch.jit",
    "torch._dynamo",
    "torch._inductor",
    "torch.package",
)  # these run source from the file
_BLOCKED = re.compile(r"(?:Unsupported global: )?GLOBAL ([\w.<>]+)")
_INSTRUCTION = re.compile(r"(Unsupported (?:operand|class)[^\n]{0,80}|Trying to [^\n]{0,80}|Can only [^\n]{0,80})")


def read_pickle(path: Path, kind: str, allow: Sequence[str] = ()) -> Any:
    """The pickled object. ``allow`` are module paths whose classes and functions may be used besides torch.nn's.

    Raises UnsafePickle (nothing was executed) or UnreadableFile.
    """
    allowed = dict(torch_nn())
    if kind == PICKLE:
        for name in _needed(path):
            if name not in allowed:
                allowed[name] = _permitted(name, allow, path)
    try:
        with warnings.catch_warnings(), safe_globals([(thing, name) for name, thing in allowed.items()]):
            warnings.simplefilter("ignore")  # legacy files: source of torch.nn has changed since
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _explained(str(error), path, allow) from error
    except Exception as error:  # torch and the constructors of torch.nn raise whatever damaged data leads them to
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UnreadableFile:
    return UnreadableFile(f"{path} is truncated or damaged: {first_line(error)}", hint="copy or download it again")


@functools.cache
def torch_nn() -> dict[str, Any]:
    """Names that a pickle may use: module classes of torch.nn.modules, activation functions, nothing else."""
    allowed: dict[str, Any] = {
        "torch._C._nn.gelu": torch._C._nn.gelu,
        "torch._C._VariableFunctionsClass": _TORCH,  # torch.relu is pickled as getattr(this, "relu")
        "builtins.getattr": _activation,
    }
    for info in pkgutil.iter_modules(nn.modules.__path__, "torch.nn.modules."):
        for name, cls in vars(importlib.import_module(info.name)).items():
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == info.name:
                allowed[f"{info.name}.{name}"] = cls
    for name in _FUNCTIONS:
        function = getattr(nn.functional, name)
        allowed[f"torch.nn.functional.{name}"] = function
        module = getattr(function, "__module__", None)
        if module in ("torch._C._nn", "torch.nn.functional"):
            allowed[f"{module}.{name}"] = function
    return allowed


_TORCH = "torch"  # stands for torch._C._VariableFunctionsClass


def _activation(owner: Any, name: Any) -> Any:
    """What a pickle gets for getattr: the activation functions of torch, and nothing else."""
    if owner is _TORCH and name in _FUNCTIONS:
        return getattr(torch, name)
    raise pickle.UnpicklingError("GLOBAL builtins.getattr")


def _needed(path: Path) -> list[str]:
    """Names in the pickle that torch's own allowlist does not hold."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # it scans opcodes, and damaged ones lead it anywhere
        raise _damaged(path, error) from error


def _permitted(name: str, allow: Sequence[str], path: Path) -> Any:
    """The object of that name, if it is defined in a module that the user allows."""
    if _inside(name, _NEVER):
        raise UnsafePickle(
            f"{path} holds {name}, which runs source text from the file; nothing was executed",
            hint="save the model with torch.export.save, or its state_dict and use --factory",
        )
    module_path, _, attribute = name.rpartition(".")
    if not any(_inside(name, [prefix]) for prefix in allow):
        raise _unsafe(name, path)
    try:
        thing = getattr(user_module(module_path), attribute)
    except Exception as error:  # the user's own module may fail in any way
        raise UnsafePickle(
            f"{path} holds {name}, which is allowed and cannot be imported: {type(error).__name__}: {error}",
            hint="run moeify where the module can be imported, for example with PYTHONPATH",
        ) from error
    home = getattr(thing, "__module__", None)  # a name that an allowed module only imports is not allowed
    if not isinstance(home, str) or not any(_inside(f"{home}.", [f"{prefix}."]) for prefix in allow):
        raise _unsafe(name, path)
    return thing


def _inside(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(prefix.rstrip(".") + ".") for prefix in prefixes)


def _unsafe(name: str, path: Path) -> UnsafePickle:
    module_path = name.rpartition(".")[0] or name
    return UnsafePickle(
        f"{path} holds {name}, which is not a class of torch.nn; nothing was executed",
        hint=f"if you trust that module: --allow {module_path}",
    )


def _explained(text: str, path: Path, allow: Sequence[str]) -> UnsafePickle | UnreadableFile:
    """torch's own refusal in our words."""
    blocked = _BLOCKED.search(text)
    if blocked:
        name = blocked[1].replace("__builtin__.", "builtins.")
        if _inside(name, _NEVER):
            try:
                _permitted(name, allow, path)
            except UnsafePickle as error:
                return error
        if any(_inside(name, [prefix]) for prefix in allow):
            return UnsafePickle(
                f"{path} holds {name}, which cannot be allowed in this old format; nothing was executed",
                hint="save it again with torch.save of torch 1.6 or newer",
            )
        return _unsafe(name, path)
    if "persistent_load" in text:
        return UnreadableFile(
            f"{path} holds a whole module in the format of torch 1.5 and older, which cannot be read safely",
            hint="load it where it comes from and save it again with torch.save, or save its state_dict",
        )
    if _INSTRUCTION.search(text):
        return UnsafePickle(
            f"{path} holds an instruction that data does not need; nothing was executed",
            hint="save the model's state_dict and use --factory",
        )
    return UnreadableFile(f"{path} is not a file that torch.save wrote", hint="save it with torch.save")
