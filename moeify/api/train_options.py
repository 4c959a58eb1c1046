"""What a training run is told: one object for Python, for the flags of ``moeify train`` and for a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from moeify.distributed.schedule import Schedule
from moeify.errors import BadOption, BadRecipe, UnreadableFile

TABLE = "train"  # of a recipe file
ONLY = ("all", "ffn", "experts", "routers")
DISTANCES = ("kl", "mse", "cosine")
# What may change when a run goes on: it is not what is trained, or it is only measured.
_FREE = (
    "data", "test", "test_part", "test_examples", "eval_every", "device", "checkpoints", "save_every", "keep",
    "factory", "allow",
)  # fmt: skip


@dataclass(frozen=True)
class TrainOptions:
    """See ``moeify train --help``. Without a ``warmup`` it is a twentieth of the steps, without a ``device`` the GPU if
    there is one. ``image_mean`` and ``image_std`` have a value for each channel, or one for all. ``router_losses`` take
    the place of those of the model's recipe. ``consistency`` is the weight of what two forward passes of a batch differ
    by, 0 for one pass. ``factory`` and ``allow`` are of the teacher's file.
    """

    data: str | None = None
    test: str | None = None
    test_part: float = 0.1
    test_examples: int = 64
    tokenizer: str | None = None
    sequence: int = 128
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    loss: str | None = None
    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    lr: float = 1e-4
    warmup: int | None = None
    decay: str = "cosine"
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    only: str = "all"
    router_losses: tuple[str, ...] | None = None
    teacher: str | None = None
    distill: str | None = None
    distill_weight: float = 1.0
    temperature: float = 1.0
    consistency: float = 0.0
    dropout: bool = True
    amp: bool = False
    device: str | None = None
    eval_every: int = 0
    checkpoints: str | None = None
    save_every: int = 100
    keep: int = 2
    factory: str | None = None
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.schedule()
        if not 0 <= self.test_part < 1:
            raise BadOption(f"test-part is {self.test_part:g}: it must be at least 0 and below 1")
        if min(self.test_examples, self.save_every, self.keep) < 1 or self.eval_every < 0 or self.sequence < 2:
            raise BadOption("test-examples, save-every and keep must be at least 1, eval-every 0, sequence 2")
        if self.consistency < 0:
            raise BadOption(f"the weight of the consistency is {self.consistency:g}: it must not be negative")
        if not 0 < self.distill_weight <= 1 or self.temperature <= 0:
            raise BadOption("distill-weight must be above 0 and at most 1, and the temperature above 0")
        for name, known in (("only", ONLY), ("distill", (None, *DISTANCES))):
            if getattr(self, name) not in known:
                said = ", ".join(one for one in known if one)
                raise BadOption(f"{name} is {getattr(self, name)!r}", hint=f"choose one of {said}")

    def schedule(self) -> Schedule:
        """Raises BadOption."""
        warmup = self.steps // 20 if self.warmup is None else self.warmup
        return Schedule(
            self.steps, self.batch, self.lr, self.weight_decay, self.clip, self.seed,
            warmup=warmup, decay=self.decay, accumulate=self.accumulate, amp=self.amp,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What must be the same when a run goes on, by flag. More steps may be asked for where the rate is constant and
        the warmup was said."""
        facts = dataclasses.asdict(self)
        if self.decay == "constant" and self.warmup is not None:
            del facts["steps"]
        told = {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}  # as in JSON
        return {flag(name): value for name, value in told.items() if name not in _FREE and value is not None}


def flag(name: str) -> str:
    return name.replace("_", "-")


def read_table(path: str | Path) -> dict[str, Any]:
    """The fields that the ``[train]`` table of a recipe file gives. Paths in it are seen from the current folder.

    Raises UnreadableFile, or BadRecipe for a file without the table or with a field that does not exist or has another
    type.
    """
    try:
        found = tomllib.loads(Path(path).read_text()).get(TABLE)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UnreadableFile(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(found, Mapping):
        raise BadRecipe(f"{path} has no table [{TABLE}]", hint=f"write [{TABLE}] and the flags below it: steps = 500")
    return {name.replace("-", "_"): _typed(path, name, value) for name, value in found.items()}


def _typed(path: str | Path, name: str, value: Any) -> Any:
    kinds = get_type_hints(TrainOptions)
    kind = kinds.get(name.replace("-", "_"))
    if kind is None:
        raise BadRecipe(
            f"[{TABLE}] of {path} has no field {name!r}", hint=f"its fields: {', '.join(sorted(map(flag, kinds)))}"
        )
    kinds_here = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    lists = [get_args(one)[0] for one in kinds_here if get_origin(one) is tuple]
    if isinstance(value, list):
        if any(all(_is(one, of) for one in value) for of in lists):
            return tuple(value)
    elif any(isinstance(one, type) and _is(value, one) for one in kinds_here):
        return float(value) if type(value) is int and int not in kinds_here else value
    raise BadRecipe(f"[{TABLE}] of {path}: {name} is {value!r}, which is of another type")


def _is(value: Any, kind: type) -> bool:
    """Of the type, as TOML has it: a whole number is a float too, and true is no number."""
    return type(value) is kind or (kind is float and type(value) is int)
