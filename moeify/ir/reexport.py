"""A rewritten program through torch.export again, as the check of its shapes. Nothing is computed and no weight
read."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moeify.errors import Refused
from moeify.ir.program import Program


def check_by_export(program: Program) -> torch.export.ExportedProgram:
    """The program as torch.export sees it, over fake weights. Raises Refused when a size does not fit."""
    device = next((example.device for example in program.example), torch.device("cpu"))
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    module = _faked(program.graph_module, mode, device)
    dynamic = tuple(
        {dim: torch.export.Dim.AUTO for dim, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in program.inputs
    )
    example = tuple(mode.from_tensor(value, static_shapes=True) for value in program.example)
    try:
        return torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise Refused(
            f"the rewritten program does not export again: {type(error).__name__}: {str(error).splitlines()[0]}",
            hint="a part of the model reads the number of rows inside a block: choose mode=capacity, or report it",
        ) from error


def _faked(module: fx.GraphModule, mode: FakeTensorMode, device: torch.device) -> fx.GraphModule:
    """The same graph over parameters and buffers without values."""
    memo: dict[int, object] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) in memo:
            continue
        with mode:
            place = device if tensor.is_meta else tensor.device
            empty: torch.Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=place)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    import copy

    return copy.deepcopy(module, memo)
