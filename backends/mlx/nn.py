"""Self-Adjust Softmax as a module of ``mlx.nn``."""

import mlx.core as mx
import mlx.nn as nn

from sa_softmax.backends.mlx._softmax import sa_softmax

__all__ = ["SASoftmax"]


class SASoftmax(nn.Module):  # type: ignore[misc, name-defined]  # mlx.nn re-exports by star
    """Self-Adjust Softmax along ``axis``, without parameters.

    ``normalized``: y = (x - lo) / (hi - lo) * softmax(x) with lo = min(0, min x), hi = max(0, max x); 0 where
    hi = lo. ``product``: y = x * softmax(x).

    Under ``normalized`` the gradient at hi = lo, a row of zeros, is 0 by convention (spec clause G5): a model whose
    query or key projection starts at exactly zero stays dead. Start both at random, or choose ``product``.

    Args:
        axis: the axis whose slices are the rows.
        variant: "normalized" or "product".

    Call it with ``x`` and optionally ``where``; shapes, dtypes and errors as in
    :func:`sa_softmax.backends.mlx.sa_softmax`. Source: paper; spec clauses R, C, D and G.
    """

    def __init__(self, axis: int = -1, variant: str = "normalized") -> None:
        super().__init__()
        self.axis = axis
        self.variant = variant

    def __call__(self, x: mx.array, where: mx.array | None = None) -> mx.array:
        return sa_softmax(x, axis=self.axis, variant=self.variant, where=where)

    def _extra_repr(self) -> str:
        return f"axis={self.axis}, variant={self.variant!r}"
