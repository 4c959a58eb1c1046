"""A Hugging Face folder without its weights: the model on the meta device, for what needs shapes alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from moeify.errors import InputError, UnreadableFile
from moeify.frontend.hf_folder import _config, _model_class
from moeify.frontend.reasons import first_line


def read_skeleton(path: str | Path) -> nn.Module:
    """The model that config.json describes; the folder need not hold weights. Nothing of it is executed.

    Raises InputError.
    """
    path = Path(path)
    config = _config(path)
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"{path} is a Hugging Face folder, and transformers is not installed", hint="pip install 'moeify[hf]'"
        ) from error
    cls = _model_class(path, config, transformers)
    try:
        read = cls.config_class.from_pretrained(str(path), local_files_only=True)
        dtype = getattr(read, "dtype", None) or torch.float32
        with torch.device("meta"):
            module = cls._from_config(read, dtype=dtype)
    except Exception as error:  # transformers raises whatever it meets
        raise UnreadableFile(f"transformers cannot build the model of {path}: {first_line(error)}") from error
    return module.eval()
