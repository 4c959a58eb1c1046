"""Which blocks to split, and how far, for a quality or a speed that is asked for."""
