"""Writing a file so that it is there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moeify.errors import OutputNotWritten


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` and renames it on success.

    The temporary file is removed when anything fails, Ctrl-C included; what stood at ``path`` stays as it was until
    the rename. Raises OutputNotWritten for what the operating system refuses (no space, no permission, no such
    folder).
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a failed write as RuntimeError
        raise OutputNotWritten(
            f"cannot write {path}: {reason(error)}",
            hint="nothing was changed; free space or choose another --output",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def reason(error: OSError | RuntimeError) -> str:
    """What the operating system said, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).splitlines()[0] if str(error) else type(error).__name__
