"""Attention on MLX arrays, composed from the row operation."""

import operator
from typing import Any

import mlx.core as mx

from sa_softmax._validate import check_attention
from sa_softmax.backends.mlx._softmax import MLX, ROWS, participating, to_compute_dtype, with_derivative


def sa_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    variant: str = "normalized",
    bias: mx.array | None = None,
    mask: mx.array | None = None,
    is_causal: bool = False,
    q_offset: int = 0,
    scale: float | None = None,
) -> mx.array:
    """Attention O = Y V, with Y = sa_softmax(scale * Q K^T + bias) row by row; materialises Y.

    Differentiable in q, k, v and bias, and open to the transformations of MLX, as :func:`sa_softmax` is. Excluded
    keys influence neither result nor gradient, whatever they hold.

    Args:
        q: (..., Hq, Tq, D). Hq is a multiple of Hkv; query head h reads key/value head h // (Hq // Hkv).
        k: (..., Hkv, Tk, D).
        v: (..., Hkv, Tk, Dv).
        variant: "normalized" or "product".
        bias: broadcasts to (..., Hq, Tq, Tk); added to the scores, so it changes the self-adjusting factor too.
        mask: boolean, broadcasts to (..., Hq, Tq, Tk); True where a key participates.
        is_causal: query i sees keys j <= i + q_offset only.
        q_offset: 0 aligns the causal mask at the upper left, Tk - Tq (what mx.fast.scaled_dot_product_attention
            means by "causal") at the lower right::

                Tq=2, Tk=4, q_offset=0    q_offset=2
                      1 0 0 0              1 1 1 0
                      1 1 0 0              1 1 1 1

        scale: factor of the scores, 1/sqrt(D) by default.

    Returns:
        (..., Hq, Tq, Dv) in the dtype of ``q``; 16-bit input is computed in float32 and rounded once. A query without
        participating keys gets 0.

    Raises:
        TypeError: not floating MLX arrays of one dtype (``bias`` may also have the compute dtype), or a mask that is
            not boolean.
        ValueError: shapes, heads, mask or bias that do not fit, q_offset without is_causal, unknown variant.

    Source: paper, SA-Softmax in attention; spec clauses A.
    """
    scale = check_attention(
        MLX, q, k, v, variant=variant, bias=bias, mask=mask, is_causal=is_causal, q_offset=q_offset, scale=scale
    )
    dtype = q.dtype
    q, k, v = to_compute_dtype(q), to_compute_dtype(k), to_compute_dtype(v)
    scores = (*q.shape[:-1], k.shape[-2])
    x = scale * _qk(_by_kv_head(q, k), k).reshape(scores)
    if bias is not None:
        x = x + bias.astype(x.dtype)
    if is_causal:
        causal = mx.arange(scores[-1]) - mx.arange(scores[-2])[:, None] <= _to_int32(q_offset)
        mask = causal if mask is None else mx.logical_and(causal, mask)
    x, on = participating(x, mask)
    y = ROWS[variant](x, on)
    return _yv(_by_kv_head(y, k), _by_kv_head(on, k), v).reshape(*q.shape[:-1], v.shape[-1]).astype(dtype)


def _to_int32(q_offset: int) -> int:
    """Any integer is allowed (A4); those that 32 bits do not hold exceed every length."""
    return max(-(2**31), min(operator.index(q_offset), 2**31 - 1))


def _by_kv_head(x: mx.array, k: mx.array) -> mx.array:
    """(..., Hq, Tq, n) as (..., Hkv, Hq / Hkv * Tq, n): the queries of a group are rows of one matrix product."""
    *batch, heads, length, n = x.shape
    kv_heads = k.shape[-3]
    return x.reshape(*batch, kv_heads, heads // kv_heads * length, n)


# The derivatives of the two products drop the NaN and infinities of keys and values, which would otherwise reach, as
# 0 * NaN, the queries that exclude them (A6). Queries that do see them have NaN in y or in the gradient already.


def _qk_forward(q: mx.array, k: mx.array) -> mx.array:
    return q @ k.mT


def _qk_vjp(primals: Any, dx: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    q, k = primals
    return dx @ _finite(k), dx.mT @ _finite(q)


def _qk_jvp(primals: Any, tangents: Any) -> mx.array:
    (q, k), (dq, dk) = primals, _given(tangents, primals)
    return dq @ _finite(k).mT + _finite(q) @ dk.mT


def _yv_forward(y: mx.array, on: mx.array, v: mx.array) -> mx.array:
    """y @ v: NaN where a participating v is not finite, 0 for a query without keys."""
    return mx.where(_sees(on), (y @ _finite(v)) * _poison(on, v), 0)


def _yv_vjp(primals: Any, do: mx.array, o: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    y, on, v = primals
    do = mx.where(_sees(on), do, 0)
    return (do * _poison(on, v)) @ _finite(v).mT, mx.zeros_like(on), y.mT @ do


def _yv_jvp(primals: Any, tangents: Any) -> mx.array:
    (y, on, v), (dy, _, dv) = primals, _given(tangents, primals)
    return mx.where(_sees(on), (dy @ _finite(v)) * _poison(on, v) + y @ dv, 0)


_qk = with_derivative(_qk_forward, _qk_vjp, _qk_jvp)
_yv = with_derivative(_yv_forward, _yv_vjp, _yv_jvp)


def _sees(on: mx.array) -> mx.array:
    """Whether a query has a key at all."""
    return on.any(-1, keepdims=True)


def _poison(on: mx.array, v: mx.array) -> mx.array:
    """The factor of each output: NaN if a participating v is not finite, else 1."""
    return mx.where(on.astype(v.dtype) @ (~mx.isfinite(v)).astype(v.dtype) > 0, mx.nan, 1)


def _finite(v: mx.array) -> mx.array:
    return mx.where(mx.isfinite(v), v, 0)


def _given(tangents: Any, primals: Any) -> list[mx.array]:
    """Zeros for the tangents that MLX leaves out because their argument is constant."""
    return [mx.zeros_like(x) if t is None else t for t, x in zip(tangents, primals, strict=True)]
