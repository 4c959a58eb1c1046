"""A folder of images as the input of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Scaling:
    """``(value * factor - mean) / std`` per channel, of values from 0 to 255. ``note`` says where it comes from."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    factor: float = 1 / 255
    note: str | None = None


@dataclass(frozen=True)
class Images:
    """Files, read when they are asked for."""

    files: tuple[Path, ...]
    spec: InputSpec
    size: tuple[int, int, int]  # channels, height, width
    scaling: Scaling

    def take(self, which: Sequence[int]) -> Tensor:
        """[len(which), channels, height, width] in the input's type. Raises UnreadableFile."""
        return torch.stack([self._read(self.files[index]) for index in which]).to(self.spec.dtype)

    def _read(self, file: Path) -> Tensor:
        from PIL import Image

        channels, height, width = self.size
        try:
            with Image.open(file) as image:
                pixels = image.convert(_MODES[channels]).resize((width, height), Image.Resampling.BILINEAR)
        except Exception as error:  # Pillow raises whatever a damaged file makes it meet
            raise UnreadableFile(f"cannot read the image {file}: {str(error).splitlines()[0]}") from error
        values = torch.from_numpy(numpy.array(pixels, dtype=numpy.float32)).view(height, width, channels)
        mean, std = torch.tensor(self.scaling.mean), torch.tensor(self.scaling.std)
        return ((values * self.scaling.factor - mean) / std).permute(2, 0, 1)


def folder(path: Path, specs: Sequence[InputSpec], example: Sequence[Tensor], scaling: Scaling) -> Images:
    """The images of a folder and the folders in it, in the order of their names, for a model that reads one image.

    Each is resized (bilinear) to the model's input, whatever its proportions. Raises RuntimeUnavailable without
    Pillow, UnreadableFile for a folder without images, BadInputSpec for a model that does not read images.
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
    files = tuple(sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file()))
    if not files:
        raise UnreadableFile(f"there is no image in the folder {path}", hint=f"images end in {', '.join(_SUFFIXES)}")
    return Images(files, spec, (size[0], size[1], size[2]), _for_channels(scaling, size[0]))


def scaling_of(model: Path | None, mean: Sequence[float] | None, std: Sequence[float] | None) -> Scaling:
    """The user's, or that of the preprocessor_config.json in or beside the model, or 0.5 and 0.5 with a note.

    Raises BadOption for deviations that are not positive, UnreadableFile for a config that is no such thing.
    """
    beside = None if model is None else (model if model.is_dir() else model.parent) / _PREPROCESSOR
    if mean is None and std is None and beside is not None and beside.is_file():
        return _from_config(beside)
    scaling = Scaling(tuple(mean or (0.5,)), tuple(std or (0.5,)))
    if mean is None and std is None:
        scaling = Scaling(
            scaling.mean, scaling.std, note="images scaled to [-1, 1]: --image-mean and --image-std say others"
        )
    if not all(value > 0 for value in scaling.std):
        raise BadOption(f"the standard deviation of images is {scaling.std}: it must be above 0")
    return scaling


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
