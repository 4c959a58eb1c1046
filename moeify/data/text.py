"""A text in pieces of as many tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.errors import BadInputSpec, BadOption, RuntimeUnavailable, UnreadableFile, UsageError
from moeify.ir.program import InputSpec

BYTES = "bytes"  # the tokenizer that needs no file: a token is a byte
SUFFIXES = (".txt", ".text", ".md")
SEQUENCE = 128  # tokens of a piece, where neither the user nor the model says another number

Encode = Callable[[str], list[int]]


def pieces(path: Path, tokenizer: str, sequence: int, vocabulary: int, *, framed: bool = False) -> Tensor:
    """Token ids [pieces, sequence] of a text, in order; the last piece is left out where it is shorter.

    ``framed`` puts the tokenizer's special tokens around each piece, as an encoder was trained. Raises UnreadableFile,
    BadInputSpec for a text that is too short, BadOption for a tokenizer that is not the model's.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFile(f"cannot read the text {path}: {error}") from error
    encode, before, after = _tokenizer(tokenizer)
    if not framed:
        before, after = [], []
    width = sequence - len(before) - len(after)
    if width < 1:
        raise BadOption(f"{sequence} tokens leave no room beside the special ones", hint="choose a larger --sequence")
    tokens = torch.tensor(encode(text), dtype=torch.int64)
    count = len(tokens) // width
    if not count:
        raise BadInputSpec(
            f"{path} has {len(tokens)} tokens, fewer than one piece of {width}", hint="choose a smaller --sequence"
        )
    if int(tokens.max()) >= vocabulary:
        raise BadOption(
            f"the tokenizer gives token {int(tokens.max())} and the model knows {vocabulary}",
            hint="give the tokenizer that belongs to the model",
        )
    cut = tokens[: count * width].view(count, width)
    return torch.cat([torch.tensor(before).expand(count, -1), cut, torch.tensor(after).expand(count, -1)], 1).long()


def inputs_of(pieces: Tensor, specs: Sequence[InputSpec], ids: str) -> dict[str, Tensor]:
    """Inputs by name: the pieces as ``ids``, ones for masks, zeros for token_type_ids.

    Raises BadInputSpec for a model with other inputs, or with another fixed length.
    """
    made: dict[str, Tensor] = {}
    for spec in specs:
        if spec.name == ids:
            made[spec.name] = pieces.to(spec.dtype)
        elif "mask" in spec.name and len(spec.shape) == 2:
            made[spec.name] = torch.ones_like(pieces).to(spec.dtype)
        elif spec.name == "token_type_ids" and len(spec.shape) == 2:
            made[spec.name] = torch.zeros_like(pieces).to(spec.dtype)
        else:
            raise BadInputSpec(
                f"the model reads {spec}, which a text does not give",
                hint="give tensors by input name instead: --data FILE.safetensors",
            )
        fixed = spec.shape[1]
        if isinstance(fixed, int) and fixed != pieces.shape[1]:
            raise BadInputSpec(
                f"the model reads {spec}, not {pieces.shape[1]} tokens", hint=f"choose --sequence {fixed}"
            )
    return made


def _tokenizer(tokenizer: str) -> tuple[Encode, list[int], list[int]]:
    """A function from text to token ids, and the special tokens that stand before and after a text."""
    if tokenizer == BYTES:
        return lambda text: list(text.encode()), [], []
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise RuntimeUnavailable(
            "a tokenizer needs transformers, which is not installed", hint="pip install 'moeify[hf]', or give tensors"
        ) from error
    place = Path(tokenizer)
    if not place.exists():
        raise UsageError(f"there is no tokenizer {tokenizer}", hint=f"give its folder, a .gguf file, or {BYTES!r}")
    options: dict[str, Any] = {"local_files_only": True}
    if place.is_file():
        place, options["gguf_file"] = place.parent, place.name
    try:
        made = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # transformers raises whatever it meets
        raise UnreadableFile(f"cannot read the tokenizer {tokenizer}: {str(error).splitlines()[0]}") from error

    def encode(text: str) -> list[int]:
        return made(text, add_special_tokens=False, verbose=False)["input_ids"]

    bare, whole = encode("a"), made("a", verbose=False)["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return encode, whole[:start], whole[start + len(bare) :]
