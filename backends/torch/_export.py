"""The operations as single operators of PyTorch, which torch.export keeps whole and ONNX export finds again.

They serve under torch.export alone: compiled and eager code needs no operator, and forward mode and torch.func work on
the composition as it is. What PyTorch derives from them when an exported program is trained follows the same clauses.
A program that was saved needs this module imported before it is loaded.
"""

from typing import Any

import torch
from torch import Tensor

from sa_softmax.backends.torch import _attention, _row

__all__ = ["sa_attention", "sa_softmax"]


def _compose(
    q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, mask: Tensor | None, offset: int | None, scale: float, variant: str,
) -> Tensor:  # fmt: skip
    return _attention.compose(q, k, v, bias, mask, offset, -1, scale, variant)


_LIBRARY: Any = torch.library.Library("sa_softmax", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("sa_softmax(Tensor x, Tensor? where, int axis, str variant) -> Tensor")
_LIBRARY.define(
    "sa_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, SymInt? offset, float scale, str variant)"
    " -> Tensor"
)
_LIBRARY.impl("sa_softmax", _row.compose, "CompositeImplicitAutograd")
_LIBRARY.impl("sa_attention", _compose, "CompositeImplicitAutograd")


def sa_softmax(x: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    return torch.ops.sa_softmax.sa_softmax(x, where, axis, variant)


def sa_attention(
    q: Tensor, k: Tensor, v: Tensor,
    bias: Tensor | None, mask: Tensor | None, offset: int | None, left: int, scale: float, variant: str,
) -> Tensor:  # fmt: skip
    if left >= 0:  # a mask like any other; causality stays an option, from which kernels see which keys to leave out
        mask = _attention.combined_mask(q, k, mask, offset, left)
    return torch.ops.sa_softmax.sa_attention(q, k, v, bias, mask, offset, scale, variant)
