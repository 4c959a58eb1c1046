"""``python -m tests.native [CASES]``: the native kernels under sanitizers, on random cases (``fuzz.cc``).

What there is no C++ compiler for, or no library of a sanitizer, is not tested, which is said and is no failure.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from moeify.backends.onnxruntime.kernel_compile import COMPILERS, CompileFailed, find_compiler, link, sources

CASES = "150"
# Name, flags. The sanitizers of addresses and of threads exclude each other.
BUILDS = {
    "addresses, undefined behaviour": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "threads": ("-O1", "-g", "-fsanitize=thread"),
    "as released": ("-O3",),
}
WARNINGS = ("-Wall", "-Wextra")


def main() -> int:
    compiler = find_compiler()
    if compiler is None:
        print(f"native tests skipped: there is no C++ compiler ({', '.join(COMPILERS)})")
        return 0
    files = [path for path in sources() if path.name != "op.cc"]  # the one that needs a runtime around it
    cases = sys.argv[1] if len(sys.argv) > 1 else CASES
    with tempfile.TemporaryDirectory(prefix="moeify-native-") as folder:
        for name, flags in BUILDS.items():
            program = Path(folder, "fuzz")
            if not _links(compiler, flags, Path(folder)):
                print(f"{name}: skipped, {compiler} does not link with {' '.join(flags)}", flush=True)
                continue
            start = time.perf_counter()
            link(compiler, [*files, Path(__file__).with_name("fuzz.cc")], program, [*WARNINGS, *flags], ["-pthread"])
            built = time.perf_counter()
            done = subprocess.run([str(program), cases], capture_output=True, text=True)
            seconds = f"built in {built - start:.0f} s, run in {time.perf_counter() - built:.0f} s"
            print(f"{name}: {(done.stdout + done.stderr).strip()} ({seconds})", flush=True)
            if done.returncode:
                return 1
    return 0


def _links(compiler: str, flags: Sequence[str], folder: Path) -> bool:
    """Whether anything does."""
    empty = folder / "empty.cc"
    empty.write_text("int main() {}\n")
    try:
        link(compiler, [empty], folder / "empty", flags, ["-pthread"])
    except CompileFailed:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
