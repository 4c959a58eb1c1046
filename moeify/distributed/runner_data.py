"""Examples and who runs which: the batches of a run do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from moeify.data import images, text
from moeify.data import tensors as data_files
from moeify.data.examples import Options
from moeify.data.images import Images
from moeify.errors import BadInputSpec, BadOption, UsageError
from moeify.ir.language import token_input_of
from moeify.ir.program import InputSpec, Program


@dataclass(frozen=True)
class Examples:
    """Tensors by name, an example to a row; ``inputs`` are the names that the model reads, in its order. What is there
    beside them, such as labels, is for the loss. ``images`` are an input too, read when a batch is taken; ``classes``
    are the names of their labels.
    """

    tensors: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    seed: int = 0
    images: Images | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def count(self) -> int:
        return len(self.images.files) if self.images is not None else len(next(iter(self.tensors.values())))

    def shuffled(self, step: int, batch: int) -> list[int]:
        """The examples of a training step: every one once, in a new order, before any comes again."""
        return [int(self._order(p // self.count)[p % self.count]) for p in range(step * batch, (step + 1) * batch)]

    def take(self, which: Sequence[int], device: torch.device | None = None) -> dict[str, Tensor]:
        rows = torch.tensor(which, dtype=torch.int64)
        taken = {name: tensor[rows].to(device) for name, tensor in self.tensors.items()}
        if self.images is not None:
            taken[self.images.spec.name] = self.images.take(which).to(device)
        return taken

    def split(self, last: int) -> tuple[Examples, Examples]:
        """All but the last so many examples, and those."""
        cut = self.count - last
        return self._some(slice(0, cut)), self._some(slice(cut, self.count))

    def mixed(self) -> Examples:
        """In an order of the seed, so that the last ones are like the first."""
        return self._some(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed)))

    def _some(self, which: slice | Tensor) -> Examples:
        tensors = {name: tensor[which] for name, tensor in self.tensors.items()}
        files = None if self.images is None else self.images.some(torch.arange(self.count)[which].tolist())
        return replace(self, tensors=tensors, images=files, _orders={})

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = torch.randperm(
                self.count, generator=torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            )
        return self._orders[epoch]


@dataclass(frozen=True)
class Part:
    """A rank's part of a batch. A rank without examples runs one that counts nothing, as the others wait for it in
    every exchange; ``counted`` is 0 then.
    """

    which: list[int]
    counted: int


def part(batch: Sequence[int], ranks: int, rank: int) -> Part:
    """Neighbouring examples, as evenly as they go."""
    start, stop = bounds(len(batch), ranks, rank)
    mine = list(batch[start:stop])
    return Part(mine or [batch[0]], len(mine))


def bounds(count: int, ranks: int, rank: int) -> tuple[int, int]:
    return count * rank // ranks, count * (rank + 1) // ranks


def rows_of(count: int, ranks: int) -> list[int]:
    """How many examples of a batch each rank has."""
    return [stop - start for start, stop in (bounds(count, ranks, rank) for rank in range(ranks))]


def fitted(
    tensors: Mapping[str, Tensor] | Sequence[Tensor], specs: Sequence[InputSpec], source: str, seed: int = 0
) -> Examples:
    """Tensors by name, of which the model may not read all, or its inputs in order. Raises BadInputSpec."""
    inputs = data_files.fit(tensors, specs, source)
    more = tensors if isinstance(tensors, Mapping) else {}
    return from_tensors({**more, **{spec.name: one for spec, one in zip(specs, inputs)}}, specs, source, seed)


def from_tensors(tensors: Mapping[str, Tensor], specs: Sequence[InputSpec], source: str, seed: int = 0) -> Examples:
    """Tensors whose rows are examples; those of the model's inputs have been checked. Raises BadInputSpec."""
    names = tuple(spec.name for spec in specs)
    counts = {name: len(tensor) if tensor.dim() else 0 for name, tensor in tensors.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        said = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise BadInputSpec(f"{source}: the tensors have not one row per example: {said}")
    return Examples(dict(tensors), names, seed)


def read(
    path: Path, program: Program, options: Options, model: Path | None = None, *, framed: bool = False
) -> Examples:
    """A text, a folder of images, or tensors of which some may be for the loss alone.

    The last piece of a text is left out where it is shorter; ``framed`` puts the tokenizer's special tokens around each
    piece. Images in sub-folders have ``labels``: the number of the sub-folder in the order of the names. They are read
    when a batch is taken, and kept as bytes where all of them take at most 2 GiB so. A preprocessor_config.json in or
    beside ``model`` says how they are scaled, unless the options do.

    Raises UsageError for a text without a tokenizer, BadOption for one that the model cannot read, UnreadableFile for a
    sub-folder without images, and what reading raises.
    """
    if path.is_dir():
        return _images(path, program, options, model)
    if path.suffix not in text.SUFFIXES:
        return fitted(data_files.tensors(path), program.inputs, str(path), options.seed)
    if options.tokenizer is None:
        raise UsageError(f"{path} is a text", hint=f"say how to cut it: --tokenizer FOLDER, or {text.BYTES}")
    found = token_input_of(program)
    if found is None:
        raise BadOption(f"{path} is a text, and the model reads no tokens", hint="give tensors by input name")
    sequence = options.sequence or text.SEQUENCE
    pieces = text.pieces(path, options.tokenizer, sequence, found.vocabulary, framed=framed)
    specs = program.inputs
    return Examples(text.inputs_of(pieces, specs, found.name), tuple(spec.name for spec in specs), options.seed)


def _images(path: Path, program: Program, options: Options, model: Path | None) -> Examples:
    scaling = images.scaling_of(model, options.image_mean, options.image_std)
    found = images.folder(path, program.inputs, program.example, scaling, keep=True)
    inputs, notes = (found.spec.name,), (scaling.note,) if scaling.note else ()
    sorted_by = images.classes_of(path, found.files)
    if sorted_by is None:
        return Examples({}, inputs, options.seed, found, notes=notes)
    names, labels = sorted_by
    images.check_classes(path, names)
    return Examples({data_files.LABELS: labels}, inputs, options.seed, found, names, notes)


def check_fixed(specs: Sequence[InputSpec], batch: int, ranks: int) -> int | None:
    """The examples that the model takes at a time, where that is fixed. Raises BadInputSpec where a batch is not that
    for every rank."""
    fixed = next((spec.shape[0] for spec in specs if isinstance(spec.shape[0], int)), None)
    if fixed is not None and batch != fixed * ranks:
        raise BadInputSpec(
            f"the model takes exactly {fixed} examples at a time, so {ranks} ranks need batches of {fixed * ranks}",
            hint=f"choose --batch {fixed * ranks}, or convert with a named size: --input 'x=float32[batch=2,...]'",
        )
    return None if fixed is None else int(fixed)
