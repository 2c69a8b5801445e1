"""The functions of ``c_api.h``: one Python function for each, the library's errors as ValueError.

Arrays are what :func:`array` makes; whoever calls keeps their memory alive and has checked their dtypes. The
interpreter lock is released while a kernel runs, but for the short calls of small arrays.
"""

import ctypes
import importlib
from collections.abc import Iterable
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import lru_cache
from typing import Any

from sa_softmax_native import library_path

__all__ = ["array", "attention", "attention_vjp", "instruction_set", "row", "row_vjp", "short_calls", "use_openmp"]

DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
VARIANTS = {"normalized": 0, "product": 1}


def _short_calls() -> Any:
    try:
        return importlib.import_module("sa_softmax_native._rows")
    except ModuleNotFoundError:  # built without Python's headers
        return None


short_calls = _short_calls()
"""``rows_of_buffers`` and ``rows_at`` for contiguous rows, whose docstrings say what they take: ctypes takes longer to
make a call than a kernel to compute a short row. dtype and variant are the numbers above. None in a package that was
built without Python's headers."""


class _Array(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("rank", c_int64), ("shape", POINTER(c_int64)), ("strides", POINTER(c_int64)))


_library = ctypes.CDLL(library_path())
_library.sa_softmax_last_error.restype = _library.sa_softmax_instruction_set.restype = c_char_p


def _function(name: str, *arguments: Any) -> Any:
    function = getattr(_library, name)
    function.argtypes, function.restype, function.errcheck = arguments, c_int, _check
    return function


def _check(status: int, *_: Any) -> None:
    if status != 0:
        raise ValueError(_library.sa_softmax_last_error().decode())


_a = POINTER(_Array)
_row = _function("sa_softmax_row", c_int, c_int, c_int64, _a, _a, _a, c_int)
_row_vjp = _function("sa_softmax_row_vjp", c_int, c_int, c_int64, _a, _a, _a, _a, c_int)
_options = (c_int, c_int, c_int, c_int64, c_int64, c_double)
_attention = _function("sa_softmax_attention", *_options, *[_a] * 6, c_int)
_attention_vjp = _function("sa_softmax_attention_vjp", *_options, *[_a] * 10, c_int)


def array(data: int, shape: Iterable[int], strides: Iterable[int]) -> Any:
    """An array at the address ``data``; strides in elements, of any sign."""
    return _Array(data, *_layout(tuple(shape), tuple(strides)))


@lru_cache(maxsize=1024)  # making these takes as long as a call
def _layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, Any, Any]:
    lengths = c_int64 * len(shape)
    return len(shape), lengths(*shape), lengths(*strides)


def row(dtype: str, variant: str, axis: int, x: Any, where: Any, y: Any, threads: int) -> None:
    """y = the row operation of x along axis; where: bytes that broadcast to x, or None."""
    _row(DTYPES[dtype], VARIANTS[variant], axis, x, where, y, threads)


def row_vjp(dtype: str, variant: str, axis: int, x: Any, g: Any, where: Any, dx: Any, threads: int) -> None:
    """dx = the gradient of sum(g * row(x))."""
    _row_vjp(DTYPES[dtype], VARIANTS[variant], axis, x, g, where, dx, threads)


def attention(
    dtype: str, variant: str, offset: int | None, left: int, scale: float,
    q: Any, k: Any, v: Any, bias: Any, mask: Any, o: Any, threads: int,
) -> None:  # fmt: skip
    """o = attention. bias and mask may be None.

    Query i sees keys j <= i + offset, unless that is None, and, with left >= 0, j >= i + (offset or 0) - left.
    """
    options = DTYPES[dtype], VARIANTS[variant], offset is not None, offset or 0, left, scale
    _attention(*options, q, k, v, bias, mask, o, threads)


def attention_vjp(
    dtype: str, variant: str, offset: int | None, left: int, scale: float,
    q: Any, k: Any, v: Any, bias: Any, mask: Any, do: Any, dq: Any, dk: Any, dv: Any, dbias: Any, threads: int,
) -> None:  # fmt: skip
    """dq, dk, dv and, unless it is None, dbias = the gradients of sum(do * attention(q, k, v))."""
    options = DTYPES[dtype], VARIANTS[variant], offset is not None, offset or 0, left, scale
    _attention_vjp(*options, q, k, v, bias, mask, do, dq, dk, dv, dbias, threads)


def use_openmp(parallel: Any) -> None:
    """Let calls with ``threads`` below 0 run on as many threads of an OpenMP runtime: ``parallel`` is its
    GOMP_parallel, a function of ctypes."""
    _library.sa_softmax_use_openmp(parallel)


def instruction_set() -> str:
    """The instruction set of the kernels; ValueError if SA_SOFTMAX_INSTRUCTION_SET names one that cannot run here."""
    name: bytes | None = _library.sa_softmax_instruction_set()
    if name is None:
        raise ValueError(_library.sa_softmax_last_error().decode())
    return name.decode()
