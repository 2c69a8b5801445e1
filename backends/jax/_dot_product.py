"""Attention under the signature and with the layout of ``jax.nn.dot_product_attention``."""

import jax
import jax.numpy as jnp

from sa_softmax._validate import check_lengths, check_window
from sa_softmax.backends.jax._attention import sa_attention
from sa_softmax.backends.jax._softmax import JAX


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    variant: str = "normalized",
) -> jax.Array:
    """SA attention where ``jax.nn.dot_product_attention`` stands, by its names and its BTNH layout.

    Computes sa_softmax(scale * query key^T + bias) value for each head. Lengths and the window are masks, and so is
    causality (query t sees keys s <= t). Queries beyond their length, and others without keys, get 0.

    Args:
        query: (B, T, N, H) or (T, N, H). N is a multiple of K; query head n reads head n // (N // K).
        key: (B, S, K, H) or (S, K, H).
        value: (B, S, K, Hv) or (S, K, Hv).
        bias: broadcasts to (B, N, T, S) or (N, T, S); part of the scores, so it changes the self-adjusting factor too.
        mask: boolean, broadcasts likewise; True where a key takes part.
        scale: factor of the scores, 1/sqrt(H) by default.
        is_causal: query t sees keys s <= t only.
        query_seq_lengths: int32 (B,); the first so many queries of a sequence count. (1,) where there is no batch.
        key_value_seq_lengths: int32 (B,); likewise for keys and values.
        local_window_size: (left, right), or one number for both: query t sees keys t - left <= s <= t + right.
        implementation: None, "xla" or "pallas", as for ``sa_attention``.
        variant: "normalized" or "product".

    Returns:
        (B, T, N, Hv) or (T, N, Hv), in the dtype of ``query``.

    Raises:
        TypeError: not floating JAX arrays of one dtype (``bias`` may also have the compute dtype), a mask that is not
            boolean, lengths that are not int32.
        ValueError: shapes, heads, mask, bias, lengths or window that do not fit, unknown variant or implementation.

    Source: the layout and names are JAX's; paper, SA-Softmax in attention; spec clauses A.
    """
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    if len({len(shape) for shape in shapes.values()}) > 1 or len(query.shape) not in (3, 4):
        raise ValueError(
            f"query, key and value must all be (B, T, N, H), or all (T, N, H); got {shapes}. Add or remove a batch axis"
        )
    masks = [] if mask is None else [_like_scores(mask, query)]
    (T, S), batch = (query.shape[-3], key.shape[-3]), query.shape[0] if query.ndim == 4 else 1
    rows, columns = jnp.arange(T)[:, None], jnp.arange(S)[None]
    for name, lengths, positions in (
        ("query_seq_lengths", query_seq_lengths, rows),
        ("key_value_seq_lengths", key_value_seq_lengths, columns),
    ):
        if lengths is not None:
            check_lengths(JAX, name, lengths, batch)
            seen = positions < lengths[:, None, None, None]
            masks.append(seen if query.ndim == 4 else seen[0])
    if local_window_size is not None:
        left, right = check_window(local_window_size)
        masks.append((columns >= rows - left) & (columns <= rows + right))
    together = None
    for one in masks:
        together = one if together is None else jnp.logical_and(*jnp.broadcast_arrays(together, one))
    o = sa_attention(
        *(x.swapaxes(-3, -2) for x in (query, key, value)),
        variant=variant,
        bias=None if bias is None else _like_scores(bias, query),
        mask=together,
        is_causal=is_causal,
        scale=scale,
        implementation=implementation,
    )
    return o.swapaxes(-3, -2)


def _like_scores(x: jax.Array, query: jax.Array) -> jax.Array:
    """``x`` without the batch axis of length 1 that JAX admits beside arrays without one."""
    if query.ndim == 3 and x.ndim == 4 and x.shape[0] == 1:
        return x[0]
    return x
