"""Hugging Face folders: config.json and safetensors, read by transformers, never with code from the
folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from moeify.errors import InputError, UnreadableFile

_UNTOUCHED = "nothing of the folder was executed"


def read_folder(path: Path) -> tuple[nn.Module, list[str]]:
    """The model of ``architectures`` in config.json with the folder's weights, and notes. Raises
    InputError."""
    config = _config(path)
    _check_weights(path)
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"{path} is a Hugging Face folder, and transformers is not installed",
            hint="pip install 'moeify[hf]'",
        ) from error
    cls = _model_class(path, config, transformers)
    transformers.logging.disable_progress_bar()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        module, info = cls.from_pretrained(
            str(path),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="auto",
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises whatever it meets
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnreadableFile(f"transformers cannot load {path}: {reason}") from error
    finally:
        transformers.logging.set_verbosity(level)
    return module.eval(), _notes(path, info)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UnreadableFile(f"cannot read {path / 'config.json'}: {error}") from error
    if not isinstance(config, dict):
        raise UnreadableFile(f"{path / 'config.json'} is not a JSON object")
    return config


def _check_weights(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    files = [path / "model.safetensors"]
    if index.exists():
        try:
            files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UnreadableFile(f"cannot read {index}: {error}") from error
    for file in files:
        if not file.exists():
            others = sorted(f.name for f in path.glob("*.bin"))
            if others and not index.exists():
                raise UnreadableFile(
                    f"{path} holds its weights as pickles ({others[0]}) and no model.safetensors",
                    hint="convert them: load the model in transformers and call save_pretrained",
                )
            raise UnreadableFile(f"there is no file {file}", hint="download the whole folder again")
        with file.open("rb") as opened:
            head = opened.read(16)
        if head.startswith(b"version https://"[:16]):
            raise UnreadableFile(
                f"{file} is a git-lfs pointer, not the file it points to", hint="fetch it with git lfs pull"
            )


def _model_class(path: Path, config: dict[str, Any], transformers: Any) -> Any:
    names = config.get("architectures") or []
    for name in names:
        cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            return cls
    if config.get("auto_map"):
        raise InputError(
            f"{path} brings its own Python code for {', '.join(map(str, names)) or 'its model'}; {_UNTOUCHED}",
            hint="if you trust it, load the model yourself and call moeify.convert(model)",
        )
    if names:
        raise InputError(
            f"transformers {transformers.__version__} has no model class {names[0]!r}",
            where=str(path / "config.json"),
        )
    try:
        kind = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        return transformers.MODEL_MAPPING[type(kind)]
    except Exception as error:
        raise InputError(
            f"{path / 'config.json'} does not say which model it is for",
            hint='add "architectures": ["TheModelClass"]',
        ) from error


def _notes(path: Path, info: dict[str, Any]) -> list[str]:
    notes = []
    missing = sorted(map(str, info.get("missing_keys") or []))
    if missing:
        notes.append(f"{len(missing)} weights are not in {path} and have random values: {', '.join(missing[:3])}")
    return notes
