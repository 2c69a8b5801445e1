"""What several test files share: arrays of every framework, and the definitions of the spec in exact arithmetic."""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
from mpmath import mpf

from sa_softmax import reference
from sa_softmax.backends import REGISTRY

VARIANTS = ("product", "normalized")
FLOATS = ("float16", "bfloat16", "float32", "float64")

variants = pytest.mark.parametrize("variant", VARIANTS)

Array = np.ndarray[Any, Any]

# Rows in which every clause about corners shows: ties, zeros, signs, exclusion, extremes.
CORNER_ROWS = {
    "zeros": [0.0, 0.0, 0.0],
    "single positive": [2.0],
    "single negative": [-2.0],
    "single zero": [0.0],
    "constant positive": [3.0, 3.0, 3.0],
    "constant negative": [-3.0, -3.0, -3.0],
    "all positive": [1.0, 2.0, 0.5],
    "all negative": [-1.0, -2.0, -0.5],
    "minimum exactly zero": [0.0, 1.0, 2.0],
    "maximum exactly zero": [0.0, -1.0, -2.0],
    "tied minimum": [-1.0, -1.0, 2.0, 0.5],
    "tied maximum": [2.0, -1.0, 2.0, 2.0],
    "tied extrema": [-1.0, 1.0, -1.0, 1.0],
    "excluded by -inf": [-np.inf, 1.0, -2.0, 0.5],
    "all -inf": [-np.inf, -np.inf],
    "far apart": [-500.0, 500.0, 0.0],
    "tiny": [-1e-30, 2e-30, 1e-30],
}
CORNERS = np.full((len(CORNER_ROWS), max(map(len, CORNER_ROWS.values()))), -np.inf)
"""CORNER_ROWS as one array, filled up with entries that do not participate."""
for _corner, _values in zip(CORNERS, CORNER_ROWS.values(), strict=True):
    _corner[: len(_values)] = _values

GARBAGE = np.array([np.nan, np.inf, -np.inf, 3e38])
"""What the entries of a row of CORNERS may hold where a mask excludes them."""


def backends() -> list[Any]:
    """The registry as pytest parameters; a framework that is not installed is skipped in plain sight."""
    return [
        pytest.param(
            entry, id=entry.name, marks=pytest.mark.skipif(not entry.installed(), reason=f"needs {entry.array_module}")
        )
        for entry in REGISTRY
    ]


def array_backends() -> list[Any]:
    """Those of :func:`backends` whose framework has arrays of its own."""
    return [parameter for parameter in backends() if parameter.values[0].array_class is not None]


def to_framework(name: str, values: Any, dtype: str = "float32") -> Any:
    """An array of the framework of the registry's backend ``name``."""
    array = np.asarray(values)
    match name:
        case "numpy":
            return array.astype(numpy_dtype(dtype))
        case "torch":
            torch = importlib.import_module("torch")
            return torch.tensor(array, dtype=getattr(torch, dtype))
        case "jax":
            return importlib.import_module("jax.numpy").asarray(array, dtype=dtype)
        case "mlx":
            mx = importlib.import_module("mlx.core")
            return mx.array(array, dtype=getattr(mx, "bool_" if dtype == "bool" else dtype))
        case "array_api":
            return importlib.import_module("array_api_strict").asarray(array.astype(dtype))
    raise AssertionError(f"tell to_framework how backend {name!r} makes an array")


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def finfo(dtype: np.dtype[Any]) -> Any:
    return importlib.import_module("ml_dtypes").finfo(dtype)


def randn(*shape: int, seed: int = 0, dtype: str = "float32") -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(numpy_dtype(dtype))


def assert_close(actual: Array, expected: Array, *, size: Any = 1.0, ulps: float = 8) -> None:
    """Within ``ulps`` roundoffs of ``size``, the magnitude of the terms that make up a value; NaN exactly where due."""
    got = actual.astype(np.float64)
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    error = np.where(np.isnan(got), 0, abs(got - expected))
    allowed = ulps * float(finfo(actual.dtype).eps) * np.maximum(abs(np.nan_to_num(expected)), size)
    assert (error <= allowed).all(), f"off by {np.max(error / allowed):.3g} of what is allowed"


def derivative_size(x: Array, where: Array | None, variant: str) -> Array:
    """Per row, the magnitude of the terms of a derivative along a direction of size 1."""
    on = (x != -np.inf) if where is None else where & (x != -np.inf)
    lo = np.min(x, -1, keepdims=True, where=on, initial=0).astype(np.float64)
    hi = np.max(x, -1, keepdims=True, where=on, initial=0).astype(np.float64)
    R = hi - lo
    return 4 * (1 + np.maximum(hi, -lo) if variant == "product" else 1 + 1 / np.where(R == 0, np.inf, R))


# The definitions, in the precision that mpmath is set to.


class Row(NamedTuple):
    """Exact values of one row's participating entries: y, the Jacobian dy_j/dx_k, and how rounding moves them.

    A size, times the roundoff u, is how far a careful floating-point evaluation may stray to first order: the
    magnitudes of the value's terms, each p stretched by 1 + |x - max| + E|x - max|, since exp turns the relative
    error of x - max into an absolute one of the exponent.
    """

    y: list[mpf]
    y_size: list[mpf]
    jacobian: list[list[mpf]]
    jacobian_size: list[list[mpf]]


exact = np.frompyfunc(lambda value: mpf(float(value)), 1, 1)
"""The array of mpmath numbers that equal the floats of an array."""


def softmax_row(x: Sequence[mpf]) -> list[mpf]:
    top = max(x)
    e = [mpmath.exp(value - top) for value in x]
    total = mpmath.fsum(e)
    return [value / total for value in e]


def sa_softmax_row(x: Sequence[mpf], variant: str) -> list[mpf]:
    """The row operation on participating entries, by definition."""
    if len(x) == 0:
        return []
    lo, hi = min(0, *x), max(0, *x)
    if variant == "product":
        a = list(x)
    elif hi == lo:
        a = [mpf(0)] * len(x)
    else:
        a = [(value - lo) / (hi - lo) for value in x]
    return [factor * weight for factor, weight in zip(a, softmax_row(x), strict=True)]


def stretches(x: Sequence[mpf]) -> list[mpf]:
    """1 + |x - max| + E|x - max| of each entry, the condition of its p."""
    spread = [max(x) - value for value in x]
    mean = mpmath.fdot(softmax_row(x), spread)
    return [1 + value + mean for value in spread]


def exact_row(x: Sequence[mpf], variant: str) -> Row:
    """Value and Jacobian of the row operation, each partial derivative by the product and quotient rules.

    dy_j/dx_k = da_j/dx_k p_j + a_j p_j ([j = k] - p_k), with da_j/dx_k = [j = k] for the product and otherwise
    ([j = k] - dlo_k - a_j (dhi_k - dlo_k)) / R; dlo_k and dhi_k are shares of the tied extrema, 0 where clamped.
    """
    x = list(x)
    n, p, y, stretch = len(x), softmax_row(x), sa_softmax_row(x, variant), stretches(x)
    lo, hi = min(0, *x), max(0, *x)
    R = hi - lo
    zero = [mpf(0)] * n
    dlo = [mpf(value == lo) / x.count(lo) for value in x] if lo < 0 else zero
    dhi = [mpf(value == hi) / x.count(hi) for value in x] if hi > 0 else zero
    if variant == "normalized" and R == 0:
        return Row(y, zero, [zero] * n, [zero] * n)
    jacobian, size = [], []
    for j in range(n):
        a = x[j] if variant == "product" else (x[j] - lo) / R
        row, row_size = [], []
        for k in range(n):
            da, da_size = mpf(j == k), mpf(j == k)
            if variant == "normalized":
                da, da_size = (da - dlo[k] - a * (dhi[k] - dlo[k])) / R, (da + dlo[k] + a * (dhi[k] + dlo[k])) / R
            row.append(da * p[j] + a * p[j] * ((j == k) - p[k]))
            dp_size = (j == k) * stretch[j] + p[k] * (stretch[j] + stretch[k])
            row_size.append(da_size * p[j] * stretch[j] + abs(a) * p[j] * dp_size)
        jacobian.append(row)
        size.append(row_size)
    return Row(y, [abs(value) * factor for value, factor in zip(y, stretch, strict=True)], jacobian, size)


def exact_attention(
    q: Any, k: Any, v: Any, variant: str, *, scale: Any, bias: Any = None, mask: Any = None
) -> np.ndarray[Any, Any]:
    """Attention query by query: q (Hq, Tq, D), k and v (Hkv, Tk, ...) and bias hold mpmath numbers."""
    scores = (*q.shape[:2], k.shape[1])
    group = q.shape[0] // k.shape[0]
    bias = np.broadcast_to(mpf(0) if bias is None else bias, scores)
    mask = np.broadcast_to(True if mask is None else mask, scores)
    out = np.full((*q.shape[:2], v.shape[-1]), mpf(0))
    for h, i in np.ndindex(scores[:2]):
        keys = [j for j in range(scores[2]) if mask[h, i, j] and bias[h, i, j] != -mpmath.inf]
        x = [scale * (q[h, i] * k[h // group, j]).sum() + bias[h, i, j] for j in keys]
        for weight, j in zip(sa_softmax_row(x, variant), keys, strict=True):
            out[h, i] = out[h, i] + weight * v[h // group, j]
    return out


def attention_weights(q: Any, k: Any, *, bias: Any = None, **options: Any) -> np.ndarray[Any, Any]:
    """Y in float64: what the reference gives with the identity in place of v."""
    identity = np.broadcast_to(np.eye(k.shape[-2]), (*k.shape[:-1], k.shape[-2]))
    wide = (x.astype(np.float64) for x in (q, k, identity))
    return reference.sa_attention(*wide, bias=None if bias is None else bias.astype(np.float64), **options)


def weights_rounding(q: Any, k: Any, v: Any, **options: Any) -> np.ndarray[Any, Any]:
    """How far attention may move where Y is rounded to the dtype of q before it multiplies V (A10): u |Y| |V|.

    u is half the epsilon. With u |O| for the rounding of O this bounds both together, to all orders: a rounding moves a
    number by no more than a share u / (1 + u) of it.
    """
    u = float(finfo(q.dtype).eps) / 2
    size = np.abs(np.where(np.isfinite(v), v, 0).astype(np.float64))
    return np.asarray(
        u * (np.abs(attention_weights(q, k, **options)) @ np.repeat(size, q.shape[-3] // k.shape[-3], -3))
    )


def attention_of_rounded_weights(q: Any, k: Any, v: Any, bits: int, **options: Any) -> np.ndarray[Any, Any]:
    """Exact but for Y, of which ``bits`` significant bits are left before it multiplies V, and the rounding of O."""
    mantissa, exponent = np.frexp(attention_weights(q, k, **options))
    y = np.ldexp(np.round(mantissa * 2**bits), exponent - bits)
    return np.asarray((y @ np.repeat(v.astype(np.float64), q.shape[-3] // k.shape[-3], -3)).astype(q.dtype))
