"""SA attention behind the signature of ``mx.fast.scaled_dot_product_attention``."""

import mlx.core as mx

from sa_softmax._validate import COMPUTE_DTYPE, dtype_name
from sa_softmax.backends.mlx._attention import sa_attention


def scaled_dot_product_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: None = None,
    variant: str = "normalized",
) -> mx.array:
    """O = Y V, with Y = sa_softmax(scale * Q K^T + additive mask) row by row: mx.fast's function, with SA attention.

    Args:
        q: (B, Hq, Tq, D). Hq is a multiple of Hkv; keys and values are not repeated for grouped queries.
        k: (B, Hkv, Tk, D).
        v: (B, Hkv, Tk, Dv).
        scale: factor of the scores.
        mask: None; or boolean, True where a key participates; or floating, to be added to the scores; both broadcast to
            (B, Hq, Tq, Tk). An additive entry of -inf, or of at most half the lowest number of the mask's own dtype,
            excludes its key; every other one is bias, part of the scores and so of the self-adjusting factor. A
            mask of -1e9 in float32 or bfloat16 is therefore bias, and makes ``normalized`` plain softmax: pass
            booleans, -inf or mx.finfo(mask.dtype).min. Or the string "causal": the last query sees the last key,
            as in mx.fast and unlike ``sa_attention(is_causal=True)``, whose first query sees the first key only::

                Tq=2, Tk=4, "causal"
                      1 1 1 0
                      1 1 1 1

        sinks: attention sinks have no definition here; None.
        variant: "normalized" or "product".

    Returns:
        (B, Hq, Tq, Dv) in the dtype of ``q``; a query without participating keys gets 0.

    Raises:
        TypeError: not floating MLX arrays of one dtype, or a mask that is neither boolean nor floating.
        ValueError: sinks, another string as mask, shapes, heads or a mask that do not fit, unknown variant.

    Source: spec clauses A and C7.
    """
    if sinks is not None:
        raise ValueError("SA attention does not define attention sinks; got sinks=. Choose a model without them")
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"mask must be an array, None or 'causal'; got {mask!r}")
        return sa_attention(q, k, v, variant=variant, is_causal=True, q_offset=k.shape[-2] - q.shape[-2], scale=scale)
    bias = None
    if isinstance(mask, mx.array) and isinstance(q, mx.array) and mx.issubdtype(mask.dtype, mx.floating):
        excluded = mask <= mx.finfo(mask.dtype).min / 2
        dtype = COMPUTE_DTYPE.get(dtype_name(q), "float32")
        mask, bias = ~excluded, mx.where(excluded, 0, mask).astype(getattr(mx, dtype))
    return sa_attention(q, k, v, variant=variant, bias=bias, mask=mask, scale=scale)
