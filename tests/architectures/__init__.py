"""A zoo of tiny models with random weights, and the feed-forward blocks that a person counts in each."""

from tests.architectures.catalogue import ARCHITECTURES
from tests.architectures.kinds import Architecture, Blocks

__all__ = ["ARCHITECTURES", "Architecture", "Blocks"]
