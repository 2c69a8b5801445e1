"""The PyTorch backend under the conformance suite."""

from typing import Any

import ml_dtypes
import numpy as np
import torch

from sa_softmax.backends.protocol import OPERATIONS, Array, Gradients
from sa_softmax.backends.torch import implementation, sa_attention, sa_softmax

__all__ = ["Adapter"]


class Adapter:
    """The public functions and their gradient by ``torch.autograd``, on every device that PyTorch has."""

    name = "torch"
    version = f"torch {torch.__version__}"
    operations: tuple[str, ...] = OPERATIONS
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")
    devices = (
        "cpu",
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
    )

    def __init__(self) -> None:
        running = {device: implementation(device) for device in self.devices}
        self.implementation = ", ".join(f"{device}: {name}" for device, name in running.items())
        # In the composition, a reduction's order depends on strides and thread count.
        self.bitwise_rows = "composition" not in running.values()

    def sa_softmax(self, x: Array, *, where: Array | None, device: str, **options: Any) -> Array:
        return _array(sa_softmax(_tensor(x, device), where=_optional(where, device), **options))

    def sa_softmax_vjp(self, x: Array, g: Array, *, where: Array | None, device: str, **options: Any) -> Array:
        x_ = _tensor(x, device).requires_grad_()
        y = sa_softmax(x_, where=_optional(where, device), **options)
        return _array(*torch.autograd.grad(y, x_, _tensor(g, device)))

    def sa_attention(
        self, q: Array, k: Array, v: Array, *, bias: Array | None, mask: Array | None, device: str, **options: Any
    ) -> Array:
        q_, k_, v_ = (_tensor(a, device) for a in (q, k, v))
        return _array(sa_attention(q_, k_, v_, bias=_optional(bias, device), mask=_optional(mask, device), **options))

    def sa_attention_vjp(
        self, q: Array, k: Array, v: Array, do: Array, *,
        bias: Array | None, mask: Array | None, device: str, **options: Any,
    ) -> Gradients:  # fmt: skip
        q_, k_, v_, *b = inputs = [_tensor(a, device).requires_grad_() for a in (q, k, v, bias) if a is not None]
        o = sa_attention(q_, k_, v_, bias=b[0] if b else None, mask=_optional(mask, device), **options)
        dq, dk, dv, *dbias = map(_array, torch.autograd.grad(o, inputs, _tensor(do, device)))
        return dq, dk, dv, dbias[0] if dbias else None


def _optional(a: Array | None, device: str) -> torch.Tensor | None:
    return None if a is None else _tensor(a, device)


def _tensor(a: Array, device: str) -> torch.Tensor:
    """A tensor with the values and, broadcast axes included, the strides of ``a``.

    Negative strides, which PyTorch lacks, and read-only memory, which it may not share, are copied.
    """
    core = a[..., *(slice(0, 1) if stride == 0 else slice(None) for stride in a.strides)]
    if not core.flags.writeable or any(stride < 0 for stride in core.strides):
        core = core.copy(order="K")
    if core.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(core.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(core)
    return tensor.expand(a.shape).to(device)


def _array(x: torch.Tensor) -> Array:
    x = x.detach().cpu()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
