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
    {
        # Krishnamurthy et al., arXiv 2302.14703
        "attentive": (
            "it weighs experts by their hidden values, and a router gives a token its experts before any has run",
            "choose 'soft', or for a layer of your own that runs every expert, the gate in moeify.nn.attentive",
        ),
        # Puigcerver et al., arXiv 2308.00951
        "soft-moe": (
            "its experts see weighted means of a sequence's tokens, and a router gives each token experts of its own",
            "choose 'soft' (all experts for each token) or 'expert-choice' (experts choose whole tokens)",
        ),
    },
)
