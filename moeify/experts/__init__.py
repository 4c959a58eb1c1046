"""How experts are made from a dense block: one method per file, a table of names."""

from moeify.registry import Registry

METHODS = Registry(
    "method",
    {
        "copy": "moeify.experts.copy:Copy",
        "granular": "moeify.experts.granular:Granular",
        "noise": "moeify.experts.noise:Noise",
        "drop": "moeify.experts.drop:Drop",
    },
)
