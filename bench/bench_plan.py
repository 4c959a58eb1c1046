"""``moeify plan`` for 4096 ranks: seconds of a large model's plan, and what placing experts gives.

The model has 60 mixtures of 256 experts, top-8, each with loads of its own, so that nothing is computed once for all.
Bar: the plan takes under 10 s. The imbalances are fullest rank over mean, of Zipf loads: in a random order, placed, and
with one place more per rank for copies.
"""

from __future__ import annotations

import json
import sys
import time

import numpy
from rich.console import Console
from rich.table import Table

from moeify.distributed.mixtures import Mixture
from moeify.distributed.placement import in_order, place, with_copies
from moeify.distributed.plan import Model, make_plan
from moeify.distributed.routing import zipf
from moeify.distributed.setting import Setting

D, F, EXPERTS, TOP_K, LAYERS, DEVICES = 4096, 2048, 256, 8, 60, 4096
BAR = 10.0
CASES = ((64, 8, 0.5), (256, 64, 1.0))  # experts, ranks, exponent


def model() -> Model:
    weights = 3 * D * F
    layers = tuple(
        Mixture(f"{i}", f"{i}", 1, D, D, F, EXPERTS, TOP_K, 3, weights, weights, EXPERTS * D, EXPERTS * D, 2)
        for i in range(LAYERS)
    )
    return Model("60 mixtures", layers, 10**9, 2 * 10**9, 10**10)


def seconds() -> float:
    draw = numpy.random.default_rng(0)
    loads = {str(i): draw.permutation(zipf(EXPERTS, 0.5, TOP_K)).tolist() for i in range(LAYERS)}
    start = time.perf_counter()
    make_plan(model(), Setting(DEVICES, loads=loads))
    return time.perf_counter() - start


def imbalances(experts: int, ranks: int, exponent: float) -> dict[str, float]:
    loads = numpy.random.default_rng(0).permutation(zipf(experts, exponent, 1))
    found = {"in order": in_order(experts, ranks), "placed": place(loads, ranks), "copies": with_copies(loads, ranks)}
    return {name: round(placement.imbalance(loads), 3) for name, placement in found.items()}


def main() -> int:
    taken = seconds()
    rows = {f"{e} on {r}, Zipf {z:g}": imbalances(e, r, z) for e, r, z in CASES}
    if "--json" in sys.argv:
        print(json.dumps({"seconds": round(taken, 2), "bar": BAR, "imbalance": rows, "held": taken <= BAR}))
    else:
        table = Table(title="imbalance of experts on ranks")
        for column in ("experts", "random order", "placed", "one copy place per rank"):
            table.add_column(column)
        for name, row in rows.items():
            table.add_row(name, *(f"{value:.3f}" for value in row.values()))
        Console().print(table)
        verdict = "held" if taken <= BAR else "MISSED"
        Console().print(f"a plan of {LAYERS} mixtures for {DEVICES} ranks: {taken:.1f} s (bar {BAR:g} s): {verdict}")
    return 0 if taken <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
