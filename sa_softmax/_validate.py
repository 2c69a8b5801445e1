"""The one validation of the public functions; every backend runs it before it computes.

Checks read shapes, dtypes and types only, never values, so they cost nothing on a device and hold under tracing.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

VARIANTS = ("product", "normalized")
DTYPES = ("float16", "bfloat16", "float32", "float64")
COMPUTE_DTYPE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


@dataclass(frozen=True)
class ArrayKind:
    """What validation must know of a framework's arrays.

    ``cls`` is the array class, ``convert`` names the call that makes one, ``device`` reads an array's device where
    arrays of one framework can live apart, ``refused`` holds subclasses whose meaning would be lost,
    ``integers`` the types of integers that must not be turned into a Python int, since tracing would make it a
    constant.
    """

    cls: type | tuple[type, ...]
    convert: str
    device: Callable[[Any], Any] | None = None
    refused: tuple[type, ...] = ()
    integers: tuple[type, ...] = (int,)


def dtype_name(x: Any) -> str:
    """The dtype's name without its framework's prefix: ``torch.float32`` and ``mlx.core.float32`` are ``float32``."""
    return _numpy_name(x.dtype) if isinstance(x.dtype, np.dtype) else str(x.dtype).rsplit(".", 1)[-1]


@cache  # NumPy takes longer to make a name than all other checks together
def _numpy_name(dtype: np.dtype[Any]) -> str:
    return str(dtype)


def check_softmax(kind: ArrayKind, x: Any, *, axis: int, variant: str, where: Any, **like_x: Any) -> int:
    """Check the arguments of the row operation and return ``axis`` counted from the front.

    ``like_x`` are further arrays that share the shape and dtype of ``x`` (an upstream gradient, a tangent).
    """
    check_variant(variant)
    _check_arrays(kind, x=x, **_given(where=where), **like_x)
    _check_dtype("x", x, DTYPES, "a floating dtype")
    for name, array in like_x.items():
        if tuple(array.shape) != tuple(x.shape):
            raise ValueError(
                f"{name} must have the shape of x, {tuple(x.shape)}; got {tuple(array.shape)}. Broadcast it first"
            )
        _check_dtype(name, array, (dtype_name(x),), "the dtype of x")
    rank = len(x.shape)
    if rank == 0:
        raise ValueError("x must have at least one axis; got a 0-d array. Reshape it to (1,) first")
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be one integer; got {axis!r}. Flatten several axes into one first") from None
    if not -rank <= index < rank:
        raise ValueError(f"axis must be in [{-rank}, {rank - 1}] for an array of shape {tuple(x.shape)}; got {index}")
    _check_mask("where", where, tuple(x.shape), "x")
    return index % rank


def check_attention(
    kind: ArrayKind,
    q: Any,
    k: Any,
    v: Any,
    *,
    variant: str,
    bias: Any,
    mask: Any,
    is_causal: bool,
    q_offset: int,
    scale: float | None,
    window_size: tuple[int, int] = (-1, -1),
    **like_output: Any,
) -> float:
    """Check the arguments of attention and return the scale, 1/sqrt(D) where none is given.

    ``window_size`` is (left, right), -1 on a side that is open, where the function has such an argument.
    ``like_output`` are further arrays that share the shape and dtype of the output (an upstream gradient).
    """
    check_variant(variant)
    _check_arrays(kind, q=q, k=k, v=v, **_given(bias=bias, mask=mask), **like_output)
    _check_dtype("q", q, DTYPES, "a floating dtype")
    dtype = dtype_name(q)
    for name, array in (("k", k), ("v", v)):
        _check_dtype(name, array, (dtype,), "the dtype of q")
    q_shape, k_shape, v_shape = (tuple(array.shape) for array in (q, k, v))  # once: frameworks make them each time

    def shapes() -> str:
        return f"q {q_shape}, k {k_shape}, v {v_shape}"

    for name, shape in (("q", q_shape), ("k", k_shape), ("v", v_shape)):
        if len(shape) < 3:
            raise ValueError(
                f"{name} must be (..., heads, length, dimension), at least 3-d; got shape {shape}. "
                "Add a heads axis of length 1 for a single head"
            )
    if not q_shape[:-3] == k_shape[:-3] == v_shape[:-3]:
        raise ValueError(f"q, k and v must have the same batch axes; got {shapes()}. Expand them to one batch shape")
    if q_shape[-1] != k_shape[-1]:
        raise ValueError(
            f"q and k must have the same last axis D; got {shapes()}. Transpose one that is (..., D, length)"
        )
    if k_shape[-3:-1] != v_shape[-3:-1]:
        raise ValueError(
            f"k and v must have the same heads Hkv and length Tk; got {shapes()}. Take both from the same tokens"
        )
    if k_shape[-3] == 0 or q_shape[-3] % k_shape[-3] != 0:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of key/value heads; "
            f"got {q_shape[-3]} and {k_shape[-3]} ({shapes()}). The axes are (..., heads, length, dimension)"
        )
    scores = (*q_shape[:-1], k_shape[-2])
    _check_mask("mask", mask, scores, "the scores (..., Hq, Tq, Tk)")
    if bias is not None:
        _check_dtype("bias", bias, (dtype, COMPUTE_DTYPE[dtype]), "the dtype of q, or the dtype it is computed in")
        _check_broadcast("bias", bias, scores, "the scores (..., Hq, Tq, Tk)")
    output = (*q_shape[:-1], v_shape[-1])
    for name, array in like_output.items():
        if tuple(array.shape) != output:
            raise ValueError(
                f"{name} must have the shape of the output, {output}; got {tuple(array.shape)}. Broadcast it first"
            )
        _check_dtype(name, array, (dtype,), "the dtype of q")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False; got {is_causal!r}. A mask array goes to mask=")
    if not isinstance(q_offset, kind.integers):
        try:
            operator.index(q_offset)
        except TypeError:
            raise TypeError(f"q_offset must be an integer; got {q_offset!r}. Pass a Python int") from None
    right = _check_window_size(kind, window_size, is_causal)
    if right < 0 and q_offset != 0:
        or_window = (
            "" if tuple(window_size) == (-1, -1) else f", or right >= 0 in window_size, which is {tuple(window_size)}"
        )
        raise ValueError(
            f"q_offset shifts the causal mask and needs is_causal=True{or_window}; got {q_offset=} without it"
        )
    if scale is None:
        if q_shape[-1] == 0:
            raise ValueError(f"the default scale 1/sqrt(D) needs D >= 1; got {shapes()}. Pass scale=")
        return 1.0 / math.sqrt(q_shape[-1])
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise TypeError(f"scale must be a Python number, or None for 1/sqrt(D); got {scale!r}. Convert it with float()")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite; got {scale!r}. None gives 1/sqrt(D)")
    return float(scale)


def check_implementation(implementation: str | None, known: tuple[str, ...]) -> None:
    """A choice of implementation is None or one of those that the backend knows."""
    if implementation is not None and implementation not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"implementation must be None or one of {names}; got {implementation!r}. None chooses")


def check_lengths(kind: ArrayKind, name: str, lengths: Any, batch: int) -> None:
    """Lengths of sequences are int32, one for each of the batch."""
    _check_arrays(kind, **{name: lengths})
    _check_dtype(name, lengths, ("int32",), "an integer dtype")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"{name} must hold one length per sequence, shape ({batch},); got {tuple(lengths.shape)}")


def check_window(window: int | tuple[int, int]) -> tuple[int, int]:
    """(left, right) of a window that may be given as one number."""
    sides = window if isinstance(window, tuple) else (window, window)
    if len(sides) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sides):
        raise ValueError(
            f"local_window_size must be one or two integers >= 0, (left, right); got {window!r}. "
            "Exclude a token itself by a mask"
        )
    return sides


def check_positions(kind: ArrayKind, positions: Any, tq: int, tk: int) -> None:
    """Check the positions of queries and keys: None, one array for both, or a pair of an array or None."""
    pair = positions if isinstance(positions, tuple) else (positions, positions)
    if len(pair) != 2:
        raise ValueError(
            f"positions must be one array, or a pair (of queries, of keys); got a tuple of {len(pair)}. "
            "Join those of several parts into one array"
        )
    for of, array, length in zip(("queries", "keys"), pair, (tq, tk), strict=True):
        if array is None:
            continue
        _check_arrays(kind, positions=array)
        _check_dtype("positions", array, ("int32", "int64"), "an integer dtype")
        if tuple(array.shape) != (length,):
            raise ValueError(
                f"positions must be one for each of the {length} {of} at hand; got shape {tuple(array.shape)}. "
                "Pass a pair (of queries, of keys) if they differ"
            )


def check_varlen(
    kind: ArrayKind, q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    variant: str, scale: float | None, window_size: tuple[int, int],
) -> float:  # fmt: skip
    """Check the arguments of attention over packed sequences and return the scale, as :func:`check_attention` does."""
    _check_arrays(kind, q=q, k=k, v=v, cu_seq_q=cu_seq_q, cu_seq_k=cu_seq_k)
    for name, array in (("q", q), ("k", k), ("v", v)):
        if len(array.shape) != 3:
            raise ValueError(
                f"{name} must be (total length, heads, dimension); got shape {tuple(array.shape)}. "
                "Pack the batch axis into the lengths, or use sa_attention"
            )
    for name, array in (("cu_seq_q", cu_seq_q), ("cu_seq_k", cu_seq_k)):
        _check_dtype(name, array, ("int32",), "the dtype of cumulative lengths")
        if len(array.shape) != 1 or array.shape[0] == 0 or array.shape != cu_seq_q.shape:
            raise ValueError(
                f"cu_seq_q and cu_seq_k must both be (N + 1,) for N sequences; got {tuple(cu_seq_q.shape)} and "
                f"{tuple(cu_seq_k.shape)}. They start with 0 and add the lengths up"
            )
    for name, value in (("max_q", max_q), ("max_k", max_k)):
        if not isinstance(value, kind.integers) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, the largest length; got {value!r}. Convert it with int()")
    q, k, v = (array.swapaxes(0, 1) for array in (q, k, v))
    return check_attention(
        kind, q, k, v,
        variant=variant, bias=None, mask=None, is_causal=False, q_offset=0, scale=scale, window_size=window_size,
    )  # fmt: skip


def check_variant(variant: str) -> None:
    """The variant is one of VARIANTS."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}; got {variant!r}")


def _check_window_size(kind: ArrayKind, window_size: tuple[int, int], is_causal: bool) -> int:
    """The right side, which causality closes at 0."""
    if (
        not isinstance(window_size, tuple | list)
        or len(window_size) != 2
        or not all(isinstance(n, kind.integers) and not isinstance(n, bool) and -1 <= n < 2**31 for n in window_size)
    ):
        raise ValueError(
            f"window_size must be (left, right) with integers from -1 to 2**31 - 1; got {window_size!r}. "
            "-1 leaves a side open: (-1, -1) is no window, (-1, 0) causal"
        )
    left, right = window_size
    if not is_causal:
        return right
    if right > 0:
        raise ValueError(
            f"is_causal=True ends the window at the query itself; got window_size={tuple(window_size)} with right > 0. "
            f"Pass ({left}, 0), or is_causal=False"
        )
    return 0


def _given(**arrays: Any) -> dict[str, Any]:
    return {name: array for name, array in arrays.items() if array is not None}


def _check_arrays(kind: ArrayKind, **arrays: Any) -> None:
    for name, array in arrays.items():
        if not isinstance(array, kind.cls) or isinstance(array, kind.refused):
            raise TypeError(
                f"{name} must be an array of the same framework as the function; "
                f"got {type(array).__module__}.{type(array).__qualname__}. Convert it with {kind.convert}"
            )
    if kind.device is not None:
        devices = {name: kind.device(array) for name, array in arrays.items()}
        first = next(iter(devices.values()))
        if any(device != first for device in devices.values()):
            places = ", ".join(f"{name} on {device}" for name, device in devices.items())
            raise ValueError(f"all arrays must be on one device; got {places}. Move them to one device first")


def _check_dtype(name: str, array: Any, allowed: tuple[str, ...], rule: str) -> None:
    if dtype_name(array) not in allowed:
        raise TypeError(
            f"{name} must have {rule} ({', '.join(dict.fromkeys(allowed))}); got {dtype_name(array)}. Cast it first"
        )


def _check_mask(name: str, mask: Any, shape: tuple[int, ...], target: str) -> None:
    if mask is None:
        return
    if dtype_name(mask) not in ("bool", "bool_"):
        raise TypeError(
            f"{name} must be boolean, True where an entry participates; got {dtype_name(mask)}. "
            "Compare it: mask != 0 if it holds 0 and 1, mask > finfo.min / 2 if it is additive"
        )
    _check_broadcast(name, mask, shape, target)


def _check_broadcast(name: str, array: Any, shape: tuple[int, ...], target: str) -> None:
    own = tuple(array.shape)
    aligned = zip(reversed(own), reversed(shape), strict=False)
    if len(own) > len(shape) or not all(n == 1 or n == m for n, m in aligned):
        raise ValueError(
            f"{name} must broadcast to the shape of {target}, {tuple(shape)}; got {own}. "
            "Align the last axes, and give those that repeat the length 1"
        )
