"""What the routers of a converted file do with the user's data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from moeify.api.load import graph_module, read_graph
from moeify.data.examples import Options, open_data
from moeify.errors import BadInputSpec
from moeify.frontend.reasons import first_line
from moeify.training.masks import masks_of_blocks
from moeify.training.recorder import routing
from moeify.training.routing_report import RoutingReport
from moeify.training.row_labels import row_labels


@dataclass(frozen=True)
class FileRouting:
    """``source`` says what the data were, ``notes`` how they were read. ``labels`` says what a token's label is, None
    where it has none, and ``classes`` what the labels of a folder of images are called.
    """

    model: str
    source: str
    notes: tuple[str, ...]
    report: RoutingReport
    labels: str | None = None
    classes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "source": self.source,
            "notes": list(self.notes),
            "labels": self.labels,
            "classes": list(self.classes),
            **self.report.to_dict(),
        }


def routing_file(model: str | Path, data: Any, *, options: Options | None = None, tokens: int = 8192) -> FileRouting:
    """Run a converted ``.pt2`` on data, as ``open_data`` reads them, until a block has seen ``tokens`` rows.

    Padding, where an input is its mask, does not count. What the expert of a token tells of its label is measured where
    the data have labels, and for a model that reads tokens, where they have none, of the token itself. Raises
    UnreadableFile for a file that moeify did not write, what reading the data raises, BadInputSpec where the model does
    not run on them.
    """
    path = Path(model)
    program, metadata = read_graph(path)
    found = open_data(data, program, options or Options(), path)
    module = graph_module(program, metadata)
    paths = {entry["anchor"]: entry["path"] for entry in metadata["report"]["blocks"]}
    masks, of_rows = masks_of_blocks(program, paths), row_labels(program, paths)
    names = [spec.name for spec in program.inputs]
    with routing(module) as seen, torch.no_grad():
        for batch, labels in zip(found.batches, repeat(None) if found.labels is None else found.labels):
            seen.next(
                mask={block: batch[position] for block, position in masks.items()},
                labels=of_rows.of(dict(zip(names, batch)), labels),
            )
            try:
                module(*batch)
            except (RuntimeError, IndexError, ValueError) as error:
                raise BadInputSpec(f"the model does not run on the data: {first_line(error)}") from error
            if seen.tokens >= tokens:
                break
    report = seen.report()
    told = labels_are(report, found.labels is not None, found.classes)
    notes = found.notes
    if told is None and found.labels is not None:
        notes += ("which label belongs to which row of a block is not known, so what experts tell of them is not said",)
    return FileRouting(str(model), found.source, notes, report, told, found.classes)


def labels_are(report: RoutingReport, labelled: bool, classes: Sequence[str]) -> str | None:
    """What the labels of a report's tokens are, in words; None where no block has any."""
    if all(block.mutual_information is None for block in report.blocks):
        return None
    if not labelled:
        return "the token itself"
    return "the folder of its image" if classes else "the tensor 'labels' of the data"
