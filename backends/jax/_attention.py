"""Attention on JAX arrays, composed from the row operation, at once or by blocks of queries."""

import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sa_softmax._validate import COMPUTE_DTYPE, check_attention, check_implementation, dtype_name
from sa_softmax.backends.jax._softmax import JAX, participating, rows

IMPLEMENTATIONS = ("xla", "pallas")
MATERIALISED = 512 * 512
"""Scores per head up to which XLA materialises all of them at once."""
QUERIES = 128
"""Queries of a block beyond that."""
SPANS = 4
"""Into how many spans of blocks causal queries are divided; each leaves out the keys that none of its queries sees."""

# The default precision rounds float32 factors to bfloat16 on TPUs and to TF32 on GPUs.
_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def sa_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    variant: str = "normalized",
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    q_offset: int = 0,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention O = Y V, with Y = sa_softmax(scale * Q K^T + bias) row by row, in memory that is linear in Tq and Tk.

    Differentiable in q, k, v and bias. Excluded keys influence neither result nor gradient, whatever they hold.

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
        implementation: "xla": Y is computed by blocks of queries and again on the way back, or at once where it has no
            more than 512 * 512 entries per head; open to every transformation of JAX, as :func:`sa_softmax` is.
            "pallas": fused kernels, which have not been run on a GPU or TPU yet; reverse mode and vmap only, the first
            derivative only; on a CPU they are interpreted, slowly. None chooses; :func:`implementation` says what.

    Returns:
        (..., Hq, Tq, Dv) in the dtype of ``q``; 16-bit input is computed in float32 and rounded once. A query without
        participating keys gets 0.

    Raises:
        TypeError: not floating JAX arrays of one dtype (``bias`` may also have the compute dtype), or a mask that is
            not boolean.
        ValueError: shapes, heads, mask or bias that do not fit, q_offset without is_causal, unknown variant or
            implementation.

    Source: paper, SA-Softmax in attention; spec clauses A.
    """
    scale = check_attention(
        JAX, q, k, v, variant=variant, bias=bias, mask=mask, is_causal=is_causal, q_offset=q_offset, scale=scale
    )
    offset = causal_offset(is_causal, q_offset)
    if _chosen(implementation) == "pallas":
        from sa_softmax.backends.jax import _pallas  # Pallas takes its time to import

        return _pallas.attention(q, k, v, bias, mask, scale, offset, variant)
    return _sa_attention(q, k, v, bias, mask, scale, offset, variant)


def implementation(q_length: int, k_length: int, implementation: str | None = None) -> str:
    """What runs for these lengths: "xla, at once", "xla, blocks of 128 queries" or "pallas".

    ``implementation`` is what :func:`sa_attention` gets; a choice that is given is what runs, on every device. None is
    "xla" everywhere, until the kernels have been run on the devices that they are for.
    """
    if _chosen(implementation) == "pallas":
        return "pallas"
    return f"xla, blocks of {QUERIES} queries" if _in_blocks(q_length, k_length) else "xla, at once"


def _chosen(implementation: str | None) -> str:
    check_implementation(implementation, IMPLEMENTATIONS)
    return implementation or "xla"


def _in_blocks(q_length: int, k_length: int) -> bool:
    if any(map(jax.export.is_symbolic_dim, (q_length, k_length))):
        return False  # the number of blocks must be known
    return q_length > QUERIES and q_length * k_length > MATERIALISED


def _sa_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    scale: float,
    q_offset: int | None,
    variant: str,
) -> jax.Array:
    if not _in_blocks(q.shape[-2], k.shape[-2]):
        return _at_once(q, k, v, bias, mask, scale, q_offset, variant)
    return by_blocks(q, k, v, bias, mask, scale, q_offset, variant, QUERIES)


@partial(jax.jit, static_argnames=("q_offset", "variant", "size"))
def by_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    scale: float,
    q_offset: int | None,
    variant: str,
    size: int,
) -> jax.Array:
    """Attention of ``size`` queries after the other, whose scores are computed anew for the derivative.

    The batch and the heads stay whole, so that arrays that are sharded along them stay as they are. The lengths of the
    keys are static, as reverse mode demands: with n spans, causal attention of equal lengths computes (1 + 1/n) / 2
    of the scores.
    """
    length, k_length = q.shape[-2], k.shape[-2]
    if q_offset is None or length == 0:
        return _span(q, k, v, bias, mask, scale, q_offset, variant, size)
    q_offset = min(q_offset, k_length)  # so that 32 bits hold its sum with a position
    blocks = -(-length // size)
    step = -(-blocks // SPANS) * size

    def span(start: int) -> jax.Array:
        stop = min(start + step, length)
        queries, keys = slice(start, stop), slice(min(max(stop + q_offset, 0), k_length))

        def part(x: jax.Array | None) -> jax.Array | None:
            """Those rows and columns; axes along which it repeats stay 1."""
            if x is not None and x.ndim > 1 and x.shape[-2] > 1:
                x = x[..., queries, :]
            return x[..., keys] if x is not None and x.ndim > 0 and x.shape[-1] > 1 else x

        return _span(
            q[..., queries, :], k[..., keys, :], v[..., keys, :], part(bias), part(mask), scale, q_offset + start,
            variant, size,
        )  # fmt: skip

    return jnp.concatenate([span(start) for start in range(0, length, step)], axis=-2)


def _span(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    scale: float,
    q_offset: int | None,
    variant: str,
    size: int,
) -> jax.Array:
    """Attention of queries block by block, all over the same keys."""
    length = q.shape[-2]
    count = -(-length // size)

    def blocks(x: jax.Array | None) -> jax.Array | None:
        """(..., Tq, n) as (count, ..., size, n), filled up with zeros."""
        if x is None or x.ndim < 2 or x.shape[-2] != length:
            return None  # the same for all queries
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, count * size - length), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:-2], count, size, x.shape[-1]), -3, 0)

    @jax.checkpoint
    def attend(block: Any) -> jax.Array:
        start, q, own_bias, own_mask = block
        see = mask if own_mask is None else own_mask
        if count * size != length:  # the queries that fill up see nothing, not even a NaN that all others exclude
            exist = (start + jnp.arange(size) < length)[:, None]
            see = exist if see is None else jnp.logical_and(*jnp.broadcast_arrays(exist, see))
        return _at_once(
            q, k, v,
            bias if own_bias is None else own_bias,
            see,
            scale, None if q_offset is None else q_offset + start, variant,
        )  # fmt: skip

    starts = size * jnp.arange(count, dtype=jnp.int32)
    o = jnp.moveaxis(jax.lax.map(attend, (starts, blocks(q), blocks(bias), blocks(mask))), 0, -3)
    return o.reshape(*q.shape[:-2], count * size, v.shape[-1])[..., :length, :]


@partial(jax.jit, static_argnames="variant")
def _at_once(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    scale: float,
    q_offset: Any,
    variant: str,
) -> jax.Array:
    dtype = q.dtype
    q, k, v = (array.astype(COMPUTE_DTYPE[dtype_name(array)]) for array in (q, k, v))
    scores = (*q.shape[:-1], k.shape[-2])
    # scale * (q k) + bias could be rounded once or twice where XLA computes it anew, and then misses its own extrema.
    x = _qk(_by_kv_head(scale * q, k), k).reshape(scores)
    if bias is not None:
        x = x + jnp.broadcast_to(bias.astype(x.dtype), scores)
    if q_offset is not None:
        causal = jnp.arange(scores[-1])[None] - jnp.arange(scores[-2])[:, None] <= q_offset
        mask = causal if mask is None else jnp.broadcast_to(causal, scores) & jnp.broadcast_to(mask, scores)
    x = participating(x, mask)
    y, on = rows(x, x.ndim - 1, variant), x != -jnp.inf
    o = _yv(_by_kv_head(y, k), _poison(_by_kv_head(on, k), v), v).reshape(*q.shape[:-1], v.shape[-1])
    # A query without keys sends on no gradient either, whatever it is sent.
    return jnp.where(on.any(-1, keepdims=True), o, 0).astype(dtype)


def causal_offset(is_causal: bool, q_offset: int) -> int | None:
    """Any integer is allowed (A4); those that 32 bits do not hold exceed every length. None if not causal."""
    return max(-(2**31), min(operator.index(q_offset), 2**31 - 1)) if is_causal else None


def _by_kv_head(x: jax.Array, k: jax.Array) -> jax.Array:
    """(..., Hq, Tq, n) as (..., Hkv, Hq / Hkv * Tq, n): the queries of a group are rows of one matrix product."""
    *batch, heads, length, n = x.shape
    kv_heads = k.shape[-3]
    return x.reshape(*batch, kv_heads, heads // kv_heads * length, n)


# The derivatives of the two products drop the NaN and infinities of keys and values, which would otherwise reach, as
# 0 * NaN, the queries that exclude them (A6). Queries that do see them have NaN in y or in the gradient already.


@jax.custom_jvp
def _qk(q: jax.Array, k: jax.Array) -> jax.Array:
    return _matmul(q, k.mT)


@_qk.defjvp
def _qk_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (q, k), (dq, dk) = primals, tangents
    return _qk(q, k), _matmul(dq, _finite(k).mT) + _matmul(_finite(q), dk.mT)


@jax.custom_jvp
def _yv(y: jax.Array, poison: jax.Array, v: jax.Array) -> jax.Array:
    return _matmul(y, _finite(v)) * poison


@_yv.defjvp
def _yv_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (y, poison, v), (dy, _, dv) = primals, tangents
    return _yv(y, poison, v), _matmul(dy, _finite(v)) * poison + _matmul(y, dv)


def _poison(on: jax.Array, v: jax.Array) -> jax.Array:
    """The factor of each output, NaN if a participating v is not finite, else 1; it has no derivative."""
    # Any precision counts zeros and ones right.
    return jnp.where(jnp.matmul(on.astype(v.dtype), (~jnp.isfinite(v)).astype(v.dtype)) > 0, jnp.nan, 1)


def _finite(v: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(v), v, 0)
