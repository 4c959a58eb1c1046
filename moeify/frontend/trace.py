"""A model to a Program: torch.export in eval mode, then a comparison of the graph with the model."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from moeify.errors import BadInputSpec, NotExportable
from moeify.frontend.calling import mode, run, tensors_only
from moeify.frontend.compare import check_graph
from moeify.frontend.exported import exported_examples, exported_program
from moeify.frontend.grad_regions import inline_grad_regions
from moeify.frontend.guess import guess_examples
from moeify.frontend.hf_attention import with_attention_fallback
from moeify.frontend.hf_inputs import hf_examples, is_transformers
from moeify.frontend.inputs import (
    Example,
    TensorSpec,
    check_names,
    name_specs,
    parse_input_spec,
    tensor_names,
)
from moeify.frontend.meta import is_meta, meta_to_cpu
from moeify.frontend.probe import attention_dropout
from moeify.frontend.reasons import not_exportable
from moeify.frontend.vocabulary import make_examples
from moeify.ir.modes import attention_probabilities, is_training, set_training
from moeify.ir.program import InputSpec, Program

Inputs = Sequence[str] | Sequence[TensorSpec] | Sequence[Example] | Mapping[str, Tensor] | Sequence[Tensor] | None


def capture(module: nn.Module, inputs: Inputs = None, *, fixed: bool = False) -> Program:
    """Capture a model as a Program whose graph computes what the model computes in eval mode.

    ``inputs`` are specs (``"input_ids=int64[batch=2,seq=16]"``), named tensors, or tensors by position; None asks the
    model itself and then guesses by its first layers. Batch and sequence are dynamic unless ``fixed``. The module is
    left as it was.

    ``program.provenance`` then holds: ``notes`` (list of lines for people), ``capture_error`` (maximum relative error
    of the graph against the model, None on the meta device), ``attention_dropout`` (dropout of each attention call in
    training, graph order), ``model`` (class name), ``torch`` (version).

    Raises NotExportable, BadInputSpec.
    """
    ready = exported_program(module)
    if ready is not None and inputs is None and (examples := exported_examples(ready)):
        return _from_archive(ready, examples, fixed)
    notes: list[str] = []
    # A view would bring the sizes of its base into the guards of the capture.
    owned = [Example(e.name, e.tensor.detach().clone(), e.dims) for e in resolve(module, inputs, notes)]
    examples = _double_single_rows(module, owned, inputs, notes)
    if fixed:
        examples = [Example(e.name, e.tensor, tuple(e.tensor.shape)) for e in examples]
    exported = with_attention_fallback(module, lambda: _export(module, examples), notes)
    graph_module = exported.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    inline_grad_regions(graph_module)
    if is_meta(module):
        meta_to_cpu(graph_module)
    set_training(graph_module, False)
    specs = _input_specs(graph_module, examples, notes)
    dynamic = [Example(e.name, e.tensor, spec.shape) for e, spec in zip(examples, specs)]
    error = check_graph(module, graph_module, exported, dynamic, notes)
    dropouts = attention_dropout(module, graph_module, examples, notes)
    program = Program(graph_module, specs, tuple(_on_cpu(e.tensor) for e in examples))
    program.provenance.update(
        model=type(module).__name__,
        torch=torch.__version__,
        capture_error=error,
        attention_dropout=dropouts,
        notes=notes,
    )
    return program


def _from_archive(exported: ExportedProgram, examples: list[Example], fixed: bool) -> Program:
    """A program that torch.export.load read: there is no model to capture again or to compare with."""
    notes = ["captured elsewhere: the archive's own graph and example inputs are used"]
    graph_module = exported.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    inline_grad_regions(graph_module)
    if is_training(graph_module):
        notes.append("the archive was exported in train mode: dropout and batch norm are switched to eval")
    set_training(graph_module, False)
    specs = [InputSpec(e.name, e.tensor.dtype, tuple(e.tensor.shape) if fixed else e.dims) for e in examples]
    program = Program(graph_module, tuple(specs), tuple(_on_cpu(e.tensor) for e in examples))
    program.provenance.update(
        model="ExportedProgram", torch=torch.__version__, capture_error=None, notes=notes,
        attention_dropout=attention_probabilities(exported.graph_module),
    )  # fmt: skip
    return program


def resolve(module: nn.Module, inputs: Inputs, notes: list[str]) -> list[Example]:
    """Example inputs in the order of forward's parameters, wherever they come from."""
    if inputs is None or not len(inputs):
        found = (hf_examples(module) if is_transformers(module) else None) or guess_examples(module)
        notes.append(found[1])
        return found[0]
    if isinstance(inputs, Mapping):
        check_names(module, list(inputs))
        return _with_usual_dims(inputs)
    items: list[Any] = [parse_input_spec(item) if isinstance(item, str) else item for item in inputs]
    if all(isinstance(item, TensorSpec) for item in items):
        return make_examples(module, name_specs(module, items))
    if all(isinstance(item, Tensor) for item in items):
        names = tensor_names(module, len(items))
        check_names(module, names)
        return _with_usual_dims(dict(zip(names, items)))
    if all(isinstance(item, Example) for item in items):
        return list(items)
    raise BadInputSpec(f"inputs are specs or tensors, not {type(items[0]).__name__}")


def _with_usual_dims(tensors: Mapping[str, Tensor]) -> list[Example]:
    """Batch first, then the sequence: the second of two dimensions of integers, of three dimensions of floats.

    Sequences of different lengths get different names.
    """
    examples = []
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        dims: list[int | str] = list(tensor.shape)
        usual = {0: "batch", 1: "seq"} if len(dims) == (3 if tensor.is_floating_point() else 2) else {0: "batch"}
        for i, label in usual.items():
            if i < len(dims) and tensor.shape[i] > 1:
                fits = sizes.setdefault(label, tensor.shape[i]) == tensor.shape[i]
                dims[i] = label if fits else f"{name}_{label}"
        examples.append(Example(name, tensor, tuple(dims)))
    return examples


def _double_single_rows(module: nn.Module, examples: list[Example], inputs: Inputs, notes: list[str]) -> list[Example]:
    """A batch of one would be baked in: give tensors with one row a second one, if the model runs on two."""
    given = isinstance(inputs, Mapping) or (inputs is not None and any(isinstance(i, Tensor) for i in inputs))
    if not given or not all(e.tensor.ndim and e.tensor.shape[0] == 1 for e in examples):
        return examples
    doubled = [Example(e.name, torch.cat([e.tensor] * 2), ("batch", *e.dims[1:])) for e in examples]
    try:
        with torch.no_grad(), mode(module, training=False):
            run(module, {e.name: e.tensor for e in doubled})
    except Exception:  # a model for one row only
        notes.append("the batch stays fixed at 1: the model does not run on two rows")
        return examples
    return doubled


def _export(module: nn.Module, examples: list[Example]) -> ExportedProgram:
    """torch.export with the examples as the only inputs. Raises NotExportable."""
    shapes = {e.name: {i: Dim.AUTO for i, d in enumerate(e.dims) if isinstance(d, str)} for e in examples}
    names = [e.name for e in examples]
    on_meta = is_meta(module)
    tensors = tuple(e.tensor.to("meta") if on_meta else e.tensor for e in examples)
    try:
        with (
            mode(module, training=False),
            tensors_only(module, names),
            torch.enable_grad(),
            _quiet(),
        ):
            return torch.export.export(module, tensors, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises whatever the model or its own parts raise
        raise not_exportable(module, error) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export prints and logs what it then raises, and warns about flat LSTM weights that it puts back itself."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.filterwarnings("ignore", message=r"The tensor attributes? self\..*assigned during export")
            yield
    finally:
        logging.disable(level)


def _input_specs(graph_module: fx.GraphModule, examples: list[Example], notes: list[str]) -> tuple[InputSpec, ...]:
    """What stayed dynamic, read from the captured graph; what did not is noted."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(examples):
        raise NotExportable(f"the graph has {len(placeholders)} inputs and the model takes {len(examples)}")
    labels: dict[str, str] = {}  # symbol -> name
    specs = []
    for node, example in zip(placeholders, examples):
        shape: list[int | str] = []
        for i, (wanted, size) in enumerate(zip(example.dims, node.meta["val"].shape)):
            constant = size if isinstance(size, int) else size.node.maybe_as_int()
            if constant is not None:
                shape.append(int(constant))
                if isinstance(wanted, str):
                    notes.append(f"{wanted} of {example.name} (dimension {i}) stays fixed at {constant}")
            else:
                shape.append(labels.setdefault(str(size), str(wanted)))  # sizes that must agree share a name
        specs.append(InputSpec(example.name, example.tensor.dtype, tuple(shape)))
    return tuple(specs)


def _on_cpu(tensor: Tensor) -> Any:
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor
