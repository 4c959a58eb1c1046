"""Finding feed-forward blocks in a captured graph, by dataflow only: no class, module or parameter name is looked at."""

from moeify.match.find import Found, Match, find

__all__ = ["Found", "Match", "find"]
