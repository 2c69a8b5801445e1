"""The one list of shapes: benchmarks time them, tests check the kernels on them, docs name them."""

from dataclasses import dataclass

__all__ = ["ATTENTION", "MEMORY", "ROWS", "SMALL_ROW", "AttentionShape"]

ROWS = ((4096, 1024), (32768, 128), (256, 65536))
"""(rows, entries of a row), 16 or 64 MiB in float32."""

SMALL_ROW = (1, 128)
"""A single call on so little that all of its time is overhead."""


@dataclass(frozen=True)
class AttentionShape:
    """Self-attention of q, k, v (batch, heads, length, dimension)."""

    batch: int
    heads: int
    length: int
    dimension: int

    @property
    def qkv(self) -> tuple[int, int, int, int]:
        """The shape of each of q, k and v."""
        return self.batch, self.heads, self.length, self.dimension

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads}x{self.length}x{self.dimension}"


ATTENTION = tuple(AttentionShape(1, 8, length, dimension) for length in (1024, 4096) for dimension in (64, 128))

MEMORY = AttentionShape(1, 2, 8192, 64)
"""Where the matrix of scores would take 512 MiB in float32."""
