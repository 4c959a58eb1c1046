"""A profile on disk: it comes back whole, belongs to one model, and damage is seen."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeify.errors import Refused, UnreadableFile
from moeify.fitting import profile_file
from moeify.fitting.collect import collect
from moeify.ir.profile import Profile
from moeify.ir.program import Program
from tests import programs

IDS = torch.randint(40, (20, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made() -> Program:
    return programs.plain(2)


@pytest.fixture(scope="module")
def profile(made: Program) -> Profile:
    return collect(made, [(part,) for part in IDS.split(6)], gradients=True, samples=30, source="numbers")


@pytest.fixture
def path(profile: Profile, tmp_path: Path) -> Path:
    profile_file.write(profile, tmp_path / "p.profile")
    return tmp_path / "p.profile"


def test_it_comes_back_whole(profile: Profile, path: Path, made: Program) -> None:
    got = profile_file.read(path)
    profile_file.check(got, made, str(path))
    assert (got.top, dict(got.facts), list(got.blocks)) == (profile.top, dict(profile.facts), list(profile.blocks))
    for anchor, block in profile.blocks.items():
        for name, value in vars(block).items():
            have = getattr(got.blocks[anchor], name)
            assert torch.equal(have, value) if isinstance(value, torch.Tensor) else have == value, name
    assert [len(batch) for batch in got.batches] == [1] * 4
    assert torch.equal(torch.cat([batch[0] for batch in got.batches]), IDS)
    assert [file.name for file in path.parent.iterdir()] == ["p.profile"]


def test_batches_that_share_memory_are_written(profile: Profile, tmp_path: Path) -> None:
    ids = torch.arange(6).view(2, 3)
    same = Profile(profile.blocks, [(ids, ids), (ids[:1], ids.t())], profile.top, profile.facts)
    profile_file.write(same, tmp_path / "p.profile")
    assert torch.equal(profile_file.read(tmp_path / "p.profile").batches[1][1], ids.t())


def test_a_file_that_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="there is no profile"):
        profile_file.read(tmp_path / "none.profile")
    save_file({"x": torch.ones(1)}, tmp_path / "other.profile")
    with pytest.raises(UnreadableFile, match="is no profile"):
        profile_file.read(tmp_path / "other.profile")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /nonexistent/canary",)


def test_damage_is_seen(path: Path) -> None:
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[:200], b"", b"\xff" * 100, pickle.dumps(Evil())):
        path.write_bytes(damaged)
        with pytest.raises(UnreadableFile, match="damaged"):
            profile_file.read(path)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"blocks": [{"anchor": "layers.0"}]},
        {"blocks": 3},
        {"batches": [9]},
        {"top": None},
        {"facts": []},
    ],
)
def test_a_header_that_was_changed(path: Path, change: dict) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["moeify.profile"])
    save_file(load_file(path), path, {"moeify.profile": json.dumps({**header, **change})})
    with pytest.raises(UnreadableFile, match="damaged"):
        profile_file.read(path)


def test_statistics_of_different_sizes(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "blocks.0.firing_F": torch.ones(3)}, path, metadata)
    with pytest.raises(UnreadableFile, match="damaged"):
        profile_file.read(path)


def test_another_model_s_profile(profile: Profile, made: Program) -> None:
    other = made.clone()
    other.set_parameter("head.bias", torch.ones(3))
    with pytest.raises(Refused, match="of other weights"):
        profile_file.check(profile, other, "p")
    first = Profile(dict(list(profile.blocks.items())[:1]), [], profile.top, profile.facts)
    with pytest.raises(Refused, match=r"has no block 'layers\.1'"):
        profile_file.check(first, made, "p")
    wide = programs.gated(2)
    wide.blocks[0].up = wide.blocks[0].down  # [D, F] in the place of [F, D]
    with pytest.raises(Refused, match="of another model"):
        profile_file.check(profile, wide, "p")
