"""SA attention inside the attention layers of Flax: ``attention_fn`` for Linen and NNX.

Every argument that the layers pass is named: Linen hands over only those that it finds in the signature, so a function
with ``**kwargs`` would never see the mask.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax.linen.dtypes import promote_dtype as promote

from sa_softmax._validate import COMPUTE_DTYPE, dtype_name
from sa_softmax.backends.jax import sa_attention

__all__ = ["attention_fn"]


def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Any] | None = None,
    qk_attn_weights_einsum: Callable[..., Any] | None = None,
    attn_weights_value_einsum: Callable[..., Any] | None = None,
    promote_dtype: Callable[..., Any] = promote,
    is_causal: bool = False,
    variant: str = "normalized",
    implementation: str | None = None,
) -> jax.Array:
    """What ``nn.MultiHeadDotProductAttention`` and ``nnx.MultiHeadAttention`` take as ``attention_fn``.

    Computes sa_softmax(query key^T / sqrt(dim) + bias) value for each head. For the other variant pass
    ``functools.partial(attention_fn, variant="product")``.

    Args:
        query: (..., q, heads, dim).
        key: (..., kv, kv_heads, dim), heads a multiple of kv_heads.
        value: (..., kv, kv_heads, value_dim).
        bias: broadcasts to (..., heads, q, kv); part of the scores.
        mask: broadcasts likewise; a key takes part where it is not 0, whatever its dtype (``nn.make_causal_mask``
            gives float32).
        deterministic: must be True if dropout_rate is not 0: there are no weights to drop.
        dtype: the dtype of the computation, by default that of the arrays, promoted.
        is_causal: query i sees keys j <= i only.
        variant, implementation: as for ``sa_attention``.
        broadcast_dropout, dropout_rng, precision, force_fp32_for_softmax: without effect. There is no dropout, products
            are of full precision, and 16-bit arrays are computed in float32.

    Returns:
        (..., q, heads, value_dim).

    Raises:
        NotImplementedError: dropout, weights to be sown (``module``), products of one's own (the einsum arguments).
        TypeError, ValueError: as ``sa_attention``.
    """
    if dropout_rate > 0 and not deterministic:
        raise NotImplementedError(
            f"SA attention computes no weights that dropout could act on; got {dropout_rate=} without deterministic. "
            "Pass deterministic=True, or dropout_rate=0 and a Dropout after the layer"
        )
    if module is not None:
        raise NotImplementedError("SA attention computes no weights that could be sown; call with sow_weights=False")
    if any((einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum)):
        raise NotImplementedError(
            "SA attention does not take the products of other libraries (einsum_dot_general, "
            "qk_attn_weights_einsum, attn_weights_value_einsum); leave them out"
        )
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    o = sa_attention(
        *(x.swapaxes(-3, -2) for x in (query, key, value)),
        variant=variant,
        bias=None if bias is None else bias.astype(COMPUTE_DTYPE[dtype_name(query)]),
        mask=None if mask is None else mask != 0,
        is_causal=is_causal,
        implementation=implementation,
    )
    return o.swapaxes(-3, -2)
