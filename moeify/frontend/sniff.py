"""What kind of file is this? Decided by content, never by its name."""

from __future__ import annotations

import zipfile
from pathlib import Path

from moeify.errors import UnreadableFile

PICKLE, LEGACY, PT2, TORCHSCRIPT, SAFETENSORS, HF = (
    "pickle", "legacy pickle", "pt2", "torchscript", "safetensors", "huggingface",
)  # fmt: skip
_READS = "moeify reads .pt, .pt2 and .safetensors files and Hugging Face folders"
_MAGIC = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"%PDF": "a PDF document",
    b"GIF8": "a GIF image",
    b"GGUF": "a GGUF file, whose weights are quantised",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x89HDF": "an HDF5 file",
    b"\x7fELF": "an ELF binary",
    b"\x93NUMPY": "a NumPy array",
}
LFS = b"version https://git-lfs.github.com"


def sniff(path: Path) -> str:
    """The kind of a model file or folder. Raises UnreadableFile when it is none."""
    if not path.exists():
        raise UnreadableFile(f"there is no file {path}")
    try:
        return _folder(path) if path.is_dir() else _file(path)
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error


def _folder(path: Path) -> str:
    if (path / "moeify.json").exists():
        raise UnreadableFile(
            f"{path} is a checkpoint that moeify has already converted", hint="open it with moeify.load"
        )
    if not (path / "config.json").exists():
        raise UnreadableFile(
            f"the folder {path} has no config.json",
            hint="give a Hugging Face folder (config.json and model.safetensors) or a file",
        )
    return HF


def _file(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise UnreadableFile(f"{path} is empty")
    if head.startswith(LFS):
        raise UnreadableFile(
            f"{path} is a git-lfs pointer, not the file it points to", hint="fetch it with git lfs pull"
        )
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            raise UnreadableFile(f"{path} is {name}, not a model", hint=_READS)
    if head.startswith(b"PK"):
        return _zip(path)
    if head[:1] == b"\x80":
        return LEGACY
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100 << 20:
        return SAFETENSORS
    if _is_text(head):
        raise UnreadableFile(f"{path} is a text file, not a model", hint=_READS)
    raise UnreadableFile(f"{path} is of an unknown kind", hint=_READS)


def _zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
            unpacked = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:  # the last: a zip version of the future
        raise UnreadableFile(f"{path} is truncated or damaged", hint="copy or download it again") from error
    if "constants.pkl" in names and any(n.startswith("code/") for n in names):
        return TORCHSCRIPT
    if unpacked > path.stat().st_size:  # torch never compresses: records that share bytes, or a zip bomb
        raise UnreadableFile(
            f"{path} would unpack to {unpacked} bytes, more than the file has",
            hint="save it with torch.save or torch.export.save, which do not compress",
        )
    if "archive_format" in names and any(n.startswith("models/") for n in names):
        return PT2
    if "data.pkl" in names:
        return PICKLE
    if "serialized_exported_program.json" in archive.namelist():
        raise UnreadableFile(
            f"{path} is a torch.export archive of torch 2.7 or older",
            hint="save it again with torch 2.8 or newer",
        )
    raise UnreadableFile(f"{path} is a zip archive and no model", hint=_READS)


def _is_text(head: bytes) -> bool:
    try:
        text = head[:-4].decode() if len(head) == 512 else head.decode()
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\r\n\t" for c in text)
