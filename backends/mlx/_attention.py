"""Attention on MLX arrays: the row operation between two matrix products, by blocks of queries."""

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
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
    """Attention O = Y V, with Y = sa_softmax(scale * Q K^T + bias) row by row.

    Differentiable in q, k, v and bias, and open to the transformations of MLX, as :func:`sa_softmax` is. Excluded
    keys influence neither result nor gradient, whatever they hold. One block of queries is computed after the other, in
    the derivatives too, so memory grows with Tq + Tk and not with Tq * Tk, save what a bias or mask of that size takes
    itself, and what second derivatives take. Where every score is exactly 0, ``normalized`` sends no gradient to q
    and k.

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
    attend = partial(_attend, variant=variant, scale=scale, offset=operator.index(q_offset) if is_causal else None)
    others = [] if bias is None else [_to_rank(q.ndim, bias.astype(q.dtype))]
    if mask is not None:
        others.append(_to_rank(q.ndim, mask))
    return _by_query(attend)(q, k, v, *others).astype(dtype)


def _to_rank(rank: int, x: mx.array) -> mx.array:
    """With axes of length 1 in front, so that the axes which vmap adds are the same ones in all arrays."""
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def _attend(
    first: int, q: mx.array, k: mx.array, v: mx.array, *others: mx.array, variant: str, scale: float, offset: int | None
) -> mx.array:
    """Attention of the queries ``q``, the ``first`` of which sees keys up to ``first`` + ``offset``.

    ``others`` are bias and mask of these queries, as far as there are any; the mask is the one that is boolean.
    """
    keys = k.shape[-2]
    if offset is not None:
        keys = min(max(first + q.shape[-2] + offset, 0), keys)
        k, v, others = k[..., :keys, :], v[..., :keys, :], tuple(x[..., :keys] for x in others)
    bias = [x for x in others if x.dtype != mx.bool_]
    masks = [x for x in others if x.dtype == mx.bool_]
    if offset is not None and first + offset < keys - 1:  # else every query sees all of these keys
        diagonal = max(first + offset, -q.shape[-2])
        last = mx.arange(diagonal, diagonal + q.shape[-2])  # in one, since compile makes a kernel of every constant
        masks.append(mx.arange(keys) <= last[:, None])
    x = sum(bias, scale * _qk(_by_kv_head(q, k), k).reshape(*q.shape[:-1], keys))
    x, on = participating(x, reduce(mx.logical_and, masks) if masks else None)
    y = ROWS[variant](x, on)
    return _yv(_by_kv_head(y, k), _by_kv_head(on, k), v).reshape(*q.shape[:-1], v.shape[-1])


# Blocks of queries, one after the other. The derivatives compute the scores of their block again: what is kept for them
# are q, k and v.

_SCORES = 2**20
"""The most scores of a block, unless _ROWS queries have more. On the CPU fewer cost time and more gain none."""
_ROWS = 32
"""The fewest queries of a block."""


def _by_query(attend: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """``attend(0, q, k, v, *others)`` as a function of (q, k, v, *others), in blocks, with their derivative."""

    def forward(*arrays: mx.array) -> mx.array:
        outputs: list[mx.array] = []
        for rows in _blocks(*arrays):
            outputs.append(attend(rows.start, *_block(arrays, rows, after=outputs[-1:])))
        return mx.concatenate(outputs, -2)

    def vjp(primals: Any, do: mx.array, _: mx.array) -> list[mx.array]:
        gradients: list[list[mx.array]] = [[] for _ in primals]  # one sum, or the gradients of one block each
        for rows in _blocks(*primals):
            block = _block(primals, rows, after=[parts[-1] for parts in gradients if parts])
            of_block = mx.vjp(partial(attend, rows.start), block, [do[..., rows, :]])[1]
            for i, (parts, dx) in enumerate(zip(gradients, of_block, strict=True)):
                if parts and _shared(i, primals):
                    parts[0] = parts[0] + dx
                else:
                    parts.append(dx)
        return [mx.concatenate(parts, -2) for parts in gradients]

    def jvp(primals: Any, tangents: Any) -> mx.array:
        tangents = _given(tangents, primals)
        outputs: list[mx.array] = []
        for rows in _blocks(*primals):
            block = _block(primals, rows, after=outputs[-1:])
            outputs += mx.jvp(partial(attend, rows.start), block, _block(tangents, rows))[1]
        return mx.concatenate(outputs, -2)

    return with_derivative(forward, vjp, jvp)


def _blocks(q: mx.array, k: mx.array, *_: mx.array) -> list[slice]:
    length = q.shape[-2]
    scores_of_a_query = math.prod(q.shape[:-2]) * k.shape[-2]
    step = max(_SCORES // max(scores_of_a_query, 1), _ROWS)
    return [slice(first, min(first + step, length)) for first in range(0, max(length, 1), step)]


def _block(arrays: Sequence[mx.array], rows: slice, after: Sequence[mx.array] = ()) -> list[mx.array]:
    """What attention of the queries ``rows`` takes, to be computed ``after`` other arrays.

    Without an order MLX interleaves the blocks and holds the scores of many at a time.
    """
    q, *others = (x if _shared(i, arrays) else x[..., rows, :] for i, x in enumerate(arrays))
    for array in after:
        # Always true, but not known to be: mx.depends, which is meant for this, has no vmap and no jvp.
        true = mx.logical_or(mx.stop_gradient(array)[..., :1, :1].any(), mx.array(True))
        q = mx.where(true, q, 0)
    return [q, *others]


def _shared(i: int, arrays: Sequence[mx.array]) -> bool:
    """Whether all queries share the ``i``-th of (q, k, v, *others)."""
    return i in (1, 2) or arrays[i].shape[-2] == 1


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
