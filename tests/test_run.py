"""``python -m moeify.run`` on real processes: the same numbers on any number of ranks, a clean end, clear errors."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeify
from moeify.run import main
from tests import runs, sharded, small_llama

WORDS = "it is a truth universally acknowledged that a single man in possession of a good fortune must want a wife"
TRAIN = ("--steps", 6, "--lr", 1e-2, "--batch", 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with 4 experts in each, as a ``.pt2``, and a text and tensors beside it."""
    folder = tmp_path_factory.mktemp("llama")
    dense = small_llama.saved(folder / "dense", intermediate_size=24)
    moeify.convert_file(dense, folder / "llama.pt2", moeify.Recipe(experts=4, top_k=2))
    draw = random.Random(0)
    (folder / "book.txt").write_text(" ".join(draw.choice(WORDS.split()) for _ in range(75)))
    ids = torch.randint(8, 128, (10, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[3, 4:] = 0
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": torch.linspace(-1, 1, 10)}
    save_file(tensors, folder / "data.safetensors")
    ids = ids.clone()
    ids[9, 0] = 7
    save_file({**tensors, "input_ids": ids}, folder / "marked.safetensors")
    return folder / "llama.pt2"


def on_text(model: Path) -> list[object]:
    return [model, "--data", model.parent / "book.txt", "--tokenizer", "bytes", "--sequence", 16, "--json"]


def on_tensors(model: Path) -> list[object]:
    return [model, "--data", model.parent / "data.safetensors", "--json"]


def answer(ended: list[runs.Ended]) -> dict:
    """What the first rank says; the others are silent."""
    for rank, one in enumerate(ended):
        assert (one.code, one.err) == (0, ""), (rank, one.err)
        assert rank == 0 or not one.out
    return ended[0].json()


def test_the_same_perplexity_on_any_number_of_ranks(model: Path, tmp_path: Path) -> None:
    """The last batch has too few examples for three ranks: one of them only keeps the others company."""
    said = {size: answer(runs.run(size, tmp_path / str(size), *on_text(model), "--batch", 7)) for size in (1, 3)}
    assert said[1]["examples"] % 7 in (1, 2)
    dense = moeify.load(model)
    pieces = torch.tensor(list((model.parent / "book.txt").read_bytes()))
    pieces = pieces[: len(pieces) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        logits = dense(pieces, torch.ones_like(pieces))["logits"]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), pieces[:, 1:].flatten())
    for size, one in said.items():
        assert one["loss"] == pytest.approx(float(loss), rel=1e-6), size
        assert one["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-6)
        assert (one["examples"], one["terms"]) == (len(pieces), 15 * len(pieces))


def test_a_mask_takes_tokens_out(model: Path, tmp_path: Path) -> None:
    said = answer(runs.run(1, tmp_path, *on_tensors(model)))
    assert said["terms"] == 10 * 5 - 2


def test_outputs_in_the_order_of_the_examples(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.safetensors"
    answer(runs.run(3, tmp_path / "ranks", *on_tensors(model), "--batch", 4, "--outputs", file))
    tensors = load_file(model.parent / "data.safetensors")
    with torch.no_grad():
        want = moeify.load(model)(tensors["input_ids"], tensors["attention_mask"])["logits"]
    assert sharded.relative(load_file(file)["output0"], want) <= 1e-6


def test_training_on_any_number_of_ranks(model: Path, tmp_path: Path) -> None:
    """Batches of 4 on 1 and 3 ranks, and on a mesh of 2 x 2: losses, and the weights that come out."""
    said, weights = {}, {}
    for size, more in ((1, []), (3, []), (4, ["--expert-ranks", 2])):
        folder = tmp_path / str(size)
        more += ["--checkpoints", folder / "kept", "--write", folder / "whole.safetensors"]
        said[size] = answer(runs.run(size, folder, *on_text(model), *TRAIN, *more))
        weights[size] = load_file(folder / "whole.safetensors")
    assert said[1]["losses"][-1] < said[1]["losses"][0] - 0.3
    for size in (3, 4):
        assert said[size]["losses"] == pytest.approx(said[1]["losses"], rel=1e-5)
        assert said[size]["gradient_norms"] == pytest.approx(said[1]["gradient_norms"], rel=1e-4)
        # Adam scales gradients that are rounding alone up to whole steps, of which there are 6 of 1e-2; by the norm
        # of the weights that is nothing.
        for name, value in weights[1].items():
            assert float((weights[size][name] - value).norm() / value.norm()) <= 1e-3, (size, name)


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGTERM, [143, 143]), (signal.SIGINT, [143, 130])])
def test_a_run_that_is_stopped_goes_on_with_other_ranks(
    model: Path, tmp_path: Path, number: signal.Signals, codes: list[int]
) -> None:
    kept = tmp_path / "kept"
    stop = runs.when_exists(kept / "step-00000001", runs.kill(1, number))
    words = (*on_text(model), *TRAIN, "--checkpoints", kept, "--every", 1, "--resume")
    ended = runs.run(2, tmp_path / "first", *words, "--steps", 5000, disturb=stop)
    assert [one.code for one in ended] == codes, ended[0].err + ended[1].err
    first = ended[0].json()
    assert first["stopped"] == "a signal to another rank"
    assert first["checkpoint"] == str(kept / f"step-{first['steps']:08d}")
    if number == signal.SIGINT:
        return
    steps = first["steps"] + 3
    second = answer(runs.run(1, tmp_path / "second", *words, "--steps", steps))
    straight = answer(runs.run(1, tmp_path / "straight", *on_text(model), *TRAIN, "--steps", steps))["losses"]
    assert second["first_step"] == first["steps"] + 1
    # Differences grow as training goes on.
    assert first["losses"] + second["losses"] == pytest.approx(straight, rel=1e-3)


def test_a_rank_is_killed(model: Path, tmp_path: Path) -> None:
    """All others say which one, and the last checkpoint is whole."""
    kept = tmp_path / "kept"
    words = (*on_text(model)[:-1], *TRAIN, "--checkpoints", kept, "--every", 2)
    killed = runs.when_exists(kept / "step-00000002", runs.kill(2))
    ended = runs.run(3, tmp_path / "ranks", *words, "--steps", 5000, disturb=killed)
    assert [one.code for one in ended] == [1, 1, -9]
    for rank, one in enumerate(ended[:2]):
        first, *_, last = one.err.splitlines()
        assert first == f"rank {rank}: error: rank 2 ended during an exchange"
        assert last == "  hint: look at the log of rank 2, and start again from the last checkpoint"
    said = answer(runs.run(1, tmp_path / "after", *on_text(model), "--checkpoints", kept, "--resume"))
    assert said["checkpoint"].startswith(str(kept))
    assert said["loss"] < 4.8  # ln 128 is 4.85


def test_torchrun(model: Path, tmp_path: Path) -> None:
    """The command of the manual, with the root cause that torchrun shows when a rank fails."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    kept = tmp_path / "kept"
    words = [*map(str, on_text(model)), *map(str, TRAIN), "--steps", "2", "--checkpoints", str(kept)]
    ended = subprocess.run([*torchrun, "-m", "moeify.run", *words], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert (said["ranks"], said["steps"], said["checkpoint"]) == (2, 2, str(kept / "step-00000002"))


def test_a_loss_that_is_not_a_number(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    words = [model, "--data", model.parent / "marked.safetensors", "--loss", "tests.run_losses:breaks_on_a_mark"]
    words += ["--steps", 9, "--batch", 2, "--checkpoints", kept, "--every", 1, "--keep", 9]
    ended = runs.run(2, tmp_path / "ranks", *words)
    done = sorted(kept.iterdir())
    step = len(done) + 1
    assert step <= 5  # the mark comes before all have been seen
    for rank, one in enumerate(ended):
        assert one.code == 1
        lines = one.err.splitlines()
        assert lines[0].startswith(f"rank {rank}: error: the loss is NaN or infinity on rank")
        assert lines[1] == f"  at: step {step}"
        if done:
            assert lines[2].endswith(f"; the last good checkpoint is {done[-1]}")


def test_a_loss_of_the_users_own(model: Path, tmp_path: Path) -> None:
    words = [*on_tensors(model), "--loss", "tests.run_losses:half_of_squares", "--batch", 4]
    said = [answer(runs.run(size, tmp_path / str(size), *words)) for size in (1, 2)]
    assert said[0]["loss"] == pytest.approx(said[1]["loss"], rel=1e-6)
    assert said[0]["perplexity"] is None


def test_one_pt2_of_a_checkpoint(model: Path, tmp_path: Path) -> None:
    kept, file = tmp_path / "kept", tmp_path / "trained.pt2"
    words = ("--steps", 2, "--checkpoints", kept)
    answer(runs.run(2, tmp_path / "ranks", *on_text(model), *words, "--write", file))
    of_checkpoint = answer(runs.run(1, tmp_path / "a", *on_text(model), "--checkpoints", kept, "--resume"))
    of_file = answer(runs.run(1, tmp_path / "b", file, *on_text(model)[1:]))
    assert of_file["loss"] == pytest.approx(of_checkpoint["loss"], rel=1e-6)
    assert f"trained: the weights are those of {kept / 'step-00000002'}" in moeify.load(file).moeify_report.notes


REFUSED = {
    "no data": ([], 2, "error: there is nothing to run on\n  hint: give --data FILE"),
    "no tokenizer": (
        ["--data", "{folder}/book.txt"],
        2,
        "error: {folder}/book.txt is a text\n  hint: say how to cut it: --tokenizer FOLDER, or bytes",
    ),
    "no such tokenizer": (
        ["--data", "{folder}/book.txt", "--tokenizer", "nowhere"],
        2,
        "error: there is no tokenizer nowhere\n  hint: give its folder, a .gguf file, or 'bytes'",
    ),
    "a short text": (
        ["--data", "{folder}/book.txt", "--tokenizer", "bytes", "--sequence", "9999"],
        2,
        "tokens, fewer than one piece of 9999\n  hint: choose a smaller --sequence",
    ),
    "no file": (["--data", "{folder}/none.pt"], 3, "error: there is no file {folder}/none.pt"),
    "no checkpoint": (
        ["--data", "{folder}/data.safetensors", "--checkpoints", "{folder}/none", "--resume"],
        3,
        "error: there is no checkpoint in {folder}/none",
    ),
    "a loss that is not there": (
        ["--data", "{folder}/data.safetensors", "--loss", "tests.run_losses:none"],
        2,
        "error: cannot import the loss tests.run_losses:none: AttributeError: ",
    ),
    "a loss of many numbers": (
        ["--data", "{folder}/data.safetensors", "--loss", "tests.run_losses:many"],
        2,
        "error: the loss tests.run_losses:many returns Tensor, not one number or a pair (sum, how many)",
    ),
    "what to write": (
        ["--write", "x.bin", "--checkpoints", "{folder}"],
        2,
        "error: cannot tell what to write to x.bin",
    ),
    "experts on two": (
        ["--data", "{folder}/data.safetensors", "--expert-ranks", "2"],
        2,
        "error: 1 ranks do not split into groups of 2\n  hint: choose --expert-ranks out of 1",
    ),
    "a device": (
        ["--data", "{folder}/data.safetensors", "--device", "tpu"],
        2,
        "error: there is no device 'tpu' for ranks\n  hint: choose cpu or cuda",
    ),
    "a flag": (["--hello"], 2, "\n  hint: see python -m moeify.run --help"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(model: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, code, text = REFUSED[case]
    assert main([str(model), *(word.format(folder=model.parent) for word in words)]) == code
    assert text.format(folder=model.parent) in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--data", str(model.parent / "data.safetensors"), "--device", "cuda"]) != 0
    assert "there is no GPU that torch can use here\n  hint: choose --device cpu" in capsys.readouterr().err


def test_a_folder_that_holds_another_run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*map(str, on_tensors(model)[:-1]), "--steps", "1", "--checkpoints", str(tmp_path)]
    assert main(words) == 0
    capsys.readouterr()
    assert main(words) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} holds checkpoints up to step 1\n"
        "  hint: --resume goes on from there; or choose another folder\n"
    )
    assert main([*words, "--resume", "--batch", "4"]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'step-00000001'} was made by another run: batch was 8, now 4\n"
        "  hint: go on with the same data and the same options, or start in another folder\n"
    )
    assert main([*words, "--resume"]) == 2
    assert "has done 1 steps already, and --steps is 1\n  hint: ask for more steps" in capsys.readouterr().err
