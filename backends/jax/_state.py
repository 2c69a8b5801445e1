"""Partial states of attention on JAX arrays: what is known of a set of keys, so that disjoint sets merge (A11)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sa_softmax._validate import COMPUTE_DTYPE, check_attention, check_variant, dtype_name
from sa_softmax.backends.jax._attention import _by_kv_head, _finite, _matmul, causal_offset
from sa_softmax.backends.jax._softmax import JAX, _range

__all__ = ["AttentionState", "attention_from_state", "attention_state", "merge_states"]


class AttentionState(NamedTuple):
    """What attention over a set of keys must remember so that disjoint sets can be merged (spec clause A11).

    m: (..., Hq, Tq, 1) maximum score; l: sum exp(x - m); lo: minimum score;
    o0: (..., Hq, Tq, Dv) sum exp(x - m) v; o1: sum exp(x - m) (x - m) v. All in the compute dtype.
    An empty set of keys has the state (-inf, 0, +inf, 0, 0), the identity of the merge.
    """

    m: jax.Array
    l: jax.Array  # noqa: E741 - the literature's name
    lo: jax.Array
    o0: jax.Array
    o1: jax.Array


def attention_state(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    q_offset: int = 0,
    scale: float | None = None,
) -> AttentionState:
    """The partial state of attention over the keys at hand; arguments and errors as in :func:`sa_attention`.

    For keys that begin at position s of the whole sequence, pass q_offset - s. The state serves both variants. It is
    for inference: JAX's own derivative of it does not keep the conventions at ties and zeros (spec clauses G3, G4).
    """
    scale = check_attention(
        JAX, q, k, v,
        variant="normalized", bias=bias, mask=mask, is_causal=is_causal, q_offset=q_offset, scale=scale,
    )  # fmt: skip
    on, offset = mask, causal_offset(is_causal, q_offset)
    if offset is not None:
        causal = jnp.arange(k.shape[-2])[None] - jnp.arange(q.shape[-2])[:, None] <= offset
        on = causal if mask is None else causal & mask
    z, on = scores(q, k, bias, on, scale)
    return state_of(z, on, v, jnp.isfinite(v).all())


def merge_states(a: AttentionState, b: AttentionState) -> AttentionState:
    """The state over the union of two disjoint sets of keys. Associative and commutative (spec clause A11).

    m = max(m_a, m_b), w_i = exp(m_i - m): l = sum w_i l_i, o0 = sum w_i o0_i, o1 = sum w_i (o1_i + (m_i - m) o0_i).
    """
    m = jnp.maximum(a.m, b.m)
    (la, oa0, oa1), (lb, ob0, ob1) = rescaled(a, m), rescaled(b, m)
    return AttentionState(m, la + lb, jnp.minimum(a.lo, b.lo), oa0 + ob0, oa1 + ob1)


def attention_from_state(state: AttentionState, *, variant: str = "normalized") -> jax.Array:
    """The attention output (..., Hq, Tq, Dv), in the compute dtype, of a state over all keys.

    ``product``: (o1 + m o0) / l. ``normalized``: (o1 + (m - lo) o0) / (R l). Rows without keys, or R = 0, give 0.

    Raises:
        ValueError: unknown variant.
    """
    check_variant(variant)
    empty = state.l == 0
    l = jnp.where(empty, 1, state.l)  # noqa: E741
    m = jnp.where(empty, 0, state.m)
    o0, o1 = state.o0 / l, state.o1 / l
    if variant == "product":
        return o1 + m * o0
    lo, unit, R = _range(state.lo, state.m)
    return o1 / R * unit + (m * unit - lo * unit) / R * o0


def empty_state(rows: tuple[int, ...], dv: int, dtype: jnp.dtype) -> AttentionState:
    """The state of no keys for queries (..., Hq, Tq) = ``rows``."""
    one, out = (*rows, 1), jnp.zeros((*rows, dv), dtype)
    return AttentionState(
        jnp.full(one, -jnp.inf, dtype), jnp.zeros(one, dtype), jnp.full(one, jnp.inf, dtype), out, out
    )


def scores(
    q: jax.Array, k: jax.Array, bias: jax.Array | None, on: jax.Array | None, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The scores (..., Hq, Tq, Tk) in the compute dtype, 0 where they do not participate, and where they do."""
    c = COMPUTE_DTYPE[dtype_name(q)]
    x = scale * _matmul(_by_kv_head(q.astype(c), k), k.astype(c).mT).reshape(*q.shape[:-1], k.shape[-2])
    if bias is not None:
        x = x + bias.astype(c)
    seen = x != -jnp.inf  # select, never multiply: whatever an excluded entry holds ends here (C5)
    if on is not None:
        seen &= jnp.broadcast_to(on, x.shape)
    return jnp.where(seen, x, 0), seen


def state_of(z: jax.Array, on: jax.Array, v: jax.Array, clean: jax.Array) -> AttentionState:
    """The state of :func:`scores`; ``clean`` as in :func:`weigh`."""
    m = jnp.max(z, -1, keepdims=True, where=on, initial=-jnp.inf)
    lo = jnp.min(z, -1, keepdims=True, where=on, initial=jnp.inf)
    e = jnp.where(on, jnp.exp(z - m), 0)
    shifted = jnp.where(e == 0, 0, z - m)
    return AttentionState(m, e.sum(-1, keepdims=True), lo, weigh(e, on, v, clean), weigh(e * shifted, on, v, clean))


def rescaled(s: AttentionState, m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """l, o0 and o1 of a state, relative to a maximum ``m`` of more keys."""
    w = jnp.where(s.m == -jnp.inf, 0, jnp.exp(s.m - m))
    shift = jnp.where(w == 0, 0, s.m - m)
    return w * s.l, w * s.o0, w * (s.o1 + shift * s.o0)


def weigh(w: jax.Array, on: jax.Array, v: jax.Array, clean: jax.Array) -> jax.Array:
    """w @ v in which an excluded v never counts, not even as 0 * NaN (A6).

    ``clean`` says that all of v is finite: who calls this often looks once, and saves the matrix product that counts.
    """
    v = v.astype(w.dtype)
    o = _matmul(_by_kv_head(w, v), _finite(v))

    def poisoned() -> jax.Array:
        # Any precision counts zeros and ones right.
        count = jnp.matmul(_by_kv_head(on, v).astype(v.dtype), (~jnp.isfinite(v)).astype(v.dtype))
        return jnp.where(count > 0, jnp.nan, o)

    o = jax.lax.cond(clean, lambda: o, poisoned)
    return o.reshape(*w.shape[:-1], v.shape[-1])
