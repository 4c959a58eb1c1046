"""What the operator of the native kernel library is called in a file: read by who writes one and by who runs one."""

DOMAIN, OP = "moeify.kernels", "DispatchFFN"
VERSION = 1  # of the domain; a change of the operator's inputs, attributes or packed layout makes another

# What experts can be stored in, by the name that users give, digits falling: storage, and inputs that share a scale (0:
# all of a row). The packer's own lists are ``kernel_pack.STORAGES`` and ``BLOCKS``; a test holds them to this one.
EXPERT_DTYPES = {
    "float32": ("float32", 0),
    "float16": ("float16", 0),
    "bfloat16": ("bfloat16", 0),
    "int8-32": ("int8", 32),
    "int8-64": ("int8", 64),
    "int8-128": ("int8", 128),
    "int8-256": ("int8", 256),
    "int8": ("int8", 0),
}
