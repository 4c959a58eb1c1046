"""The report of an export: for the screen, for --json and for the metadata of the file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ExportedCall:
    """One call of a converted block. ``relative_error`` is of the lowering alone: both sides get the same rows."""

    path: str
    call: int
    lowering: str
    why: str
    experts: int
    top_k: int
    relative_error: float | None = None
    rerouted: int = 0  # tokens that the runtime sends elsewhere, because scores tie to within rounding
    warning: str | None = None  # slower than the dense block at the expected tokens, ...


@dataclass
class ExportReport:
    """What ``moeify export`` chose, wrote and proved."""

    model: str
    backend: str
    target: str
    dtype: str
    tokens: int
    output: str | None = None
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    blocks: list[ExportedCall] = field(default_factory=list)
    provider: str = ""  # where it was verified, in a word
    verified_on: str = ""  # the same for a person
    verified: bool = False
    tolerance: float = 1e-4
    max_relative_error: float | None = None  # the largest of the blocks' and the whole model's
    model_relative_error: float | None = None
    rerouted: int = 0
    tokens_verified: int = 0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    placements: list[dict[str, Any]] = field(default_factory=list)  # nodes that leave the target's provider
    versions: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
