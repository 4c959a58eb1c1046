"""Fills a Report from a Program: what was found, what it costs before and after."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import torch

import moeify
from moeify.experts import METHODS
from moeify.fitting.figures import Fitted
from moeify.ir.block import Block
from moeify.ir.program import Program
from moeify.ir.report import BlockReport, Report
from moeify.nn.routers import ROUTERS


def describe(program: Program, model: str) -> Report:
    """The report of a program that find-ffn and select have seen; ``complete`` adds what the rewrite made."""
    report = Report(model=model, recipe=program.recipe.to_dict(), versions=versions())
    report.inputs = [str(spec) for spec in program.inputs]
    report.notes = list(program.provenance.get("notes", []))
    report.capture_error = program.provenance.get("capture_error")
    report.near_misses = [
        {"path": miss.path, "reason": miss.reason, "source": miss.source} for miss in program.near_misses
    ]
    report.blocks = [_block(program, block) for block in program.blocks]
    report.parameters_before = report.parameters_after = count_parameters(program)
    return report


def complete(report: Report, program: Program) -> None:
    """Add the figures after the rewrite, and what each pass said."""
    sizes = {name: tuple(p.shape) for name, p in program.graph_module.named_parameters(remove_duplicate=False)}
    for entry in report.blocks:
        if entry.converted:
            _figures(entry, sizes)
    report.parameters_after = count_parameters(program)
    report.passes = [{"text": h.text, "seconds": h.seconds, "lines": list(h.lines)} for h in program.history]


def fitted(report: Report, figures: Mapping[str, Fitted]) -> None:
    """Add what the fit of each block gave, by anchor."""
    for entry in report.blocks:
        found = figures.get(entry.anchor)
        if found is None:
            continue
        entry.fitted_rows, entry.held_out_rows = found.rows, found.held_out
        entry.rms_error, entry.repaired_rms_error, entry.repaired = found.error, found.repaired_error, found.kept
        routing = found.routing
        entry.router_agreement, entry.load_cv = routing.agreement, routing.load_cv
        entry.load_entropy = routing.load_entropy
        if found.repaired_error is None:
            continue
        if found.rows < found.unknowns:
            entry.notes.append(
                f"repaired on {found.rows} rows for {found.unknowns} weights of each output: more data would tell more"
            )
        if not found.kept:
            entry.notes.append("not repaired: on the rows held out the error would be larger")


def count_parameters(program: Program) -> int:
    """Elements of all parameters, tied ones once, without the dense ones that go when the pending ones are computed."""
    read = {node.target for node in program.graph.find_nodes(op="get_attr")}
    going = {ref.parameter for recipe in program.pending.values() for ref in recipe.sources} - read
    named = program.graph_module.named_parameters(remove_duplicate=False)
    return sum({id(p): p.numel() for name, p in named if name not in going}.values())


def versions() -> dict[str, str]:
    return {"moeify": moeify.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _block(program: Program, block: Block) -> BlockReport:
    converted = program.selected.get(block.anchor, False)
    entry = BlockReport(
        path=block.path,
        converted=converted,
        reason=None if converted else (block.reason or "not selected by the recipe"),
        activation=block.activation,
        gated=block.gated,
        d_model=block.d_model,
        d_ff=block.d_ff,
        source=block.source,
        anchor=block.anchor,
        calls=len(block.calls),
        parameters_before=block.parameters,
        flops_per_token_before=block.flops_per_token,
        notes=list(block.notes),
    )
    entry.parameters_after, entry.flops_per_token_after = (
        entry.parameters_before,
        entry.flops_per_token_before,
    )
    if converted:
        recipe = program.recipe.for_block(block.path)
        method, router = METHODS.parse(recipe.method), ROUTERS.parse(recipe.router)
        entry.method, entry.router = str(method), str(router)
        entry.experts, entry.top_k, entry.shared = recipe.experts, recipe.top_k, recipe.shared
        entry.exact = method.keeps_function(recipe, router)
    return entry


def _figures(entry: BlockReport, sizes: dict[str, tuple[int, ...]]) -> None:
    assert entry.experts is not None
    assert entry.top_k is not None
    own = {
        name.removeprefix(f"{entry.anchor}."): torch.Size(size)
        for name, size in sizes.items()
        if name.startswith(
            (
                f"{entry.anchor}.experts.",
                f"{entry.anchor}.shared",
                f"{entry.anchor}.router.",
                f"{entry.anchor}.output_bias",
            )
        )
    }
    entry.d_expert = own["experts.up"][1]
    always = own["shared.up"][0] if "shared.up" in own else 0
    entry.active_share = (entry.top_k * entry.d_expert + always) / entry.d_ff
    entry.parameters_after = sum(size.numel() for size in own.values())
    active = 0
    for name, size in own.items():
        if "bias" in name:
            continue
        share = size.numel() * entry.top_k // entry.experts if name.startswith("experts.") else size.numel()
        active += 2 * share
    entry.flops_per_token_after = active
