"""The row operation on MLX arrays."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from sa_softmax._validate import COMPUTE_DTYPE, VARIANTS, ArrayKind, check_softmax, dtype_name

MLX = ArrayKind(mx.array, "mlx.core.array")
_BLOCK = 128


def sa_softmax(x: mx.array, *, axis: int = -1, variant: str = "normalized", where: mx.array | None = None) -> mx.array:
    """Self-Adjust Softmax of every row of ``x`` along ``axis``.

    ``normalized``: y = (x - lo) / (hi - lo) * softmax(x) with lo = min(0, min x), hi = max(0, max x); 0 where
    hi = lo. ``product``: y = x * softmax(x). Minimum, maximum and softmax run over the participating entries:
    ``where`` is true and x is not -inf. The others get exactly 0 and send no gradient.

    mx.grad, mx.vjp, mx.jvp, mx.vmap and mx.compile apply, in any order. The derivative shares equally among the
    entries tied at an extremum, treats an extremum of exactly 0 as the constant that it is clamped by, and is 0 at
    hi = lo: under ``normalized`` a model whose scores start at exactly zero does not learn.

    Args:
        x: array of any shape with at least one axis; float16, bfloat16, float32 or, on the CPU, float64. 16-bit input
            is computed in float32 and rounded once.
        axis: the axis whose slices are the rows.
        variant: "normalized" or "product".
        where: boolean array that broadcasts to the shape of ``x``; True where an entry participates.

    Returns:
        An array with the shape and dtype of ``x``, computed on the default device.

    Raises:
        TypeError: ``x`` is not a floating MLX array, or ``where`` is not a boolean one.
        ValueError: unknown variant, 0-d ``x``, axis out of range, ``where`` that does not broadcast.

    Source: paper, SA-Softmax and its normalized variant; spec clauses R, C, D and G.
    """
    axis = check_softmax(MLX, x, axis=axis, variant=variant, where=where)
    z, on = participating(to_compute_dtype(x), where)
    y = ROWS[variant](mx.moveaxis(z, axis, -1), mx.moveaxis(on, axis, -1))
    return mx.moveaxis(y, -1, axis).astype(x.dtype)


def to_compute_dtype(x: mx.array) -> mx.array:
    """``x`` in the dtype that it is computed in."""
    return x.astype(getattr(mx, COMPUTE_DTYPE[dtype_name(x)]))


def participating(x: mx.array, where: mx.array | None) -> tuple[mx.array, mx.array]:
    """Which entries participate, and ``x`` with 0 in place of the others.

    Select, never multiply: whatever an excluded entry holds is replaced before it is used (C5).
    """
    on = x != -math.inf
    if where is not None:
        on = mx.logical_and(on, where)  # under vmap, & reads beyond the end of an array that is not batched
    return mx.where(on, x, 0), on


def with_derivative(
    forward: Callable[..., Any], vjp: Callable[..., Any], jvp: Callable[..., Any]
) -> Callable[..., Any]:
    """The custom function with this derivative, for a ``forward`` whose arguments may all have further axes in front.

    It has a vmap rule, because without one a custom function loses its derivative under vmap.
    """
    function = mx.custom_function(forward)

    def vmap(inputs: Any, axes: Any) -> Any:
        size = next(x.shape[axis] for x, axis in zip(inputs, axes, strict=True) if axis is not None)
        batched = (
            mx.broadcast_to(x, (size, *x.shape)) if axis is None else mx.moveaxis(x, axis, 0)
            for x, axis in zip(inputs, axes, strict=True)
        )
        return function(*batched), 0

    function.vjp(vjp)
    function.jvp(jvp)
    function.vmap(vmap)
    return function


# The operation along the last axis of participating() arrays. Its derivative is stated, because those of MLX's own min
# and minimum differ in forward and in reverse mode, and its where multiplies what it did not select by 0, which lets
# NaN through. MLX refuses the minimum of nothing, so empty arrays are returned as they are.


def _forward(z: mx.array, on: mx.array, variant: str) -> mx.array:
    if z.size == 0:
        return z
    p, x_min, x_max = _softmax(z, on)
    if variant == "product":
        return mx.where(on, z * p, 0)
    lo, unit, R = _range(x_min, x_max)
    return mx.where(on, (z * unit - lo * unit) / R * p, 0)


def _vjp(primals: Any, g: mx.array, y: mx.array, variant: str) -> tuple[mx.array, mx.array]:
    """The gradient of clauses G1 (product) and G2 (normalized)."""
    z, on = primals
    no_gradient = mx.zeros_like(on)
    if z.size == 0:
        return g, no_gradient
    g = mx.where(on, g, 0)
    p, x_min, x_max = _softmax(z, on)
    if variant == "product":
        s = _split(x_max)
        gy = g * s * (z * p / (s * s))
        return mx.where(on, (gy - p * _total(gy)) * s + g * p, 0), no_gradient
    lo, unit, R = _range(x_min, x_max)
    a = (z * unit - lo * unit) / R
    D, S = _total(g * a * p), _total(g * p)
    at_min, at_max = _shares(z, on, x_min, x_max)
    return mx.where(on, p * (g * a - D) + (g * p + at_min * (D - S) - at_max * D) / R * unit, 0), no_gradient


def _jvp(primals: Any, tangents: Any, variant: str) -> mx.array:
    """The tangent map, the transpose of :func:`_vjp` (G6)."""
    z, on = primals
    t, _ = tangents
    if z.size == 0:
        return t
    t = mx.where(on, t, 0)
    p, x_min, x_max = _softmax(z, on)
    if variant == "product":
        s = _split(x_max)
        ts = t * s
        return mx.where(on, t * p + z * p / (s * s) * (ts - _total(p * ts)) * s, 0)
    lo, unit, R = _range(x_min, x_max)
    a = (z * unit - lo * unit) / R
    at_min, at_max = _shares(z, on, x_min, x_max)
    dlo, dhi = _total(at_min * t), _total(at_max * t)
    return mx.where(on, (t - dlo - a * (dhi - dlo)) / R * unit * p + a * (p * (t - _total(p * t))), 0)


ROWS = {
    variant: with_derivative(*(partial(function, variant=variant) for function in (_forward, _vjp, _jvp)))
    for variant in VARIANTS
}


def _softmax(z: mx.array, on: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """p, and the minimum and maximum over the participating entries; +inf and -inf where there are none."""
    x_min = mx.where(on, z, math.inf).min(-1, keepdims=True)
    x_max = mx.where(on, z, -math.inf).max(-1, keepdims=True)
    # Selected before exp, not after: the second derivative would multiply an overflowed exp by 0.
    e = _exp(mx.where(on, z - mx.stop_gradient(x_max), -math.inf))
    l = _total(e)  # noqa: E741 - the literature's name
    return e / mx.where(l == 0, 1, l), x_min, x_max


def _exp(z: mx.array) -> mx.array:
    """mx.exp computes float64 in float32; mx.power does not."""
    return mx.power(mx.array(math.e, z.dtype), z) if z.dtype == mx.float64 else mx.exp(z)


def _range(x_min: mx.array, x_max: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """lo, unit and R = unit * (hi - lo), where ``unit`` is the power of two that keeps hi - lo finite (C7).

    R = 0 becomes inf, which makes a, and every gradient that divides by R, the 0 that clauses C1 and G5 ask for.
    """
    lo, hi = mx.minimum(x_min, 0), mx.maximum(x_max, 0)
    unit = mx.where(mx.maximum(hi, -lo) > 1, 0.5, 1.0)
    R = hi * unit - lo * unit
    return lo, unit, mx.where(R == 0, math.inf, R)


def _split(x_max: mx.array) -> mx.array:
    """A factor s for the terms of y * (t - sum p t), which may cancel beyond the largest float: y / s^2, t s, and s."""
    big = 2.0 ** (math.frexp(mx.finfo(x_max.dtype).max)[1] // 2)
    return mx.where(mx.abs(x_max) > big, mx.array(math.sqrt(big), x_max.dtype), 1)


def _shares(z: mx.array, on: mx.array, x_min: mx.array, x_max: mx.array) -> tuple[mx.array, mx.array]:
    """The share of each entry in the derivative of lo and of hi: ties equally, strict at zero (G3, G4)."""
    at_min = mx.logical_and(on, mx.logical_and(z == x_min, x_min < 0)).astype(z.dtype)
    at_max = mx.logical_and(on, mx.logical_and(z == x_max, x_max > 0)).astype(z.dtype)
    return at_min / mx.maximum(_total(at_min), 1), at_max / mx.maximum(_total(at_max), 1)


def _total(x: mx.array) -> mx.array:
    """The sum over the last axis, block by block: mx.sum adds up a long row on the CPU one entry after the other."""
    n = x.shape[-1]
    if n <= _BLOCK:
        return x.sum(-1, keepdims=True)
    whole = n - n % _BLOCK
    blocks = mx.unflatten(x[..., :whole], -1, (n // _BLOCK, _BLOCK)).sum(-1)
    return _total(blocks) + x[..., whole:].sum(-1, keepdims=True)
