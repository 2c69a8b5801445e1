"""NumPy arrays under the conformance suite: what users get, and the reference."""

from typing import Any

import numpy as np

from sa_softmax import reference
from sa_softmax.backends import numpy as door
from sa_softmax.backends.protocol import OPERATIONS, Array, Gradients

__all__ = ["Adapter", "ReferenceAdapter"]


class ReferenceAdapter:
    """The reference, whether the kernels are installed or not."""

    name = "numpy-reference"
    version = f"numpy {np.__version__}"
    implementation = "reference"
    operations = OPERATIONS
    dtypes = ("float16", "bfloat16", "float32", "float64")
    devices = ("cpu",)
    bitwise_rows = True
    _functions: Any = reference

    def sa_softmax(self, x: Array, *, device: str, **options: Any) -> Array:
        return self._functions.sa_softmax(x, **options)

    def sa_softmax_vjp(self, x: Array, g: Array, *, device: str, **options: Any) -> Array:
        return self._functions.sa_softmax_vjp(x, g, **options)

    def sa_attention(self, q: Array, k: Array, v: Array, *, device: str, **options: Any) -> Array:
        return self._functions.sa_attention(q, k, v, **options)

    def sa_attention_vjp(self, q: Array, k: Array, v: Array, do: Array, *, device: str, **options: Any) -> Gradients:
        return self._functions.sa_attention_vjp(q, k, v, do, **options)


class Adapter(ReferenceAdapter):
    """The kernels of sa-softmax-native where they are installed, and else the reference."""

    name = "numpy"

    def __init__(self) -> None:
        self.implementation = door.implementation()
        self._functions = door.functions
