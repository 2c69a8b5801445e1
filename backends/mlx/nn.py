"""Self-Adjust Softmax, and multi-head attention with it, as modules of ``mlx.nn``."""

import math
import warnings

import mlx.core as mx
import mlx.nn as nn

from sa_softmax.backends.mlx._sdpa import scaled_dot_product_attention
from sa_softmax.backends.mlx._softmax import sa_softmax

__all__ = ["SAMultiHeadAttention", "SASoftmax"]


class SASoftmax(nn.Module):  # type: ignore[misc, name-defined]  # mlx.nn re-exports by star
    """Self-Adjust Softmax along ``axis``, without parameters.

    ``normalized``: y = (x - lo) / (hi - lo) * softmax(x) with lo = min(0, min x), hi = max(0, max x); 0 where
    hi = lo. ``product``: y = x * softmax(x).

    Under ``normalized`` the gradient at hi = lo, a row of zeros, is 0 by convention (spec clause G5): a model whose
    query or key projection starts at exactly zero stays dead. Start both at random, or choose ``product``.

    Args:
        axis: the axis whose slices are the rows.
        variant: "normalized" or "product".

    Call it with ``x`` and optionally ``where``; shapes, dtypes and errors as in
    :func:`sa_softmax.backends.mlx.sa_softmax`. Source: paper; spec clauses R, C, D and G.
    """

    def __init__(self, axis: int = -1, variant: str = "normalized") -> None:
        super().__init__()
        self.axis = axis
        self.variant = variant

    def __call__(self, x: mx.array, where: mx.array | None = None) -> mx.array:
        return sa_softmax(x, axis=self.axis, variant=self.variant, where=where)

    def _extra_repr(self) -> str:
        return f"axis={self.axis}, variant={self.variant!r}"


class SAMultiHeadAttention(nn.MultiHeadAttention):  # type: ignore[misc, name-defined]
    """``mlx.nn.MultiHeadAttention`` with SA attention: the same arguments, parameters and names of parameters.

    Its weights load into this module and the other way round. Those that were trained with softmax do not keep their
    quality: finetune them. A query whose keys are all masked gets 0 from the attention.

    Under ``normalized`` scores that are all 0 send no gradient to queries and keys (spec clause G5): a query or key
    projection that starts at exactly zero never learns. The module warns of one at its first call in training, except
    inside mx.compile and mx.vmap, where no value can be seen.

    Args:
        dims: dimension of the model, the default of all others; a multiple of ``num_heads``.
        num_heads: number of heads.
        query_input_dims, key_input_dims, value_input_dims, value_dims, value_output_dims, bias: as in
            ``mlx.nn.MultiHeadAttention``.
        variant: "normalized" or "product".

    Call it with ``queries`` (B, Tq, query_input_dims), ``keys`` (B, Tk, key_input_dims), ``values``
    (B, Tk, value_input_dims) and optionally ``mask``, which takes the forms of
    :func:`sa_softmax.backends.mlx.scaled_dot_product_attention`: boolean, additive (what
    ``create_additive_causal_mask`` makes, say), or "causal", which lets the last query see the last key. Returns
    (B, Tq, value_output_dims).

    Raises:
        ValueError: dims that are no multiple of num_heads, unknown variant (when called), and like TypeError what the
            function raises.

    Source: paper; spec clauses A and C7.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        query_input_dims: int | None = None,
        key_input_dims: int | None = None,
        value_input_dims: int | None = None,
        value_dims: int | None = None,
        value_output_dims: int | None = None,
        bias: bool = False,
        *,
        variant: str = "normalized",
    ) -> None:
        super().__init__(
            dims, num_heads, query_input_dims, key_input_dims, value_input_dims, value_dims, value_output_dims, bias
        )
        self.variant = variant
        self._zeros_sought = False

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None = None
    ) -> mx.array:
        q = self._by_head(self.query_proj(queries))
        k = self._by_head(self.key_proj(keys))
        v = self._by_head(self.value_proj(values))
        if self.training and self.variant == "normalized" and not self._zeros_sought:
            self._warn_of_zeros(query=q, key=k)
        o = scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(q.shape[-1]), mask=mask, variant=self.variant)
        return self.out_proj(o.transpose(0, 2, 1, 3).flatten(-2, -1))

    def _by_head(self, x: mx.array) -> mx.array:
        return mx.unflatten(x, -1, (self.num_heads, -1)).transpose(0, 2, 1, 3)

    def _warn_of_zeros(self, **projected: mx.array) -> None:
        try:
            zeros = [name for name, x in projected.items() if x.size > 0 and not x.any().item()]
        except ValueError:  # inside mx.compile or mx.vmap
            return
        self._zeros_sought = True
        for name in zeros:
            warnings.warn(
                f"every {name} of {type(self).__name__} is exactly 0, as after a projection that starts at zero. Under "
                "the normalized variant the gradient of scores that are all 0 is 0 (docs/spec.md, G5), so unless the "
                "mask adds to the scores this attention will not learn. Initialise the projection at random, or choose "
                "variant='product'",
                stacklevel=3,
            )
