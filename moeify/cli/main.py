"""The entry point, and how every kind of error leaves it.

Exit codes: 0 done, 1 refused or failed verification, 2 bad usage, 3 unreadable input, 70 a bug,
130 interrupted.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, cast

import typer

from moeify.cli.commands import Commands
from moeify.errors import MoeifyError

_BUG = 70  # EX_SOFTWARE of sysexits.h
_INTERRUPTED = 130  # 128 + SIGINT, as a shell has it; typer returns it for a Ctrl-C
_NO_MEMORY = ("can't allocate memory", "out of memory")  # torch's RuntimeErrors, on the CPU and on a GPU
# typer's own base of "no such option" and the like; it has no public name.
_Usage: type[Any] = cast("type[Any]", typer.BadParameter.__bases__[0])

app = typer.Typer(
    help="Turn dense PyTorch models into sparse Mixture-of-Experts models, with a proof.",
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,  # plain help: it starts in half the time
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from moeify import __version__

        typer.echo(f"moeify {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    return None


def run() -> None:
    """The ``moeify`` command."""
    sys.exit(main(sys.argv[1:]))


def main(
    arguments: Sequence[str], command: typer.Typer | None = None, name: str = "moeify", rank: int | None = None
) -> int:
    """Run one command and return its exit code. Never raises for what a user can cause.

    ``rank`` is this process's where it is one of several: errors say so, and only the first answers in JSON.
    """
    # Also a command line that does not parse must be answered in JSON when it asks for JSON.
    flags = set(itertools.takewhile(lambda word: word != "--", arguments))
    as_json, debug = "--json" in flags and not rank, "--debug" in flags
    fail = functools.partial(_fail, rank)
    try:
        with warnings.catch_warnings():
            if not debug:  # torch and transformers warn about their own internals
                warnings.simplefilter("ignore")
            code = (command or app)(list(arguments) or ["--help"], prog_name=name, standalone_mode=False) or 0
        sys.stdout.flush()
    except MoeifyError as error:
        return fail(as_json, type(error).__name__, error.what, error.where, error.hint, error.exit_code)
    except _Usage as error:
        path = error.ctx.command_path if error.ctx else name
        hint = f"see {path} --help"
        return fail(as_json, "UsageError", _lower(error.format_message()), None, hint, error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _drop_stdout()
        return 1
    except Exception as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY):
            return fail(as_json, "OutOfMemory", "there is not enough memory for this", None, None, 1)
        if isinstance(error, OSError) and error.filename is None:  # stdout itself, so no JSON can be written there
            _drop_stdout()
            return fail(False, "OutputNotWritten", f"cannot print: {_lower(error.strerror or '')}", None, None, 1)
        if debug:
            import traceback

            traceback.print_exc()
        what = f"this is a bug in moeify: {type(error).__name__}: {error}"
        hint = "please report it" if debug else "run it again with --debug to see where, and please report it"
        return fail(as_json, "Bug", what, None, hint, _BUG)
    if code == _INTERRUPTED:
        return fail(as_json, "Interrupted", "interrupted; nothing was written", None, None, code)
    return code


def _drop_stdout() -> None:
    """What is still buffered goes nowhere: Python would try to write it at its end, and set the exit code to 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(rank: int | None, as_json: bool, kind: str, what: str, where: str | None, hint: str | None, code: int) -> int:
    if as_json:
        from moeify.cli.output import write_json

        write_json({"error": {"kind": kind, "what": what, "where": where, "hint": hint}})
    else:
        who = "" if rank is None else f"rank {rank}: "
        print(f"{who}error: {MoeifyError(what, where=where, hint=hint)}", file=sys.stderr)
    return code


def _lower(text: str) -> str:
    """Typer's sentences in the style of all other messages here."""
    return (text[:1].lower() + text[1:]).rstrip(".")
