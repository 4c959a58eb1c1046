"""The machine that a plan is for: its links, its arithmetic, its memory; each number with its source.

A calibration file is JSON, ``{"where": text, "figures": {name: {"value": number, "source": word}}}``, as ``moeify
calibrate`` writes it. What it holds goes before the defaults, and what the caller gives goes before both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeify.distributed.cost import Link
from moeify.distributed.labels import ASSUMED, GIVEN, Figure, weakest
from moeify.errors import BadOption, UnreadableFile

UNITS = {
    "intra_latency": "s",
    "intra_bandwidth": "B/s",
    "latency": "s",
    "bandwidth": "B/s",
    "peak": "FLOP/s",
    "memory_bandwidth": "B/s",
    "memory": "B",
}


@dataclass(frozen=True)
class Machine:
    """``latency`` and ``bandwidth`` are those between nodes, ``intra_*`` those inside one; bandwidths are bytes/s that
    one rank sends. ``peak`` is FLOP/s of one rank, ``memory`` its bytes.

    The defaults are data sheet numbers of a node of 8 H100 SXM (NVLink 450 GB/s a direction, one 400 Gb/s link per
    GPU, 989 TFLOP/s in dense bfloat16, 3.35 TB/s, 80 GB); the latencies are round figures of NCCL's.
    """

    intra_latency: Figure = field(default=Figure(5e-6, "s"))
    intra_bandwidth: Figure = field(default=Figure(450e9, "B/s"))
    latency: Figure = field(default=Figure(10e-6, "s"))
    bandwidth: Figure = field(default=Figure(50e9, "B/s"))
    peak: Figure = field(default=Figure(989e12, "FLOP/s"))
    memory_bandwidth: Figure = field(default=Figure(3.35e12, "B/s"))
    memory: Figure = field(default=Figure(80e9, "B"))

    @property
    def intra(self) -> Link:
        return Link(self.intra_latency.value, self.intra_bandwidth.value)

    @property
    def inter(self) -> Link:
        return Link(self.latency.value, self.bandwidth.value)

    def links_source(self, nodes: int) -> str:
        """The source of a time over these links, when the ranks stand in so many nodes."""
        used = [self.intra_latency, self.intra_bandwidth]
        return weakest(*used, *((self.latency, self.bandwidth) if nodes > 1 else ()))

    def compute_source(self) -> str:
        return weakest(self.peak, self.memory_bandwidth)

    def with_values(self, values: Mapping[str, float | None], source: str = GIVEN) -> Machine:
        """The same with these numbers, None for one that was not given. Raises BadOption for one that is none."""
        changed = {}
        for name, value in values.items():
            if value is None:
                continue
            may_be_zero = "latency" in name
            if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
                kind = "a number of at least 0" if may_be_zero else "a positive number"
                raise BadOption(f"{name.replace('_', '-')} is {value:g}: it must be {kind}")
            changed[name] = Figure(value, UNITS[name], source)
        return replace(self, **changed)


def read(path: str | Path) -> Machine:
    """The machine of a calibration file, the defaults where it says nothing. Raises UnreadableFile."""
    try:
        figures = json.loads(Path(path).read_text())["figures"]
        machine = Machine()
        for name, entry in figures.items():
            if entry["source"] == ASSUMED:
                continue
            machine = machine.with_values({name: float(entry["value"])}, entry["source"])
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, KeyError, TypeError, AttributeError, BadOption) as error:
        raise UnreadableFile(
            f"{path} is not what moeify calibrate writes: {error}", hint="write one: moeify calibrate -o network.json"
        ) from error
    return machine


def to_dict(machine: Machine, where: str) -> dict[str, Any]:
    """What a calibration file holds; ``where`` says in words what was measured."""
    return {
        "where": where,
        "figures": {
            name: {"value": figure.value, "unit": figure.unit, "source": figure.source}
            for name, figure in ((name, getattr(machine, name)) for name in UNITS)
            if figure.source != ASSUMED
        },
    }
