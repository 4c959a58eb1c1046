"""What ``moeify export`` asks of a backend that writes something for a runtime, and of what it has lowered."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import fx

from moeify.backends.base import Backend
from moeify.backends.calls import Call, Seen
from moeify.errors import BadOption
from moeify.ir.export_report import ExportReport
from moeify.ir.program import Program


@dataclass(frozen=True)
class Choice:
    """Which lowering a call gets, and why, in a few words."""

    lowering: str
    why: str


class Deployed(Protocol):
    """A lowered program that runs and is not at its place yet. ``choices`` are in the order of ``calls``.

    ``module`` is the torch graph that the calls' names belong to. ``provider`` is what it runs on here, in one word,
    and ``verified_on`` the same for a person.
    """

    module: fx.GraphModule
    calls: Sequence[Call]
    choices: Sequence[Choice]
    provider: str
    verified_on: str
    notes: Sequence[str]  # what the report says of the lowering beside its choices

    def seen(self, inputs: Sequence[torch.Tensor]) -> dict[str, Seen]:
        """What the runtime computes in every call, by ``Call.name``."""

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs of the file as it will be deployed."""

    def placements(self) -> list[dict[str, Any]]:
        """The nodes that will not run where the target says, with the reasons."""

    def finish(self, report: ExportReport) -> list[Path]:
        """Put the report into what is written and that in its place; gives the files written."""


@dataclass(frozen=True)
class Deployment(Backend):
    """A backend of ``moeify export``. Its options are the fields of the class that derives from it."""

    TITLE: ClassVar[str] = ""  # of the runtime, for a person
    SUFFIX: ClassVar[str] = ""  # of what it writes; none for a folder
    FALLBACKS: ClassVar[tuple[str, ...]] = ()  # lowerings that take every block
    TRANSLATING: ClassVar[str] = ""  # the name of a stage

    target: str = "cpu"
    dtype: str = "float32"
    tokens: int = 128  # expected in one call of the model

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise BadOption(f"the expected number of tokens is {self.tokens}: it must be positive")

    @classmethod
    def options(cls) -> set[str]:
        return {field.name for field in fields(cls)}

    @property
    @abstractmethod
    def precision(self) -> str:
        """The type with the fewest digits that values or weights are held in: decides what error is to be expected."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Of the packages that have a say in what is written. Raises RuntimeUnavailable."""

    @abstractmethod
    def cast(self, program: Program) -> tuple[Program, list[str]]:
        """The program in the wanted type, and what that did to it. Raises Refused for weights that overflow."""

    @abstractmethod
    def cast_inputs(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The inputs of a program in the types of one that ``cast`` gave."""

    @abstractmethod
    def neutral(self, program: Program) -> Any:
        """The program in the backend's own form, before any choice. Raises Refused, NotExportable."""

    @abstractmethod
    def chooser(self, tolerance: float, measured: Any = None) -> Any:
        """What picks the lowering of each block. Raises UnknownName or BadOption for one that makes no sense."""

    @abstractmethod
    def measured(self) -> Any:
        """What times the lowerings of a block on this machine, for ``chooser``. Raises BadOption where it cannot."""

    @abstractmethod
    def lower(
        self, source: Any, chosen: Any, path: Path, forced: Mapping[str, str]
    ) -> AbstractContextManager[Deployed]:
        """Lower a copy of what ``neutral`` gave and stage it at ``path``; ``Deployed.finish`` writes it.

        ``forced`` names the lowering of some calls, by ``Call.name``. Raises OutputNotWritten, Refused.
        """

    @abstractmethod
    def slower_than_dense(self, block: Mapping[str, Any]) -> str | None:
        """A warning when a block will take longer than the dense one did; ``block`` is a BlockReport as dict."""


def one_of(option: str, value: str, choices: Sequence[str]) -> None:
    """Raises BadOption when ``value`` is none of them."""
    if value not in choices:
        raise BadOption(f"there is no {option} {value!r}", hint=f"choose one of {', '.join(choices)}")
