"""How experts are made from a dense block: one method per file, a table of names."""

from moeify.registry import Registry

METHODS = Registry(
    "method",
    {
        "copy": "moeify.experts.copy:Copy",
        "granular": "moeify.experts.granular:Granular",
        "noise": "moeify.experts.noise:Noise",
        "drop": "moeify.experts.drop:Drop",
        "split-random": "moeify.experts.split_random:SplitRandom",
        "split-kmeans": "moeify.experts.split_kmeans:SplitKMeans",
        "split-coactivation": "moeify.experts.split_coactivation:SplitCoactivation",
        "split-importance": "moeify.experts.split_importance:SplitImportance",
        "split-energy": "moeify.experts.split_energy:SplitEnergy",
        "carve": "moeify.experts.carve:Carve",
    },
)
