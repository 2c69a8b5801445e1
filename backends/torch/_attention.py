"""Attention over the row operation on PyTorch tensors, with its gradient in closed form (spec clause A7).

The two forms of the derivative are those of :mod:`sa_softmax.backends.torch._row`. The closed form keeps the inputs
alone, and computes the Tq x Tk scores again in the backward pass.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

from sa_softmax.backends.torch import _kernels, _row

__all__ = ["autocast", "combined_mask", "compose", "sa_attention", "window"]


def sa_attention(
    q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, mask: Tensor | None, offset: int | None, left: int, scale: float, variant: str,
) -> Tensor:  # fmt: skip
    """``offset`` and ``left`` as :func:`window` gives them."""
    if (kernel := _kernels.direct("attention", q, k, v, bias, mask)) is not None:
        return cast("Tensor", kernel(q, k, v, bias, mask, offset, left, scale, variant)[0])
    return _row.apply(_Attention, _compose_first, q, k, v, bias, mask, offset, left, scale, variant)[0]


def window(shift: int, left: int, right: int) -> tuple[int | None, int]:
    """``offset`` and ``left`` of the operators where query i sees keys i + shift - left to i + shift + right.

    -1 leaves a side open. Where the right one is, they know no shift, which must be 0 then.
    """
    if right < 0:
        return None, left
    return shift + right, left + right if left >= 0 else -1


def autocast(x: Any) -> Any:
    """``x`` as autocast hands it to ``scaled_dot_product_attention``."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 and _autocasts(x.device):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast would round the operands of the matrix products, which have the compute dtype (A10)."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()


def compose(
    q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, mask: Tensor | None, offset: int | None, left: int, scale: float, variant: str,
) -> Tensor:  # fmt: skip
    with _no_autocast(q.device):
        s = _scores(q, k, v, bias, mask, offset, left, scale)
        y = _row.value(s.z, s.on, _row.softmax(s.z, s.on, -1), -1, variant)
        o = _weigh(_fold(y, k), _fold(s.on, k), s.v)
    return _unfold(o, q).to(q.dtype)


def _compose_first(*args: Any) -> tuple[Tensor]:
    return (compose(*args),)


def compose_vjp(
    q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, mask: Tensor | None, do: Tensor,
    offset: int | None, left: int, scale: float, variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    with _no_autocast(q.device):
        s = _scores(q, k, v, bias, mask, offset, left, scale)
        do = _fold(do.to(s.z.dtype), k)
        p = _row.softmax(s.z, s.on, -1)
        y = _fold(_row.value(s.z, s.on, p, -1, variant), k)
        dx = _row.vjp(s.z, s.on, p, _unfold(do @ s.v.mT, q), -1, variant)
        dx_ = _fold(dx, k)
        # dx carries the NaN of participating entries, so what multiplies it may drop the non-finite of the others.
        dq = _unfold(scale * (dx_ @ _finite(s.k)), q)
        dk = scale * (dx_.mT @ _finite(s.q))
        dv = _weigh(y.mT, _fold(s.on, k).mT, do)
    # Whether bias needs a gradient or not: Dynamo may say that it does not where torch.func asks for it.
    dbias = None if bias is None else dx.sum_to_size(bias.shape).to(bias.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


class _Attention(Function):
    """o, and the kernel's stats, which are kept where the kernel of the backward pass reads them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor,
        bias: Tensor | None, mask: Tensor | None, offset: int | None, left: int, scale: float, variant: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if not _kernels.supports("attention", q, v):
            return compose(q, k, v, bias, mask, offset, left, scale, variant), q.new_empty(0)
        return torch.ops.sa_softmax.attention(q, k, v, bias, mask, offset, left, scale, variant)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.offset, ctx.left, ctx.scale, ctx.variant = inputs
        reads = _kernels.reads_output(inputs[0], inputs[2])
        ctx.save_for_backward(*tensors, *(output if reads else (None, None)))

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, mask, o, stats = ctx.saved_tensors
        options = ctx.offset, ctx.left, ctx.scale, ctx.variant
        if not _kernels.supports("attention_vjp", q, v):
            gradients = compose_vjp(q, k, v, bias, mask, do, *options)
        else:
            if o is None:
                o = stats = q.new_empty(0)
            gradients = _row.apply(_AttentionVjp, _compose_vjp, q, k, v, bias, mask, o, stats, do, *options)
        dq, dk, dv, dbias = gradients
        return dq, dk, dv, dbias if bias is not None else None, *[None] * 5


def _compose_vjp(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, o: Tensor, stats: Tensor, *rest: Any
) -> Any:  # fmt: skip
    return compose_vjp(q, k, v, bias, mask, *rest)


class _AttentionVjp(Function):
    """The gradient by kernels; its own derivatives are those of the closed form, of which o and stats are no part."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, o: Tensor, stats: Tensor, do: Tensor,
        offset: int | None, left: int, scale: float, variant: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return torch.ops.sa_softmax.attention_vjp(q, k, v, bias, mask, o, stats, do, offset, left, scale, variant)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, k, v, bias, mask, _, _, do, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, bias, mask, do)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, mask, do = ctx.saved_tensors

        def gradients(q: Tensor, k: Tensor, v: Tensor, do: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
            dq, dk, dv, dbias = compose_vjp(q, k, v, bias[0] if bias else None, mask, do, *ctx.options)
            return (dq, dk, dv) if dbias is None else (dq, dk, dv, dbias)

        inputs = (q, k, v, do) if bias is None else (q, k, v, do, bias)
        dq, dk, dv, ddo, *dbias = torch.func.vjp(gradients, *inputs)[1](tangents[: len(inputs) - 1])
        return dq, dk, dv, dbias[0] if dbias else None, None, None, None, ddo, *[None] * 4


class _Scores(NamedTuple):
    """In the compute dtype: q folded, k, v, and the scores z (..., Hq, Tq, Tk), 0 where ``on`` is false."""

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    on: Tensor


def _scores(
    q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, mask: Tensor | None, offset: int | None, left: int, scale: float,
) -> _Scores:  # fmt: skip
    c = torch.promote_types(q.dtype, torch.float32)
    keep = combined_mask(q, k, mask, offset, left)
    q_, k_, v_ = _fold(q.to(c), k), k.to(c), v.to(c)
    if keep is not None:
        # A key that no query sees, of padding say, must not meet even the derivatives of the matrix products (A6).
        seen = _fold(keep.expand(*q.shape[:-1], k.shape[-2]), k).any(-2).unsqueeze(-1)
        k_, v_ = torch.where(seen, k_, 0), torch.where(seen, v_, 0)
    x = _unfold((scale * q_) @ k_.mT, q)
    if bias is not None:
        x = x + bias.to(c)
    return _Scores(q_, k_, v_, *_row.participating(x, keep))


def combined_mask(q: Tensor, k: Tensor, mask: Tensor | None, offset: int | None, left: int) -> Tensor | None:
    """``mask``, causality and the window as one mask, or None where there is none of them."""
    if offset is None and left < 0:
        return mask
    # Compared by the distance, because a position plus an offset may overflow.
    ahead = torch.arange(k.shape[-2], device=q.device) - torch.arange(q.shape[-2], device=q.device).unsqueeze(-1)
    conditions = [] if mask is None else [mask]
    if offset is not None:
        conditions.append(ahead <= offset)
    if left >= 0:
        conditions.append(ahead >= (0 if offset is None else offset) - left)
    return reduce(torch.logical_and, conditions)


def _fold(x: Tensor, k: Tensor) -> Tensor:
    """(..., Hq, Tq, n) as (..., Hkv, G Tq, n): the queries of a group in one matrix, so that k is not repeated (A3)."""
    *batch, hq, tq, n = x.shape
    hkv = k.shape[-3]
    return x.reshape(*batch, hkv, hq // hkv * tq, n)


def _unfold(x: Tensor, q: Tensor) -> Tensor:
    *batch, hkv, _, n = x.shape
    hq, tq = q.shape[-3:-1]
    # In two steps, because torch.export cannot prove that one is a view.
    return x.reshape(*batch, hkv, hq // hkv, tq, n).reshape(*batch, hq, tq, n)


def _weigh(w: Tensor, on: Tensor, v: Tensor) -> Tensor:
    """w @ v in which an excluded v never counts, not even as 0 * NaN (A6)."""
    poison = on.to(w.dtype) @ (~torch.isfinite(v)).to(w.dtype)
    # A factor rather than a selection, so that what PyTorch derives from this is NaN, too.
    return (w @ _finite(v)) * torch.where(poison > 0, math.nan, torch.ones_like(poison))


def _finite(x: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x), x, 0)
