"""The three row operations that the pictures compare, in float64, and their colours."""

from collections.abc import Callable
from typing import Any

import numpy as np

from sa_softmax import reference

__all__ = ["COLORS", "OPERATIONS", "Array"]

Array = np.ndarray[Any, np.dtype[np.float64]]
Operation = tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]

COLORS = {"softmax": "0.25", "normalized": "#0a6ebd", "product": "#d1570c"}


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _softmax_vjp(x: Array, g: Array) -> Array:
    p = _softmax(x)
    return p * (g - (g * p).sum(-1, keepdims=True))


OPERATIONS: dict[str, Operation] = {
    "softmax": (_softmax, _softmax_vjp),
    "normalized": (reference.sa_softmax, reference.sa_softmax_vjp),
    "product": (
        lambda x: reference.sa_softmax(x, variant="product"),
        lambda x, g: reference.sa_softmax_vjp(x, g, variant="product"),
    ),
}
"""By name: the operation along the last axis, and its VJP."""
