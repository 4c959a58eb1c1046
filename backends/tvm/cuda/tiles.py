"""What one thread block of a matrix kernel computes, and with which hardware limits that is compatible."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
FRAGMENT = 16  # rows, columns and depth of one tensor-core instruction (wmma m16n16k16)


@dataclass(frozen=True)
class BlockTile:
    """``rows`` x ``columns`` sums of one thread block, which reads ``depth`` of the inner axis at a time.

    ``tensor_cores``: each of ``warps`` warps holds ``part_rows`` x ``part_columns`` of the sums in fragments. Otherwise
    each thread holds that many in registers.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    part_rows: int  # of a warp with tensor cores, of a thread without
    part_columns: int
    tensor_cores: bool

    def __post_init__(self) -> None:
        parts = (self.rows // self.part_rows) * (self.columns // self.part_columns)
        assert parts == (self.warps if self.tensor_cores else self.threads), self
        assert self.rows % self.part_rows == 0, self
        assert self.columns % self.part_columns == 0, self

    @property
    def threads(self) -> int:
        return self.warps * WARP

    @property
    def across(self) -> int:
        """Parts side by side."""
        return self.columns // self.part_columns


# 2 x 2 fragments of float32 sums are 32 registers of each thread. With 4 warps of twice as many, registers spill.
HALF = BlockTile(64, 128, 32, 8, 32, 32, tensor_cores=True)
# 8 x 4 sums are 32 registers; rows that an expert lacks cost as much as those it has, so tiles are not larger.
FLOAT = BlockTile(64, 64, 16, 4, 8, 4, tensor_cores=False)


def tile_for(dtype: str) -> BlockTile:
    """The tile for operands of that type: float16 takes the tensor cores, float32 is computed as float32."""
    return {"float16": HALF, "float32": FLOAT}[dtype]


def ceildiv(a: int, b: int) -> int:
    return -(-a // b)
