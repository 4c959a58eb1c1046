"""How many threads TVM's kernels run on.

TVM makes a pool of threads for every thread that runs a kernel, when it runs the first, and the pool cannot grow. Left
to itself it has half as many threads as an x86 machine has processors (it counts two to a core, where there may be
one), and binds the caller to the first one: whatever else the process computes, torch for example, then stays there.
"""

from __future__ import annotations

import os
import threading

import tvm

from moeify.errors import BadOption, RuntimeUnavailable

_mine = threading.local()
_ANY_CORE = 0


def prepare() -> None:
    """Pools that are made from now on have a thread for each processor that this process may use, bound to none.

    What the user said by TVM_NUM_THREADS, OMP_NUM_THREADS or TVM_BIND_THREADS stays.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("TVM_BIND_THREADS", "0")


def use(threads: int | None) -> None:
    """Run what this thread runs next on so many threads; None is as many as its pool has.

    Raises BadOption for a number below 1 and RuntimeUnavailable for more than the pool has.
    """
    if threads is not None and threads < 1:
        raise BadOption(f"the number of threads is {threads}: it must be positive")
    if getattr(_mine, "threads", None) == threads:
        return
    tvm.get_global_func("runtime.config_threadpool")(_ANY_CORE, threads or 0)
    have = tvm.runtime.num_threads()
    _mine.threads = threads
    if threads is not None and have < threads:
        _mine.threads = have  # what the pool is set to now
        raise RuntimeUnavailable(
            f"TVM runs on {have} threads in this process, and {threads} were asked for",
            hint=f"start it with TVM_NUM_THREADS={threads}",
        )
