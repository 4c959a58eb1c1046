"""Running the dense model, then the converted one, with one of them in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from moeify.api.output_kinds import PREDICTIONS, OutputKind
from moeify.backends.calls import Call, find_calls
from moeify.backends.pt2.unfailing import unfailing
from moeify.errors import BadInputSpec, OutputNotWritten, UsageError
from moeify.fitting.padding import mask_of_rows, masks_of
from moeify.frontend.reasons import first_line
from moeify.ir import metadata
from moeify.ir.difference import wide
from moeify.ir.program import Program, flat
from moeify.verify.fidelity import ExpertLoad, LargestError, Predictions, RowErrors
from moeify.verify.measure import in_float32, widened

Watch = Callable[[Tensor], Tensor | None]  # sees the value of a node, and may give another for its place
_moe = torch.ops.moeify


@dataclass(frozen=True)
class Record:
    """What the dense model gave for one batch. ``blocks`` holds rows [T, D] by anchor and call."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    blocks: dict[tuple[str, int], Tensor]

    @property
    def rows(self) -> int:
        return max(map(len, self.blocks.values()))


@dataclass(frozen=True)
class Records:
    """Records in a folder, a file each, read one at a time."""

    folder: Path

    def add(self, number: int, record: Record) -> None:
        """Raises OutputNotWritten, where the disk is full for example."""
        try:
            with unfailing(self._file(number)) as file:
                torch.save((record.inputs, record.outputs, record.blocks), file)
        except OSError as error:
            raise OutputNotWritten(
                f"cannot keep what the dense model gives in {self.folder}: {(error.strerror or str(error)).lower()}",
                hint="choose a smaller --tokens, or another folder with the variable TMPDIR",
            ) from error

    def read(self, number: int) -> Record:
        return Record(*torch.load(self._file(number), weights_only=True))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.pt"


@contextmanager
def dense_run(program: Program) -> Iterator[Callable[[tuple[Tensor, ...]], Record]]:
    """Runs the dense program on a batch, in float32 at least. find-ffn and select have seen it.

    Raises BadInputSpec when it does not run.
    """
    blocks = {block.anchor: block for block in program.blocks}
    watches: dict[str, Watch] = {}
    kept: dict[tuple[str, int], Tensor] = {}
    for key, node in metadata.outputs(program.graph).items():
        # find-ffn leaves the features of a moe.ffn last, and those of a region where they were.
        first = blocks[key[0]].layout == "channels-first" and node.target != _moe.ffn.default
        watches[node.name] = _keeper(kept, key, 1 if first else -1)

    def run(batch: tuple[Tensor, ...]) -> Record:
        kept.clear()
        outputs = flat(_run(module, watches, batch, "the dense model does not run on the data"))
        return Record(list(batch), outputs, dict(kept))

    with torch.no_grad(), in_float32(program) as module:
        yield run


def _keeper(kept: dict[tuple[str, int], Tensor], key: tuple[str, int], features: int) -> Watch:
    def keep(value: Tensor) -> None:
        kept[key] = value.movedim(features, -1).flatten(0, -2)

    return keep


@dataclass
class BlockMeasures:
    errors: RowErrors
    load: ExpertLoad


@dataclass
class OutputMeasures:
    kind: OutputKind
    errors: RowErrors
    largest: LargestError
    predictions: Predictions


class MixtureRun:
    """Runs a converted program on what was recorded of the dense one, and adds up how far it is from it.

    Each batch is run twice: with every block's output replaced by the dense one, so that each is measured on the dense
    model's own inputs, and free, for the outputs and the experts' loads. Rows of padding do not count.
    """

    def __init__(self, program: Program, kinds: Sequence[OutputKind]) -> None:
        self.outputs = [OutputMeasures(kind, RowErrors(), LargestError(), Predictions()) for kind in kinds]
        self.blocks: dict[str, BlockMeasures] = {}
        self._program = program
        nodes = {node.name: node for node in program.graph.nodes}
        names = {name for name, _ in program.graph_module.named_parameters(remove_duplicate=False)}
        masks = masks_of(program.graph, program.inputs)
        self._sites = []
        for call in find_calls(program.graph):
            experts = program.parameter(f"{call.block}.experts.up").shape[0]
            self.blocks.setdefault(call.block, BlockMeasures(RowErrors(), ExpertLoad(experts)))
            mask = mask_of_rows(program.graph, masks, nodes[call.rows])
            self._sites.append((call, _whole_output(nodes[call.output], call.block, names).name, mask))

    def compare(self, records: Iterator[tuple[tuple[Tensor, ...], Record]]) -> None:
        """Pairs of this program's inputs and of what the dense one gave for the same."""
        with torch.no_grad(), in_float32(self._program) as module:
            for batch, record in records:
                forced = {name: self._forcing(call, record, batch, mask) for call, name, mask in self._sites}
                counted = {call.experts: self._counting(call, batch, mask) for call, _, mask in self._sites}
                fail = "the converted model does not run on the data"
                _run(module, forced, batch, fail)
                self._add(flat(_run(module, counted, batch, fail)), record)

    def _forcing(self, call: Call, record: Record, batch: tuple[Tensor, ...], mask: int | None) -> Watch:
        dense = record.blocks[call.block, call.number]

        def force(value: Tensor) -> Tensor:
            if value.shape != dense.shape:
                raise UsageError(
                    f"the block gives rows of shape {tuple(value.shape)} and the dense one {tuple(dense.shape)}",
                    where=call.block,
                    hint="give the dense model that was converted",
                )
            self.blocks[call.block].errors.add(_on(value, batch, mask), _on(dense, batch, mask))
            return dense

        return force

    def _counting(self, call: Call, batch: tuple[Tensor, ...], mask: int | None) -> Watch:
        def count(experts_TK: Tensor) -> None:
            self.blocks[call.block].load.add(_on(experts_TK, batch, mask))

        return count

    def _add(self, values: list[Tensor], record: Record) -> None:
        shapes = [[tuple(value.shape) for value in side] for side in (record.outputs, values)]
        if shapes[0] != shapes[1]:
            raise UsageError(f"the outputs cannot be compared: shapes {shapes[0]} against {shapes[1]}")
        for measures, value, dense in zip(self.outputs, values, record.outputs, strict=True):
            add_output(measures, value, dense, record.inputs)


def add_output(measures: OutputMeasures, value: Tensor, dense: Tensor, inputs: Sequence[Tensor]) -> None:
    """What one output is for a batch, against the same output of the dense model."""
    kind = measures.kind
    if kind.kind == "values":
        rows = [wide(tensor).reshape(-1, 1) for tensor in (value, dense)]
    else:
        rows = [_on(tensor.flatten(0, -2), inputs, kind.mask) for tensor in (value, dense)]
    measures.errors.add(*rows)
    measures.largest.add(*rows)
    if kind.ids is not None:
        on = slice(None) if kind.mask is None else (inputs[kind.mask] != 0).unfold(1, 2, 1).all(2).flatten()
        targets = inputs[kind.ids][:, 1:].flatten()[on]
        scores, reference = (tensor[:, :-1].flatten(0, 1)[on] for tensor in (value, dense))
        measures.predictions.add(scores, reference, targets)
    elif kind.kind in PREDICTIONS:
        measures.predictions.add(*rows)


def _on(rows: Tensor, inputs: Sequence[Tensor], mask: int | None) -> Tensor:
    """Without rows of padding."""
    return rows if mask is None else rows[inputs[mask].flatten() != 0]


def _whole_output(routed: fx.Node, anchor: str, names: set[str]) -> fx.Node:
    """The sum of routed experts, shared experts and output bias, as make-experts adds them, in that order."""
    node = routed
    for part in ("shared.up", "output_bias"):
        if f"{anchor}.{part}" in names:
            (node,) = node.users
            assert node.target == torch.ops.aten.add.Tensor
    return node


class _Watched(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, watches: dict[str, Watch]) -> None:
        super().__init__(module)
        self._watches = watches

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        watch = self._watches.get(n.name)
        other = None if watch is None else watch(value)
        return value if other is None else other


def _run(module: fx.GraphModule, watches: dict[str, Watch], batch: tuple[Tensor, ...], fail: str) -> Any:
    try:
        return _Watched(module, watches).run(*widened(batch))
    except (RuntimeError, IndexError, ValueError) as error:
        raise BadInputSpec(f"{fail}: {first_line(error)}") from error
