"""The row operation on JAX arrays."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sa_softmax._validate import COMPUTE_DTYPE, ArrayKind, check_softmax, dtype_name

JAX = ArrayKind(jax.Array, "jax.numpy.asarray")


def sa_softmax(
    x: jax.Array, *, axis: int = -1, variant: str = "normalized", where: jax.Array | None = None
) -> jax.Array:
    """Self-Adjust Softmax of every row of ``x`` along ``axis``.

    ``normalized``: y = (x - lo) / (hi - lo) * softmax(x) with lo = min(0, min x), hi = max(0, max x); 0 where
    hi = lo. ``product``: y = x * softmax(x). Minimum, maximum and softmax run over the participating entries:
    ``where`` is true and x is not -inf. The others get exactly 0 and send no gradient.

    Every transformation of JAX applies: jit, vmap, grad, jvp, vjp, hessian, checkpoint, scan. The derivative shares
    equally among the entries tied at an extremum, treats an extremum of exactly 0 as the constant that it is clamped
    by, and is 0 at hi = lo: under ``normalized`` a model whose scores start at exactly zero does not learn.

    Args:
        x: array of any shape with at least one axis; float16, bfloat16, float32 or float64. 16-bit input is computed
            in float32 and rounded once.
        axis: the axis whose slices are the rows, a Python integer.
        variant: "normalized" or "product".
        where: boolean array that broadcasts to the shape of ``x``; True where an entry participates.

    Returns:
        An array with the shape and dtype of ``x``.

    Raises:
        TypeError: ``x`` is not a floating JAX array, or ``where`` is not a boolean one.
        ValueError: unknown variant, 0-d ``x``, axis out of range, ``where`` that does not broadcast.

    Source: paper, SA-Softmax and its normalized variant; spec clauses R, C, D and G.
    """
    axis = check_softmax(JAX, x, axis=axis, variant=variant, where=where)
    return _sa_softmax(x, where, axis, variant)


@partial(jax.jit, static_argnames=("axis", "variant"))
def _sa_softmax(x: jax.Array, where: jax.Array | None, axis: int, variant: str) -> jax.Array:
    return rows(participating(x.astype(COMPUTE_DTYPE[dtype_name(x)]), where), axis, variant).astype(x.dtype)


def participating(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """``x`` with -inf, which excludes, in place of the entries that do not participate.

    Select, never multiply: whatever an excluded entry holds, and whatever gradient it is sent, ends here (C5).
    """
    if where is not None:
        x = jnp.where(jnp.broadcast_to(where, x.shape), x, -jnp.inf)
    return _still_where_excluded(x)


@jax.custom_jvp
def _still_where_excluded(x: jax.Array) -> jax.Array:
    """The identity, of which XLA sees nothing; the derivative at -inf is 0, so that no tangent there is ever used."""
    return x


@_still_where_excluded.defjvp
def _still_where_excluded_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (t,) = primals, tangents
    return _still_where_excluded(x), jnp.where(x == -jnp.inf, 0, t)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def rows(x: jax.Array, axis: int, variant: str) -> jax.Array:
    """The operation on :func:`participating` arrays of the compute dtype.

    Its derivative is stated, because JAX halves the gradient of minimum(x, 0) at 0 and loses those of quotients near
    the ends of the exponent range, and because XLA needs fewer passes over the rows for it (docs/jax.md counts them).
    """
    return _forward(x, axis, variant)[0]


@rows.defjvp
def _rows_jvp(axis: int, variant: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """dy = da * p + a * dp, linear in the tangent t, so that its transpose is the gradient of clauses G1 and G2.

    It is written to stay finite in either direction (read backwards, products come before quotients), and so that
    no factor of a row is inside a sum over it: XLA then keeps nothing but e and the selected g for the way back.
    With e = exp(x - max x), l = sum e, s = unit / (R l), normalized is::

        dy = e (s t - s dlo) + y (t - c),   c = sum(e t) / l + unit / R (dhi - dlo)
    """
    (x,), (t,) = primals, tangents
    total = partial(jnp.sum, axis=axis, keepdims=True)
    _, e, r, x_min, x_max = _forward(x, axis, variant)
    y = rows(x, axis, variant)
    if variant == "product":
        # y * (t - sum p t) may cancel terms beyond the largest float: half of the excess goes to either side of y.
        big = 2.0 ** (np.finfo(x.dtype).maxexp // 2)
        s = jnp.where(jnp.abs(x_max) > big, big**0.5, 1).astype(x.dtype)
        ts = t * s
        return y, jnp.where(x == -jnp.inf, 0, e * (r * t) + y / (s * s) * (ts - r * total(e * ts)) * s)
    _, unit, R = _range(x_min, x_max)
    u = unit / R

    def at(extremum: jax.Array, free: jax.Array) -> jax.Array:
        """The derivative of lo or hi along t: ties share it equally, and it is strict at zero (G3, G4)."""
        tied = x == extremum
        count = jnp.where(free, total(tied.astype(x.dtype)), 1)
        return jnp.where(free, total(jnp.where(tied, t, 0)), 0) / count

    dlo, dhi = at(x_min, x_min < 0), at(x_max, x_max > 0)
    s, c = r * u, r * total(e * t) + u * (dhi - dlo)
    return y, jnp.where(x == -jnp.inf, 0, e * (s * t - s * dlo) + y * (t - c))


def _forward(x: jax.Array, axis: int, variant: str) -> tuple[jax.Array, ...]:
    """y, e = exp(x - max x), 1 / sum e, and the extrema over the participating entries, 0 and -inf without any.

    The minimum counts excluded entries as 0, where it is clamped in any case.
    """
    x_min = jnp.min(jnp.where(x == -jnp.inf, 0, x), axis, keepdims=True, initial=0)
    x_max = jnp.max(x, axis, keepdims=True, initial=-jnp.inf)
    e = jnp.exp(x - jax.lax.stop_gradient(jnp.where(x_max == -jnp.inf, 0, x_max)))
    l = e.sum(axis, keepdims=True)  # noqa: E741 - the literature's name
    r = 1 / jnp.where(l == 0, 1, l)
    lo, unit, R = _range(x_min, x_max)
    a = x if variant == "product" else (x * unit - lo * unit) / R
    return jnp.where(x == -jnp.inf, 0, a * (e * r)), e, r, x_min, x_max


def _range(x_min: jax.Array, x_max: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """lo, unit and R = unit * (hi - lo), with ``unit`` the power of two that brings R near 1.

    So hi - lo does not overflow (C7), and the reciprocals that XLA and JAX put in place of a quotient and of its
    derivative, 1/R and R^-2, neither overflow nor flush to 0. R = 0 becomes inf, which makes a, and every gradient
    that divides by R, the 0 that clauses C1 and G5 ask for.
    """
    lo, hi = jnp.minimum(x_min, 0), jnp.maximum(x_max, 0)
    finfo = np.finfo(lo.dtype)
    size = jnp.clip(jnp.maximum(hi, -lo), finfo.tiny, finfo.max / 4)
    unit = 1 / jax.lax.reduce_precision(jax.lax.stop_gradient(size), finfo.nexp, 0)
    R = hi * unit - lo * unit
    return lo, unit, jnp.where(R == 0, jnp.inf, R)
