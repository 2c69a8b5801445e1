"""Fused attention for GPUs and TPUs in Pallas, forward and backward; elsewhere interpreted.

One program has a block of queries (of keys, for dk and dv) and loops over blocks of the others. The forward pass reads
the keys twice: row extrema and their positions first, then O = sum a e v / l without rescaling. The backward pass
computes the scores again, S = sum g p and D = sum g y from them (D from a rounded O would cost 16-bit gradients a
digit), and adds the extremal terms at the stored positions: comparing scores with their extrema would miss them where
a product is rounded otherwise the second time.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sa_softmax._validate import COMPUTE_DTYPE, dtype_name

QUERIES, KEYS = 64, 128  # of a block; a TPU demands 128 columns of the mask
_NOWHERE = -1


class _Static(NamedTuple):
    """What a kernel is compiled for."""

    scale: float
    q_offset: int | None
    variant: str
    q_length: int
    k_length: int
    bq: int
    bk: int


class _Inputs(NamedTuple):
    """Arrays of whole blocks: q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), ``dirty`` (1, 1), not 0 where
    any v is not finite; bias and mask (B or 1, Hq or 1, Tq or 1, Tk or 1), the mask not 0 where a key participates."""

    q: Any
    k: Any
    v: Any
    dirty: Any
    bias: Any
    mask: Any


class _Stats(NamedTuple):
    """(B, Hq, Tq, 1): max, min and sum exp(x - max) over the participating keys, and where the extrema are."""

    x_max: Any
    x_min: Any
    l: Any  # noqa: E741 - the literature's name
    at_max: Any
    at_min: Any


@partial(jax.jit, static_argnames=("scale", "q_offset", "variant"))
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    scale: float,
    q_offset: int | None,
    variant: str,
) -> jax.Array:
    """Attention of checked arguments; q_offset is None where it is not causal."""
    batch, (length, _), (k_length, dim) = q.shape[:-3], q.shape[-2:], v.shape[-2:]
    o_shape = (*q.shape[:-1], dim)
    if 0 in (*q.shape[:-1], k_length):
        return jnp.zeros(o_shape, q.dtype)
    bq, bk = min(QUERIES, _power_of_two(length)), min(KEYS, _power_of_two(k_length))
    static = _Static(scale, q_offset, variant, length, k_length, bq, bk)

    def whole_blocks(x: jax.Array, *sizes: int) -> jax.Array:
        """Filled up with zeros to a multiple, at least one, of each size."""
        more = [max(1, -(-n // size)) * size - n for n, size in zip(x.shape[2:], sizes, strict=True)]
        return jnp.pad(x, [(0, 0), (0, 0), *((0, n) for n in more)])

    def per_score(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        x = x.reshape((1,) * (q.ndim - x.ndim) + x.shape)
        one = all(n == 1 for n in x.shape[:-3])
        x = jnp.broadcast_to(x, (*(x.shape[:-3] if one else batch), *x.shape[-3:])).reshape(-1, *x.shape[-3:])
        return whole_blocks(x, *(1 if n == 1 else size for n, size in zip(x.shape[2:], static[-2:], strict=True)))

    q, k, v = (array.reshape(math.prod(batch), *array.shape[-3:]) for array in (q, k, v))
    inputs = _Inputs(
        whole_blocks(q, static.bq, _power_of_two(q.shape[-1])),
        whole_blocks(k, static.bk, _power_of_two(k.shape[-1])),
        whole_blocks(v, static.bk, _power_of_two(v.shape[-1])),
        (~jnp.isfinite(v).all()).astype(jnp.int32).reshape(1, 1),
        per_score(bias),
        per_score(None if mask is None else mask.astype(jnp.int8)),
    )
    return _attention(static, inputs)[..., :length, :dim].reshape(o_shape)


def _power_of_two(n: int) -> int:
    """At least n and 16, the least factor of a product in Triton."""
    return max(16, 1 << (n - 1).bit_length())


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, inputs: _Inputs) -> jax.Array:
    return _forward(static, inputs)[0]


def _attention_fwd(static: _Static, inputs: _Inputs) -> tuple[jax.Array, Any]:
    o, stats = _forward(static, inputs)
    return o, (inputs, stats)


def _attention_bwd(static: _Static, residuals: Any, do: jax.Array) -> tuple[_Inputs]:
    return (_backward(static, *residuals, do),)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _without_derivative(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` of ``static`` and arrays; JAX would differentiate kernels by itself, and not as the spec asks."""
    guarded = jax.custom_jvp(run, nondiff_argnums=(0,))

    @guarded.defjvp
    def refuse(static: _Static, primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "implementation='pallas' has a first derivative only; got a second one. Use implementation='xla'"
        )

    return guarded


# The kernels.


@_without_derivative
def _forward(static: _Static, inputs: _Inputs) -> tuple[jax.Array, _Stats]:
    B, H, Tq, _ = inputs.q.shape
    compute = COMPUTE_DTYPE[dtype_name(inputs.q)]
    dtypes = (compute, compute, compute, jnp.int32, jnp.int32)
    out = [_blocks((B, H, Tq, inputs.v.shape[-1]), inputs.q.dtype, static.bq)]
    out += [_blocks((B, H, Tq, 1), dtype, static.bq) for dtype in dtypes]
    o, *stats = _call(_forward_kernel, static, (B, H, Tq // static.bq), _by_query(static, inputs), out)
    return o, _Stats(*stats)


def _forward_kernel(static: _Static, inputs: _Inputs, o_ref: Any, *stats: Any) -> None:
    q, compute = inputs.q[...], stats[0].dtype
    blocks, i = _key_blocks(static, inputs), pl.program_id(2)

    def extrema(j: Any, carry: Any) -> Any:
        x, on, keys = _scores(static, inputs, q, _block_of(inputs.k, j, static.bk), i, j, 0, compute)

        def first(x: jax.Array, extremum: jax.Array) -> jax.Array:
            found = jnp.where(on & (x == extremum), keys, static.k_length)
            return jnp.min(found, axis=1, keepdims=True)

        x_max, x_min, at_max, at_min = carry
        high = jnp.max(jnp.where(on, x, -jnp.inf), axis=1, keepdims=True)
        low = jnp.min(jnp.where(on, x, jnp.inf), axis=1, keepdims=True)
        return (
            jnp.maximum(x_max, high),
            jnp.minimum(x_min, low),
            jnp.where(high > x_max, first(x, high), at_max),
            jnp.where(low < x_min, first(x, low), at_min),
        )

    rows = (static.bq, 1)
    nowhere = jnp.full(rows, _NOWHERE, jnp.int32)
    start = (jnp.full(rows, -jnp.inf, compute), jnp.full(rows, jnp.inf, compute), nowhere, nowhere)
    x_max, x_min, at_max, at_min = _loop(blocks, extrema, start)
    row = _Row.of(x_max, x_min)

    def weigh(j: Any, carry: Any) -> Any:
        l, o, poison = carry  # noqa: E741
        x, on, _ = _scores(static, inputs, q, _block_of(inputs.k, j, static.bk), i, j, 0, compute)
        e = jnp.where(on, jnp.exp(x - row.shift), 0)
        weights = jnp.where(on, row.factor(x, static.variant) * e, 0)
        v = _block_of(inputs.v, j, static.bk)
        poison = _poisoned(inputs, poison, on, v)
        o = o + _dot(_rounded(weights, v, static), _as(_finite(v), weights, static), (1, 0))
        return l + jnp.sum(e, axis=1, keepdims=True), o, poison

    zeros = jnp.zeros((static.bq, inputs.v.shape[-1]), compute)
    l, o, poison = _loop(blocks, weigh, (jnp.zeros(rows, compute), zeros, zeros))  # noqa: E741
    o = jnp.where(poison > 0, jnp.nan, o / jnp.where(l == 0, 1, l))
    o_ref[...] = jnp.where(l == 0, 0, o).astype(o_ref.dtype)
    for ref, value in zip(stats, (x_max, x_min, l, at_max, at_min), strict=True):
        ref[...] = value


@_without_derivative
def _backward(static: _Static, inputs: _Inputs, stats: _Stats, do: jax.Array) -> _Inputs:
    B, H, Tq, _ = inputs.q.shape
    Hkv, Tk = inputs.k.shape[1:3]
    compute = stats.l.dtype
    do = jnp.where(stats.l == 0, 0, do)  # a query without keys sends no gradient, whatever it is sent
    per_query = [do, *stats]

    sums = [_blocks((B, H, Tq, 1), compute, static.bq)] * 2
    out = [_blocks(inputs.q.shape, inputs.q.dtype, static.bq), *sums]
    if inputs.bias is not None:
        _, _, rows, columns = inputs.bias.shape
        block = (1 if rows == 1 else static.bq, columns)
        dx_shape = jax.ShapeDtypeStruct((B, H, Tq // static.bq, *block), compute)
        out.append(_Cut(dx_shape, pl.BlockSpec((None, None, None, *block), lambda b, h, i: (b, h, i, 0, 0))))
    specs = _by_query(static, inputs) + [_query_blocks(x, static) for x in per_query]
    dq, D, S, *dx = _call(_dq_kernel, static, (B, H, Tq // static.bq), specs, out)

    out = [_blocks(x.shape, x.dtype, static.bk) for x in (inputs.k, inputs.v)]
    specs = _by_key(static, inputs) + [_group(x, H // Hkv) for x in (*per_query, D, S)]
    dk, dv = _call(_dkv_kernel, static, (B, Hkv, Tk // static.bk), specs, out)

    dbias = None
    if inputs.bias is not None:
        dbias = dx[0].sum(2) if rows == 1 else dx[0].reshape(B, H, Tq, columns)
        broadcast = [axis for axis in (0, 1) if inputs.bias.shape[axis] == 1]
        dbias = dbias.sum(broadcast, keepdims=True).astype(inputs.bias.dtype)
    no_gradient = [None if x is None else np.zeros(x.shape, jax.dtypes.float0) for x in (inputs.dirty, inputs.mask)]
    return _Inputs(dq, dk, dv, no_gradient[0], dbias, no_gradient[1])


def _dq_kernel(static: _Static, inputs: _Inputs, do_ref: Any, *refs: Any) -> None:
    stats, (dq_ref, D_ref, S_ref, *dx_ref) = _Stats(*refs[:5]), refs[5:]
    q, do, compute = inputs.q[...], do_ref[...], D_ref.dtype
    blocks, i = _key_blocks(static, inputs), pl.program_id(2)
    row, l = _Row.of(stats.x_max[...], stats.x_min[...]), stats.l[...]  # noqa: E741
    r = 1 / jnp.where(l == 0, 1, l)

    def scores(j: Any) -> Any:
        x, on, keys = _scores(static, inputs, q, _block_of(inputs.k, j, static.bk), i, j, 0, compute)
        v = _finite(_block_of(inputs.v, j, static.bk))
        g = jnp.where(on, _dot(do, v, (1, 1)), 0)
        return x, on, keys, jnp.where(on, jnp.exp(x - row.shift), 0) * r, g

    def total(j: Any, sums: Any) -> Any:
        x, on, _, p, g = scores(j)
        D, S, poison = sums
        D = D + jnp.sum(g * (row.factor(x, static.variant) * p), axis=1, keepdims=True)
        poison = _poisoned(inputs, poison, on, _block_of(inputs.v, j, static.bk))
        return D, S + jnp.sum(g * p, axis=1, keepdims=True), poison

    zero = jnp.zeros((static.bq, 1), compute)
    D, S, poison = _loop(blocks, total, (zero, zero, jnp.zeros(do.shape, compute)))
    D = jnp.where(jnp.max(poison, axis=1, keepdims=True) > 0, jnp.nan, D)  # and with it the gradient of the row
    D_ref[...], S_ref[...] = D, S

    def gradient(j: Any, dq: jax.Array) -> jax.Array:
        x, on, keys, p, g = scores(j)
        dx = row.gradient(x, p, g, D, S, keys == stats.at_max[...], keys == stats.at_min[...], static.variant)
        dx = jnp.where(on, dx, 0)
        for ref in dx_ref:  # the bias's gradient, summed over the queries or keys of the block that share an entry
            shared = dx if ref.shape[0] > 1 else jnp.sum(dx, axis=0, keepdims=True)
            if ref.shape[1] > 1:
                ref[:, pl.ds(_at(j, static.bk), static.bk)] = shared
            else:
                ref[...] += jnp.sum(shared, axis=1, keepdims=True)
        k = _finite(_block_of(inputs.k, j, static.bk))
        return dq + _dot(*_factors(dx, k), (1, 0))

    for ref in dx_ref:
        ref[...] = jnp.zeros(ref.shape, ref.dtype)
    dq = _loop(blocks, gradient, jnp.zeros(q.shape, compute))
    dq_ref[...] = (static.scale * dq).astype(dq_ref.dtype)


def _dkv_kernel(static: _Static, inputs: _Inputs, do_ref: Any, *refs: Any) -> None:
    stats, (D_ref, S_ref, dk_ref, dv_ref) = _Stats(*refs[:5]), refs[5:]
    k, v, compute = inputs.k[...], _finite(inputs.v[...]), D_ref.dtype
    j, (heads, Tq, _) = pl.program_id(2), inputs.q.shape
    first, count = _first_query_block(static, inputs), Tq // static.bq

    def of_head(h: Any, sums: Any) -> Any:
        def gradient(i: Any, sums: Any) -> Any:
            dk, dv = sums
            here = (h, pl.ds(_at(i, static.bq), static.bq), slice(None))
            q, do, D, S = inputs.q[here], do_ref[here], D_ref[here], S_ref[here]
            x_max, x_min, l, at_max, at_min = (ref[here] for ref in stats)  # noqa: E741
            row = _Row.of(x_max, x_min)
            x, on, keys = _scores(static, inputs, q, k, i, j, h, compute)
            p = jnp.where(on, jnp.exp(x - row.shift), 0) / jnp.where(l == 0, 1, l)
            g = jnp.where(on, _dot(do, v, (1, 1)), 0)
            y = jnp.where(on, row.factor(x, static.variant) * p, 0)
            dx = jnp.where(on, row.gradient(x, p, g, D, S, keys == at_max, keys == at_min, static.variant), 0)
            dk = dk + _dot(*_factors(dx, _finite(q)), (0, 0))
            return dk, dv + _dot(_rounded(y, do, static), _as(do, y, static), (0, 0))

        return _loop(count, gradient, sums, first)

    start = (jnp.zeros(k.shape, compute), jnp.zeros(v.shape, compute))
    dk, dv = _loop(heads, of_head, start)
    dk_ref[...] = (static.scale * dk).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


# Their parts.


class _Row(NamedTuple):
    """lo, unit and R = unit * (hi - lo) of a row, inf in place of R = 0; ``shift`` is what exp subtracts."""

    shift: jax.Array
    lo: jax.Array
    unit: jax.Array
    R: jax.Array
    free_min: jax.Array
    free_max: jax.Array

    @classmethod
    def of(cls, x_max: jax.Array, x_min: jax.Array) -> "_Row":
        lo, hi = jnp.minimum(x_min, 0), jnp.maximum(x_max, 0)
        # The power of two that keeps R and 1 / R within the exponent range (C7).
        big = 2.0 ** (np.finfo(lo.dtype).maxexp // 2)
        size = jnp.maximum(hi, -lo)
        unit = jnp.where(size > big, 1 / big, jnp.where(size < 1 / big, big, 1)).astype(lo.dtype)
        R = hi * unit - lo * unit
        shift = jnp.where(x_max == -jnp.inf, 0, x_max)
        return cls(shift, lo, unit, jnp.where(R == 0, jnp.inf, R), x_min < 0, x_max > 0)

    def factor(self, x: jax.Array, variant: str) -> jax.Array:
        return x if variant == "product" else (x * self.unit - self.lo * self.unit) / self.R

    def gradient(
        self, x: jax.Array, p: jax.Array, g: jax.Array, D: jax.Array, S: jax.Array,
        at_max: jax.Array, at_min: jax.Array, variant: str,
    ) -> jax.Array:  # fmt: skip
        """dx of clauses G1 and G2, the whole of an extremal term at one of the tied keys (A8)."""
        dx = g * (self.factor(x, variant) * p) - p * D
        if variant == "product":
            return dx + g * p
        terms = g * p + jnp.where(at_min & self.free_min, D - S, 0) - jnp.where(at_max & self.free_max, D, 0)
        return dx + terms / self.R * self.unit


def _scores(
    static: _Static, inputs: _Inputs, q: jax.Array, k: jax.Array, i: Any, j: Any, h: Any, compute: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scores of query block i and key block j, 0 where they do not participate; which do; the keys' positions.

    The program has its own block of one side of the bias and the mask, and the whole of the other.
    """
    x = static.scale * _dot(q, k, (1, 1), compute)
    position = partial(jax.lax.broadcasted_iota, jnp.int32, x.shape)
    at, row = position(1) + j * static.bk, position(0) + i * static.bq
    on = (at < static.k_length) & (row < static.q_length)  # those that fill up the last blocks take no part
    if static.q_offset is not None:
        on &= at - row <= static.q_offset

    def part(ref: Any) -> jax.Array:
        heads, rows, columns = ref.shape
        own_rows = pl.ds(_at(i, static.bq), static.bq) if rows > static.bq else slice(None)
        own_columns = pl.ds(_at(j, static.bk), static.bk) if columns > static.bk else slice(None)
        return ref[0 if heads == 1 else h, own_rows, own_columns]

    if inputs.mask is not None:
        on &= part(inputs.mask) != 0
    if inputs.bias is not None:
        x = x + part(inputs.bias).astype(compute)
    on &= x != -jnp.inf
    return jnp.where(on, x, 0), on, at


def _key_blocks(static: _Static, inputs: _Inputs) -> Any:
    """How many blocks of keys a block of queries sees: those after the diagonal are left out."""
    blocks = inputs.k.shape[0] // static.bk
    if static.q_offset is None:
        return blocks
    seen = (pl.program_id(2) + 1) * static.bq + min(max(static.q_offset, -(2**30)), 2**30)
    return _divided(jnp.clip(seen + static.bk - 1, 0, blocks * static.bk), static.bk)


def _first_query_block(static: _Static, inputs: _Inputs) -> Any:
    """The first block of queries that sees any of a block of keys: those before the diagonal are left out."""
    if static.q_offset is None:
        return 0
    seeing = pl.program_id(2) * static.bk - min(max(static.q_offset, -(2**30)), 2**30)
    return _divided(jnp.clip(seeing, 0, inputs.q.shape[1]), static.bq)


def _loop(stop: Any, body: Callable[[Any, Any], Any], carry: Any, start: Any = 0) -> Any:
    return jax.lax.fori_loop(jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32), body, carry)


def _divided(n: Any, size: int) -> jax.Array:
    """n // size for n >= 0, in 32 bits whatever JAX's default is; a floor division does not lower without a device."""
    return jax.lax.div(jnp.asarray(n, jnp.int32), jnp.int32(size))


def _at(block: Any, size: int) -> Any:
    return pl.multiple_of(block * size, size)


def _block_of(ref: Any, block: Any, size: int) -> jax.Array:
    return ref[pl.ds(_at(block, size), size), :]


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: Any = None) -> jax.Array:
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype.itemsize >= 4 else None,
        preferred_element_type=dtype or COMPUTE_DTYPE[dtype_name(a)],
    )  # fmt: skip


def _factors(dx: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dX and q or k as factors of a product: dX rounded to 16 bits once, save to float16, where it may underflow."""
    return (dx, like.astype(dx.dtype)) if like.dtype == jnp.float16 else (dx.astype(like.dtype), like)


def _rounded(weights: jax.Array, like: jax.Array, static: _Static) -> jax.Array:
    """Y as a factor of a product: rounded to 16 bits once (A10), save where float16 would overflow."""
    return weights if like.dtype == jnp.float16 and static.variant == "product" else weights.astype(like.dtype)


def _as(x: jax.Array, weights: jax.Array, static: _Static) -> jax.Array:
    """``x`` in the dtype that :func:`_rounded` gives ``weights``."""
    return x.astype(_rounded(weights, x, static).dtype)


def _poisoned(inputs: _Inputs, poison: jax.Array, on: jax.Array, v: jax.Array) -> jax.Array:
    """``poison`` and, for each query and column, how many participating values are not finite.

    NaN of a participating value must come out, one of an excluded value must not (A6).
    """
    return jax.lax.cond(
        inputs.dirty[0, 0] != 0,
        lambda: poison + _dot(on.astype(poison.dtype), (~_is_finite(v)).astype(poison.dtype), (1, 0)),
        lambda: poison,
    )


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.abs(x) < jnp.inf


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(_is_finite(x), x, 0)


# How arrays are cut into blocks: an array's shape, dtype, BlockSpec and, for an input, the array.


class _Cut(NamedTuple):
    array: Any
    spec: pl.BlockSpec


def _blocks(shape: tuple[int, ...], dtype: Any, size: int) -> _Cut:
    """(B, H, T, n), of which a program has ``size`` rows of one head."""
    block = (None, None, size, shape[-1])
    return _Cut(jax.ShapeDtypeStruct(shape, dtype), pl.BlockSpec(block, lambda b, h, i: (b, h, i, 0)))


def _query_blocks(x: jax.Array, static: _Static) -> _Cut:
    return _Cut(x, _blocks(x.shape, x.dtype, static.bq).spec)


def _group(x: jax.Array, heads: int) -> _Cut:
    """(B, Hq, T, n), of which a program has all rows of the heads of one group."""
    return _Cut(x, pl.BlockSpec((None, heads, *x.shape[2:]), lambda b, h, _: (b, h, 0, 0)))


def _scalar(x: jax.Array) -> _Cut:
    return _Cut(x, pl.BlockSpec((1, 1), lambda *_: (0, 0)))


def _by_query(static: _Static, inputs: _Inputs) -> list[_Cut | None]:
    """The inputs of a program that has a block of queries of one head."""
    groups = inputs.q.shape[1] // inputs.k.shape[1]
    whole = [
        pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, i: (b, _divided(h, groups), 0, 0)) for x in inputs[1:3]
    ]

    def per_score(x: Any) -> _Cut | None:
        if x is None:
            return None
        B, H, rows, columns = x.shape
        block = (None, 1, 1 if rows == 1 else static.bq, columns)
        at = lambda b, h, i: (0 if B == 1 else b, 0 if H == 1 else h, 0 if rows == 1 else i, 0)  # noqa: E731
        return _Cut(x, pl.BlockSpec(block, at))

    q, k, v, dirty, bias, mask = inputs
    return [
        _query_blocks(q, static), _Cut(k, whole[0]), _Cut(v, whole[1]), _scalar(dirty), per_score(bias), per_score(mask)
    ]  # fmt: skip


def _by_key(static: _Static, inputs: _Inputs) -> list[_Cut | None]:
    """The inputs of a program that has a block of keys of one group of heads."""
    groups = inputs.q.shape[1] // inputs.k.shape[1]

    def per_score(x: Any) -> _Cut | None:
        if x is None:
            return None
        B, H, rows, columns = x.shape
        block = (None, 1 if H == 1 else groups, rows, 1 if columns == 1 else static.bk)
        at = lambda b, h, j: (0 if B == 1 else b, 0 if H == 1 else h, 0, 0 if columns == 1 else j)  # noqa: E731
        return _Cut(x, pl.BlockSpec(block, at))

    q, k, v, dirty, bias, mask = inputs
    keys = [_Cut(x, _blocks(x.shape, x.dtype, static.bk).spec) for x in (k, v)]
    return [_group(q, groups), *keys, _scalar(dirty), per_score(bias), per_score(mask)]


def _call(
    kernel: Callable[..., None], static: _Static, grid: tuple[int, ...], cuts: list[_Cut | None], out: list[_Cut]
) -> Any:
    """Run the kernel over the grid: interpreted on a CPU, through Mosaic on a TPU, through Triton elsewhere."""
    given = [cut for cut in cuts if cut is not None]

    def body(*refs: Any) -> None:
        rest = iter(refs)
        inputs = [None if cut is None else next(rest) for cut in cuts]
        kernel(static, _Inputs(*inputs[:6]), *inputs[6:], *rest)

    def run(*arrays: jax.Array, **options: Any) -> Any:
        return pl.pallas_call(
            body, grid=grid, out_shape=[cut.array for cut in out],
            in_specs=[cut.spec for cut in given], out_specs=[cut.spec for cut in out], **options,
        )(*arrays)  # fmt: skip

    return jax.lax.platform_dependent(
        *(cut.array for cut in given),
        cpu=partial(run, interpret=True),
        tpu=run,
        default=partial(run, compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2)),
    )
