"""The runtime's profile of a session, added up by block and stage from the names that the lowerings give nodes."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# ``encoder.layer.0.ffn#1/07.expert-3.up``: call, number, stage. Emitter._name writes it; fusions append to it.
_NAME = re.compile(r"^(?P<call>.+)/\d{2,}\.(?P<stage>.+)$")
_EXPERT = re.compile(r"^expert-\d+")
_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class Profile:
    """Seconds of kernels over all ``runs``.

    ``blocks``: by call, then by stage of its lowering, the experts of a stage together. ``other``: by operator, the
    nodes of no block. Kernels that ran at the same time count each in full.
    """

    runs: int
    blocks: Mapping[str, Mapping[str, float]]
    other: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.of_blocks.values()) + sum(self.other.values())

    @property
    def of_blocks(self) -> Mapping[str, float]:
        """By call."""
        return {name: sum(stages.values()) for name, stages in self.blocks.items()}


def read_profile(path: Path) -> Profile:
    """From the file that ``end_profiling`` names."""
    return add_up(json.loads(path.read_text(encoding="utf-8")))


def add_up(events: list[Mapping]) -> Profile:
    """From the runtime's trace events; durations are in microseconds."""
    blocks: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    other: dict[str, float] = defaultdict(float)
    runs = 0
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Session" and name == "model_run":
            runs += 1
        if event.get("cat") != "Node" or not name.endswith(_SUFFIX):
            continue
        seconds = event["dur"] * 1e-6
        match = _NAME.match(name.removesuffix(_SUFFIX))
        if match is None:
            other[event.get("args", {}).get("op_name", "?")] += seconds
        else:
            blocks[match["call"]][_EXPERT.sub("experts", match["stage"])] += seconds
    return Profile(runs, {call: dict(stages) for call, stages in blocks.items()}, dict(other))
