"""``save_pretrained`` of a converted transformers model: it writes our checkpoint folder.

What transformers would write, ``from_pretrained`` would read into the dense class: it would drop the experts and draw
new FFNs, with a warning only. An attribute of the instance stands before the method of the class, so the class stays
the user's own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify.errors import Refused
from moeify.surgery.conversion import conversion_of
from moeify.surgery.folder import writing
from moeify.surgery.layout import is_ours
from moeify.surgery.saving import write_files

# The names transformers writes a model under. A save into the same folder replaces them, as transformers' own would.
_TRANSFORMERS_FILES = re.compile(
    r"(config|generation_config|(model|pytorch_model)(.*)\.index)\.json"
    r"|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)"
)
_INDEX = "model.safetensors.index.json"
_NOTE = "a mixture of experts made by moeify: open this folder with moeify.load"


class SavePretrained:
    """Stands in for the method. Holds the model, not a closure: copies and pickles of the model keep a working one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Like ``moeify.surgery.save``, into a folder that may hold other files (Trainer keeps its own beside the
        model).

        ``max_shard_size`` and other arguments about transformers' file format are not needed here. An index lets
        Trainer resume; ``from_pretrained`` cannot read it.
        """
        if push_to_hub:
            raise Refused(
                "push_to_hub would upload files that from_pretrained cannot read", hint="upload the folder yourself"
            )
        if not is_main_process:
            return
        with writing(Path(save_directory), _replaced, beside_others=True) as fresh:
            index = write_files(self.model, fresh, values=state_dict)
            # transformers adds entries to `metadata`; a text makes from_pretrained raise, and Trainer does not look
            # at it.
            (fresh / _INDEX).write_text(json.dumps({"metadata": _NOTE, "weight_map": index}, indent=1) + "\n")


class SavePretrainedOfPart:
    """For the inner models of a converted one (``model.model``): a part cannot be read back."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise Refused(
            "only the whole converted model can be saved, not a part of it",
            where=self.path,
            hint="call save_pretrained of the model that was converted",
        )


def guard(model: nn.Module) -> None:
    """Take the place of ``save_pretrained`` on a converted transformers model and on the inner models that hold
    experts.
    """
    anchors = [block.anchor for block in conversion_of(model).blocks]
    for path, module in model.named_modules():
        if not hasattr(type(module), "save_pretrained"):
            continue
        if path == "":
            object.__setattr__(module, "save_pretrained", SavePretrained(module))
        elif any(anchor.startswith(path + ".") for anchor in anchors):
            object.__setattr__(module, "save_pretrained", SavePretrainedOfPart(path))


def _replaced(name: str) -> bool:
    return is_ours(name) or _TRANSFORMERS_FILES.fullmatch(name) is not None
