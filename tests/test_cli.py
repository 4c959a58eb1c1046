"""What all commands share: the listings, the help, and every error with its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moeify.cli.main import main
from moeify.errors import BadRecipe, MoeifyError, NotDivisible, OutputNotWritten, UnreadableFile, VerificationFailed
from tests.cli_api import Api, fake_api

fake = pytest.fixture(fake_api)


# --- listings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [("passes", "find-ffn"), ("methods", "copy"), ("routers", "softmax-topk"), ("backends", "pt2")],
)
def test_listings(capsys, kind: str, name: str) -> None:
    assert main([kind]) == 0
    assert any(line.startswith(f"{name} ") for line in capsys.readouterr().out.splitlines())
    assert main([kind, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)[kind]
    assert name in [entry["name"] for entry in entries]
    assert set(entries[0]) == {"name", "options", "summary"}


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotDivisible("it does not divide", where="a.b", hint="do this"), 1),
        (VerificationFailed("it is not the same"), 1),
        (OutputNotWritten("the disk is full"), 1),
        (BadRecipe("no"), 2),
        (UnreadableFile("empty"), 3),
    ],
)
def test_errors_of_the_api(fake: Api, capsys, error: MoeifyError, code: int) -> None:
    fake.error = error
    assert main(["convert", "dense.pt"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {error}\n")
    assert main(["convert", "dense.pt", "--json"]) == code
    out, err = capsys.readouterr()
    kind = type(error).__name__
    assert json.loads(out) == {"error": {"kind": kind, "what": error.what, "where": error.where, "hint": error.hint}}
    assert err == ""


def test_an_interrupt_is_quiet(fake: Api, capsys) -> None:
    fake.error = KeyboardInterrupt()
    assert main(["convert", "dense.pt"]) == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"
    assert main(["convert", "dense.pt", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "Interrupted"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")]
)
def test_no_memory_is_an_error_of_its_own(fake: Api, capsys, error: Exception) -> None:
    fake.error = error
    assert main(["convert", "dense.pt"]) == 1
    assert capsys.readouterr().err == "error: there is not enough memory for this\n"


def test_a_bug_has_a_traceback_only_with_debug(fake: Api, capsys) -> None:
    fake.error = ZeroDivisionError("boom")
    assert main(["convert", "dense.pt"]) == 70
    assert capsys.readouterr().err == (
        "error: this is a bug in moeify: ZeroDivisionError: boom\n"
        "  hint: run it again with --debug to see where, and please report it\n"
    )
    assert main(["convert", "dense.pt", "--debug"]) == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_usage_errors(fake: Api, capsys) -> None:
    assert main(["convrt"]) == 2
    assert capsys.readouterr().err == ("error: there is no command named 'convrt'\n  hint: did you mean 'convert'?\n")
    assert main(["convert", "dense.pt", "--expert", "3"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no such option: --expert")
    assert "--experts" in err
    assert err.endswith("\n  hint: see moeify convert --help\n")
    assert main(["convert", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "UsageError"
    assert main(["convert", "dense.pt", "--top-k", "9"]) == 2
    assert capsys.readouterr().err == (
        "error: top-k 9 is larger than the number of experts, 8\n  hint: choose --top-k between 1 and 8\n"
    )
    assert fake.calls == []


def test_no_arguments_print_the_help(capsys) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("Usage: moeify ")


def test_a_full_stdout() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "moeify", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "error: cannot print: no space left on device\n")


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "moeify", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
