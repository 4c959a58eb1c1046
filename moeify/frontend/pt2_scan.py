"""What a ``.pt2`` may hold. Looked at before torch.export.load sees it, because that function runs what it finds.

In torch 2.13 it unpickles sample inputs and opaque constants, loads native libraries, evaluates size expressions as
Python, resolves operators by walking attributes from ``torch`` (``torch.os.system`` exists), imports the modules of
enums, and builds Python source from names. Each of these is refused here unless it is plain data.
"""

from __future__ import annotations

import ast
import importlib
import json
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from moeify.errors import UnreadableFile, UnsafePickle
from moeify.frontend.reasons import first_line

_RECORDS = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model\.pt|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model\.pt|model_constants_config\.json)|data/sample_inputs/model\.pt"
    r"|extra/[^/]+|archive_format|archive_version|byteorder|version|\.data/[\w.]+|\.format_version|\.storage_alignment"
)
_IDENTIFIER = re.compile(r"([A-Za-z_]\w*)?")
_QUALIFIED = re.compile(r"[\w.@$:/ -]*")  # nothing that ends a string or a call in generated source
_TREESPEC = re.compile(r"[\w\s\[\]{}\":,.\\/-]*")
_NAMESPACES = ("aten", "prims", "moeify", "torchvision")
_REFUSED_OPS = ("aten::from_file",)  # reads any file
_HIGHER_ORDER = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "while_loop", "scan", "map_impl")
_OPERATORS = (
    "getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "and_", "or_", "xor",
    "not_", "invert", "lshift", "rshift", "eq", "ne", "lt", "le", "gt", "ge",
)  # fmt: skip
_SIZE_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
    ast.Load, ast.keyword, ast.Name, ast.Call, ast.Constant,
)  # fmt: skip
_SIZE_FUNCTIONS = (
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod", "PythonMod",
    "FloorDiv", "CleanDiv", "CeilDiv", "ModularIndexing", "Where", "CeilToInt", "FloorToInt", "LShift",
    "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator",
    "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity", "Eq", "Ne", "Lt", "Le",
    "Gt", "Ge", "Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan",
    "And", "Or", "Not", "Piecewise", "ExprCondPair", "floor", "ceiling", "sqrt", "log", "exp",
    "BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or", "OpaqueUnaryFn_sqrt", "OpaqueUnaryFn_log2", "true",
    "false", "oo", "int_oo", "BooleanTrue", "BooleanFalse",
)  # fmt: skip


def check_archive(path: Path) -> None:
    """Raises UnsafePickle for anything that could run, UnreadableFile for what cannot be read. Executes nothing."""
    try:
        reader = torch._C.PyTorchFileReader(str(path))  # the reader that torch.export.load uses
        names = reader.get_all_records()
        for name in names:
            if not _RECORDS.fullmatch(name):
                raise _refusal(path, f"the record {name!r}" + (", native code" if "aotinductor" in name else ""))
        if "models/model.json" not in names:
            raise UnreadableFile(f"{path} holds no model named 'model'", hint="save it with torch.export.save")
        for record in names:
            if record.endswith("_config.json"):
                _check_config(path, json.loads(reader.get_record(record)))
        model = json.loads(reader.get_record("models/model.json"))
    except (RuntimeError, ValueError) as error:
        raise UnreadableFile(
            f"{path} is truncated or damaged: {first_line(error)}", hint="copy or download it again"
        ) from error
    for key, value in _strings(model):
        check = _CHECKS.get(key)
        if check is not None and not check(value):
            raise _refusal(path, f"the {key} {_short(value)}")
    for key, _ in _keys(model):
        if key in ("as_custom_obj", "as_opaque_obj"):
            raise _refusal(path, "a custom object")


def _refusal(path: Path, what: str) -> UnsafePickle:
    return UnsafePickle(
        f"{path} holds {what}, which plain data does not need; nothing was executed",
        hint="if you trust where it comes from, save the model's state_dict there and use --factory",
    )


def _check_config(path: Path, config: Any) -> None:
    for key, value in _strings(config):
        if key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", value):
            raise _refusal(path, f"the pickled object {_short(value)}")
        if key == "expr_str" and not _is_size(value):
            raise _refusal(path, f"the size {_short(value)}")


def _strings(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string with the key it stands under."""
    if isinstance(data, str):
        yield key, data
    elif isinstance(data, dict):
        for name, value in data.items():
            yield from _strings(value, name)
    elif isinstance(data, list):
        for value in data:
            yield from _strings(value, key)


def _keys(data: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for name, value in data.items():
            yield name, value
            yield from _keys(value)
    elif isinstance(data, list):
        for value in data:
            yield from _keys(value)


def _is_size(text: str) -> bool:
    """An arithmetic expression of symbols and numbers: no attribute, no index, no unknown function."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _SIZE_NODES):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _SIZE_FUNCTIONS):
            return False
        if isinstance(node, ast.Name) and node.id not in _SIZE_FUNCTIONS and not re.fullmatch(r"[a-z]+\d+", node.id):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.isidentifier():
            return False
    return True


def _is_target(text: str) -> bool:
    """An operator of a known namespace, arithmetic on sizes, or nothing."""
    first, *rest = text.split(".")
    if first == "_operator":
        return len(rest) == 1 and rest[0] in _OPERATORS and hasattr(operator, rest[0])
    if first == "math":
        return len(rest) == 1 and rest[0].isalpha()
    if first != "torch" or not rest:
        return False
    if len(rest) == 1:
        return rest[0].startswith("sym_")
    if rest[0] != "ops" or len(rest) not in (3, 4):
        return False
    if rest[1] == "higher_order":
        return len(rest) == 3 and rest[2] in _HIGHER_ORDER
    return rest[1] in _NAMESPACES and _is_operator(rest[1:])


def _is_operator(names: list[str]) -> bool:
    if names[0] == "moeify":
        importlib.import_module("moeify.ir.ops")
    found: Any = torch.ops
    for name in names:
        found = getattr(found, name, None)
    if isinstance(found, torch._ops.OpOverloadPacket):
        return str(found._qualified_op_name) not in _REFUSED_OPS
    return isinstance(found, torch._ops.OpOverload) and found._schema.name not in _REFUSED_OPS


def _is_treespec(text: str) -> bool:
    return bool(_TREESPEC.fullmatch(text)) and "__enum__" not in text


def _identifier(text: str) -> bool:
    return bool(_IDENTIFIER.fullmatch(text))


def _qualified(text: str) -> bool:
    return bool(_QUALIFIED.fullmatch(text))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


_CHECKS: dict[str, Callable[[str], bool]] = {
    "target": _is_target,
    "as_operator": _is_target,
    "expr_str": _is_size,
    "name": _identifier,
    "as_name": _identifier,
    "forward_arg_names": _identifier,
    "parameter_name": _qualified,
    "buffer_name": _qualified,
    "tensor_constant_name": _qualified,
    "custom_obj_name": _qualified,
    "user_input_name": _qualified,
    "fqn": _qualified,
    "in_spec": _is_treespec,
    "out_spec": _is_treespec,
    "treespec_namedtuple_fields": _qualified,
}
