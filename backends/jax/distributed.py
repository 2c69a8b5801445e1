"""SA attention whose sequence is sharded over an axis of a JAX mesh, exact to the reference, forward and backward.

Each device keeps its queries, and the keys and values go around the ring (``collective-permute``); what a device knows
of the keys it has seen is the partial state of spec clause A11. The backward pass goes around once more, with the
gradients of keys and values travelling beside them: what it needs of a whole row is D = dO O and S = dO (O0 / l), since
S = sum_j p_j dO v_j = dO sum_j p_j v_j, and the keys at the extrema, all of them known from the forward pass.

No device ever holds more keys than its own and the ones that arrive, nor more scores than one tile: memory per device
falls as 1 / N.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sa_softmax._validate import COMPUTE_DTYPE, check_attention, check_positions, dtype_name
from sa_softmax.backends.jax._attention import _by_kv_head, _finite, _matmul
from sa_softmax.backends.jax._softmax import JAX, _range
from sa_softmax.backends.jax._state import (
    AttentionState,
    attention_from_state,
    attention_state,
    empty_state,
    merge_states,
    rescaled,
    scores,
    state_of,
    weigh,
)
from sa_softmax.backends.zigzag import zigzag

__all__ = ["decode", "from_zigzag", "ring_attention", "to_zigzag"]

BLOCK = 512  # queries and keys of a tile, at most
BiasFunction = Callable[[jax.Array, jax.Array], jax.Array]


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh,
    axis_name: str,
    variant: str = "normalized",
    bias: jax.Array | BiasFunction | None = None,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    positions: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
) -> jax.Array:
    """:func:`sa_attention` of global arrays whose sequence axis is sharded over the mesh axis ``axis_name``.

    Call it under jit and grad as any function. Other axes of the mesh may shard batch and heads. Lengths that twice
    the number of devices does not divide are padded with keys that do not participate, and the output is cut.

    Args:
        q: (..., Hq, Tq, D). Hq is a multiple of Hkv.
        k: (..., Hkv, Tk, D).
        v: (..., Hkv, Tk, Dv).
        mesh: the devices.
        axis_name: the axis of the mesh along which the sequence is sharded.
        variant: "normalized" or "product".
        bias: an array that broadcasts to (..., Hq, Tq, Tk), sharded along its queries, so that each device holds the
            columns of all keys, in the order of ``k``; or a function of positions i and j, which broadcast to
            (Tq', Tk'), whose value broadcasts to (..., Hq, Tq', Tk'), called for one tile at a time. Gradients flow to
            the array, and to the arrays that the function closes over. A new function is a new compilation: call it
            under jit.
        mask: boolean, broadcasts to (..., Hq, Tq, Tk); True where a key participates; sharded as the bias is. A mask
            of padding keys is (..., 1, 1, Tk).
        is_causal: a query sees the keys whose position is not after its own.
        positions: (T,) integers, the place in the sequence of each query and key, or a pair (of queries (Tq,), of keys
            (Tk,)). 0, 1, 2, ... by default. Give those of
            :func:`sa_softmax.backends.zigzag.zigzag` to balance a causal mask.
        scale: factor of the scores, 1/sqrt(D) by default.

    Returns:
        (..., Hq, Tq, Dv) in the dtype of ``q``, sharded along Tq. A query without participating keys gets 0.

    Raises:
        TypeError, ValueError: as :func:`sa_attention`; positions of another length or dtype; an axis that the mesh
            does not have.

    The derivative is a reverse-mode rule: JAX raises on jvp, and so on second derivatives of its own. At tied extremal
    scores one of the tied keys gets the whole term (clause A8).

    Source: spec clauses A, A11 in particular.
    """
    function = bias if callable(bias) else None
    array = None if callable(bias) else bias
    scale = check_attention(
        JAX, q, k, v, variant=variant, bias=array, mask=mask, is_causal=is_causal, q_offset=0, scale=scale
    )
    chunks = 2 * _axis_size(mesh, axis_name)
    tq, tk = q.shape[-2], k.shape[-2]
    check_positions(JAX, positions, tq, tk)
    pair = positions if isinstance(positions, tuple) else (positions, positions)
    i, j = (_arange(t) if p is None else p.astype(np.int32) for p, t in zip(pair, (tq, tk), strict=True))
    if 0 in (tq, tk):
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    parameters: Any = ()
    if function is not None:
        bq, bk = (_Blocks(2 * -(-t // chunks)).size for t in (tq, tk))
        function, parameters = jax.closure_convert(
            function, jnp.zeros((bq, bk), np.int32), jnp.zeros((1, bk), np.int32)
        )
    ring = _Ring(mesh, axis_name, variant, is_causal, scale, function)
    q, k, v = (_pad(x, -2, chunks) for x in (q, k, v))
    array, mask = (_pad_scores(x, q.ndim, (chunks, chunks)) for x in (array, mask))
    i, j = (_pad(x, 0, chunks, NOWHERE) for x in (i, j))
    return _compiled(ring, q, k, v, array, tuple(parameters), mask, i, j)[..., :tq, :]


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh,
    axis_name: str,
    variant: str = "normalized",
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention of a few queries, which every device has, over a cache of keys sharded over ``axis_name``.

    Each device reduces its slice of the cache to the state of clause A11, and the states, a few numbers for each query,
    are merged by all-reduce. For inference: differentiating it raises; :func:`ring_attention` is for training.

    Args:
        q: (..., Hq, Tq, D), replicated.
        k: (..., Hkv, Tk, D), sharded along Tk.
        v: (..., Hkv, Tk, Dv), sharded along Tk.
        mesh: the devices.
        axis_name: the axis of the mesh along which the cache is sharded.
        variant: "normalized" or "product".
        bias: broadcasts to (..., Hq, Tq, Tk), sharded along Tk.
        mask: boolean, broadcasts to (..., Hq, Tq, Tk), sharded along Tk; False where the cache is not filled yet, or
            where causality forbids it.
        scale: factor of the scores, 1/sqrt(D) by default.

    Returns:
        (..., Hq, Tq, Dv) in the dtype of ``q``, replicated.

    Raises:
        TypeError, ValueError: as :func:`sa_attention`; an axis that the mesh does not have.
    """
    scale = check_attention(
        JAX, q, k, v, variant=variant, bias=bias, mask=mask, is_causal=False, q_offset=0, scale=scale
    )
    n = _axis_size(mesh, axis_name)
    if k.shape[-2] % n and mask is None:
        mask = jnp.ones((1, k.shape[-2]), bool)
    k, v = _pad(k, -2, n), _pad(v, -2, n)
    bias, mask = (_pad_scores(x, q.ndim, (1, n)) for x in (bias, mask))
    return _compiled_decode((mesh, axis_name, variant, scale), q, k, v, bias, mask)


def to_zigzag(x: jax.Array, devices: int, axis: int = -2) -> jax.Array:
    """``x`` with its sequence axis in zig-zag order: sharded evenly, each device gets its two chunks.

    Moving a sharded array moves most of it over the links: permute the tokens, before the first layer, not each layer's
    queries. The positions in that order are ``to_zigzag(jnp.arange(T), devices, 0)``.
    """
    return jnp.take(x, np.concatenate(zigzag(x.shape[axis], devices)), axis)


def from_zigzag(x: jax.Array, devices: int, axis: int = -2) -> jax.Array:
    """The inverse of :func:`to_zigzag`."""
    return jnp.take(x, np.argsort(np.concatenate(zigzag(x.shape[axis], devices))), axis)


# The position of padding. One value for queries and keys: where an array is padded twice, and sharded, XLA takes the
# first value both times (jaxlib 0.10.2).
NOWHERE = np.iinfo(np.int32).min


class _Ring(NamedTuple):
    """What a compilation depends on."""

    mesh: Mesh
    axis_name: str
    variant: str
    is_causal: bool
    scale: float
    bias: Callable[..., jax.Array] | None

    @property
    def n(self) -> int:
        return int(self.mesh.shape[self.axis_name])

    def pass_on(self, x: Any) -> Any:
        """Every device's arrays to the next device."""
        return jax.lax.ppermute(x, self.axis_name, [(i, (i + 1) % self.n) for i in range(self.n)])

    def source(self, step: Any) -> Any:
        """The device whose keys are here after so many steps."""
        return (jax.lax.axis_index(self.axis_name) - step) % self.n


class _Rows(NamedTuple):
    """What the backward pass must know of each query's row of scores: (..., Hq, Tq, 1), and (..., Hq, Tq, Dv)."""

    m: jax.Array
    l: jax.Array  # noqa: E741
    lo: jax.Array
    at_lo: jax.Array  # the key of the minimum and that of the maximum, counted over the blocks of all devices
    at_hi: jax.Array
    o: jax.Array  # the output before it is rounded
    mean: jax.Array  # sum p v


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attention(ring: _Ring, *arrays: Any) -> jax.Array:
    return _forward(ring, *arrays)[0]


def _forward(ring: _Ring, *arrays: Any) -> tuple[jax.Array, Any]:
    specs, rows = _specs(ring, arrays)
    o, kept = _on_devices(ring, _forward_of_device, specs, (rows, _all_rows(rows)))(*arrays)
    return o, (arrays, kept)


def _backward(ring: _Ring, residuals: Any, do: jax.Array) -> tuple[Any, ...]:
    arrays, kept = residuals
    specs, rows = _specs(ring, arrays)
    backward = _on_devices(ring, _backward_of_device, (*specs, _all_rows(rows), rows), specs[:5])
    return (*backward(*arrays, kept, do), None, None, None)


_ring_attention.defvjp(_forward, _backward)
_compiled = jax.jit(_ring_attention, static_argnums=0)


def _specs(ring: _Ring, arrays: Any) -> tuple[tuple[Any, ...], PartitionSpec]:
    """Of q, k, v, bias, the parameters of its function, mask, positions of queries and of keys; and of rows."""
    q, _, _, bias, parameters, mask, _, _ = arrays
    rows, whole = PartitionSpec(*(None,) * (q.ndim - 2), ring.axis_name, None), PartitionSpec()
    line = PartitionSpec(ring.axis_name)
    of_bias, of_mask = (None if x is None else whole if x.shape[-2] == 1 else rows for x in (bias, mask))
    return (rows, rows, rows, of_bias, tuple(whole for _ in parameters), of_mask, line, line), rows


def _all_rows(spec: Any) -> _Rows:
    return _Rows(*(spec,) * len(_Rows._fields))


def _on_devices(ring: Any, f: Any, in_specs: Any, out_specs: Any) -> Any:
    return jax.shard_map(
        partial(f, ring), mesh=ring.mesh, in_specs=in_specs, out_specs=out_specs, axis_names={ring.axis_name},
        check_vma=False,
    )  # fmt: skip


# What one device does.


def _forward_of_device(
    ring: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, bias: Any, parameters: Any, mask: Any, i: Any, j: Any
) -> tuple[jax.Array, _Rows]:
    tiles = _Tiles(ring, q.shape[-2], k.shape[-2], bias, parameters, mask)
    queries = (_arange(tiles.q.count), tiles.q.split(q), tiles.q.split(i, 0, NOWHERE))

    def fold(folded: Any, held: Any, step: Any) -> Any:
        ks, vs, js = held
        clean = jnp.isfinite(vs).all()
        keys = (ring.source(step) * tiles.k.count + _arange(tiles.k.count), ks, vs, js)

        def of_queries(_: None, block: Any) -> Any:
            (a, q_a, i_a), folded = block

            def with_keys(folded: Any, keys: Any) -> Any:
                b, k_b, v_b, j_b = keys

                def see() -> Any:
                    z, on, _ = tiles.scores(a, b, q_a, k_b, i_a, j_b)
                    first = b * tiles.k.size
                    at_lo = first + jax.lax.argmin(jnp.where(on, z, jnp.inf), z.ndim - 1, np.int32)[..., None]
                    at_hi = first + jax.lax.argmax(jnp.where(on, z, -jnp.inf), z.ndim - 1, np.int32)[..., None]
                    return _merge(folded, (state_of(z, on, v_b, clean), at_lo, at_hi))

                return tiles.where_seen(i_a, j_b, see, folded), None

            return None, jax.lax.scan(with_keys, folded, keys)[0]

        return jax.lax.scan(of_queries, None, (queries, folded))[1]

    rows = (tiles.q.count, *q.shape[:-2], tiles.q.size)
    none = jnp.zeros((*rows, 1), np.int32)
    folded = (empty_state(rows, v.shape[-1], _compute_dtype(q)), none, none)
    held = (tiles.k.split(k), tiles.k.split(v), tiles.k.split(j, 0, NOWHERE))

    def step(carry: Any, s: Any) -> Any:
        held, folded = carry
        return (ring.pass_on(held), fold(folded, held, s)), None  # independent: the compiler may overlap them

    (held, folded), _ = jax.lax.scan(step, (held, folded), _arange(ring.n - 1))
    state, at_lo, at_hi = fold(folded, held, ring.n - 1)
    o = attention_from_state(state, variant=ring.variant)
    mean = state.o0 / jnp.where(state.l == 0, 1, state.l)
    kept = _Rows(*map(tiles.q.join, (state.m, state.l, state.lo, at_lo, at_hi, o, mean)))
    return kept.o.astype(q.dtype), kept


def _merge(a: Any, b: Any) -> Any:
    (a, lo_a, hi_a), (b, lo_b, hi_b) = a, b
    return merge_states(a, b), jnp.where(b.lo < a.lo, lo_b, lo_a), jnp.where(b.m > a.m, hi_b, hi_a)


def _backward_of_device(
    ring: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, bias: Any, parameters: Any, mask: Any, i: Any, j: Any,
    kept: _Rows, do: jax.Array,
) -> tuple[Any, ...]:  # fmt: skip
    tiles = _Tiles(ring, q.shape[-2], k.shape[-2], bias, parameters, mask)
    c = _compute_dtype(q)
    do = jnp.where(kept.l == 0, 0, do.astype(c))  # a query without keys sends nothing, whatever it is sent (A6)
    D, S = ((do * x).sum(-1, keepdims=True) for x in (kept.o, kept.mean))
    clean = jnp.isfinite(do).all()
    q_ = jax.tree.map(tiles.q.split, (q, do, kept.m, kept.l, kept.lo, kept.at_lo, kept.at_hi, D, S))
    queries = (_arange(tiles.q.count), tiles.q.split(i, 0, NOWHERE), q_)

    def contribute(sums: Any, held: Any, dkv: Any, step: Any) -> Any:
        """Add what this device's queries send to the keys at hand, and what these send to its queries."""
        keys = (ring.source(step) * tiles.k.count + _arange(tiles.k.count), *held, *dkv)

        def of_keys(sums: Any, block: Any) -> Any:
            b, k_b, v_b, j_b, dk_b, dv_b = block
            dq, dbias, dparameters = sums

            def with_queries(carry: Any, block: Any) -> Any:
                dk, dv, dbias, dparameters = carry
                (a, i_a, (q_a, do_a, *row)), dq_a = block

                def see() -> Any:
                    z, on, pull = tiles.scores(a, b, q_a, k_b, i_a, j_b)
                    g = _matmul(_by_kv_head(do_a, v_b), v_b.astype(c).mT).reshape(z.shape)
                    y, dx = _tile_vjp(ring.variant, z, on, g, b * tiles.k.size, *row)
                    dx_ = _by_kv_head(dx, k_b)
                    # dx carries the NaN of participating entries, so what multiplies it may drop those of the others.
                    to_q = ring.scale * _matmul(dx_, _finite(k_b).astype(c)).reshape(q_a.shape)
                    to_k = ring.scale * _matmul(dx_.mT, _by_kv_head(_finite(q_a).astype(c), k_b))
                    to_v = weigh(_by_kv_head(y, v_b).mT, _by_kv_head(on, v_b).mT, _by_kv_head(do_a, v_b), clean)
                    to_bias, to_parameters = pull(dx)
                    return (to_q, to_k, to_v, to_bias, to_parameters)

                zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(see))
                to_q, to_k, to_v, to_bias, to_parameters = tiles.where_seen(i_a, j_b, see, zero)
                dbias = tiles.add(dbias, a, b, to_bias)
                dparameters = jax.tree.map(jnp.add, dparameters, to_parameters)
                return (dk + to_k, dv + to_v, dbias, dparameters), dq_a + to_q

            (dk_b, dv_b, dbias, dparameters), dq = jax.lax.scan(
                with_queries, (dk_b, dv_b, dbias, dparameters), (queries, dq)
            )
            return (dq, dbias, dparameters), (dk_b, dv_b)

        return jax.lax.scan(of_keys, sums, keys)

    held = (tiles.k.split(k), tiles.k.split(v), tiles.k.split(j, 0, NOWHERE))
    dkv = (jnp.zeros(held[0].shape, c), jnp.zeros(held[1].shape, c))
    dbias = None if bias is None else jnp.zeros(tiles.bias.shape, c)
    sums = (jnp.zeros(q_[0].shape, c), dbias, jax.tree.map(jnp.zeros_like, parameters))

    def step(carry: Any, s: Any) -> Any:
        sums, held, dkv = carry
        arriving = ring.pass_on(held)
        sums, dkv = contribute(sums, held, dkv, s)
        return (sums, arriving, ring.pass_on(dkv)), None

    (sums, held, dkv), _ = jax.lax.scan(step, (sums, held, dkv), _arange(ring.n - 1))
    (dq, dbias, dparameters), dkv = contribute(sums, held, dkv, ring.n - 1)
    dk, dv = map(tiles.k.join, ring.pass_on(dkv))
    if bias is not None:
        dbias = tiles.cut(dbias)
        if bias.shape[-2] == 1:  # every device's queries read the same bias
            dbias = jax.lax.psum(dbias, ring.axis_name)
        dbias = dbias.astype(bias.dtype)
    dparameters = jax.lax.psum(dparameters, ring.axis_name) if parameters else ()
    return tiles.q.join(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias, dparameters


def _tile_vjp(
    variant: str, z: jax.Array, on: jax.Array, g: jax.Array, first: jax.Array,
    m: jax.Array, l: jax.Array, lo: jax.Array, at_lo: jax.Array, at_hi: jax.Array, D: jax.Array, S: jax.Array,  # noqa: E741
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """y, and the gradient of the scores, by clauses G1 and G2 for rows of which a tile is a part from key ``first`` on.

    The extremal terms go to the keys that the forward pass noted: scores that are computed again need not be equal to
    the last bit.
    """
    p = jnp.where(on, jnp.exp(z - m) / jnp.where(l == 0, 1, l), 0)
    if variant == "product":
        y = z * p  # first, because g * z may overflow where p, and with it the gradient, is 0
        return y, jnp.where(on, (g * y - p * D) + g * p, 0)
    clamped, unit, R = _range(lo, m)
    a = (z * unit - clamped * unit) / R
    key = first + _arange(z.shape[-1])
    extremal = jnp.where((key == at_lo) & (lo < 0), D - S, 0) - jnp.where((key == at_hi) & (m > 0), D, 0)
    return jnp.where(on, a * p, 0), jnp.where(on, p * (g * a - D) + (g * p + extremal) / R * unit, 0)


class _Blocks:
    """A local length in blocks of at most BLOCK, an even number, so that the two chunks of a zig-zag fall apart."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.count = 2 * -(-length // (2 * BLOCK))
        self.size = -(-length // self.count)

    def fill(self, x: jax.Array, axis: int, value: Any = 0) -> jax.Array:
        return _pad(x, axis, self.count * self.size, value)

    def split(self, x: jax.Array, axis: int = -2, value: Any = 0) -> jax.Array:
        """The blocks, along a new first axis."""
        x, axis = self.fill(x, axis, value), axis % x.ndim
        return jnp.moveaxis(x.reshape(*x.shape[:axis], self.count, self.size, *x.shape[axis + 1 :]), axis, 0)

    def join(self, x: jax.Array) -> jax.Array:
        """The inverse of :meth:`split` for axis -2."""
        x = jnp.moveaxis(x, 0, -3)
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., : self.length, :]


class _Tiles:
    """The scores of one device's queries, tile by tile: query block a, key block b counted over all devices."""

    def __init__(self, ring: _Ring, tq: int, tk: int, bias: Any, parameters: Any, mask: Any) -> None:
        self.ring, self.parameters = ring, parameters
        self.q, self.k = _Blocks(tq), _Blocks(tk)
        self.bias, self.mask = self._fill(bias), self._fill(mask)

    def scores(self, a: Any, b: Any, q: Any, k: Any, i: Any, j: Any) -> tuple[jax.Array, jax.Array, Any]:
        """z and on of a tile, and the function from dx to the gradients of the bias's tile and of the parameters."""
        i, j = i[:, None], j[None]
        pull: Callable[[Any], Any]
        on = (i != NOWHERE) & (j != NOWHERE)
        if self.ring.is_causal:
            on &= j <= i
        if self.ring.bias is not None:
            # Where no score will be, the function is asked about a distance of 0: its derivative may not be NaN there.
            i, function = jnp.where(on, i, j), self.ring.bias
            bias, vjp = jax.vjp(lambda *parameters: function(i, j, *parameters), *self.parameters)
            pull = lambda dx: (None, vjp(_sum_to(dx, bias.shape).astype(bias.dtype)))  # noqa: E731
        else:
            bias = self._slice(self.bias, a, b)
            pull = lambda dx: (None if bias is None else _sum_to(dx, bias.shape), ())  # noqa: E731
        if self.mask is not None:
            on = on & self._slice(self.mask, a, b)
        return *scores(q, k, bias, on, self.ring.scale), pull

    def where_seen(self, i: Any, j: Any, see: Callable[[], Any], otherwise: Any) -> Any:
        """``see()`` unless causality excludes the whole tile: half of the work, in every step alike with a zig-zag."""
        if not self.ring.is_causal:
            return see()
        first = jnp.min(j, where=j != NOWHERE, initial=np.iinfo(np.int32).max)
        return jax.lax.cond(first <= i.max(), see, lambda: otherwise)

    def add(self, dbias: Any, a: Any, b: Any, tile: Any) -> Any:
        if dbias is None:
            return None
        start = self._start(dbias, a, b)
        old = jax.lax.dynamic_slice(dbias, start, tile.shape)
        return jax.lax.dynamic_update_slice(dbias, old + tile, start)

    def cut(self, dbias: jax.Array) -> jax.Array:
        """The inverse of the padding."""
        if dbias.shape[-1] > 1:
            dbias = dbias.reshape(*dbias.shape[:-1], self.ring.n, -1)[..., : self.k.length]
            dbias = dbias.reshape(*dbias.shape[:-2], -1)
        return dbias[..., : self.q.length, :]

    def _fill(self, x: Any) -> Any:
        """Columns of all devices' keys, each device's padded to its blocks; axes along which it repeats stay 1."""
        if x is None:
            return None
        if x.shape[-2] > 1:
            x = self.q.fill(x, -2)
        if x.shape[-1] > 1:
            x = self.k.fill(x.reshape(*x.shape[:-1], self.ring.n, -1), -1)
            x = x.reshape(*x.shape[:-2], -1)
        return x

    def _start(self, x: jax.Array, a: Any, b: Any) -> tuple[Any, ...]:
        row = a * self.q.size if x.shape[-2] > 1 else 0
        column = b * self.k.size if x.shape[-1] > 1 else 0
        return (*(jnp.int32(0),) * (x.ndim - 2), jnp.int32(row), jnp.int32(column))

    def _slice(self, x: Any, a: Any, b: Any) -> Any:
        if x is None:
            return None
        sizes = (min(x.shape[-2], self.q.size), min(x.shape[-1], self.k.size))
        return jax.lax.dynamic_slice(x, self._start(x, a, b), (*x.shape[:-2], *sizes))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _decode(
    options: tuple[Mesh, str, str, float], q: jax.Array, k: jax.Array, v: jax.Array, bias: Any, mask: Any
) -> jax.Array:
    mesh, axis_name, variant, scale = options

    def of_device(q: Any, k: Any, v: Any, bias: Any, mask: Any) -> jax.Array:
        state = attention_state(q, k, v, bias=bias, mask=mask, scale=scale)
        m = jax.lax.pmax(state.m, axis_name)
        l, o0, o1 = jax.lax.psum(rescaled(state, m), axis_name)  # noqa: E741
        merged = AttentionState(m, l, jax.lax.pmin(state.lo, axis_name), o0, o1)
        return attention_from_state(merged, variant=variant).astype(q.dtype)

    keys, whole = PartitionSpec(*(None,) * (q.ndim - 2), axis_name, None), PartitionSpec()
    columns = [
        None if x is None else whole if x.shape[-1] == 1 else PartitionSpec(*(None,) * (x.ndim - 1), axis_name)
        for x in (bias, mask)
    ]
    return jax.shard_map(
        of_device, mesh=mesh, in_specs=(whole, keys, keys, *columns), out_specs=whole, axis_names={axis_name},
        check_vma=False,
    )(q, k, v, bias, mask)  # fmt: skip


@_decode.defjvp
def _decode_jvp(*_: Any) -> Any:
    raise NotImplementedError("decode has no derivative; train with ring_attention")


_compiled_decode = jax.jit(_decode, static_argnums=0)


def _axis_size(mesh: Mesh, axis_name: str) -> int:
    if axis_name not in mesh.shape:
        raise ValueError(
            f"axis_name must be an axis of the mesh, {', '.join(map(repr, mesh.shape))}; got {axis_name!r}"
        )
    return int(mesh.shape[axis_name])


def _arange(n: int) -> jax.Array:
    return jnp.arange(n, dtype=np.int32)


def _compute_dtype(x: jax.Array) -> Any:
    return jnp.dtype(COMPUTE_DTYPE[dtype_name(x)])


def _pad(x: jax.Array, axis: int, multiple: int, value: Any = 0) -> jax.Array:
    """``x`` with its axis filled up to a multiple."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, width, constant_values=value) if width[axis][1] else x


def _pad_scores(x: jax.Array | None, rank: int, multiples: tuple[int, int]) -> jax.Array | None:
    """A bias or mask with all axes of the scores, rows and columns filled up; axes along which it repeats stay 1."""
    if x is None:
        return None
    x = x.reshape((1,) * (rank - x.ndim) + x.shape)
    for axis, multiple in zip((-2, -1), multiples, strict=True):
        if x.shape[axis] > 1:
            x = _pad(x, axis, multiple)
    return x


def _sum_to(dx: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sum over the axes along which an array of ``shape`` was broadcast to the shape of ``dx``."""
    dx = dx.sum(tuple(range(dx.ndim - len(shape))))
    return dx.sum(tuple(axis for axis, n in enumerate(shape) if n == 1 < dx.shape[axis]), keepdims=True)
