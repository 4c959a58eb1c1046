"""A folder of images as the input of a model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from moeify.errors import BadInputSpec, BadOption, RuntimeUnavailable, UnreadableFile
from moeify.ir.program import InputSpec

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
_MODES = {1: "L", 3: "RGB"}
_PREPROCESSOR = "preprocessor_config.json"
KEPT = 2 * 2**30  # bytes of a folder's decoded images up to which training keeps them


@dataclass(frozen=True)
class Scaling:
    """``(value * factor - mean) / std`` per channel, of values from 0 to 255. ``note`` says where it comes from."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    factor: float = 1 / 255
    note: str | None = None


@dataclass(frozen=True)
class Images:
    """Files, read when they are asked for. With ``keep``, what was read stays in memory as bytes, a byte for each value
    of the model's input: for one who asks again.
    """

    files: tuple[Path, ...]
    spec: InputSpec
    size: tuple[int, int, int]  # channels, height, width
    scaling: Scaling
    keep: bool = False
    _pixels: dict[Path, numpy.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def take(self, which: Sequence[int]) -> Tensor:
        """[len(which), channels, height, width] in the input's type. Raises UnreadableFile."""
        pixels_NHWC = torch.from_numpy(numpy.stack([self._pixels_of(self.files[index]) for index in which]))
        values_NCHW = pixels_NHWC.permute(0, 3, 1, 2).contiguous().float()
        mean_C11, std_C11 = (torch.tensor(each).view(-1, 1, 1) for each in (self.scaling.mean, self.scaling.std))
        return values_NCHW.mul_(self.scaling.factor).sub_(mean_C11).div_(std_C11).to(self.spec.dtype)

    def some(self, which: Sequence[int]) -> Images:
        """Of these files alone, in this order."""
        return replace(self, files=tuple(self.files[index] for index in which))

    def _pixels_of(self, file: Path) -> numpy.ndarray:
        pixels_HWC = self._pixels.get(file)
        if pixels_HWC is None:
            pixels_HWC = self._read(file)
            if self.keep:
                self._pixels[file] = pixels_HWC
        return pixels_HWC

    def _read(self, file: Path) -> numpy.ndarray:
        """[height, width, channels] from 0 to 255."""
        from PIL import Image

        channels, height, width = self.size
        try:
            with Image.open(file) as image:
                pixels = image.convert(_MODES[channels]).resize((width, height), Image.Resampling.BILINEAR)
        except Exception as error:  # Pillow raises whatever a damaged file makes it meet
            raise UnreadableFile(f"cannot read the image {file}: {str(error).splitlines()[0]}") from error
        return numpy.array(pixels, dtype=numpy.uint8).reshape(height, width, channels)


def folder(
    path: Path, specs: Sequence[InputSpec], example: Sequence[Tensor], scaling: Scaling, *, keep: bool = False
) -> Images:
    """The images of a folder and the folders in it, in the order of their names, for a model that reads one image.
    Files and folders whose name begins with a dot are left out.

    Each is resized (bilinear) to the model's input, whatever its proportions. With ``keep``, decoded images stay in
    memory where all of them take at most ``KEPT`` bytes. Raises RuntimeUnavailable without Pillow, UnreadableFile for a
    folder without images, BadInputSpec for a model that does not read images.
    """
    try:
        import PIL.Image  # noqa: F401  (only to see whether it is there)
    except ImportError as error:
        raise RuntimeUnavailable(
            "reading images needs Pillow, which is not installed", hint="pip install pillow, or give tensors"
        ) from error
    spec = specs[0]
    size = tuple(example[0].shape[1:])
    if len(specs) != 1 or len(spec.shape) != 4 or not spec.dtype.is_floating_point or size[0] not in _MODES:
        raise BadInputSpec(
            f"{path} is a folder of images, and the model reads {', '.join(map(str, specs))}, "
            "not one image[batch, 1 or 3, height, width]",
            hint="give tensors by input name instead: --data FILE.safetensors",
        )
    inside = (file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
    files = tuple(sorted(file for file in inside if not any(part[0] == "." for part in file.relative_to(path).parts)))
    if not files:
        raise UnreadableFile(
            f"there is no image in the folder {path}", hint=f"images end in {', '.join(sorted(_SUFFIXES))}"
        )
    keep = keep and len(files) * math.prod(size) <= KEPT
    return Images(files, spec, (size[0], size[1], size[2]), _for_channels(scaling, size[0]), keep)


def classes_of(path: Path, files: Sequence[Path]) -> tuple[tuple[str, ...], Tensor] | None:
    """The class of each file of a folder, which is the sub-folder that it is in or below: the names in their order, as
    torchvision's ImageFolder has them, and for each file the number of its own. None where a file is in the folder
    itself.
    """
    parts = [file.relative_to(path).parts for file in files]
    if any(len(one) == 1 for one in parts):
        return None
    names = sorted({one[0] for one in parts})
    numbers = {name: number for number, name in enumerate(names)}
    return tuple(names), torch.tensor([numbers[one[0]] for one in parts])


def check_classes(path: Path, names: Sequence[str]) -> None:
    """Raises UnreadableFile for a sub-folder without an image: it may be a class, and the others' numbers depend on
    it."""
    for place in sorted(path.iterdir()):
        if place.is_dir() and place.name not in names and place.name[0] != ".":
            raise UnreadableFile(
                f"there is no image in {place}, and every sub-folder of {path} is a class",
                hint="put its images there, or remove it",
            )


def scaling_of(model: Path | None, mean: Sequence[float] | None, std: Sequence[float] | None) -> Scaling:
    """The user's, or that of the preprocessor_config.json in or beside the model, or 0.5 and 0.5 with a note.

    Raises BadOption for deviations that are not positive, UnreadableFile for a config that is no such thing.
    """
    beside = None if model is None else preprocessor_of(model)
    if mean is None and std is None and beside is not None:
        return _from_config(beside)
    scaling = Scaling(tuple(mean or (0.5,)), tuple(std or (0.5,)))
    if mean is None and std is None:
        scaling = Scaling(
            scaling.mean, scaling.std, note="images scaled to [-1, 1]: --image-mean and --image-std say others"
        )
    if not all(value > 0 for value in scaling.std):
        raise BadOption(f"the standard deviation of images is {scaling.std}: it must be above 0")
    return scaling


def preprocessor_of(model: Path) -> Path | None:
    """The preprocessor_config.json in or beside a model, if there is one."""
    place = (model if model.is_dir() else model.parent) / _PREPROCESSOR
    return place if place.is_file() else None


def _from_config(path: Path) -> Scaling:
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        factor = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
        note = f"images scaled as {path} says"
        if not config.get("do_normalize", True):
            return Scaling((0.0,), (1.0,), factor, note)
        mean = tuple(float(value) for value in config["image_mean"])
        std = tuple(float(value) for value in config["image_std"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableFile(
            f"cannot read how images are scaled from {path}", hint="give --image-mean and --image-std"
        ) from error
    return Scaling(mean, std, factor, note)


def _for_channels(scaling: Scaling, channels: int) -> Scaling:
    """One value stands for all channels. Raises BadOption for any other number of values."""
    for name, values in (("mean", scaling.mean), ("std", scaling.std)):
        if len(values) not in (1, channels):
            raise BadOption(f"the {name} of images has {len(values)} values and the model reads {channels} channels")
    mean, std = ((values * channels)[:channels] for values in (scaling.mean, scaling.std))
    return Scaling(mean, std, scaling.factor, scaling.note)
