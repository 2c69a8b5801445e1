"""Triton kernels behind the operators of :mod:`sa_softmax.backends.torch._kernels`. Not run on a GPU yet.

The tests run them in Triton's interpreter, and :mod:`sa_softmax.backends.torch._triton.compile_check` compiles them for
GPUs that need not be there. Triton is imported when a kernel is first called.
"""

import torch
from torch import Tensor

__all__ = [
    "NAME",
    "READS_OUTPUT",
    "attention",
    "attention_state",
    "attention_vjp",
    "row",
    "row_vjp",
    "supports",
    "varlen",
    "varlen_vjp",
]

NAME = "triton (not run on a GPU yet)"
READS_OUTPUT = True


def row(x: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    from sa_softmax.backends.torch._triton import rows

    return rows.row(x, where, axis, variant)


def row_vjp(x: Tensor, g: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    from sa_softmax.backends.torch._triton import rows

    return rows.row_vjp(x, g, where, axis, variant)


def supports(operator: str, x: Tensor, *others: Tensor) -> bool:
    """Attention takes head dimensions of at most 256, and no float64."""
    if operator.startswith("row"):
        return True
    return x.dtype != torch.float64 and max(y.shape[-1] for y in (x, *others)) <= 256


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None,
    offset: int | None, left: int, scale: float, variant: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from sa_softmax.backends.torch._triton import attention_launch

    return attention_launch.attention(q, k, v, bias, mask, offset, left, scale, variant)


def attention_vjp(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, o: Tensor, stats: Tensor, do: Tensor,
    offset: int | None, left: int, scale: float, variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from sa_softmax.backends.torch._triton import attention_launch

    return attention_launch.attention_vjp(q, k, v, bias, mask, o, stats, do, offset, left, scale, variant)


def attention_state(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, offset: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from sa_softmax.backends.torch._triton import attention_launch

    return attention_launch.attention_state(q, k, v, bias, mask, offset, scale)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    left: int, right: int, scale: float, variant: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from sa_softmax.backends.torch._triton import attention_launch

    return attention_launch.varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, left, right, scale, variant)


def varlen_vjp(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, o: Tensor, stats: Tensor, do: Tensor,
    max_q: int, max_k: int, left: int, right: int, scale: float, variant: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from sa_softmax.backends.torch._triton import attention_launch

    return attention_launch.varlen_vjp(
        q, k, v, cu_seq_q, cu_seq_k, o, stats, do, max_q, max_k, left, right, scale, variant
    )
