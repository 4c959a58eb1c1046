"""Example inputs: the text that describes them, and tensors made from it."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moeify.errors import BadInputSpec

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_FORM = "write name=dtype[size,...], for example input_ids=int64[batch=2,seq=16]"
_SPEC = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_]\w*)\s*=\s*)?(?P<dtype>[a-z]\w*)\s*\[(?P<dims>[^\[\]]*)\]\s*(?:\{(?P<options>[^{}]*)\})?\s*"
)
_DIM = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)\s*=\s*)?(?P<size>\d+)")


@dataclass(frozen=True)
class TensorSpec:
    """What an input looks like: ``sizes`` of the example, ``dims`` with a name where the size may change.

    ``below`` bounds integers: values are drawn from [0, below). Without it the bound is the vocabulary of the embedding
    that reads the input.
    """

    name: str | None
    dtype: torch.dtype
    sizes: tuple[int, ...]
    dims: tuple[int | str, ...]
    below: int | None = None

    def __str__(self) -> str:
        dims = ",".join(f"{d}={s}" if isinstance(d, str) else str(s) for d, s in zip(self.dims, self.sizes))
        bound = "" if self.below is None else f"{{below={self.below}}}"
        return f"{self.name + '=' if self.name else ''}{str(self.dtype).removeprefix('torch.')}[{dims}]{bound}"


@dataclass(frozen=True)
class Example:
    """An example input: a tensor, and its sizes with a name where the size may change."""

    name: str
    tensor: Tensor = field(repr=False)
    dims: tuple[int | str, ...]


def parse_input_spec(text: str) -> TensorSpec:
    """``input_ids=int64[batch=2,seq=16]{below=30522}`` to a TensorSpec.

    ``name=size`` is a dimension whose size may change, a bare number a fixed one. The input's name may be left out when
    the model has one input. Raises BadInputSpec.
    """
    match = _SPEC.fullmatch(text)
    if not match:
        raise BadInputSpec(f"cannot read the input {text!r}", hint=_FORM)
    if match["dtype"] not in DTYPES:
        close = difflib.get_close_matches(match["dtype"], DTYPES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(DTYPES)}"
        raise BadInputSpec(f"the input {text!r} has the unknown dtype {match['dtype']!r}", hint=hint)
    sizes: list[int] = []
    dims: list[int | str] = []
    for item in match["dims"].split(",") if match["dims"].strip() else []:
        dim = _DIM.fullmatch(item.strip())
        if not dim:
            raise BadInputSpec(f"the input {text!r} has the unreadable size {item.strip()!r}", hint=_FORM)
        size = int(dim["size"])
        if size == 0:
            raise BadInputSpec(f"the input {text!r} has an empty dimension", hint="give every size at least 1")
        if dim["name"] and size < 2:
            raise BadInputSpec(
                f"the dynamic dimension {dim['name']!r} of the input {text!r} has the example size {size}",
                hint="give it an example size of 2 or more, or write the bare number to fix it",
            )
        sizes.append(size)
        dims.append(dim["name"] or size)
    dtype = DTYPES[match["dtype"]]
    return TensorSpec(match["name"], dtype, tuple(sizes), tuple(dims), _below(text, match["options"], dtype))


def _below(text: str, options: str | None, dtype: torch.dtype) -> int | None:
    below = None
    for item in (options or "").split(","):
        key, _, value = (part.strip() for part in item.partition("="))
        if not key:
            continue
        if key != "below":
            raise BadInputSpec(f"the input {text!r} has no option {key!r}", hint="its options: below")
        if dtype.is_floating_point or dtype is torch.bool:
            raise BadInputSpec(f"the input {text!r} bounds values that are not integers with below")
        if not value.isdigit() or int(value) == 0:
            raise BadInputSpec(f"below wants a whole number of at least 1, not {value!r}")
        below = int(value)
    return below


def forward_parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of ``forward`` by name.

    The module of an exported program insists on the split into positional and keyword arguments of its capture.
    """
    parameters = dict(inspect.signature(module.forward).parameters)
    in_spec = getattr(module, "_in_spec", None)
    if in_spec is None:
        return parameters
    positional = in_spec.child(0).num_children
    kinds = [inspect.Parameter.POSITIONAL_ONLY] * positional + [inspect.Parameter.KEYWORD_ONLY] * len(parameters)
    return {name: p.replace(kind=kind) for (name, p), kind in zip(parameters.items(), kinds)}


def _takes_anything(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_POSITIONAL for p in parameters.values())


def tensor_names(module: nn.Module, count: int) -> list[str]:
    """Names for ``count`` tensors given by position. Raises BadInputSpec when forward takes fewer."""
    names: list[str] = []
    for parameter in forward_parameters(module).values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    if len(names) < count:
        raise BadInputSpec(
            f"{count} inputs are given and forward of {type(module).__name__} takes {len(names)}",
            hint=f"its parameters: {', '.join(names) or 'none'}",
        )
    return names[:count]


def name_specs(module: nn.Module, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Give every spec the name of a parameter of forward and put them in its order. Raises BadInputSpec."""
    parameters = forward_parameters(module)
    if any(spec.name is None for spec in specs):
        if len(specs) > 1:
            raise BadInputSpec(f"the input {specs[0]} of {len(specs)} has no name" if specs[0].name is None
                               else f"one of {len(specs)} inputs has no name", hint=_FORM)  # fmt: skip
        return [_renamed(specs[0], tensor_names(module, 1)[0])]
    names = [spec.name or "" for spec in specs]
    check_names(module, names)
    sizes: dict[str, int] = {}
    for spec in specs:
        for dim, size in zip(spec.dims, spec.sizes):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                raise BadInputSpec(
                    f"the dynamic dimension {dim!r} has the example sizes {sizes[dim]} and {size}",
                    hint="give dimensions that differ different names",
                )
    order = list(parameters)
    return sorted(specs, key=lambda spec: order.index(spec.name) if spec.name in order else len(order))


def check_names(module: nn.Module, names: Sequence[str]) -> None:
    """Raises BadInputSpec for names that forward does not have, names given twice, and required ones left out."""
    parameters = forward_parameters(module)
    for name in names:
        if names.count(name) > 1:
            raise BadInputSpec(f"the input {name!r} is given twice")
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or _takes_anything(parameters)
        if name not in parameters and not anything:
            close = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"its parameters: {', '.join(parameters)}"
            raise BadInputSpec(f"forward of {type(module).__name__} has no parameter {name!r}", hint=hint)
    missing = [name for name in required(module) if name not in names]
    if missing:
        raise BadInputSpec(
            f"forward of {type(module).__name__} needs {missing[0]!r} too",
            hint=f"add --input {missing[0]}=dtype[size,...]",
        )


def required(module: nn.Module) -> list[str]:
    """Parameters of forward without a default."""
    return [
        p.name
        for p in forward_parameters(module).values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def _renamed(spec: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name, spec.dtype, spec.sizes, spec.dims, spec.below)


def make_tensor(spec: TensorSpec, below: int, device: torch.device) -> Tensor:
    """Random normal floats, integers in [0, below), ones for masks. The same spec gives the same values."""
    generator = torch.Generator().manual_seed(0)
    if "mask" in (spec.name or "") and not spec.dtype.is_floating_point:
        value = torch.ones(spec.sizes, dtype=spec.dtype)
    elif spec.dtype is torch.bool:
        value = torch.rand(spec.sizes, generator=generator) < 0.5
    elif spec.dtype.is_floating_point:
        value = torch.randn(spec.sizes, generator=generator).to(spec.dtype)
    else:
        limit = min(below, torch.iinfo(spec.dtype).max)
        value = torch.randint(0, limit, spec.sizes, generator=generator).to(spec.dtype)
    return value.to(device)
