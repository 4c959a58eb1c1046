"""Lowerings for CPUs: kernels in TIR, their schedules, and the pipeline that compiles them."""
