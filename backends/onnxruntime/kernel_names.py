"""What the operator of the native kernel library is called in a file: read by who writes one and by who runs one."""

DOMAIN, OP = "moeify.kernels", "DispatchFFN"
VERSION = 1  # of the domain; a change of the operator's inputs, attributes or packed layout makes another
