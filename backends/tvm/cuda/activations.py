"""The named activations on float32 values, with the device's accurate functions."""

from __future__ import annotations

from moeify.backends.tvm.activations import Definitions

TABLE = Definitions("float32").table()
