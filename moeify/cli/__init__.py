"""The command line: it reads flags, calls ``moeify.api`` and draws what comes back. Nothing here imports torch at start."""
