"""Targets a Program is lowered to: one folder each, a table of names."""

from moeify.registry import Registry

BACKENDS = Registry(
    "backend",
    {
        "pt2": "moeify.backends.pt2:Pt2",
        "onnxruntime": "moeify.backends.onnxruntime.backend:OnnxRuntime",
        "tvm": "moeify.backends.tvm.backend:Tvm",
    },
)
