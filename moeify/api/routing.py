"""What the routers of a converted file do with the user's data."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class FileRouting:
    """``source`` says what the data were, ``notes`` how they were read."""

    model: str
    source: str
    notes: tuple[str, ...]
    report: RoutingReport

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "source": self.source, "notes": list(self.notes), **self.report.to_dict()}


def routing_file(model: str | Path, data: Any, *, options: Options | None = None, tokens: int = 8192) -> FileRouting:
    """Run a converted ``.pt2`` on data, as ``open_data`` reads them, until a block has seen ``tokens`` rows.

    Padding, where an input is its mask, does not count. Raises UnreadableFile for a file that moeify did not write,
    what reading the data raises, BadInputSpec where the model does not run on them.
    """
    path = Path(model)
    program, metadata = read_graph(path)
    found = open_data(data, program, options or Options(), path)
    module = graph_module(program, metadata)
    masks = masks_of_blocks(program, {entry["anchor"]: entry["path"] for entry in metadata["report"]["blocks"]})
    with routing(module) as seen, torch.no_grad():
        for batch in found.batches:
            seen.next(mask={block: batch[position] for block, position in masks.items()})
            try:
                module(*batch)
            except (RuntimeError, IndexError, ValueError) as error:
                raise BadInputSpec(f"the model does not run on the data: {first_line(error)}") from error
            if seen.tokens >= tokens:
                break
    return FileRouting(str(model), found.source, found.notes, seen.report())
