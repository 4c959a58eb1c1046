"""Finding feed-forward blocks in a captured graph, by dataflow only: names of classes and parameters do not count."""

from moeify.match.find import Found, Match, find

__all__ = ["Found", "Match", "find"]
