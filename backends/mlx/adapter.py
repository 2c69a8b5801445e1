"""The MLX backend under the conformance suite."""

import importlib.metadata
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from sa_softmax.backends.mlx import sa_attention, sa_softmax
from sa_softmax.backends.protocol import OPERATIONS, Array, Gradients

__all__ = ["Adapter"]


class Adapter:
    """The public functions and their ``mx.vjp``, on the CPU and, where there is one, on Metal."""

    name = "mlx"
    version = f"mlx {importlib.metadata.version('mlx')}"
    implementation = "mlx.core"
    operations = OPERATIONS
    dtypes = ("float16", "bfloat16", "float32", "float64")
    devices = ("cpu", "gpu") if mx.metal.is_available() else ("cpu",)

    def sa_softmax(self, x: Array, *, where: Array | None, device: str, **options: Any) -> Array:
        with mx.stream(_DEVICES[device]):
            return _to_numpy(sa_softmax(_to_mlx(x), where=_to_mlx(where), **options))

    def sa_softmax_vjp(self, x: Array, g: Array, *, where: Array | None, device: str, **options: Any) -> Array:
        with mx.stream(_DEVICES[device]):
            on = _to_mlx(where)
            _, (dx,) = mx.vjp(lambda x: sa_softmax(x, where=on, **options), [_to_mlx(x)], [_to_mlx(g)])
            return _to_numpy(dx)

    def sa_attention(
        self, q: Array, k: Array, v: Array, *, bias: Array | None, mask: Array | None, device: str, **options: Any
    ) -> Array:
        with mx.stream(_DEVICES[device]):
            arrays = map(_to_mlx, (q, k, v))
            return _to_numpy(sa_attention(*arrays, bias=_to_mlx(bias), mask=_to_mlx(mask), **options))

    def sa_attention_vjp(
        self, q: Array, k: Array, v: Array, do: Array, *,
        bias: Array | None, mask: Array | None, device: str, **options: Any,
    ) -> Gradients:  # fmt: skip
        with mx.stream(_DEVICES[device]):
            on = _to_mlx(mask)
            primals = [_to_mlx(array) for array in (q, k, v, bias) if array is not None]

            def attention(q: mx.array, k: mx.array, v: mx.array, bias: mx.array | None = None) -> mx.array:
                return sa_attention(q, k, v, bias=bias, mask=on, **options)

            _, gradients = mx.vjp(attention, primals, [_to_mlx(do)])
            dq, dk, dv, *dbias = map(_to_numpy, gradients)
            return dq, dk, dv, dbias[0] if dbias else None


_DEVICES = {"cpu": mx.cpu, "gpu": mx.gpu}


def _to_mlx(x: Array | None) -> Any:
    """mx.array refuses negative strides, and without a dtype it would make float32 of float64."""
    if x is None:
        return None
    return mx.array(np.array(x, order="C"), getattr(mx, "bool_" if x.dtype == bool else x.dtype.name))


def _to_numpy(x: mx.array) -> Array:
    if x.dtype == mx.bfloat16:  # has no NumPy buffer; float32 holds it exactly
        return np.array(x.astype(mx.float32)).astype(ml_dtypes.bfloat16)
    return np.array(x)
