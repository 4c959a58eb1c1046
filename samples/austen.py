"""Jane Austen's six novels from the Debian package r-cran-janeaustenr, whose data file is read without R.

apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb out/austen
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from pretrained import OUT

_PLACES = (OUT / "austen" / "usr", Path("/usr"))
_FILE = "lib/R/site-library/janeaustenr/data/Rdata.rdb"
_CHARSXP = 9  # a string in R's serialisation: flags, whose low byte is this, length, bytes
_UTF8 = 0x8000  # among the flags
_LONGEST = 400  # of a line
_SHORTEST_NOVEL = 100_000  # characters; what else the package holds are tables


def novel(first_line: str = "EMMA") -> str | None:
    """The text of one novel, which begins with the line; None where the package is not."""
    found = _package()
    if found is None:
        return None
    for block in _blocks(found.read_bytes()):
        lines = _strings(block)
        if first_line in lines[:40]:
            return "\n".join(lines[lines.index(first_line) :])
    raise ValueError(f"{found} holds no novel that begins with {first_line!r}")


def novels() -> list[str]:
    """The texts of all six; none where the package is not."""
    found = _package()
    texts = ["\n".join(_strings(block)) for block in _blocks(found.read_bytes())] if found else []
    return [text for text in texts if len(text) > _SHORTEST_NOVEL]


def _package() -> Path | None:
    return next((place / _FILE for place in _PLACES if (place / _FILE).is_file()), None)


def _blocks(data: bytes) -> list[bytes]:
    """The objects of an rdb file: length of the rest and of the content, big-endian, then zlib."""
    found, at = [], 0
    while (at := data.find(b"\x78\x9c", at)) >= 0:
        reader = zlib.decompressobj()
        try:
            content = reader.decompress(data[at:])
        except zlib.error:
            content = b""
        if reader.eof and data[at - 4 : at] == struct.pack(">I", len(content)):
            found.append(content)
            at = len(data) - len(reader.unused_data)
        else:
            at += 2
    return found


def _strings(block: bytes) -> list[str]:
    """The strings of a vector, in order."""
    found, at = [], 0
    while at + 8 <= len(block):
        flags, length = struct.unpack_from(">Ii", block, at)
        text = block[at + 8 : at + 8 + max(length, 0)]
        if flags & 0xFF == _CHARSXP and flags < 1 << 20 and 0 <= length <= _LONGEST and len(text) == length:
            found.append(text.decode("utf-8" if flags & _UTF8 else "latin-1"))
            at += 8 + length
        else:
            at += 1
    return found
