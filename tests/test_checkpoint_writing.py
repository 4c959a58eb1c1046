"""A checkpoint folder changes as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moeify import surgery
from moeify.errors import OutputNotWritten
from moeify.surgery import folder, shards
from tests.surgery_models import Encoder, case, output


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    surgery.save(case("encoder").moe, tmp_path / "out")
    return tmp_path / "out"


def _content(target: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in target.iterdir()}


def test_replaces_its_own_folder(saved: Path) -> None:
    changed = case("encoder").copy()
    with torch.no_grad():
        changed.get_parameter("encoder.layers.0.norm1.weight").fill_(3)
    (saved / "moeify-00002-of-00002.safetensors").write_text("from an earlier, larger save")
    surgery.save(changed, saved)
    assert not (saved / "moeify-00002-of-00002.safetensors").exists()
    inputs = case("encoder").inputs
    assert torch.equal(output(surgery.load(saved, factory=Encoder), inputs), output(changed, inputs))
    assert [file.name for file in saved.parent.iterdir()] == ["out"]


def test_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputNotWritten) as caught:
        surgery.save(case("encoder").moe, tmp_path / "out")
    assert str(caught.value) == (
        f"the folder {tmp_path / 'out'} holds files that moeify did not write\n"
        "  hint: choose another folder, or empty this one yourself"
    )
    assert _content(tmp_path / "out") == {"thesis.txt": b"mine"}
    with pytest.raises(OutputNotWritten, match=r"thesis.txt is a file, not a folder"):
        surgery.save(case("encoder").moe, tmp_path / "out" / "thesis.txt")


def _fail_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """The call-th rename fails; the ones that undo do not."""
    calls = iter(range(1, 1000))
    replace = os.replace

    def failing(source: Any, to: Any) -> None:
        if next(calls) == call:
            raise error
        replace(source, to)

    monkeypatch.setattr(folder.os, "replace", failing)


@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_failed_rename_is_undone(
    saved: Path, monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException
) -> None:
    (saved / "notes.txt").write_text("mine")
    before = _content(saved)
    _fail_at(monkeypatch, call, error)
    with pytest.raises(OutputNotWritten if isinstance(error, OSError) else KeyboardInterrupt):
        surgery.save(case("encoder").moe, saved)
    assert _content(saved) == before
    assert [file.name for file in saved.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    if existing:
        surgery.save(case("encoder").moe, tmp_path / "out")
        before = _content(tmp_path / "out")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OutputNotWritten) as caught:
        surgery.save(case("encoder").moe, tmp_path / "out")
    assert str(caught.value) == (
        f"cannot write the checkpoint folder {tmp_path / 'out'}: no space left on device\n"
        "  hint: nothing was changed; free space or choose another folder"
    )
    if existing:
        assert _content(tmp_path / "out") == before
    assert [file.name for file in tmp_path.iterdir()] == (["out"] if existing else [])


def test_a_folder_can_move(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved, tmp_path / "moved")
    inputs = case("encoder").inputs
    loaded = surgery.load(tmp_path / "moved", factory=Encoder)
    assert torch.equal(output(loaded, inputs), output(case("encoder").moe, inputs))
