"""Routers: one per file, a table of names."""

from moeify.registry import Registry

ROUTERS = Registry(
    "router",
    {
        "softmax-topk": "moeify.nn.routers.softmax_topk:SoftmaxTopK",
        "noisy-topk": "moeify.nn.routers.noisy_topk:NoisyTopK",
        "switch": "moeify.nn.routers.switch:Switch",
        "topk": "moeify.nn.routers.topk:TopK",
        "hash": "moeify.nn.routers.hash:Hash",
    },
)
