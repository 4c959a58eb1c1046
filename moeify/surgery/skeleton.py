"""The dense model without weights, from what a checkpoint folder says about it.

A transformers model is described by its class and configuration, any other model by a factory ``pkg.mod:function``
without arguments. Both mean importing a module that the file names: modules of transformers are taken, any other only
when the caller names it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from moeify.errors import InputError, UnreadableFile, UsageError
from moeify.frontend.importing import user_module

Factory = Callable[[], nn.Module]


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is a transformers model; does not import transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def describe(model: nn.Module, factory: str | None) -> tuple[dict[str, Any], str | None]:
    """(what ``moeify.json`` keeps, the text of ``dense_config.json`` or None)."""
    if factory is not None or not is_transformers(model):
        return {"kind": "factory", "factory": factory, "class": type(model).__name__}, None
    config: Any = model.config
    attention = getattr(config, "_attn_implementation", None)
    generation = getattr(model, "generation_config", None)
    data = {
        "kind": "transformers",
        "module": type(model).__module__,
        "class": type(model).__qualname__,
        "attention": attention if isinstance(attention, str) else None,
        "generation_config": generation.to_dict() if generation is not None else None,
    }
    return data, config.to_json_string(use_diff=True)


def rebuild(
    data: Mapping[str, Any], config: str | None, factory: Factory | str | None, allow: Sequence[str]
) -> nn.Module:
    """The model with real buffers and its parameters on the meta device.

    Raises UsageError without a usable factory, InputError for modules that nobody allowed, UnreadableFile for a
    description that makes no sense.
    """
    if data.get("kind") == "transformers" and factory is None:
        return _from_transformers(data, config or "{}", allow)
    if callable(factory):
        make = factory
    else:
        make = _named_factory(data, factory, allow)
    with parameters_on_meta():
        return make()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers lands on the meta device, before anything initialises it; buffers stay
    real.

    Patches ``nn.Module.register_parameter``, so it holds for the whole process while it lasts.
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _from_transformers(data: Mapping[str, Any], config_text: str, allow: Sequence[str]) -> nn.Module:
    cls = _import(str(data["module"]), str(data["class"]), ("transformers", *allow))
    try:
        config = cls.config_class.from_dict(json.loads(config_text))
    except ValueError as error:
        raise UnreadableFile(f"cannot read the configuration of {data['class']}: {error}") from error
    if data.get("attention"):
        config._attn_implementation = data["attention"]
    with parameters_on_meta():
        model = cls(config)
    if data.get("generation_config") is not None:
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_dict(data["generation_config"])
    return model


def _named_factory(data: Mapping[str, Any], factory: str | None, allow: Sequence[str]) -> Factory:
    text = factory or data.get("factory")
    if not text:
        raise UsageError(
            f"the checkpoint does not say how to build its {data.get('class', 'model')}",
            hint="pass factory=, a function without arguments that returns the dense model, or its 'pkg.mod:function'",
        )
    module, colon, name = text.partition(":")
    if not colon:
        raise UsageError(f"the factory {text!r} does not name a function", hint="write pkg.mod:function")
    # A factory that the caller passes is the caller's word; one that the file names needs it.
    return _import(module, name, (module, *allow) if factory else allow)


def _import(module: str, name: str, allow: Sequence[str]) -> Any:
    if not any(module == prefix or module.startswith(prefix + ".") for prefix in allow):
        raise InputError(
            f"the checkpoint asks to import {module}:{name}; nothing was imported",
            hint=f"if you trust it: --allow {module}, or allow=({module!r},) in Python",
        )
    try:
        found: Any = user_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"cannot import {module}:{name}: {error}") from error
    return found
