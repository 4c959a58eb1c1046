"""The same bits with any number of threads: no two of them write one place, and no sum depends on their order."""

from __future__ import annotations

import threading

import pytest
import torch

from moeify.backends.tvm import threads
from tests.tvm_kernels import Block, routing, small_tile

BLOCK = Block(6, 40, 50, 70, "silu", gated=True)


@pytest.mark.parametrize("k", [1, 3])
def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    run = BLOCK.compiled(k, target=small_tile(2, 8))
    x = torch.randn(37, BLOCK.d_model, generator=torch.Generator().manual_seed(0))
    experts, weights = routing(37, BLOCK.experts, k)
    monkeypatch.setenv("TVM_NUM_THREADS", "5")
    results: dict[int, torch.Tensor] = {}

    def work() -> None:
        for count in (1, 2, 5):
            threads.use(count)
            (results[count],) = run(x, experts, weights)

    worker = threading.Thread(target=work)  # a pool of threads is made for each thread that runs a kernel
    worker.start()
    worker.join()
    assert torch.equal(results[1], results[2])
    assert torch.equal(results[1], results[5])
