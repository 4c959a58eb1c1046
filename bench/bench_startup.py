"""``moeify --help`` against ``python -c "import typer, rich"``, and what ``import moeify`` loads.

Run with the Python that moeify is installed in. The target is a ratio below 1.5; both are measured in turns.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 10
TARGET = 1.5
HEAVY = ("transformers", "networkx", "onnx", "onnxruntime", "tvm", "rich", "typer", "scipy")


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> int:
    help_command = [str(Path(sys.executable).with_name("moeify")), "--help"]
    bare_command = [sys.executable, "-c", "import typer, rich"]
    seconds(help_command), seconds(bare_command)  # byte code and the disk's cache
    pairs = [(seconds(help_command), seconds(bare_command)) for _ in range(RUNS)]
    help_time, bare_time = (statistics.median(times) for times in zip(*pairs))
    ratio = statistics.median(ours / bare for ours, bare in pairs)
    print(f"moeify --help        {help_time:.3f} s (median of {RUNS})")
    print(f"import typer, rich   {bare_time:.3f} s")
    print(f"ratio                {ratio:.2f} (target below {TARGET})")
    code = f"import sys, moeify; print(*[n for n in {HEAVY!r} if n in sys.modules])"
    extra = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    print(f"import moeify loads  torch{f' and {extra}' if extra else ', nothing heavier'}")
    return int(ratio >= TARGET or bool(extra))


if __name__ == "__main__":
    sys.exit(main())
