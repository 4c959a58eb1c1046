"""What the CPU lowers itself of a model outside its experts."""

from __future__ import annotations

from moeify.backends.tvm.cpu.attention import attention
from moeify.backends.tvm.cpu.linear import linear
from moeify.backends.tvm.cpu.matmul import matmul
from moeify.backends.tvm.cpu.norms import layer_norm, rms_norm
from moeify.backends.tvm.cpu.softmax import softmax
from moeify.backends.tvm.families import Lower

DENSE: dict[str, Lower] = {
    "linear": linear,
    "matmul": matmul,
    "attention": attention,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "softmax": softmax,
}
