"""Passes, their log, the rules around them, and the runner."""

from moeify.registry import Registry

PASSES = Registry(
    "pass",
    {
        "canonicalize": "moeify.passes.canonicalize:Canonicalize",
        "find-ffn": "moeify.passes.find_ffn:FindFfn",
        "select": "moeify.passes.select:Select",
        "make-experts": "moeify.passes.make_experts:MakeExperts",
        "route": "moeify.passes.route:Route",
        "lower-experts": "moeify.passes.lower_experts:LowerExperts",
        "fuse-dispatch": "moeify.passes.fuse_dispatch:FuseDispatch",
        "place-experts": "moeify.passes.place_experts:PlaceExperts",
        "shard-experts": "moeify.passes.shard_experts:ShardExperts",
        "lower-exchange": "moeify.passes.lower_exchange:LowerExchange",
        "lower-to-aten": "moeify.passes.lower_to_aten:LowerToAten",
        "clean-up": "moeify.passes.clean_up:CleanUp",
    },
)
