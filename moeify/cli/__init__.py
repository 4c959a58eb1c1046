"""The command line: it reads flags, calls ``moeify.api`` and draws what comes back. It starts without torch."""
