"""Arrays of any library that implements the array API standard, 2023.12 or later: CuPy, array-api-strict and others.

Only functions of the standard are used, so results keep the library, dtype and device of their arguments. The
standard has no derivatives; neither has this backend.
"""

import math
from typing import Any

import array_api_compat
import numpy as np

from sa_softmax._validate import COMPUTE_DTYPE, ArrayKind, check_attention, check_softmax, dtype_name

__all__ = ["sa_attention", "sa_softmax"]

# Libraries built on NumPy would warn about overflow and NaN that the semantics ask for.
_quiet = np.errstate(over="ignore", under="ignore", invalid="ignore")


@_quiet
def sa_softmax(x: Any, *, axis: int = -1, variant: str = "normalized", where: Any = None) -> Any:
    """Self-Adjust Softmax of every row of ``x`` along ``axis``.

    ``product``: y = x * p. ``normalized``: y = (x - lo) / (hi - lo) * p with lo = min(0, min x), hi = max(0, max x).
    Extrema and softmax p run over the participating entries: ``where`` is true and x is not -inf; others get 0.

    Args:
        x: array with at least one axis, of a floating dtype (16-bit ones compute in float32).
        axis: the axis whose slices are the rows.
        variant: "normalized" or "product".
        where: boolean array of the same library that broadcasts to the shape of ``x``.

    Returns:
        An array with the library, shape, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is no floating array of an array-API library, or ``where`` is no boolean one of the same.
        ValueError: unknown variant, 0-d ``x``, axis out of range, ``where`` that does not broadcast, two devices.

    Source: paper, equations of SA-Softmax and its normalized variant; spec clauses R, C and D.
    """
    axis = check_softmax(_kind(x), x, axis=axis, variant=variant, where=where)
    xp = array_api_compat.array_namespace(x)
    scores = xp.astype(x, _compute_dtype(xp, x))
    on = scores != -math.inf
    if where is not None:
        on = on & where
    return xp.astype(_weights(xp, scores, on, axis, variant), x.dtype)


@_quiet
def sa_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    variant: str = "normalized",
    bias: Any = None,
    mask: Any = None,
    is_causal: bool = False,
    q_offset: int = 0,
    scale: float | None = None,
) -> Any:
    """Attention O = Y V, with Y the row operation over the scores x = scale * Q K^T + bias.

    Args:
        q: (..., Hq, Tq, D). Hq is a multiple of Hkv; query head h reads key/value head h // (Hq // Hkv).
        k: (..., Hkv, Tk, D).
        v: (..., Hkv, Tk, Dv).
        variant: "normalized" or "product".
        bias: broadcasts to (..., Hq, Tq, Tk); added to the scores, so it changes the self-adjusting factor too.
        mask: boolean, broadcasts to (..., Hq, Tq, Tk); True where a key participates.
        is_causal: query i sees keys j <= i + q_offset only.
        q_offset: 0 aligns the causal mask at the upper left, Tk - Tq at the lower right.
        scale: factor of the scores, 1/sqrt(D) by default.

    Returns:
        (..., Hq, Tq, Dv) in the library, dtype and device of ``q``. A query without participating keys gets 0.

    Raises:
        TypeError: not floating arrays of one library and dtype (``bias`` may also have the compute dtype), or a mask
            that is not boolean.
        ValueError: shapes, heads, mask or bias that do not fit, q_offset without is_causal, unknown variant, two
            devices.

    Source: paper, SA-Softmax in attention; spec clauses A.
    """
    scale = check_attention(
        _kind(q), q, k, v,
        variant=variant, bias=bias, mask=mask, is_causal=is_causal, q_offset=q_offset, scale=scale,
    )  # fmt: skip
    xp = array_api_compat.array_namespace(q)
    compute = _compute_dtype(xp, q)
    groups = q.shape[-3] // k.shape[-3]
    k, v = (xp.repeat(xp.astype(array, compute), groups, axis=-3) for array in (k, v))
    scores = scale * (xp.astype(q, compute) @ xp.matrix_transpose(k))
    if bias is not None:
        scores = scores + bias
    on = scores != -math.inf
    if is_causal:
        Tq, Tk = scores.shape[-2:]
        i, j = (xp.arange(n, device=array_api_compat.device(q)) for n in (Tq, Tk))
        on = on & (j <= i[:, None] + max(-Tq, min(int(q_offset), Tk)))  # clipped to what any integer dtype holds
    if mask is not None:
        on = on & mask
    return xp.astype(_weigh(xp, _weights(xp, scores, on, -1, variant), on, v), q.dtype)


def _kind(x: Any) -> ArrayKind:
    """The class of the first argument, which the others have to share; no class if ``x`` is no array."""
    return ArrayKind(
        type(x) if array_api_compat.is_array_api_obj(x) else (),
        "the asarray of one array-API library for all arguments",
        device=array_api_compat.device,
        refused=(np.ma.MaskedArray,),
    )


def _compute_dtype(xp: Any, x: Any) -> Any:
    return getattr(xp, COMPUTE_DTYPE[dtype_name(x)])


def _weights(xp: Any, x: Any, on: Any, axis: int, variant: str) -> Any:
    """The row operation on scores ``x`` of the compute dtype, of which ``on`` participate."""
    if 0 in x.shape:  # the standard's min and max have no initial value
        return x
    z = _select(xp, on, x, 0)
    x_max = xp.max(_select(xp, on, x, -math.inf), axis=axis, keepdims=True)
    e = _select(xp, on, xp.exp(z - x_max), 0)
    p = e / xp.sum(e, axis=axis, keepdims=True)  # 0/0 where nothing participates is selected away below
    if variant == "product":
        return _select(xp, on, z * p, 0)
    zero = xp.zeros_like(x_max)
    lo = xp.minimum(xp.min(z, axis=axis, keepdims=True), zero)  # the zeros of excluded entries do not move it
    hi = xp.maximum(x_max, zero)
    # A power of two keeps hi - lo finite; R = inf gives a row of zeros its 0.
    unit = 1 - 0.5 * xp.astype((hi > 1) | (lo < -1), x.dtype)
    R = hi * unit - lo * unit
    a = (z * unit - lo * unit) / _select(xp, R != 0, R, math.inf)
    return _select(xp, on, a * p, 0)


def _weigh(xp: Any, w: Any, on: Any, v: Any) -> Any:
    """w @ v in which an excluded v never counts, not even as 0 * NaN."""
    finite = xp.isfinite(v)
    poisoned = xp.astype(on, v.dtype) @ xp.astype(~finite, v.dtype)
    return _select(xp, poisoned == 0, w @ _select(xp, finite, v, 0), math.nan)


def _select(xp: Any, condition: Any, x: Any, other: float) -> Any:
    return xp.where(condition, x, xp.asarray(other, dtype=x.dtype, device=array_api_compat.device(x)))
