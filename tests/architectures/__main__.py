"""``python -m tests.architectures [WORDS]``: the table of architectures; blocks expected, found and false."""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from fnmatch import fnmatchcase

import torch

from moeify.match import find
from tests.architectures.catalogue import ARCHITECTURES


def main(words: list[str]) -> int:
    """Prints one line per architecture and the sums; 1 when anything is missed or false."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    verbose = "-v" in words
    words = [word.lower() for word in words if word != "-v"]
    sums = [0, 0, 0]
    print(f"{'architecture':44} {'expected':>8} {'found':>6} {'false':>6} {'seconds':>8}")
    for one in ARCHITECTURES.values():
        if words and not any(word in f"{one.name} {one.build.__module__}".lower() for word in words):
            continue
        start = time.perf_counter()
        try:
            found = find(one.program().graph_module)
        except Exception as error:
            print(f"{one.name:44} {str(error).splitlines()[0][:120] if str(error) else type(error).__name__}")
            if verbose:
                traceback.print_exc()
            sums[0] += one.expected
            continue
        true, wrong = one.compare(found.blocks)
        false = len(found.blocks) - true
        for i, count in enumerate((one.expected, true, false)):
            sums[i] += count
        mark = "  (held out)" if one.held_out else ""
        print(f"{one.name:44} {one.expected:8} {true:6} {false:6} {time.perf_counter() - start:8.1f}{mark}")
        for line in wrong:
            print(f"    {line}")
        for path, reason in one.refused:
            if not any(fnmatchcase(miss.path, path) and reason in miss.reason for miss in found.near_misses):
                print(f"    no near miss at {path}: {reason}")
        if verbose or wrong:
            for miss in found.near_misses:
                print(f"    near miss: {miss.path or '(root)'}: {miss.reason}")
    print(f"{'sum':44} {sums[0]:8} {sums[1]:6} {sums[2]:6}")
    return int(sums[0] != sums[1] or sums[2] != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
