"""The table of commands. A command's module is imported when it is called: ``moeify --help`` costs typer alone."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

from moeify.errors import UnknownName

# name -> (module of moeify.cli that holds a function of that name, what --help says)
_TABLE = {
    "convert": ("convert", "Turn a dense model into a verified mixture of experts."),
    "inspect": ("inspect", "See what would be converted, or what was."),
    "profile": ("profile", "Run a dense model on data, for methods that learn from them."),
    "train": ("train", "Train a converted model, on a task or to do what the dense one does."),
    "tune": ("tune", "Choose what to split, and how far, for a quality or a speed."),
    "verify": ("verify", "Compare the outputs of two models."),
    "quality": ("quality", "Say how far a converted model is from its dense one, on held-out data."),
    "bench": ("bench", "Time a converted model against its dense twin, in PyTorch, ONNX Runtime and TVM."),
    "export": ("export", "Lower what convert wrote to a runtime's file, verified there."),
    "build-kernels": ("build_kernels", "Compile the fused CPU kernels that ONNX Runtime loads."),
    "plan": ("plan", "Say what expert parallelism would cost, on any number of devices."),
    "calibrate": ("plan", "Measure the links and the arithmetic of this machine, for plan."),
    "passes": ("listings", "List the passes."),
    "methods": ("listings", "List the ways to make experts."),
    "routers": ("listings", "List the routers."),
    "losses": ("listings", "List the router losses."),
    "backends": ("listings", "List the targets a program is lowered to."),
}


class Commands(TyperGroup):
    """A group whose commands come from the table."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_TABLE)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _TABLE:
            raise UnknownName("command", cmd_name, _TABLE)
        module = importlib.import_module(f"moeify.cli.{_TABLE[cmd_name][0]}")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(getattr(module, cmd_name.replace("-", "_")))
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _TABLE.items()])
