"""The report of a conversion: one object for the screen, for --json and for moeify.json inside the artefact."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class BlockReport:
    """One block found. ``relative_error`` is max abs difference over max abs of the dense block's output, in float32
    or better.
    """

    path: str
    converted: bool
    reason: str | None  # why not, when it was not converted
    activation: str
    gated: bool
    d_model: int
    d_ff: int
    source: str | None = None
    anchor: str = ""
    calls: int = 1
    method: str | None = None
    router: str | None = None
    experts: int | None = None
    top_k: int | None = None
    shared: int = 0  # experts that are always on, beside those
    d_expert: int | None = None
    parameters_before: int = 0
    parameters_after: int = 0
    flops_per_token_before: int = 0
    flops_per_token_after: int = 0
    relative_error: float | None = None
    exact: bool | None = None  # whether method and router promise to keep the function
    active_share: float | None = None  # hidden units a token goes through, shared ones included, over those of the FFN
    all_on_error: float | None = None  # relative error with every expert on with weight 1, for methods that split
    # Of a split block, on rows of the data that nothing was fitted to; see fitting.figures.Fitted.
    fitted_rows: int | None = None
    held_out_rows: int | None = None
    rms_error: float | None = None  # root mean square of the difference over that of the dense block's output
    repaired_rms_error: float | None = None  # the same after the repair
    repaired: bool = False  # the repair was better, and is in the weights
    router_agreement: float | None = None  # share of the chosen experts that are among the largest
    load_cv: float | None = None  # standard deviation of the experts' loads over their mean
    load_entropy: float | None = None  # of the loads, over that of equal ones
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What ``moeify convert`` found, did and proved."""

    model: str
    output: str | None = None
    blocks: list[BlockReport] = field(default_factory=list)
    near_misses: list[dict[str, Any]] = field(default_factory=list)  # path, reason, source
    inputs: list[str] = field(default_factory=list)  # InputSpec texts
    notes: list[str] = field(default_factory=list)  # guesses made, dimensions that stayed static, ...
    capture_error: float | None = None  # captured graph against the user's eager model
    verified: bool = False  # every exact block and, if all are exact, the model within `tolerance`
    tolerance: float = 1e-5
    max_relative_error: float | None = None  # the largest of the blocks' and the whole model's
    model_relative_error: float | None = None
    model_error_on_fitted_data: bool = False  # that error is of a batch that split blocks were fitted to
    parameters_before: int = 0
    parameters_after: int = 0
    seconds: float = 0.0
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    passes: list[dict[str, Any]] = field(default_factory=list)  # text, seconds, log lines

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        known["blocks"] = [
            BlockReport(**{k: v for k, v in b.items() if k in BlockReport.__dataclass_fields__})
            for b in data.get("blocks", [])
        ]
        return cls(**known)
