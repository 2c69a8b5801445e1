"""What each operator must give for its actual inputs, and how far a careful implementation may be off.

The expected value is the reference's in float64. The bound is that of docs/spec.md, section 7: one roundoff of the
output, and four of the compute dtype times the first-order error. Where the suite has the exact sums of magnitudes,
this has simple upper bounds of them. In 16 bits attention may also be off by a roundoff of each weight Y (clause A10).
"""

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from sa_softmax import reference
from sa_softmax._validate import COMPUTE_DTYPE

__all__ = ["Expected", "expected"]

Array = npt.NDArray[Any]
SAFETY = 4


class Expected(NamedTuple):
    """The values, and the largest error that each may have; both float64."""

    value: Array
    bound: Array

    def error(self, got: Array) -> float:
        """The largest error of ``got`` in units of its bound; infinite if a shape or the places of NaN differ."""
        actual = got.astype(np.float64)
        if actual.shape != self.value.shape or not np.array_equal(np.isnan(actual), np.isnan(self.value)):
            return math.inf
        with np.errstate(invalid="ignore", divide="ignore"):
            difference = np.where(np.isnan(actual) | (actual == self.value), 0, abs(actual - self.value))
            return float(np.where(difference == 0, 0, difference / self.bound).max(initial=0))


def expected(
    operator: str, inputs: dict[str, Array], attributes: dict[str, Any], *, inputs_were_rounded: bool = True
) -> Expected:
    """For the inputs and attributes of a node, by their names in the operator's schema.

    If ``inputs_were_rounded`` is false the node may have had each input as it was before it took its dtype.
    """
    dtype = next(iter(inputs.values())).dtype
    wide = {name: a if a.dtype == bool else a.astype(np.float64) for name, a in inputs.items()}
    compute = COMPUTE_DTYPE[dtype.name] if inputs_were_rounded else dtype.name
    with np.errstate(all="ignore"):
        value, error, weighed = _OPERATORS[operator](_roundoff(compute), **wide, **attributes)
        info = ml_dtypes.finfo(dtype)
        floor = float(info.smallest_subnormal if dtype == np.float16 else info.smallest_normal)
        rounded = abs(value) + weighed if dtype.itemsize == 2 else abs(value)
        return Expected(value, _roundoff(dtype.name) * rounded + SAFETY * error + floor)


def _roundoff(dtype: str) -> float:
    return float(ml_dtypes.finfo(np.dtype(dtype)).eps) / 2


class _Row(NamedTuple):
    """p; how many roundoffs it may be off, relatively; 1 and hi - lo, or |x| and 1; where an extremum is."""

    p: Array
    off: Array
    a: Array
    R: Array
    at_extremum: Array


def _row(x: Array, on: Array, axis: int, variant: str) -> _Row:
    top = np.max(x, axis, keepdims=True, where=on, initial=-np.inf)
    bottom = np.min(x, axis, keepdims=True, where=on, initial=np.inf)
    below = np.where(on, top - x, 0)
    e = np.where(on, np.exp(-below), 0)
    p = e / np.maximum(e.sum(axis, keepdims=True), 1e-300)
    off = 4 + below + (p * below).sum(axis, keepdims=True) + math.sqrt(x.shape[axis])
    if variant == "product":
        return _Row(p, off, np.where(on, abs(x), 0), np.ones_like(top), np.zeros_like(on))
    R = np.maximum(top, 0) - np.minimum(bottom, 0)
    return _Row(p, off, np.ones_like(x), np.where(R > 0, R, np.inf), on & ((x == top) | (x == bottom)))


class _Computed(NamedTuple):
    """The value, its first-order error, and the sum of the magnitudes of Y times V that make it up."""

    value: Array
    error: Array
    weighed: Array | float = 0.0


def _softmax(u: float, X: Array, *, axis: int, variant: str, where: Array | None = None) -> _Computed:
    row = _row(X, _participating(X, where), axis, variant)
    return _Computed(reference.sa_softmax(X, axis=axis, variant=variant, where=where), u * row.p * row.a * row.off)


def _softmax_grad(u: float, X: Array, G: Array, *, axis: int, variant: str, where: Array | None = None) -> _Computed:
    on = _participating(X, where)
    row = _row(X, on, axis, variant)
    g = np.where(on, abs(G), 0)
    through_p, through_a = g * row.p * row.a * row.off, g * row.p * row.off / row.R
    D = through_p.sum(axis, keepdims=True)
    through_extremum = row.at_extremum * (2 * D / row.R + through_a.sum(axis, keepdims=True))
    error = through_p + row.p * row.off * D + through_a + through_extremum
    return _Computed(reference.sa_softmax_vjp(X, G, axis=axis, variant=variant, where=where), u * error)


def _attention(
    u: float, Q: Array, K: Array, V: Array, *,
    variant: str, is_causal: int, q_offset: int, scale: float | None = None,
    bias: Array | None = None, mask: Array | None = None,
) -> _Computed:  # fmt: skip
    """An error of the scores moves p relatively by twice as much, and a by three times its share of R."""
    options: dict[str, Any] = {"bias": bias, "is_causal": bool(is_causal), "q_offset": q_offset, "scale": scale}
    o = reference.sa_attention(Q, K, V, variant=variant, mask=mask, **options)
    group = Q.shape[-3] // K.shape[-3]
    k, v = (np.repeat(np.nan_to_num(each), group, -3) for each in (K, V))
    q = np.nan_to_num(Q)
    s = 1 / math.sqrt(max(Q.shape[-1], 1)) if scale is None else scale
    b = np.zeros(()) if bias is None else bias
    x = s * (q @ k.mT) + b
    keep = np.tri(x.shape[-2], x.shape[-1], q_offset, dtype=bool) if is_causal else np.ones(x.shape[-2:], bool)
    on = _participating(x, keep if mask is None else keep & mask)
    of_x = (math.sqrt(q.shape[-1]) + 4) * abs(s) * (abs(q) @ abs(k.mT)) + np.nan_to_num(abs(b))
    of_x = np.max(of_x, -1, keepdims=True, where=on, initial=0)
    row = _row(x, on, -1, variant)
    of_a = of_x if variant == "product" else np.minimum(3 * of_x / row.R, 1 / u)
    of_y = row.p * (row.a * (row.off + 2 * of_x) + of_a)
    y = reference.sa_softmax(x, variant=variant, where=on)
    return _Computed(o, u * (of_y + (math.sqrt(x.shape[-1]) + 1) * row.p * row.a) @ abs(v), abs(y) @ abs(v))


def _participating(x: Array, where: Array | None) -> Array:
    on = x != -np.inf
    return on if where is None else on & where


_OPERATORS: dict[str, Any] = {"SASoftmax": _softmax, "SASoftmaxGrad": _softmax_grad, "SAAttention": _attention}
