"""The dense model as the teacher of the one that was made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from moeify import frontend
from moeify.api.convert import captured
from moeify.api.progress import Progress
from moeify.errors import UsageError
from moeify.frontend.inputs import TensorSpec
from moeify.ir import devices
from moeify.ir.program import Program, flat


@dataclass(frozen=True)
class Teacher:
    """``student`` are the names of the student's inputs in its order, ``inputs`` the same in the teacher's."""

    name: str
    module: fx.GraphModule
    inputs: tuple[str, ...]
    student: tuple[str, ...]

    def outputs(self, batch: Mapping[str, Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """What it gives for a batch, in evaluation. Raises UsageError for outputs of other shapes than the student's,
        ``like``."""
        with torch.no_grad():
            found = flat(self.module(*(batch[name] for name in self.inputs)))
        shapes = [[list(one.shape) for one in side] for side in (found, like)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"the outputs of the teacher {self.name} are {shapes[0]}, those of the model {shapes[1]}",
                hint="give the dense model that was converted",
            )
        return found


def read_teacher(
    dense: nn.Module | str | Path,
    student: Program,
    device: torch.device,
    progress: Progress,
    *,
    factory: str | None = None,
    allow: Sequence[str] = (),
) -> Teacher:
    """A module, or any file that ``moeify.convert`` takes, captured with the inputs of the student.

    Raises what reading and capturing raise, UsageError for a model with other inputs.
    """
    examples = zip(student.inputs, student.example)
    specs = [str(TensorSpec(one.name, one.dtype, tuple(like.shape), tuple(one.shape))) for one, like in examples]
    if isinstance(dense, nn.Module):
        name, program = type(dense).__name__, frontend.capture(dense, specs)
    else:
        archive = Path(dense).suffix == ".pt2"  # it says itself what it takes
        name, program = str(dense), captured(dense, () if archive else specs, factory, allow, progress)[0]
    names = [spec.name for spec in program.inputs]
    own = [spec.name for spec in student.inputs]
    if len(names) != len(own):
        raise UsageError(
            f"the teacher {name} takes {', '.join(names)}, the model {', '.join(own)}",
            hint="give the dense model that was converted",
        )
    module = program.graph_module
    module.requires_grad_(False)
    devices.move(module, device)
    return Teacher(name, module, tuple(names if set(names) == set(own) else own), tuple(own))
