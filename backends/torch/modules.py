"""Modules in the place of PyTorch's own: the row operation, multi-head attention, and a switch for whole models."""

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sa_softmax.backends.torch as ops
from sa_softmax._validate import check_variant
from sa_softmax.backends.torch._integration import participation, warn_of_zeros, weights

__all__ = ["SAMultiheadAttention", "SASoftmax", "convert_module"]


class SASoftmax(nn.Module):
    """:func:`sa_softmax` as a module, in the place of ``nn.Softmax``.

    The gradient of a row of zeros is 0 by convention under ``normalized`` (G5), because it grows like 1/R as the row
    approaches zero and has no finite limit. A model whose query or key projection starts at exactly zero, as some
    initialisation schemes have it, therefore stays dead: start it elsewhere, or use ``product``. The module does not
    warn of such rows: it would have to read values, which stalls a device and cannot be traced.

    Args:
        axis: the axis whose slices are the rows.
        variant: "normalized" or "product".

    Source: paper, SA-Softmax and its normalized variant; docs/spec.md, clauses R, C, D and G.
    """

    def __init__(self, axis: int = -1, variant: str = "normalized") -> None:
        super().__init__()
        self.axis = axis
        self.variant = variant

    def forward(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        """Arguments, result and errors as in :func:`sa_softmax`."""
        return ops.sa_softmax(x, axis=self.axis, variant=self.variant, where=where)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, variant={self.variant!r}"


class SAMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` over SA attention: its arguments, its parameters, and so its state dicts.

    O = concat_h(Y_h V_h) W_o + b_o, with Y_h = sa_softmax(Q_h K_h^T / sqrt(D) + mask) row by row, and Q, K and V the
    linear maps of query, key and value. Trained softmax weights load, but do not keep their quality. The variant is no
    part of a state dict.

    What differs from ``nn.MultiheadAttention``: a query whose keys are all masked gets Y = 0, not NaN; an additive mask
    entry of at most half the lowest number of its dtype excludes, as -inf does; ``dropout`` must be 0 in training; and
    nested tensors are refused.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            ``nn.MultiheadAttention``.
        variant: "normalized" or "product".

    Raises:
        ValueError: unknown variant.

    Source: paper, SA-Softmax in attention; docs/spec.md, clauses A and C7.
    """

    variant: str

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        *,
        variant: str = "normalized",
    ) -> None:
        check_variant(variant)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._become_sa(variant)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` over ``key`` and ``value``.

        Boolean masks follow ``nn.MultiheadAttention``: **True excludes**, the opposite of ``sa_attention``'s ``mask``.

        Args:
            query: (N, L, E) with ``batch_first``, (L, N, E) without, or (L, E).
            key: (N, S, kdim), (S, N, kdim) or (S, kdim).
            value: (N, S, vdim), (S, N, vdim) or (S, vdim).
            key_padding_mask: (N, S), or (S) without a batch; boolean or additive.
            need_weights: return Y too; that takes a matrix of L x S numbers per head, and the scores twice.
            attn_mask: (L, S) or (N * num_heads, L, S); boolean or additive.
            average_attn_weights: return the mean of Y over the heads.
            is_causal: the promise that ``attn_mask`` is the causal mask, which must be given, too. Nothing depends on
                it: what is excluded is what the masks say.

        Returns:
            The output, in the shape of ``query``, and with ``need_weights`` Y (N, L, S), or (N, num_heads, L, S) where
            it is not averaged, without N where there is no batch; otherwise None.

        Raises:
            TypeError: masks that are neither boolean nor floating.
            ValueError: dropout in training; shapes that do not fit; ``is_causal`` without ``attn_mask``; nested
                tensors.
        """
        if any(x.is_nested for x in (query, key, value)):
            raise ValueError(
                "SA attention does not take nested tensors. Pad them, and pass key_padding_mask; in "
                "nn.TransformerEncoder, set enable_nested_tensor=False"
            )
        if self.training and self.dropout > 0:
            raise ValueError(
                f"SA attention has no dropout; this {type(self).__name__} has dropout={self.dropout} and is in "
                "training. Set its attribute dropout to 0.0; the dropout of the layer around it may stay"
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is the causal mask, which must be given, too; got None")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))

        q, k, v = self._heads(query, key, value)
        mask, bias = self._masks(attn_mask, key_padding_mask, q, key.shape[1])
        if self.training and self.variant == "normalized" and bias is None:
            warn_of_zeros(self, q, k, "variant='product'")
        out = ops.sa_attention(q, k, v, variant=self.variant, bias=bias, mask=mask)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        y = None
        if need_weights:
            y = weights(q, k, bias, mask, None, self.variant)
            y = y.mean(1) if average_attn_weights else y
        if not batched:
            return out.squeeze(0), None if y is None else y.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), y

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, H, L, D), and k and v (N, H, S', D) with the learned and the zero entries at their ends."""
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        maps = separate if self.q_proj_weight is not None else self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), maps, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(len(v), 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, keys: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """What ``sa_attention`` takes as mask and bias, with the entries that :meth:`_heads` adds unmasked."""
        n, heads, length, _ = q.shape
        added = (self.bias_k is not None) + self.add_zero_attn
        views: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {
            "attn_mask": {(length, keys): (1, 1, length, keys), (n * heads, length, keys): (n, heads, length, keys)},
            "key_padding_mask": {(n, keys): (n, 1, 1, keys)},
        }
        mask: Tensor | None = None
        bias: Tensor | None = None
        for name, given in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if given is None:
                continue
            view = views[name].get(tuple(given.shape))
            if view is None:
                raise ValueError(
                    f"{name} must have shape {' or '.join(map(str, views[name]))}; got {tuple(given.shape)}. The batch "
                    f"is the {'first' if self.batch_first else 'second'} axis of query by {self.batch_first=}"
                )
            # PyTorch's True excludes here.
            keep, plus = participation(~given if given.dtype == torch.bool else given, name, q.dtype)
            keep = F.pad(keep.reshape(view), (0, added), value=True)
            mask = keep if mask is None else mask & keep
            if plus is not None:
                plus = F.pad(plus.reshape(view), (0, added))
                bias = plus if bias is None else bias + plus
        return mask, bias

    def _become_sa(self, variant: str) -> None:
        self.variant = variant
        # In evaluation mode nn.TransformerEncoderLayer takes the weights and computes softmax in a kernel of its own,
        # without calling this module, unless this attribute tells it that it cannot. Nothing here depends on it.
        self._qkv_same_embed_dim = False

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, variant={self.variant!r}"


def convert_module(module: nn.Module, variant: str = "normalized") -> nn.Module:
    """Make every ``nn.MultiheadAttention`` in ``module`` a :class:`SAMultiheadAttention`, in place.

    It serves ``nn.TransformerEncoderLayer``, ``nn.TransformerDecoderLayer``, ``nn.Transformer``, and whatever else is
    built from ``nn.MultiheadAttention``. Parameters, their names, hooks and attributes stay as they are, the dropout of
    the attention too, which must be 0 by the time the model trains. Modules that are SA already take the new variant.

    A model that was trained with softmax does not keep its quality: finetune it, or train it again. Every call warns
    so, since the weights cannot tell.

    Args:
        module: a model, a part of one, or an ``nn.MultiheadAttention`` itself.
        variant: "normalized" or "product".

    Returns:
        ``module``.

    Raises:
        ValueError: unknown variant; no ``nn.MultiheadAttention`` in the module; subclasses of it, whose own forward
            would be lost. The module is then left as it was.

    Source: docs/spec.md, clauses A.
    """
    check_variant(variant)
    name = type(module).__name__
    found = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]
    if not found:
        raise ValueError(
            f"{name} holds no nn.MultiheadAttention. Attention that is written otherwise must call "
            "sa_attention itself; sa_softmax.backends.torch.transformers.convert switches models of Transformers"
        )
    others = {type(m).__name__ for m in found if type(m) not in (nn.MultiheadAttention, SAMultiheadAttention)}
    if others:
        raise ValueError(
            f"{', '.join(sorted(others))} in {name} is a subclass of nn.MultiheadAttention, and what "
            "its forward does would be lost. Convert before wrapping or quantising, or replace it by hand"
        )
    for attention in found:
        # Not a new module: parameters, hooks, and whatever else holds this one stay as they are.
        attention.__class__ = SAMultiheadAttention
        SAMultiheadAttention._become_sa(attention, variant)  # type: ignore[arg-type]
    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            encoder.use_nested_tensor = False
    warnings.warn(
        f"{name} now runs SA attention ({variant}). A model that was trained with another attention does not keep its "
        "quality; finetune it or train it anew",
        stacklevel=2,
    )
    return module
