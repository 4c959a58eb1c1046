"""An api made by hand, for tests of what the commands pass on and print."""

from __future__ import annotations

from typing import Any

import pytest

from moeify import api
from moeify.api import Comparison, Inspection, OutputError
from moeify.ir.recipe import Recipe
from moeify.ir.report import BlockReport, Report
from tests.view_programs import stack


def block(path: str, **changes: Any) -> BlockReport:
    figures: dict[str, Any] = {
        "path": path, "converted": True, "reason": None, "activation": "gelu", "gated": False, "d_model": 384,
        "d_ff": 1536, "anchor": path, "method": "copy", "router": "softmax-topk", "experts": 8, "top_k": 2,
        "d_expert": 1536, "parameters_before": 1_181_568, "parameters_after": 9_455_616,
        "flops_per_token_before": 2_359_296, "flops_per_token_after": 4_724_736, "relative_error": 1e-7, "exact": True,
    }  # fmt: skip
    return BlockReport(**{**figures, **changes})


def report(**changes: Any) -> Report:
    blocks = [block(f"encoder.layer.{i}", relative_error=(i + 1) * 1e-8) for i in range(6)]
    blocks.append(block("classifier", converted=False, reason="one row per sample; --include sample converts it"))
    fields: dict[str, Any] = {
        "model": "dense.pt",
        "output": "dense.moe.pt2",
        "blocks": blocks,
        "near_misses": [
            {"path": f"encoder.layer.{i}.attention", "reason": "an attention projection", "source": None}
            for i in range(6)
        ],
        "inputs": ["input_ids=int64[batch, seq]"],
        "verified": True,
        "max_relative_error": 3.4e-7,
        "model_relative_error": 3.4e-7,
        "parameters_before": 22_713_216,
        "parameters_after": 72_357_504,
        "seconds": 3.21,
        "recipe": Recipe().to_dict(),
        "passes": [{"text": "find-ffn", "seconds": 0.25, "lines": []}],
    }
    return Report(**{**fields, **changes})


class Api:
    """Stands in for moeify.api; remembers how it was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[tuple, dict[str, Any]]] = []
        self.error: BaseException | None = None
        self.report = report()
        self.comparison = Comparison([OutputError("output 0", 1e-6, 2e-7, 1.0)], 2e-7, True)
        for name in ("convert_file", "inspect_file", "verify_files"):
            monkeypatch.setattr(api, name, getattr(self, name))

    def convert_file(self, *args: Any, **kwargs: Any) -> Report:
        self._called(args, kwargs)
        kwargs["progress"].stage("computing expert weights", total=2)
        kwargs["progress"].advance()
        if kwargs["print_after_all"]:
            print("a library talks on stdout")
            kwargs["show"]("after select", "# after select\n")
        return self.report

    def inspect_file(self, *args: Any, **kwargs: Any) -> Inspection:
        self._called(args, kwargs)
        dense = None if args[0].endswith(".pt2") else stack(3)
        return Inspection(self.report, stack(3, odd=1), dense)

    def verify_files(self, *args: Any, **kwargs: Any) -> Comparison:
        self._called(args, kwargs)
        return self.comparison

    def _called(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.calls.append((args, kwargs))
        if self.error is not None:
            raise self.error


def fake_api(monkeypatch: pytest.MonkeyPatch) -> Api:
    """For a fixture: in place of moeify.api, on a screen of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    return Api(monkeypatch)
