"""A seeded sample of the rows of a stream."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


class Reservoir:
    """Uniform, without replacement: every row of a stream draws a key, and the rows of the smallest keys stay.

    A stream's keys depend on the seed and the stream's number alone, so that which rows stay depends neither on how
    the streams are cut into batches nor on what else is sampled, and blocks that see the same tokens keep the same.
    (Random keys: Efraimidis and Spirakis, Information Processing Letters 97, 2006, with equal weights.)
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._seed = seed
        self._streams: dict[int, numpy.random.Generator] = {}
        self._keys = torch.empty(0, dtype=torch.float64)
        self._rows: Tensor | None = None

    def add(self, rows_ND: Tensor, stream: int) -> None:
        """More rows of a stream, in its order."""
        if stream not in self._streams:
            self._streams[stream] = numpy.random.default_rng((self._seed, stream))
        # numpy draws one double after the other, so n and then m of them are the first n + m.
        keys = torch.from_numpy(self._streams[stream].random(len(rows_ND)))
        if len(self._keys) == self.size:
            kept = keys < self._keys[-1]
            keys, rows_ND = keys[kept], rows_ND[kept]
        self._keys, order = torch.cat([self._keys, keys]).sort(stable=True)
        self._keys, order = self._keys[: self.size], order[: self.size]
        rows_ND = rows_ND.to("cpu", torch.float32)
        self._rows = (rows_ND if self._rows is None else torch.cat([self._rows, rows_ND]))[order]

    def sample(self) -> Tensor:
        """At most ``size`` rows in order of their keys, [N, D] in float32."""
        assert self._rows is not None, "no row was added"
        return self._rows
