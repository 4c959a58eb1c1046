"""Model files and modules to a Program: ``load`` reads a file, ``capture`` traces a module.

``Loaded(module, kind, path, sha256, notes, input_hints)`` is what ``load`` returns; ``read_pt2`` and ``holds_metadata``
open archives.
"""

from moeify.frontend.inputs import Example, TensorSpec, parse_input_spec
from moeify.frontend.pt2 import holds_metadata, read_pt2
from moeify.frontend.read import Loaded, load
from moeify.frontend.trace import capture

__all__ = [
    "Example",
    "Loaded",
    "TensorSpec",
    "capture",
    "holds_metadata",
    "load",
    "parse_input_spec",
    "read_pt2",
]
