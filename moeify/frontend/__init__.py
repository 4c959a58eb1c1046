"""Model files and modules to a Program."""

from moeify.frontend.trace import capture

__all__ = ["capture"]
