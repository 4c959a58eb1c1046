"""A number with its unit and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

MEASURED, GIVEN, ASSUMED = "measured", "given", "assumed"
MEANING = {
    MEASURED: "counted in the model, or timed on a machine",
    GIVEN: "what you said",
    ASSUMED: "a default: say otherwise where you know better",
}
_STRENGTH = (ASSUMED, GIVEN, MEASURED)


@dataclass(frozen=True)
class Figure:
    """``source`` is MEASURED, GIVEN or ASSUMED; a number that is computed from others has the weakest of theirs."""

    value: float
    unit: str = ""
    source: str = ASSUMED

    def __post_init__(self) -> None:
        if self.source not in _STRENGTH:
            raise ValueError(f"the source of a figure is {self.source!r}, expected one of {', '.join(_STRENGTH)}")


def weakest(*of: Figure | str) -> str:
    """The source of a number computed from these figures or sources; MEASURED for none."""
    sources = [one.source if isinstance(one, Figure) else one for one in of]
    return min(sources, key=_STRENGTH.index, default=MEASURED)
