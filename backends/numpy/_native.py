"""NumPy arrays through the kernels of sa-softmax-native: arguments, results and errors are those of the reference."""

import os
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from sa_softmax_native import c_api

from sa_softmax import reference
from sa_softmax._validate import check_attention, check_softmax, dtype_name
from sa_softmax.reference import _NUMPY

__all__ = ["sa_attention", "sa_attention_vjp", "sa_softmax", "sa_softmax_vjp"]

Array = npt.NDArray[Any]


def _threads() -> int:
    given = os.environ.get("SA_SOFTMAX_NUM_THREADS")
    if given is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"SA_SOFTMAX_NUM_THREADS must be an integer of at least 1; got {given!r}. Unset it")
    return int(given)


_THREADS = _threads()


def sa_softmax(x: Array, *, axis: int = -1, variant: str = "normalized", where: Array | None = None) -> Array:
    if where is None and (short := _contiguous(x, axis, variant)) is not None:
        return short
    axis = check_softmax(_NUMPY, x, axis=axis, variant=variant, where=where)
    y = np.empty_like(x, subok=False)
    c_api.row(dtype_name(x), variant, axis, _array(x), _optional(where), _array(y), _THREADS)
    return y


def sa_softmax_vjp(
    x: Array, g: Array, *, axis: int = -1, variant: str = "normalized", where: Array | None = None
) -> Array:
    axis = check_softmax(_NUMPY, x, axis=axis, variant=variant, where=where, g=g)
    dx = np.empty_like(x, subok=False)
    c_api.row_vjp(dtype_name(x), variant, axis, _array(x), _array(g), _optional(where), _array(dx), _THREADS)
    return dx


def sa_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    variant: str = "normalized",
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    q_offset: int = 0,
    scale: float | None = None,
) -> Array:
    scale = check_attention(
        _NUMPY, q, k, v,
        variant=variant, bias=bias, mask=mask, is_causal=is_causal, q_offset=q_offset, scale=scale,
    )  # fmt: skip
    dtype = q.dtype
    q, k, v = _widened(bias, q, k, v)
    o = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    offset = _offset(q, k, is_causal, q_offset)
    c_api.attention(
        dtype_name(q), variant, offset, -1, scale,
        _array(q), _array(k), _array(v), _optional(bias), _optional(mask), _array(o), _THREADS,
    )  # fmt: skip
    return o.astype(dtype, copy=False)


def sa_attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    *,
    variant: str = "normalized",
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    q_offset: int = 0,
    scale: float | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    scale = check_attention(
        _NUMPY, q, k, v,
        variant=variant, bias=bias, mask=mask, is_causal=is_causal, q_offset=q_offset, scale=scale, do=do,
    )  # fmt: skip
    dtype = q.dtype
    q, k, v, do = _widened(bias, q, k, v, do)
    dq, dk, dv = (np.empty(a.shape, a.dtype) for a in (q, k, v))
    dbias = None if bias is None else np.empty(bias.shape, bias.dtype)
    offset = _offset(q, k, is_causal, q_offset)
    c_api.attention_vjp(
        dtype_name(q), variant, offset, -1, scale,
        _array(q), _array(k), _array(v), _optional(bias), _optional(mask), _array(do),
        _array(dq), _array(dk), _array(dv), _optional(dbias), _THREADS,
    )  # fmt: skip
    dq, dk, dv = (a.astype(dtype, copy=False) for a in (dq, dk, dv))
    return dq, dk, dv, dbias


for _function in (sa_softmax, sa_softmax_vjp, sa_attention, sa_attention_vjp):
    _function.__doc__ = getattr(reference, _function.__name__).__doc__


# What short calls take: arrays of bfloat16 have no buffers.
_CODES = {np.dtype(name): c_api.DTYPES[name] for name in ("float16", "float32", "float64")}
_LAST = -1  # compared by identity: -1.0 equals it, and is no axis


def _contiguous(x: Array, axis: int, variant: str) -> Array | None:
    """The result where nothing is to be checked, laid out or masked: a short row computes faster than that is done."""
    if c_api.short_calls is None or type(x) is not np.ndarray or axis is not _LAST or type(variant) is not str:
        return None
    dtype, number = _CODES.get(x.dtype), c_api.VARIANTS.get(variant)
    if dtype is None or number is None:
        return None
    y = np.empty_like(x)
    return y if c_api.short_calls.rows_of_buffers(dtype, number, _THREADS, x, y) else None


def _widened(bias: Array | None, *arrays: Array) -> tuple[Array, ...]:
    """``arrays`` in the dtype of ``bias``: a wider one widens all, and the result is rounded once."""
    return arrays if bias is None else tuple(a.astype(bias.dtype, copy=False) for a in arrays)


def _offset(q: Array, k: Array, is_causal: bool, q_offset: int) -> int | None:
    """That of the causal mask, None without one; beyond these bounds it changes nothing, and any integer may come."""
    return max(-q.shape[-2], min(q_offset, k.shape[-2])) if is_causal else None


def _array(a: Array) -> Any:
    strides = _in_elements(a.strides, a.itemsize)
    if strides is None or not a.flags.aligned:  # fields of records
        return _array(a.copy())
    described = c_api.array(a.ctypes.data, a.shape, strides)
    described.owner = a
    return described


@lru_cache(maxsize=1024)
def _in_elements(strides: tuple[int, ...], size: int) -> tuple[int, ...] | None:
    return None if any(stride % size for stride in strides) else tuple(stride // size for stride in strides)


def _optional(a: Array | None) -> Any:
    return None if a is None else _array(a)
