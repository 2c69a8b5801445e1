"""The definitions in 50-digit arithmetic, and how far rounding may move each value.

Everything here is written from the formulas of ``docs/spec.md``, row by row, independently of
:mod:`sa_softmax.reference`. Beside each value stands its *scale*: a first-order bound of the rounding error, in units
of the roundoff u, that a careful implementation makes. It sums the magnitudes of the terms that make up the value,
each times the number of roundings it passes through, where

- exp amplifies: a relative error u in x - max is an absolute one of u |x - max| in the exponent, and so a relative
  one in p; the sum of the exponentials inherits the average of that;
- a sum of n terms costs sqrt(n) u of the sum of their magnitudes, whatever the order of the additions
  (the probabilistic bound of Higham and Mary, 2019);
- what is below the smallest normal number a framework may flush (D5): p is off by itself there, and never by more
  than that number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath
import numpy as np

__all__ = ["AttentionTruth", "RowTruth", "attention", "exact", "row"]

# Arrays of dtype object that hold mpmath numbers.
Mp = np.ndarray[Any, Any]

mp = mpmath.mp.clone()
mp.dps = 50

_exp: Callable[[Mp], Mp] = np.frompyfunc(mp.exp, 1, 1)


def exact(array: np.ndarray[Any, Any]) -> Mp:
    """The very numbers of a floating array."""
    return np.array([mp.mpf(float(value)) for value in array.flat], object).reshape(array.shape)


class RowTruth(NamedTuple):
    """Values and scales of one row and one variant; object arrays of the row's length."""

    y: Mp
    y_scale: Mp
    dx: Mp
    dx_scale: Mp


def row(
    x: Mp, g: Mp, on: np.ndarray[Any, Any], variant: str, tiny: Any, u: Any,
    count: np.ndarray[Any, Any] | None = None, x_scale: Any = 0, g_scale: Any = 0,
) -> RowTruth:  # fmt: skip
    """y and dx of one row.

    ``tiny`` and ``u`` are the compute dtype's smallest normal number and roundoff. ``count`` gives each entry a
    multiplicity (golden rows are dictionary-coded). ``x_scale`` and ``g_scale`` are the errors of x and g themselves,
    which attention has.
    Entries whose value the spec fixes exactly have the scale -1.
    """
    zero = mp.mpf(0)
    out = RowTruth(*(np.full(len(x), zero) for _ in range(4)))
    out.y_scale[:], out.dx_scale[:] = -1, -1
    at = np.flatnonzero(on)
    if len(at) == 0:
        return out
    if not all(mp.isfinite(value) for value in x[at]):
        out.y[at] = out.dx[at] = mp.nan
        return out
    full = np.full(len(x), zero)
    c = np.ones(len(at), int) if count is None else count[at]
    x, g, ex, eg = x[at], g[at], (full + x_scale)[at], (full + g_scale)[at]

    def total(terms: Mp) -> Any:
        return (c * terms).sum()

    root = mp.sqrt(int(c.sum()))
    x_min, x_max = x.min(), x.max()
    ex_max = ex[x == x_max].max()
    e = _exp(x - x_max)
    p = e / total(e)
    stretch = abs(x - x_max) + ex + ex_max
    p_err = p * (stretch + total(p * stretch) + 2 + root) + np.minimum(p, tiny) / u

    if variant == "product":
        y, y_err = x * p, abs(x) * p_err + p * ex + abs(x * p)
        D = total(g * y)
        D_err = total(abs(g) * y_err + abs(y) * eg) + root * total(abs(g * y))
        dx = p * (g * x - D) + g * p
        dx_err = p_err * (abs(g * x) + abs(D) + abs(g)) + p * (
            abs(g) * ex + (abs(x) + 1) * eg + D_err + 2 * (abs(g * x) + abs(D) + abs(g))
        )
        out.y[at], out.y_scale[at], out.dx[at], out.dx_scale[at] = y, y_err, dx, dx_err
        return out

    lo, hi = min(x_min, zero), max(x_max, zero)
    if hi == lo:
        return out
    R = hi - lo
    ex_lo = ex[x == x_min].max() if x_min < 0 else zero
    ex_hi = ex_max if x_max > 0 else zero
    a = (x - lo) / R
    a_err = (ex + ex_lo + a * (ex_lo + ex_hi)) / R + 3 * (abs(x) + abs(lo)) / R
    R_err = (ex_lo + ex_hi) / R + 1
    y = a * p
    y_err = a * p_err + p * a_err + y
    D, S = total(g * y), total(g * p)
    D_err = total(abs(g) * y_err + y * eg) + root * total(abs(g) * y)
    S_err = total(abs(g) * p_err + p * eg) + root * total(abs(g) * p)
    dx = p * (g * a - D) + g * p / R
    dx_err = p_err * (abs(g) * a + abs(D) + abs(g) / R) + p * (
        abs(g) * a_err + a * eg + D_err + abs(g) * a + abs(D) + (abs(g) * (R_err + 2) + eg) / R
    )
    if x_min < 0:
        tied = total(x == x_min)
        dx = dx + np.where(x == x_min, (D - S) / R / tied, zero)
        dx_err = dx_err + np.where(x == x_min, (D_err + S_err + (abs(D) + abs(S)) * (R_err + 1)) / R / tied, zero)
    if x_max > 0:
        tied = total(x == x_max)
        dx = dx - np.where(x == x_max, D / R / tied, zero)
        dx_err = dx_err + np.where(x == x_max, (D_err + abs(D) * (R_err + 1)) / R / tied, zero)
    out.y[at], out.y_scale[at], out.dx[at], out.dx_scale[at] = y, y_err, dx, dx_err
    if x_min < 0:  # a is 0 there, exactly (C3); scores of attention are rounded, so their minimum is not exact
        out.y_scale[at[(x == x_min) & (ex == 0)]] = -1
    return out


class AttentionTruth(NamedTuple):
    """(value, scale) of each output of one variant; dbias is None without a bias."""

    o: tuple[Mp, Mp]
    dq: tuple[Mp, Mp]
    dk: tuple[Mp, Mp]
    dv: tuple[Mp, Mp]
    dbias: tuple[Mp, Mp] | None


def attention(
    q: Mp, k: Mp, v: Mp, do: Mp, *,
    variant: str, bias: Mp | None, keep: np.ndarray[Any, Any], scale: Any, tiny: Any, u: Any, weight_roundings: Any,
) -> AttentionTruth:  # fmt: skip
    """Attention and its gradients, head by head and query by query.

    q (..., Hq, Tq, D), k and v (..., Hkv, Tk, D or Dv); ``keep`` (..., Hq, Tq, Tk) says which keys a query may see.
    ``weight_roundings``: the error of rounding Y and dX before they multiply V, Q and K (A10), in units of u.
    """
    zero = mp.mpf(0)
    group = q.shape[-3] // k.shape[-3]
    scores = keep.shape

    def zeros(like: Mp) -> tuple[Mp, Mp]:
        return np.full(like.shape, zero), np.full(like.shape, zero)

    o, dq, dk, dv = zeros(do), zeros(q), zeros(k), zeros(v)
    ds, ds_err = np.full(scores, zero), np.full(scores, zero)
    root_d, root_dv = mp.sqrt(q.shape[-1]) + 1, mp.sqrt(v.shape[-1]) + 1
    # Sums over the queries, for dk and dv, run over all heads of a group.
    root_k, root_q = mp.sqrt(max(k.shape[-2], 1)) + 1, mp.sqrt(max(q.shape[-2] * group, 1)) + 1

    for index in np.ndindex(scores[:-1]):
        *batch, h, _ = index
        head = (*batch, h // group)
        on = keep[index].copy()
        at = np.flatnonzero(on)
        terms = [scale * q[index] * k[(*head, j)] for j in at]
        x, x_err = np.full(len(on), zero), np.full(len(on), zero)
        x[at] = [t.sum() for t in terms]
        x_err[at] = [root_d * abs(t).sum() for t in terms]
        if bias is not None:
            b = np.broadcast_to(bias, scores)[index]
            rounded = x[at] != 0  # a bias added to a score of exactly 0 is exact
            x[at] = x[at] + b[at]
            x_err[at] = x_err[at] + np.where(rounded, abs(x[at]) + abs(b[at]), zero)
        on[at] = [score != -mp.inf for score in x[at]]
        at = np.flatnonzero(on)
        x_err[~on] = zero
        g, g_err = np.full(len(on), zero), np.full(len(on), zero)
        g[at] = [(do[index] * v[(*head, j)]).sum() for j in at]
        g_err[at] = [root_dv * abs(do[index] * v[(*head, j)]).sum() for j in at]
        truth = row(x, g, on, variant, tiny, u, None, x_err, g_err)
        for j in at:
            y, y_err, s, s_err = truth.y[j], max(truth.y_scale[j], zero), truth.dx[j], max(truth.dx_scale[j], zero)
            kj, vj = (*head, j), (*head, j)
            _add(o, index, y * v[vj], abs(v[vj]) * (y_err + abs(y) * (root_k + weight_roundings)))
            _add(dv, vj, y * do[index], abs(do[index]) * (y_err + abs(y) * (root_q + weight_roundings)))
            _add(dq, index, scale * s * k[kj], abs(scale * k[kj]) * (s_err + abs(s) * (root_k + weight_roundings)))
            _add(dk, kj, scale * s * q[index], abs(scale * q[index]) * (s_err + abs(s) * (root_q + weight_roundings)))
            ds[(*index, j)], ds_err[(*index, j)] = s, s_err
    dbias = None
    if bias is not None:
        copies = mp.sqrt(max(ds.size, 1) / max(bias.size, 1))
        dbias = _sum_to(ds, bias.shape), _sum_to(ds_err + abs(ds) * (copies + weight_roundings), bias.shape)
    return AttentionTruth(o, dq, dk, dv, dbias)


def _add(total: tuple[Mp, Mp], index: Any, value: Mp, error: Mp) -> None:
    total[0][index] = total[0][index] + value
    total[1][index] = total[1][index] + error


def _sum_to(full: Mp, shape: tuple[int, ...]) -> Mp:
    full = full.sum(tuple(range(full.ndim - len(shape))))
    return full.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)
