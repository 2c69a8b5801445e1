"""Attention over packed sequences: one after another in one tensor, cut by their cumulative lengths.

The definition is the attention of each sequence by itself, so a row's extrema are those of its own sequence. Where a
device has a kernel for it, no length is read on the host.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sa_softmax.backends.torch import _attention, _kernels, _row

__all__ = ["compose", "varlen"]


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    left: int, right: int, scale: float, variant: str,
) -> Tensor:  # fmt: skip
    arguments = q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, left, right, scale, variant
    if _kernels.supports("varlen", q, v):
        return _row.apply(_Varlen, _compose_first, *arguments)[0]
    return compose(*arguments)


def _compose_first(*arguments: Any) -> tuple[Tensor]:
    return (compose(*arguments),)


def compose(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    left: int, right: int, scale: float, variant: str,
) -> Tensor:  # fmt: skip
    parts = []
    stop = 0
    for (start, stop), (first, last) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        q_, k_, v_ = q[start:stop].transpose(0, 1), *(x[first:last].transpose(0, 1) for x in (k, v))
        Tq, Tk = q_.shape[1], k_.shape[1]
        # An open right side next to a closed left one ends behind the last key.
        window = _attention.window(Tk - Tq, left, Tq if right < 0 <= left else right)
        parts.append(_attention.sa_attention(q_, k_, v_, None, None, *window, scale, variant).transpose(0, 1))
    return torch.cat([*parts, q.new_zeros((q.shape[0] - stop, q.shape[1], v.shape[2]))])


class _Varlen(Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.sa_softmax.varlen(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.max_q, ctx.max_k, ctx.left, ctx.right, ctx.scale, ctx.variant = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        options = ctx.max_q, ctx.max_k, ctx.left, ctx.right, ctx.scale, ctx.variant
        dq, dk, dv = torch.ops.sa_softmax.varlen_vjp(*ctx.saved_tensors, do, *options)
        return dq, dk, dv, *[None] * 8
