"""Benchmarks: ratios against a baseline in the same process, interleaved, medians. `make bench` runs all of them."""
