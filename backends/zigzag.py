"""The zig-zag layout of a causal sequence over devices, which gives each of them the same work."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["zigzag"]


def zigzag(length: int, devices: int) -> list[npt.NDArray[Any]]:
    """The positions that each device holds: of 2N chunks of the sequence, device i of N has chunks i and 2N - 1 - i.

    In a causal mask a chunk sees the chunks before it, so i early keys and 2N - 1 - i late ones add up to the same work
    on every device, in every step of the ring. Chunks are as equal as ``length`` allows.
    ``zigzag(8, 2)`` is ``[[0, 1, 6, 7], [2, 3, 4, 5]]``.
    """
    chunks = np.array_split(np.arange(length, dtype=np.int32), 2 * devices)
    return [np.concatenate([chunks[i], chunks[-1 - i]]) for i in range(devices)]
