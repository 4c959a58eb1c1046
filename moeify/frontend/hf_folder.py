"""Hugging Face folders: config.json and safetensors, read by transformers, never with code from the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from moeify.errors import InputError, StateDictMismatch, UnreadableFile
from moeify.frontend.reasons import first_line
from moeify.frontend.sniff import LFS

_UNTOUCHED = "nothing of the folder was executed"


def read_folder(path: Path) -> tuple[nn.Module, list[str]]:
    """The model of ``architectures`` in config.json with the folder's weights, and notes. Raises InputError."""
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
        raise UnreadableFile(f"transformers cannot load {path}: {first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(level)
    return module.eval(), _notes(path, module, info)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableFile(f"cannot read {path / 'config.json'}: {error}") from error
    if not isinstance(config, dict):
        raise UnreadableFile(f"{path / 'config.json'} is not a JSON object")
    if not isinstance(config.get("architectures") or [], list):
        raise UnreadableFile(f"the architectures of {path / 'config.json'} are not a list of names")
    _check_kernels(path, config)
    return config


def _check_kernels(path: Path, part: Any) -> None:
    """transformers fetches ``owner/repository`` as an attention or experts kernel from the Hub, and runs it."""
    for key, value in part.items() if isinstance(part, dict) else ():
        values = value.values() if isinstance(value, dict) else [value]
        if key.endswith("_implementation") and any(isinstance(v, str) and "/" in v for v in values):
            raise InputError(
                f"{path / 'config.json'} asks for code from the Hub ({key}: {value!r}); {_UNTOUCHED}",
                hint="remove that entry, or load the model yourself and call moeify.convert(model)",
            )
        _check_kernels(path, value)


def _check_weights(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    files = [path / "model.safetensors"]
    if index.exists():
        try:
            files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
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
        if not file.is_file():
            raise UnreadableFile(f"{file} is not a file")
        with file.open("rb") as opened:
            head = opened.read(len(LFS))
        if head == LFS:
            raise UnreadableFile(
                f"{file} is a git-lfs pointer, not the file it points to", hint="fetch it with git lfs pull"
            )


def _model_class(path: Path, config: dict[str, Any], transformers: Any) -> Any:
    names = config.get("architectures") or []
    for name in names:
        try:
            cls = getattr(transformers, str(name), None)
        except Exception:  # transformers imports the class now, and it may need a package that is not here
            continue
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
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


def _notes(path: Path, module: nn.Module, info: dict[str, Any]) -> list[str]:
    """Raises StateDictMismatch where most weights would be random: a new head is usual, a new body is not."""
    notes = []
    missing = sorted(map(str, info.get("missing_keys") or []))
    total = len(module.state_dict())
    if 2 * len(missing) > total:
        raise StateDictMismatch(
            f"{len(missing)} of the {total} weights of {type(module).__name__} are not in {path}: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}",
            hint="do config.json and the safetensors files belong together?",
        )
    if missing:
        one = len(missing) == 1
        what = "1 weight is not" if one else f"{len(missing)} weights are not"
        notes.append(f"{what} in {path} and {'has' if one else 'have'} random values: {', '.join(missing[:3])}")
    return notes
