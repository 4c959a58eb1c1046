"""Losses on what routers do: one per file, a table of names."""

from moeify.registry import Registry

LOSSES = Registry(
    "router loss",
    {
        "switch": "moeify.nn.losses.switch:Switch",
        "gshard": "moeify.nn.losses.gshard:GShard",
        "z": "moeify.nn.losses.z:Z",
        "importance": "moeify.nn.losses.importance:Importance",
        "load": "moeify.nn.losses.load:Load",
        "l1": "moeify.nn.losses.l1:L1",
        "similarity": "moeify.nn.losses.similarity:Similarity",
        "reinforce": "moeify.nn.losses.reinforce:Reinforce",
    },
)
