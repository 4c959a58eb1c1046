"""TVM's threads: as many as there are processors, bound to none of them, or as the user says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeify.backends.tvm import threads
from moeify.errors import BadOption, RuntimeUnavailable

ROOT = Path(__file__).parent.parent
_COUNTED = """
import os
from moeify.backends.tvm import threads
threads.prepare()
import tvm
threads.use({asked})
print(tvm.runtime.num_threads(), sorted(os.sched_getaffinity(0)) == before)
"""


def counted(asked: int | None, **environment: str) -> str:
    """What a fresh process says: its threads, and whether it may still run on every processor that it began with."""
    script = "import os\nbefore = sorted(os.sched_getaffinity(0))\n" + _COUNTED.format(asked=asked)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TVM_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**kept, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_thread_for_each_processor_bound_to_none() -> None:
    assert counted(None) == f"{len(os.sched_getaffinity(0))} True"


@pytest.mark.parametrize("variable", ["TVM_NUM_THREADS", "OMP_NUM_THREADS"])
def test_what_the_user_said_stays(variable: str) -> None:
    assert counted(None, **{variable: "1"}) == "1 True"


def test_fewer_for_one_library() -> None:
    assert counted(1, TVM_NUM_THREADS="2") == "1 True"


def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadOption, match="the number of threads is 0: it must be positive"):
        threads.use(0)
    monkeypatch.setattr(threads.tvm.runtime, "num_threads", lambda: 2)
    with pytest.raises(RuntimeUnavailable) as error:
        threads.use(1000)
    assert error.value.what == "TVM runs on 2 threads in this process, and 1000 were asked for"
    assert error.value.hint == "start it with TVM_NUM_THREADS=1000"
    monkeypatch.undo()
    threads.use(None)


def test_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    threads.use(1)
    monkeypatch.setattr(threads.tvm, "get_global_func", lambda _: pytest.fail("asked again"))
    threads.use(1)
    monkeypatch.undo()
    threads.use(None)
