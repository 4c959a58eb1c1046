"""The graph form: a torch.export archive with moeify.json inside."""

from moeify.backends.pt2.archive import Pt2

__all__ = ["Pt2"]
