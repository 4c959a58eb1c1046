"""The user's data in batches that fit a model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.data import images, tensors, text
from moeify.errors import BadInputSpec, BadOption, UnreadableFile, UsageError
from moeify.ir.language import is_causal, language_of, token_input_of
from moeify.ir.program import InputSpec, Program

BATCH = 8  # examples that are run at a time

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Options:
    """How data are read. ``sequence`` and ``tokenizer`` are of a text, ``image_mean`` and ``image_std`` of images."""

    tokenizer: str | None = None
    sequence: int | None = None
    image_mean: Sequence[float] | None = None
    image_std: Sequence[float] | None = None
    batch: int = BATCH
    seed: int = 0  # of the order of examples


@dataclass(frozen=True)
class Data:
    """Batches of inputs, made when they are asked for; ``source`` is where they come from, for people.

    ``labels`` are the right classes of each batch, as integers, where the data have them: the tensor ``labels`` beside
    the inputs, or the folder that an image is in, of which ``classes`` are the names.
    """

    batches: Iterable[Batch]
    source: str
    notes: tuple[str, ...] = ()
    labels: Iterable[Tensor] | None = None
    classes: tuple[str, ...] = ()


def open_data(data: Any, program: Program, options: Options, model: Path | None = None) -> Data:
    """Batches of what the user gave, in an order that depends on the seed only.

    ``data`` is the path of a text (``.txt``, ``.text``, ``.md``), of a folder of images or of tensors (``.pt``,
    ``.npz``, ``.safetensors``), a tuple or mapping of tensors whose rows are examples, or an iterable of batches
    (tensors, tuples or mappings of them), which are run as they come. ``model`` is the model's file or folder, beside
    which a tokenizer and a preprocessor_config.json may lie. Raises UnreadableFile, UsageError, BadOption, or
    BadInputSpec for data that do not fit the model.
    """
    if isinstance(data, (str, Path)):
        path = Path(data)
        if not path.exists():
            raise UnreadableFile(f"there is no file or folder {path}")
        if path.is_dir():
            return _images(path, program, options, model)
        if path.suffix.lower() in text.SUFFIXES:
            return _text(path, program, options, model)
        return _tensors(tensors.tensors(path), program.inputs, options, str(path))
    if isinstance(data, Mapping) or (isinstance(data, tuple) and all(isinstance(one, Tensor) for one in data)):
        return _tensors(data, program.inputs, options, "the data")
    if isinstance(data, Iterable) and not isinstance(data, Tensor):
        return Data((_fitted(batch, program.inputs) for batch in data), "batches from Python")
    raise UsageError(
        f"cannot read data from a {type(data).__name__}",
        hint="give a path, a tuple or dict of tensors, or an iterable of batches",
    )


def _text(path: Path, program: Program, options: Options, model: Path | None) -> Data:
    found = token_input_of(program)
    if found is None:
        raise BadOption(f"{path} is a text, and the model reads no tokens", hint="give tensors by input name")
    tokenizer, notes = options.tokenizer, []
    if tokenizer is None:
        if model is None or not (model / "tokenizer_config.json").is_file():
            raise UsageError(f"{path} is a text", hint=f"say how to cut it: --tokenizer FOLDER, or {text.BYTES}")
        tokenizer = str(model)
        notes.append(f"the text is cut by the tokenizer in {model}")
    fixed = next(spec.shape[1] for spec in program.inputs if spec.name == found.name)
    sequence = options.sequence or (fixed if isinstance(fixed, int) else text.SEQUENCE)
    language = language_of(program)
    causal = language is not None and is_causal(program.graph_module, program, language)
    cut = text.pieces(path, tokenizer, sequence, found.vocabulary, framed=not causal)
    made = text.inputs_of(cut, program.inputs, found.name)
    source = f"{path}, {len(cut)} pieces of {sequence} tokens"
    return Data(_Shuffled(len(cut), program.inputs, options, source, _rows_of(made)), source, tuple(notes))


def _images(path: Path, program: Program, options: Options, model: Path | None) -> Data:
    scaling = images.scaling_of(model, options.image_mean, options.image_std)
    found = images.folder(path, program.inputs, program.example, scaling)
    source = f"{path}, {len(found.files)} images"
    batches = _Shuffled(
        len(found.files), program.inputs, options, source, lambda which: {found.spec.name: found.take(which)}
    )
    notes = (scaling.note,) if scaling.note else ()
    sorted_by = images.classes_of(path, found.files)
    if sorted_by is None:
        return Data(batches, source, notes)
    names, labels = sorted_by
    return Data(batches, f"{source} in {len(names)} folders", notes, _Labels(batches, labels), names)


def _tensors(
    given: Mapping[str, Tensor] | Sequence[Tensor], specs: Sequence[InputSpec], options: Options, source: str
) -> Data:
    whole = tensors.named(given, specs, source)
    first = {spec.shape[0] if spec.shape else None for spec in specs}
    counts = {name: len(tensor) if tensor.dim() else 0 for name, tensor in whole.items()}
    if len(first) > 1 or None in first or first == {"seq"}:  # no dimension that counts examples: one batch
        return Data([tensors.fit(whole, specs, source)], source)
    if len(set(counts.values())) != 1:
        said = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise BadInputSpec(f"{source}: the tensors have not one row per example: {said}")
    count = next(iter(counts.values()))
    batches = _Shuffled(count, specs, options, source, _rows_of(whole))
    source = f"{source}, {count} examples"
    labels = given.get(tensors.LABELS) if isinstance(given, Mapping) and tensors.LABELS not in whole else None
    if labels is None or not labels.dim() or len(labels) != count or labels.is_floating_point():
        return Data(batches, source)
    return Data(batches, source, labels=_Labels(batches, labels))


@dataclass(frozen=True)
class _Shuffled:
    """Every example once, in an order of its own. What is left over where the model takes a fixed number is not run."""

    count: int
    specs: Sequence[InputSpec]
    options: Options
    source: str
    take: Callable[[list[int]], Mapping[str, Tensor]]

    def __iter__(self) -> Iterator[Batch]:
        return (tensors.fit(self.take(which), self.specs, self.source) for which in self.indices())

    def indices(self) -> Iterator[list[int]]:
        """Of the examples of each batch."""
        fixed = self.specs[0].shape[0]
        size = fixed if isinstance(fixed, int) else self.options.batch
        if self.count < size and isinstance(fixed, int):
            raise BadInputSpec(
                f"{self.source}: {self.count} examples, and the model takes exactly {fixed} at a time",
                hint="convert with a named size: --input 'x=float32[batch=2,...]'",
            )
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.options.seed)).tolist()
        for start in range(0, self.count, size):
            which = order[start : start + size]
            if len(which) == size or not isinstance(fixed, int):
                yield which


@dataclass(frozen=True)
class _Labels:
    """In the order of the batches."""

    batches: _Shuffled
    labels: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return (self.labels[torch.tensor(which)] for which in self.batches.indices())


def _rows_of(whole: Mapping[str, Tensor]) -> Callable[[list[int]], dict[str, Tensor]]:
    return lambda which: {name: tensor[torch.tensor(which)] for name, tensor in whole.items()}


def _fitted(batch: Any, specs: Sequence[InputSpec]) -> Batch:
    """A batch from Python. Raises BadInputSpec for what is no batch, or does not fit."""
    if isinstance(batch, Tensor):
        batch = (batch,)
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(values, (tuple, list)) or not all(isinstance(one, Tensor) for one in values):
        raise BadInputSpec(
            f"a batch of the data is a {type(batch).__name__}", hint="give tensors, or tuples or dicts of them"
        )
    return tensors.fit(batch, specs, "the data")
