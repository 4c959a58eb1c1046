"""Routers: one per file, a table of names."""

from moeify.registry import Registry

ROUTERS = Registry(
    "router",
    {
        "softmax-topk": "moeify.nn.routers.softmax_topk:SoftmaxTopK",
        "noisy-topk": "moeify.nn.routers.noisy_topk:NoisyTopK",
        "switch": "moeify.nn.routers.switch:Switch",
        "gshard": "moeify.nn.routers.gshard:GShard",
        "sigma": "moeify.nn.routers.sigma:Sigma",
        "sigmoid-bias": "moeify.nn.routers.sigmoid_bias:SigmoidBias",
        "cosine": "moeify.nn.routers.cosine:Cosine",
        "top-p": "moeify.nn.routers.top_p:TopP",
        "relu": "moeify.nn.routers.relu:Relu",
        "soft": "moeify.nn.routers.soft:Soft",
        "hierarchical": "moeify.nn.routers.hierarchical:Hierarchical",
        "hash": "moeify.nn.routers.hash:Hash",
        "random": "moeify.nn.routers.random:Random",
        "rl": "moeify.nn.routers.rl:Rl",
        "base": "moeify.nn.routers.base:Base",
        "sinkhorn": "moeify.nn.routers.sinkhorn:Sinkhorn",
        "expert-choice": "moeify.nn.routers.expert_choice:ExpertChoice",
        "topk": "moeify.nn.routers.topk:TopK",
        "dynamic-k": "moeify.nn.routers.dynamic_k:DynamicK",
    },
)
