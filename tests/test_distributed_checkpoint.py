"""Checkpoints of sharded models: any number of ranks to any other, to one file and back, and all that can go wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moeify.distributed import checkpoint_folder, checkpoint_whole
from moeify.errors import MoeifyError
from tests import checkpoint_work as work
from tests import ranks, sharded


def saved(tmp_path: Path, size: int, found: Path | None = None, steps: int = 1, **options: int) -> Path:
    """A checkpoint that ``size`` ranks wrote."""
    folder = tmp_path / f"ranks-{size}-{found.name if found else 'new'}"
    outcomes = ranks.results(ranks.run(work.go_on, size, folder, tmp_path / "kept", found, steps, **options))
    return outcomes[0][0]


def compare(whole: dict[str, torch.Tensor], steps: int) -> None:
    reference = dict(work.alone(steps).named_parameters())
    assert reference.keys() <= whole.keys()
    for name, value in reference.items():
        assert sharded.relative(whole[name], value.detach()) <= 1e-5, name  # the bar for weights after training


def test_any_number_of_ranks_goes_on_where_another_stopped(tmp_path: Path) -> None:
    """Four experts on 2, 3 (the last rank has none), 1 and 4 ranks, and on a mesh of 2 x 2."""
    found = None
    for size, ep in ((2, 2), (3, 3), (1, 1), (4, 4), (4, 2)):
        folder = tmp_path / f"{found.name if found else 'new'}"
        outcomes = ranks.results(ranks.run(work.go_on, size, folder, tmp_path / "kept", found, 1, ep=ep))
        found = outcomes[0][0]
    assert checkpoint_folder.steps(tmp_path / "kept") == [1, 2, 3, 4, 5]
    state = checkpoint_folder.read_state(found)
    assert (state.step, state.ranks, state.facts) == (5, 4, {"by": "test"})
    checkpoint_whole.consolidate(found, tmp_path / "whole.safetensors")
    compare(load_file(tmp_path / "whole.safetensors"), 5)


def test_one_file_and_back(tmp_path: Path) -> None:
    found = saved(tmp_path, 3)
    checkpoint_whole.consolidate(found, tmp_path / "whole.safetensors")
    whole = load_file(tmp_path / "whole.safetensors")
    program = work.program()
    checkpoint_whole.load_program(program, found)
    compare({name: p.detach() for name, p in program.graph_module.named_parameters()}, 1)
    for name, value in program.graph_module.named_parameters():
        assert torch.equal(whole[name], value), name


def test_no_file_is_much_larger_than_its_limit(tmp_path: Path) -> None:
    """A rank copies a file in memory before it writes it."""
    limit, header = 4096, 2048
    outcomes = ranks.results(ranks.run(work.in_small_files, 2, tmp_path / "save", tmp_path / "kept", limit))
    found = outcomes[0]
    files = sorted(found.glob("*.safetensors"))
    assert len(files) > 4
    largest = max(value.nbytes for value in work.program().graph_module.parameters())
    assert max(file.stat().st_size for file in files) <= max(limit, largest) + header
    checkpoint_whole.consolidate(found, tmp_path / "whole.safetensors")
    compare(load_file(tmp_path / "whole.safetensors"), 1)
    resumed = ranks.results(ranks.run(work.go_on, 3, tmp_path / "resume", tmp_path / "kept", found, 1))[0][0]
    checkpoint_whole.consolidate(resumed, tmp_path / "later.safetensors")
    compare(load_file(tmp_path / "later.safetensors"), 2)


def test_older_checkpoints_go(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    found = saved(tmp_path, 1)
    left = kept / ".step-00000007.part"
    left.mkdir()
    (left / "shard").touch()  # of a run that was killed while it wrote
    assert checkpoint_folder.latest(kept) == found
    for _ in range(2):
        results = ranks.results(ranks.run(work.go_on, 1, tmp_path / f"r{found.name}", kept, found, 1, 2))
        found = results[0][0]
    assert sorted(entry.name for entry in kept.iterdir()) == ["step-00000002", "step-00000003"]


def test_weights_in_any_order_of_memory(tmp_path: Path) -> None:
    found = ranks.results(ranks.run(work.transposed, 2, tmp_path / "ranks", tmp_path / "kept"))[0]
    checkpoint_whole.consolidate(found, tmp_path / "whole.safetensors")
    compare(load_file(tmp_path / "whole.safetensors"), 0)


WRONG = {
    "disk_full": (
        "OutputNotWritten",
        "cannot write a checkpoint to {kept}: rank 1: OSError: [Errno 28] No space left on device",
    ),
    "diverged": (
        "NonFiniteWeights",
        (
            "the weights after step 9 hold NaN or infinity; they were not saved\n"
            "  at: rank 1\n"
            "  hint: go on from the checkpoint before, with a smaller learning rate"
        ),
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_was_there_stays(tmp_path: Path, fault: str) -> None:
    found, kept = saved(tmp_path, 2), tmp_path / "kept"
    kind, text = WRONG[fault]
    for outcome in ranks.run(getattr(work, fault), 2, tmp_path / "fault", kept):
        assert (outcome.code, outcome.kind, outcome.error) == (1, kind, text.format(kept=kept))
    assert checkpoint_folder.latest(kept) == found
    assert ranks.results(ranks.run(work.load, 2, tmp_path / "load", found, {})) == ["loaded"] * 2


def test_a_rank_is_killed_while_it_writes(tmp_path: Path) -> None:
    """The others are in collectives of torch's own, which look at no board."""
    found, kept = saved(tmp_path, 3), tmp_path / "kept"
    text = "rank 2 ended during an exchange\n  at: checkpoint\n"
    text += "  hint: look at the log of rank 2, and start again from the last checkpoint"
    *others, killed = ranks.run(work.killed_while_writing, 3, tmp_path / "fault", kept, 20.0)
    assert killed.code == -9
    assert [(outcome.code, outcome.error) for outcome in others] == [(1, text)] * 2
    assert checkpoint_folder.latest(kept) == found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks wrote."""
    return saved(tmp_path_factory.mktemp("two"), 2)


def test_of_another_model(two: Path, tmp_path: Path) -> None:
    for outcome in ranks.run(work.load, 2, tmp_path / "load", two, {"experts": 6}):
        assert outcome.kind == "StateDictMismatch"
        assert outcome.error == (
            f"the checkpoint {two} has (4, 24, 8) for model.layers.0.experts.up, which is (6, 24, 8) in the model\n"
            "  hint: give the model that it was made from"
        )


def cut_short(found: Path) -> None:
    file = sorted(found.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_shard(found: Path) -> None:
    sorted(found.glob("*.safetensors"))[1].unlink()


def other_bytes(found: Path) -> None:
    file = sorted(found.glob("*.safetensors"))[1]
    file.write_bytes(bytes(file.stat().st_size))


def lose_the_state(found: Path) -> None:
    (found / "state.json").unlink()


def of_the_future(found: Path) -> None:
    (found / "state.json").write_text(json.dumps({"format": 2, "step": 1, "ranks": 2, "facts": {}}))


DAMAGE = {
    cut_short: "is damaged: shard-00002-model-00001-of-00001.safetensors has ",
    lose_a_shard: "is damaged: shard-00002-model-00001-of-00001.safetensors is missing",
    other_bytes: "is damaged: Error while deserializing header: ",
    lose_the_state: "is not a checkpoint: state.json: no such file or directory",
    of_the_future: "has format 2 and this moeify reads format 1",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda function: function.__name__)
def test_damage(two: Path, tmp_path: Path, damage) -> None:
    found = tmp_path / two.name
    shutil.copytree(two, found)
    damage(found)
    with pytest.raises(MoeifyError) as caught:
        checkpoint_whole.load_program(work.program(), found)
    assert DAMAGE[damage] in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda function: function.__name__)
def test_damage_that_one_rank_alone_sees(two: Path, tmp_path: Path, damage) -> None:
    own = tmp_path / two.name
    shutil.copytree(two, own)
    damage(own)
    outcomes = ranks.run(work.load_own, 2, tmp_path / "load", [two, own])
    assert [outcome.kind for outcome in outcomes] == ["UnreadableFile"] * 2
    assert outcomes[0].error == outcomes[1].error
    assert DAMAGE[damage] in outcomes[0].error
    assert "\n  at: rank 1" in outcomes[0].error


def test_ranks_that_read_different_steps(two: Path, tmp_path: Path) -> None:
    own = tmp_path / two.name
    shutil.copytree(two, own)
    state = json.loads((own / "state.json").read_text())
    (own / "state.json").write_text(json.dumps({**state, "step": 3}))
    for outcome in ranks.run(work.load_own, 2, tmp_path / "load", [two, own]):
        assert (outcome.kind, outcome.error) == (
            "RanksDiffer",
            (
                "the ranks do not agree: step 1 on rank 0 and step 3 on rank 1\n"
                "  hint: give every rank the same files and options"
            ),
        )


RAISES = "ValueError: no such luck\n  at: checkpoint, rank 1\n  hint: look at the log of that rank"
LATE = (
    "rank 1 did not come to the end of the checkpoint within 8 s\n  at: checkpoint\n  hint: look at the log of rank 1"
)
STOPS = "rank 1 stopped: the data ended\n  at: checkpoint\n  hint: cure rank 1 and start again"
ALONE = {  # what rank 1 does: the text of rank 0
    ("load_alone", "raises"): RAISES,
    ("load_alone", "absent"): LATE,
    ("load_alone", "stops"): STOPS,
    ("save_alone", "raises"): RAISES,
    ("save_alone", "hangs"): "rank 1 did not come to an exchange within 8 s\n  at: checkpoint\n",
    ("save_alone", "is killed"): "rank 1 ended during an exchange\n  at: checkpoint\n",
}


@pytest.mark.parametrize(("function", "fault"), ALONE)
def test_one_rank_goes_wrong(two: Path, tmp_path: Path, function: str, fault: str) -> None:
    """The other one hears of it, and does not wait longer than bind was told."""
    place = two if function == "load_alone" else tmp_path / "kept"
    first, second = ranks.run(getattr(work, function), 2, tmp_path / "ranks", place, fault, 8.0)
    assert (first.code, first.kind) == (1, "RankLost")
    assert first.error.startswith(ALONE[function, fault])
    if fault == "raises":
        assert (second.kind, second.error) == (first.kind, first.error)
    assert checkpoint_folder.latest(tmp_path / "kept") is None
