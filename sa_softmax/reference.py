"""The NumPy reference: the normative semantics of Self-Adjust Softmax, written to be read.

Clause ids (R1, C2, ...) are those of ``docs/spec.md``. Paper: Zheng et al., Self-Adjust Softmax, EMNLP 2025,
arXiv 2502.18277.

Notation, per row: ``on`` marks the participating entries M, ``p`` is the softmax over M, ``a`` the self-adjusting
factor of the normalized variant. Everything is computed in float32 (float64 for float64 input) and rounded once.

Accuracy: at score scales from 1e-300 to 1e300, values, VJPs and JVPs are within 4 units (6 for rows of thousands) of
50-digit arithmetic. The unit is the roundoff times the magnitudes of a value's terms, in which each p counts
``1 + |x - max| + E|x - max|`` times, as the exponential demands.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sa_softmax._validate import COMPUTE_DTYPE, ArrayKind, check_attention, check_softmax, check_variant, dtype_name

__all__ = [
    "AttentionState",
    "attention_from_state",
    "attention_state",
    "merge_states",
    "sa_attention",
    "sa_attention_vjp",
    "sa_softmax",
    "sa_softmax_jvp",
    "sa_softmax_vjp",
]

Array = npt.NDArray[Any]

# Both subclasses redefine what * and a reduction mean, so a right answer for them is impossible here.
_NUMPY = ArrayKind(np.ndarray, "numpy.asarray, and pass a mask as where=", refused=(np.ma.MaskedArray, np.matrix))
_quiet = np.errstate(over="ignore", under="ignore", invalid="ignore")


def sa_softmax(x: Array, *, axis: int = -1, variant: str = "normalized", where: Array | None = None) -> Array:
    """Self-Adjust Softmax of every row of ``x`` along ``axis``.

    ``product``: y = x * p. ``normalized``: y = (x - lo) / (hi - lo) * p with lo = min(0, min x), hi = max(0, max x).
    Extrema and softmax p run over the participating entries: ``where`` is true and x is not -inf; others get 0.

    Args:
        x: array of any shape with at least one axis; float16, bfloat16 (ml_dtypes), float32 or float64.
        axis: the axis whose slices are the rows.
        variant: "normalized" or "product".
        where: boolean array that broadcasts to the shape of ``x``; True where an entry participates.

    Returns:
        An array with the shape and dtype of ``x``.

    Raises:
        TypeError: ``x`` is not a floating NumPy array, or ``where`` is not a boolean one.
        ValueError: unknown variant, 0-d ``x``, axis out of range, ``where`` that does not broadcast.

    Source: paper, equations of SA-Softmax and its normalized variant; spec clauses R, C and D.
    """
    axis = check_softmax(_NUMPY, x, axis=axis, variant=variant, where=where)
    z, on = _participating(x, axis, where)
    return _rounded(_forward(z, on, axis, variant), x)


def sa_softmax_vjp(
    x: Array, g: Array, *, axis: int = -1, variant: str = "normalized", where: Array | None = None
) -> Array:
    """The gradient of sum(g * sa_softmax(x)) with respect to ``x``, by the conventions of spec clauses G.

    With S = sum(g p) and D = sum(g y):
    ``product``: dx = p (g x - D) + g p.
    ``normalized``: dx = p (g a - D) + g p / R, plus at the minimum, if it is negative, (D - S) / R and at the
    maximum, if it is positive, -D / R, each shared equally among the entries tied there.

    ``g`` has the shape and dtype of ``x``; other arguments, result and errors as in :func:`sa_softmax`.
    """
    axis = check_softmax(_NUMPY, x, axis=axis, variant=variant, where=where, g=g)
    z, on = _participating(x, axis, where)
    return _rounded(_vjp(z, on, g.astype(z.dtype), axis, variant), x)


def sa_softmax_jvp(
    x: Array, t: Array, *, axis: int = -1, variant: str = "normalized", where: Array | None = None
) -> Array:
    """The tangent of ``sa_softmax`` at ``x`` along ``t``: the transpose of :func:`sa_softmax_vjp` (spec clause G6).

    ``t`` has the shape and dtype of ``x``; other arguments, result and errors as in :func:`sa_softmax`.
    """
    axis = check_softmax(_NUMPY, x, axis=axis, variant=variant, where=where, t=t)
    z, on = _participating(x, axis, where)
    return _rounded(_jvp(z, on, t.astype(z.dtype), axis, variant), x)


def sa_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    variant: str = "normalized",
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    q_offset: int = 0,
    scale: float | None = None,
) -> Array:
    """Attention O = Y V, with Y the row operation over the scores x = scale * Q K^T + bias.

    Args:
        q: (..., Hq, Tq, D). Hq is a multiple of Hkv; query head h reads key/value head h // (Hq // Hkv).
        k: (..., Hkv, Tk, D).
        v: (..., Hkv, Tk, Dv).
        variant: "normalized" or "product".
        bias: broadcasts to (..., Hq, Tq, Tk); added to the scores, so it changes the self-adjusting factor too.
        mask: boolean, broadcasts to (..., Hq, Tq, Tk); True where a key participates.
        is_causal: query i sees keys j <= i + q_offset only.
        q_offset: 0 aligns the causal mask at the upper left, Tk - Tq at the lower right::

            Tq=2, Tk=4, q_offset=0    q_offset=2
                  1 0 0 0              1 1 1 0
                  1 1 0 0              1 1 1 1

        scale: factor of the scores, 1/sqrt(D) by default.

    Returns:
        (..., Hq, Tq, Dv) in the dtype of ``q``. A query without participating keys gets 0.

    Raises:
        TypeError: not floating NumPy arrays of one dtype (``bias`` may also have the compute dtype), or a mask that
            is not boolean.
        ValueError: shapes, heads, mask or bias that do not fit, q_offset without is_causal, unknown variant.

    Source: paper, SA-Softmax in attention; spec clauses A.
    """
    scale = check_attention(
        _NUMPY,
        q,
        k,
        v,
        variant=variant,
        bias=bias,
        mask=mask,
        is_causal=is_causal,
        q_offset=q_offset,
        scale=scale,
    )
    _, _, v_, x, on = _scores(q, k, v, bias, mask, is_causal, q_offset, scale)
    return _rounded(_weigh(_forward(x, on, -1, variant), on, v_), q)


@_quiet
def sa_attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    *,
    variant: str = "normalized",
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    q_offset: int = 0,
    scale: float | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """The gradients (dq, dk, dv, dbias) of sum(do * sa_attention(q, k, v)); dbias is None without a bias.

    dV = Y^T dO, dX = the row operation's VJP of dO V^T, dQ = scale dX K, dK = scale dX^T Q, dbias = dX summed over
    the axes along which the bias was broadcast. ``do`` is (..., Hq, Tq, Dv) in the dtype of ``q``; other arguments
    and errors as in :func:`sa_attention`. Spec clause A7.
    """
    scale = check_attention(
        _NUMPY, q, k, v,
        variant=variant, bias=bias, mask=mask, is_causal=is_causal, q_offset=q_offset, scale=scale, do=do,
    )  # fmt: skip
    q_, k_, v_, x, on = _scores(q, k, v, bias, mask, is_causal, q_offset, scale)
    do_ = do.astype(x.dtype)
    y = _forward(x, on, -1, variant)
    dx = _vjp(x, on, do_ @ _t(v_), -1, variant)
    # dx carries the NaN of participating entries, so what multiplies it may drop the non-finite of the others.
    dq = scale * (dx @ _finite(k_))
    dk = scale * _sum_groups(_t(dx) @ _finite(q_), k)
    dv = _sum_groups(_weigh(_t(y), _t(on), do_), v)
    dbias = None if bias is None else _rounded(_sum_to(dx, bias.shape), bias)
    return _rounded(dq, q), _rounded(dk, k), _rounded(dv, v), dbias


class AttentionState(NamedTuple):
    """What attention over a set of keys must remember so that disjoint sets can be merged (spec clause A11).

    m: (..., Hq, Tq, 1) maximum score; l: sum exp(x - m); lo: minimum score;
    o0: (..., Hq, Tq, Dv) sum exp(x - m) v; o1: sum exp(x - m) (x - m) v. All in the compute dtype.
    An empty set of keys has the state (-inf, 0, +inf, 0, 0), the identity of the merge.
    """

    m: Array
    l: Array  # noqa: E741 - the literature's name
    lo: Array
    o0: Array
    o1: Array


@_quiet
def attention_state(
    q: Array,
    k: Array,
    v: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    q_offset: int = 0,
    scale: float | None = None,
) -> AttentionState:
    """The partial state of attention over the keys at hand; arguments and errors as in :func:`sa_attention`.

    For keys that begin at position s of the whole sequence, pass q_offset - s. The state serves both variants.
    """
    scale = check_attention(
        _NUMPY, q, k, v,
        variant="normalized", bias=bias, mask=mask, is_causal=is_causal, q_offset=q_offset, scale=scale,
    )  # fmt: skip
    _, _, v_, x, on = _scores(q, k, v, bias, mask, is_causal, q_offset, scale)
    x_min, x_max = _extrema(x, on, -1)
    e = np.where(on, np.exp(x - x_max), 0)
    shifted = np.where(e == 0, 0, x - x_max)
    return AttentionState(x_max, e.sum(-1, keepdims=True), x_min, _weigh(e, on, v_), _weigh(e * shifted, on, v_))


@_quiet
def merge_states(a: AttentionState, b: AttentionState) -> AttentionState:
    """The state over the union of two disjoint sets of keys. Associative and commutative (spec clause A11).

    m = max(m_a, m_b), w_i = exp(m_i - m): l = sum w_i l_i, o0 = sum w_i o0_i, o1 = sum w_i (o1_i + (m_i - m) o0_i).
    """
    m = np.maximum(a.m, b.m)
    la, oa0, oa1 = _rescaled(a, m)
    lb, ob0, ob1 = _rescaled(b, m)
    return AttentionState(m, la + lb, np.minimum(a.lo, b.lo), oa0 + ob0, oa1 + ob1)


def _rescaled(s: AttentionState, m: Array) -> tuple[Array, Array, Array]:
    w = np.where(s.m == -np.inf, 0, np.exp(s.m - m))
    shift = np.where(w == 0, 0, s.m - m)
    return w * s.l, w * s.o0, w * (s.o1 + shift * s.o0)


@_quiet
def attention_from_state(state: AttentionState, *, variant: str = "normalized") -> Array:
    """The attention output (..., Hq, Tq, Dv), in the compute dtype, of a state over all keys.

    ``product``: (o1 + m o0) / l. ``normalized``: (o1 + (m - lo) o0) / (R l). Rows without keys, or R = 0, give 0.

    Raises:
        ValueError: unknown variant.
    """
    check_variant(variant)
    empty = state.l == 0
    l = np.where(empty, 1, state.l)  # noqa: E741
    m = np.where(empty, 0, state.m)
    o0, o1 = state.o0 / l, state.o1 / l
    if variant == "product":
        return o1 + m * o0
    lo, unit, R = _range(state.lo, state.m)
    return o1 / R * unit + (m * unit - lo * unit) / R * o0


# The row operation on compute-dtype arrays. ``z`` holds 0 where ``on`` is false.


def _participating(x: Array, axis: int, where: Array | None) -> tuple[Array, Array]:
    """Select, never multiply: whatever an excluded entry holds is replaced before it is used (C5)."""
    x = x.astype(COMPUTE_DTYPE[dtype_name(x)])
    on = x != -np.inf
    if where is not None:
        on = on & where
    return np.where(on, x, 0), on


def _extrema(z: Array, on: Array, axis: int) -> tuple[Array, Array]:
    x_min = np.min(z, axis, keepdims=True, where=on, initial=np.inf)
    x_max = np.max(z, axis, keepdims=True, where=on, initial=-np.inf)
    return x_min, x_max


def _range(x_min: Array, x_max: Array) -> tuple[Array, Array, Array]:
    """lo, unit and R = unit * (hi - lo), where ``unit`` is the power of two that keeps hi - lo finite (C7).

    R = 0 becomes inf, which makes a, and every gradient that divides by R, the 0 that clauses C1 and G5 ask for.
    """
    lo, hi = np.minimum(x_min, 0), np.maximum(x_max, 0)
    unit = np.where(np.maximum(hi, -lo) > 1, 0.5, 1).astype(lo.dtype)
    R = hi * unit - lo * unit
    return lo, unit, np.where(R == 0, np.inf, R)


def _softmax(z: Array, on: Array, axis: int) -> tuple[Array, Array, Array]:
    x_min, x_max = _extrema(z, on, axis)
    e = np.where(on, np.exp(z - x_max), 0)
    l = _sum(e, axis)  # noqa: E741
    return e / np.where(l == 0, 1, l), x_min, x_max


@_quiet
def _forward(z: Array, on: Array, axis: int, variant: str) -> Array:
    p, x_min, x_max = _softmax(z, on, axis)
    if variant == "product":
        return np.where(on, z * p, 0)
    lo, unit, R = _range(x_min, x_max)
    return np.where(on, (z * unit - lo * unit) / R * p, 0)


@_quiet
def _vjp(z: Array, on: Array, g: Array, axis: int, variant: str) -> Array:
    g = np.where(on, g, 0)
    p, x_min, x_max = _softmax(z, on, axis)
    if variant == "product":
        y = z * p  # first, because g * z may overflow where p, and with it the gradient, is 0
        D = _sum(g * y, axis)
        return np.where(on, (g * y - p * D) + g * p, 0)
    lo, unit, R = _range(x_min, x_max)
    a = (z * unit - lo * unit) / R
    D = _sum(g * a * p, axis)
    S = _sum(g * p, axis)
    at_min, at_max = _shares(z, on, x_min, x_max, axis)
    return np.where(on, p * (g * a - D) + (g * p + at_min * (D - S) - at_max * D) / R * unit, 0)


@_quiet
def _jvp(z: Array, on: Array, t: Array, axis: int, variant: str) -> Array:
    t = np.where(on, t, 0)
    p, x_min, x_max = _softmax(z, on, axis)
    dp = p * (t - _sum(p * t, axis))
    if variant == "product":
        return np.where(on, t * p + z * dp, 0)
    lo, unit, R = _range(x_min, x_max)
    a = (z * unit - lo * unit) / R
    at_min, at_max = _shares(z, on, x_min, x_max, axis)
    dlo = _sum(at_min * t, axis)
    dhi = _sum(at_max * t, axis)
    return np.where(on, (t - dlo - a * (dhi - dlo)) / R * unit * p + a * dp, 0)


def _shares(z: Array, on: Array, x_min: Array, x_max: Array, axis: int) -> tuple[Array, Array]:
    """The share of each entry in the derivative of lo and of hi: ties equally, strict at zero (G3, G4)."""
    at_min = (on & (z == x_min) & (x_min < 0)).astype(z.dtype)
    at_max = (on & (z == x_max) & (x_max > 0)).astype(z.dtype)
    return (
        at_min / np.maximum(at_min.sum(axis, keepdims=True), 1),
        at_max / np.maximum(at_max.sum(axis, keepdims=True), 1),
    )


def _sum(terms: Array, axis: int) -> Array:
    """NumPy adds contiguous rows pairwise and others one by one: here no axis or layout changes the bits (R6)."""
    rows = np.ascontiguousarray(np.moveaxis(terms, axis, -1))
    return np.moveaxis(rows.sum(-1, keepdims=True), -1, axis)


@_quiet
def _rounded(y: Array, like: Array) -> Array:
    return y.astype(like.dtype)


# Attention.


@_quiet
def _scores(
    q: Array, k: Array, v: Array,
    bias: Array | None, mask: Array | None, is_causal: bool, q_offset: int, scale: float,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """q, and k and v with their heads repeated for each group, in the compute dtype; the scores and participation."""
    c = COMPUTE_DTYPE[dtype_name(q)]
    groups = q.shape[-3] // k.shape[-3]
    q, k, v = q.astype(c), np.repeat(k.astype(c), groups, -3), np.repeat(v.astype(c), groups, -3)
    x = scale * (q @ _t(k))
    if bias is not None:
        x = x + bias.astype(c)
    keep: Array = np.ones(x.shape[-2:], bool)
    if is_causal:
        keep = np.tri(x.shape[-2], x.shape[-1], q_offset, dtype=bool)
    if mask is not None:
        keep = keep & mask
    return (q, k, v, *_participating(x, -1, keep))


@_quiet
def _weigh(w: Array, on: Array, v: Array) -> Array:
    """w @ v in which an excluded v never counts, not even as 0 * NaN (A6)."""
    poisoned = on.astype(v.dtype) @ (~np.isfinite(v)).astype(v.dtype) > 0
    return np.where(poisoned, np.nan, w @ _finite(v))


def _finite(v: Array) -> Array:
    return np.where(np.isfinite(v), v, 0)


def _t(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


def _sum_groups(dk: Array, k: Array) -> Array:
    """Sum the gradient of repeated heads (..., Hq, T, D) to (..., Hkv, T, D)."""
    heads = k.shape[-3]
    return dk.reshape(*dk.shape[:-3], heads, dk.shape[-3] // heads, *dk.shape[-2:]).sum(-3)


def _sum_to(dx: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes along which an array of ``shape`` was broadcast to the shape of ``dx``."""
    dx = dx.sum(tuple(range(dx.ndim - len(shape))))
    return dx.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)
