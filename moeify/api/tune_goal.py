"""What ``moeify tune`` is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moeify.errors import BadOption, UsageError
from moeify.ir.recipe import TOKENS
from moeify.tuning.choices import PARTS

TEST_TOKENS = 4096
TIME_TOKENS = 128
TRIES = 4


@dataclass(frozen=True)
class Goal:
    """What is asked for, and how much is spent on it. Exactly one of ``keep``, ``speedup`` and ``flops`` is given.

    ``keep`` is a share in (0, 1] of what ``tune_report.kept`` measures, ``speedup`` the dense model's time over the
    converted one's for ``time_tokens`` tokens, ``flops`` a share in (0, 1) of the feed-forward blocks'
    work. ``parts`` is the largest number of parts of a block, ``tries`` that of conversions until the goal is met;
    ``points`` more are made for the picture that they give of the frontier. ``test`` is data like ``data``; ``time``
    False leaves ONNX Runtime out.
    """

    keep: float | None = None
    speedup: float | None = None
    time_tokens: int = TIME_TOKENS
    threads: int | None = None
    time: bool = True
    parts: int = PARTS
    tries: int = TRIES
    fit_tokens: int = TOKENS
    test_tokens: int = TEST_TOKENS
    classes: bool = False
    test: Any = None
    points: int = 0
    flops: float | None = None

    def check(self) -> None:
        """Raises UsageError for none or more than one, BadOption for numbers that make no sense."""
        said = [name for name in ("keep", "speedup", "flops") if getattr(self, name) is not None]
        if len(said) != 1:
            raise UsageError(
                f"give one of {', '.join(said)}"
                if said
                else "say what to tune for: a quality, a speed or an amount of work",
                hint="--keep 0.99, or --speedup 1.3, or --flops 0.5",
            )
        if self.flops is not None and not 0 < self.flops < 1:
            raise BadOption(f"flops is {self.flops:g}: it must be above 0 and below 1", hint="0.5 is half the work")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise BadOption(f"keep is {self.keep:g}: it must be above 0 and at most 1", hint="0.99 keeps 99 %")
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise BadOption(f"speedup is {self.speedup:g}: it must be above 1", hint="1.3 is three tenths faster")
        for name in ("time_tokens", "tries", "fit_tokens", "test_tokens"):
            if getattr(self, name) < 1:
                raise BadOption(f"{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1")
        if self.points < 0:
            raise BadOption(f"points is {self.points}: it must be at least 0")
        if self.parts < 3:
            raise BadOption(f"parts is {self.parts}: it must be at least 3, or no part could be left out")
