"""The public functions: they find the backend that owns the arrays and leave the rest to it."""

import sys
from types import ModuleType
from typing import Any

import array_api_compat

from sa_softmax import backends
from sa_softmax.backends import REGISTRY, array_api

__all__ = ["sa_attention", "sa_softmax"]


def sa_softmax(x: Any, *, axis: int = -1, variant: str = "normalized", where: Any = None) -> Any:
    """Self-Adjust Softmax of every row of ``x`` along ``axis``, for an array of any supported framework.

    ``normalized`` (the default, what the paper's authors train with): y = (x - lo) / (hi - lo) * softmax(x) with
    lo = min(0, min x), hi = max(0, max x); 0 where hi = lo. ``product``: y = x * softmax(x). Minimum, maximum and
    softmax run over the participating entries: ``where`` is true and x is not -inf. The others get exactly 0.

    Args:
        x: array with at least one axis; float16, bfloat16, float32 or float64. numpy.ndarray, torch.Tensor,
            jax.Array, mlx.core.array, or an array of any array-API library.
        axis: the axis whose slices are the rows.
        variant: "normalized" or "product".
        where: boolean array of the same framework that broadcasts to the shape of ``x``.

    Returns:
        An array of the same framework, shape, dtype and device as ``x``.

    Raises:
        TypeError: ``x`` is no floating array of a supported framework, or ``where`` is no boolean array of the same.
        ValueError: unknown variant, 0-d ``x``, axis out of range, ``where`` that does not broadcast, two devices.

    Source: paper, SA-Softmax and its normalized variant; docs/spec.md, clauses R, C, D and G.
    """
    return _backend_of(x, "x").sa_softmax(x, axis=axis, variant=variant, where=where)


def sa_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    variant: str = "normalized",
    bias: Any = None,
    mask: Any = None,
    is_causal: bool = False,
    q_offset: int = 0,
    scale: float | None = None,
) -> Any:
    """Attention O = Y V, with Y = sa_softmax(scale * Q K^T + bias) row by row, for arrays of any supported framework.

    Args:
        q: (..., Hq, Tq, D), with Hq a multiple of Hkv.
        k: (..., Hkv, Tk, D).
        v: (..., Hkv, Tk, Dv).
        variant: "normalized" or "product".
        bias: broadcasts to (..., Hq, Tq, Tk); part of the scores, so it changes the self-adjusting factor too.
        mask: boolean, broadcasts to (..., Hq, Tq, Tk); True where a key participates.
        is_causal: query i sees keys j <= i + q_offset only.
        q_offset: 0 aligns the causal mask at the upper left, Tk - Tq at the lower right, as a cache needs.
        scale: factor of the scores, 1/sqrt(D) by default.

    Returns:
        (..., Hq, Tq, Dv), same framework, dtype and device as ``q``. A query without participating keys gets 0.

    Raises:
        TypeError: not floating arrays of one framework and dtype, or a mask that is not boolean.
        ValueError: shapes, heads, mask or bias that do not fit, q_offset without is_causal, unknown variant, two
            devices.

    Source: paper, SA-Softmax in attention; docs/spec.md, clauses A.
    """
    return _backend_of(q, "q").sa_attention(
        q, k, v, variant=variant, bias=bias, mask=mask, is_causal=is_causal, q_offset=q_offset, scale=scale
    )


_OWNERS: dict[type, ModuleType] = {}


def _backend_of(x: Any, name: str) -> ModuleType:
    owner = _OWNERS.get(type(x))
    if owner is None:
        owner = _found(x, name)
        torch = sys.modules.get("torch")
        if torch is None or not torch.compiler.is_compiling():  # a strict export warns of what it sees written
            _OWNERS[type(x)] = owner
    return owner


def _found(x: Any, name: str) -> ModuleType:
    for entry in REGISTRY:
        if entry.owns(x):
            return getattr(backends, entry.name)
    if array_api_compat.is_array_api_obj(x):
        return array_api  # whatever its library is: the registry's array_api_strict need not be installed
    kinds = ", ".join(f"{entry.array_module}.{entry.array_class}" for entry in REGISTRY if entry.array_class)
    raise TypeError(
        f"{name} must be an array of a supported framework ({kinds}, or another array-API library); "
        f"got {type(x).__module__}.{type(x).__qualname__}. Convert it first, with numpy.asarray for example"
    )
