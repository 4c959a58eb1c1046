"""The checkpoint folder of the module form: what its files are called.

    moeify.json                                 format, recipe, blocks, dense skeleton, provenance, report
    dense_config.json                           the configuration of a transformers model
    moeify-00001-of-0000N.safetensors           parameters and persistent buffers, shared ones once
    moeify-buffers-00001-of-0000N.safetensors   buffers that state_dict leaves out (rotary frequencies, ...)

No file has a name that transformers' ``from_pretrained`` reads: on this folder it fails instead of drawing new FFNs.
"""

from __future__ import annotations

from types import NoneType

FORMAT = "moeify-module"
VERSION = 1
MARKER = "moeify.json"  # a folder that holds it is one of ours
CONFIG = "dense_config.json"
WEIGHTS = "moeify"
BUFFERS = "moeify-buffers"
FIELDS: dict[str, tuple[type, ...]] = {  # of moeify.json, and what each holds
    "skeleton": (dict,),
    "recipe": (dict,),
    "blocks": (list,),
    "token_ids_of": (dict,),
    "weights": (dict,),
    "buffers": (dict,),
    "aliases": (dict,),
    "frozen": (list,),
    "versions": (dict,),
    "provenance": (dict,),
    "report": (dict, NoneType),
}


def is_ours(name: str) -> bool:
    """Whether a file of that name may stem from an earlier save."""
    return name in (MARKER, CONFIG) or (name.startswith("moeify-") and name.endswith(".safetensors"))
