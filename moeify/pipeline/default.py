"""The default pipeline, in phases. The order reads as the story; where it matters the reason is on the line."""

FIND = (
    "canonicalize",  # one spelling for each construct, so that find-ffn needs one pattern for each
    "find-ffn",  # every FFN becomes one moe.ffn; near misses are logged with a reason
    "select",  # which of them the recipe names
)

# make-experts emits the fused moe.dispatch_ffn where it can. lower-experts opens it for passes that put something
# between its stages (expert parallelism), and fuse-dispatch closes it again; a pipeline without such a pass needs
# neither.
REWRITE = (
    "make-experts",  # stacked expert weights as recipes; every expert is on, so the function is still the same
    "route",  # the router's graph takes the place of "every expert"
    "clean-up",  # blocks left dense go back to ATen; what nothing reads is dropped
)
