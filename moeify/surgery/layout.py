"""The checkpoint folder of the module form: what its files are called.

    moeify.json                             format, recipe, blocks, how to rebuild the dense skeleton, provenance,
    report dense_config.json                       the configuration of a transformers model
    moeify-00001-of-0000N.safetensors       parameters and persistent buffers, shared ones once
    moeify-buffers-00001-of-0000N.safetensors   buffers that state_dict leaves out (rotary frequencies, ...)

No file has a name that transformers' ``from_pretrained`` reads: on this folder it fails instead of drawing new FFNs.
"""

from __future__ import annotations

FORMAT = "moeify-module"
VERSION = 1
MARKER = "moeify.json"  # a folder that holds it is one of ours
CONFIG = "dense_config.json"
WEIGHTS = "moeify"
BUFFERS = "moeify-buffers"
FIELDS = (
    "skeleton",
    "recipe",
    "blocks",
    "token_ids_of",
    "weights",
    "buffers",
    "aliases",
    "frozen",
    "versions",
    "provenance",
    "report",
)


def is_ours(name: str) -> bool:
    """Whether a file of that name may stem from an earlier save."""
    return name in (MARKER, CONFIG) or (name.startswith("moeify-") and name.endswith(".safetensors"))
