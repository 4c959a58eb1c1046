"""``moeify calibrate``: real processes over gloo; the fit; a rank that dies. No times are asserted."""

from __future__ import annotations

import json
import os

import pytest

from moeify.cli.main import main
from moeify.distributed import calibration, network
from moeify.distributed.labels import ASSUMED, MEASURED
from moeify.errors import BadOption, RuntimeUnavailable


def test_the_fit_finds_what_made_the_times():
    leaving = [3 * 4**n for n in range(12)]
    times = [3 * 2e-5 + n / 5e8 for n in leaving]
    assert calibration.fit(leaving, times, 4) == pytest.approx((2e-5, 5e8))


def test_the_fit_gives_no_negative_latency():
    alpha, bandwidth = calibration.fit([1000, 2000, 4000], [0.5e-6, 2e-6, 4.5e-6], 2)
    assert alpha == 0
    assert 0.8e9 < bandwidth < 2e9


def test_times_that_do_not_grow():
    with pytest.raises(RuntimeUnavailable, match="the times do not grow with the bytes"):
        calibration.fit([1, 10, 100], [3e-6, 2e-6, 1e-6], 2)


def test_two_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "_GEMM", 64)
    file = tmp_path / "network.json"
    assert main(["calibrate", "--ranks", "2", "--rounds", "2", "-o", str(file), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [point[0] for point in made["points"]] == list(calibration.SIZES)
    assert made["where"] == "gloo, 2 processes of 1 thread on one machine"
    machine = network.read(file)
    assert machine.intra_bandwidth.source == machine.peak.source == MEASURED
    assert machine.intra_bandwidth.value > 0
    assert machine.bandwidth.source == ASSUMED  # nothing here says what lies between nodes


def _dies(rank: int, *_: object) -> None:
    os._exit(3)


def test_a_rank_that_dies_is_named(monkeypatch):
    monkeypatch.setattr(calibration, "_rank", _dies)
    with pytest.raises(RuntimeUnavailable, match=r"rank [01] ended before it had measured anything"):
        calibration.calibrate(2, sizes=(1, 4), rounds=1)


def test_a_rank_that_hangs_ends_with_the_timeout():
    with pytest.raises(RuntimeUnavailable, match=r"rank 0 (has not finished in|could not measure)"):
        calibration.calibrate(2, sizes=(1, 4), rounds=1, timeout=0.001)


def test_one_rank_has_nobody_to_talk_to():
    with pytest.raises(BadOption, match="the number of ranks is 1: it must be at least 2"):
        calibration.calibrate(1)


def test_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    machine = network.Machine().with_values({"intra_latency": 2e-5, "intra_bandwidth": 5e8}, MEASURED)
    made = calibration.Calibration(2, 1, ((1, 2e-5, 2.1e-5), (4096, 3e-5, 2.9e-5)), machine)
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: made)
    assert main(["calibrate"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "all-to-all over gloo, 2 processes of 1 thread on one machine",
        "",
        "  leaving a rank  measured  fitted  error",
        "  1 B             20 us     21 us   5.0e-02",
        "  4.10 kB         30 us     29 us   3.3e-02",
        "",
        "                                 source",
        "  latency in a node    20 us     measured",
        "  bandwidth in a node  500 MB/s  measured",
    ]
