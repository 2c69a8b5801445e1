"""CPU tensors through the kernels of sa-softmax-native, on the threads of PyTorch's own operators, or on as many."""

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sa_softmax_native import c_api
from torch import Tensor

from sa_softmax.backends.torch._kernels import empty_attention

__all__ = ["READS_OUTPUT", "attention", "attention_vjp", "row", "row_vjp", "short_row", "threads"]

READS_OUTPUT = False
"""The gradient of attention computes the scores again."""

_NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
_NUMBERS = {dtype: c_api.DTYPES[name] for dtype, name in _NAMES.items()}


def _shares_threads() -> bool:
    """Whether the kernels can run on PyTorch's own threads. They wait for work busily: others would share processors
    with them for some milliseconds after each operator."""
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return False
    try:  # the one among the libraries that this one was linked with
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return False
    c_api.use_openmp(parallel)
    return True


_SIGN = -1 if _shares_threads() else 1


def threads() -> int:
    """What the kernels take for the threads of PyTorch's operators."""
    return _SIGN * torch.get_num_threads()


def row(x: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    y = torch.empty_like(x)
    if c_api.short_calls is not None and where is None and axis == x.dim() - 1 and x.is_contiguous():
        numbers = _NUMBERS[x.dtype], c_api.VARIANTS[variant], threads()
        c_api.short_calls.rows_at(*numbers, x.numel(), x.size(axis), x.data_ptr(), y.data_ptr())
        return y
    c_api.row(_NAMES[x.dtype], variant, axis, _array(x), _optional(where), _array(y), threads())
    return y


def short_row(*followed: Any) -> Callable[[str, Tensor], Tensor | None] | None:
    """Rows along the last axis without a line of Python, where nothing follows the tensor: ``followed`` is what to ask.
    The function takes the variant and x, and returns None where it is not for it to compute. It reads tensors through
    DLPack's exchange of functions; older releases of PyTorch have none, and no such way."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if c_api.short_calls is None or exchange is None or not c_api.short_calls.speaks_dlpack(exchange):
        return None
    how = (Tensor, exchange, *followed, c_api.VARIANTS, threads, torch.empty_like)
    return partial(c_api.short_calls.rows_of_tensor, how)


def row_vjp(x: Tensor, g: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    dx = torch.empty_like(x)
    x_, g_, where_, dx_ = _array(x), _array(g), _optional(where), _array(dx)
    c_api.row_vjp(_NAMES[x.dtype], variant, axis, x_, g_, where_, dx_, threads())
    return dx


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None,
    offset: int | None, left: int, scale: float, variant: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = q.dtype
    q, k, v = _widened(bias, q, k, v)
    o, stats = empty_attention(q, v)
    c_api.attention(
        _NAMES[q.dtype], variant, offset, left, scale,
        _array(q), _array(k), _array(v), _optional(bias), _optional(mask), _array(o), threads(),
    )  # fmt: skip
    return o.to(dtype), stats


def attention_vjp(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, o: Tensor, stats: Tensor, do: Tensor,
    offset: int | None, left: int, scale: float, variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = q.dtype
    q, k, v, do = _widened(bias, q, k, v, do)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dbias = None if bias is None else bias.new_empty(bias.shape)
    c_api.attention_vjp(
        _NAMES[q.dtype], variant, offset, left, scale,
        _array(q), _array(k), _array(v), _optional(bias), _optional(mask), _array(do),
        _array(dq), _array(dk), _array(dv), _optional(dbias), threads(),
    )  # fmt: skip
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), q.new_empty(0) if dbias is None else dbias


def _widened(bias: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in the dtype of ``bias``: one in the compute dtype widens all, and the result is rounded once."""
    return tensors if bias is None else tuple(x.to(bias.dtype) for x in tensors)


def _array(x: Tensor) -> Any:
    return c_api.array(x.data_ptr(), x.shape, x.stride())


def _optional(x: Tensor | None) -> Any:
    return None if x is None else _array(x)
