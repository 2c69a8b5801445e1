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
    z, on = participating(x.astype(COMPUTE_DTYPE[dtype_name(x)]), where)
    return rows(z, on, axis, variant).astype(x.dtype)


def participating(x: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Which entries participate, and ``x`` with 0 in place of the others.

    Select, never multiply: whatever an excluded entry holds, and whatever gradient it is sent, ends here (C5).
    """
    on = x != -jnp.inf
    if where is not None:
        on &= jnp.broadcast_to(where, x.shape)
    return jnp.where(on, x, 0), on


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def rows(z: jax.Array, on: jax.Array, axis: int, variant: str) -> jax.Array:
    """The operation on :func:`participating` arrays of the compute dtype.

    Its derivative is stated, because JAX halves the gradient of minimum(x, 0) at 0 and loses those of quotients near
    the ends of the exponent range.
    """
    p, x_min, x_max = _softmax(z, on, axis)
    if variant == "product":
        return jnp.where(on, z * p, 0)
    lo, unit, R = _range(x_min, x_max)
    return jnp.where(on, (z * unit - lo * unit) / R * p, 0)


@rows.defjvp
def _rows_jvp(axis: int, variant: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """dy = da * p + a * dp, linear in the tangent t, so that its transpose is the gradient of clauses G1 and G2.

    It is written to stay finite in either direction: read backwards, products come before quotients.
    """
    z, on = primals
    t, _ = tangents
    total = partial(jnp.sum, axis=axis, keepdims=True)
    y = rows(z, on, axis, variant)
    p, x_min, x_max = _softmax(z, on, axis)
    if variant == "product":
        # y * (t - sum p t) may cancel terms beyond the largest float: half of the excess goes to either side of y.
        big = 2.0 ** (np.finfo(z.dtype).maxexp // 2)
        s = jnp.where(jnp.abs(x_max) > big, big**0.5, 1).astype(z.dtype)
        ts = t * s
        return y, jnp.where(on, t * p + y / (s * s) * (ts - total(p * ts)) * s, 0)
    lo, unit, R = _range(x_min, x_max)
    a = (z * unit - lo * unit) / R
    at_min, at_max = _shares(z, on, x_min, x_max, axis)
    dlo, dhi = total(at_min * t), total(at_max * t)
    da = (t - dlo - a * (dhi - dlo)) / R * unit
    return y, jnp.where(on, da * p + a * (p * (t - total(p * t))), 0)


def _softmax(z: jax.Array, on: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """p, and the minimum and maximum over the participating entries; +inf and -inf where there are none."""
    x_min = jnp.min(z, axis, keepdims=True, where=on, initial=jnp.inf)
    x_max = jnp.max(z, axis, keepdims=True, where=on, initial=-jnp.inf)
    e = jnp.exp(jnp.where(on, z - jax.lax.stop_gradient(x_max), -jnp.inf))
    l = e.sum(axis, keepdims=True)  # noqa: E741 - the literature's name
    return e / jnp.where(l == 0, 1, l), x_min, x_max


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


def _shares(z: jax.Array, on: jax.Array, x_min: jax.Array, x_max: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The share of each entry in the derivative of lo and of hi: ties equally, strict at zero (G3, G4)."""
    at_min = (on & (z == x_min) & (x_min < 0)).astype(z.dtype)
    at_max = (on & (z == x_max) & (x_max > 0)).astype(z.dtype)
    return (
        at_min / jnp.maximum(at_min.sum(axis, keepdims=True), 1),
        at_max / jnp.maximum(at_max.sum(axis, keepdims=True), 1),
    )
