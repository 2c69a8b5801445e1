"""The reference under the conformance suite."""

from typing import Any

import numpy as np

from sa_softmax import reference
from sa_softmax.backends.protocol import OPERATIONS, Array, Gradients

__all__ = ["Adapter"]


class Adapter:
    name = "numpy"
    version = f"numpy {np.__version__}"
    implementation = "reference"
    operations = OPERATIONS
    dtypes = ("float16", "bfloat16", "float32", "float64")
    devices = ("cpu",)
    bitwise_rows = True

    def sa_softmax(self, x: Array, *, device: str, **options: Any) -> Array:
        return reference.sa_softmax(x, **options)

    def sa_softmax_vjp(self, x: Array, g: Array, *, device: str, **options: Any) -> Array:
        return reference.sa_softmax_vjp(x, g, **options)

    def sa_attention(self, q: Array, k: Array, v: Array, *, device: str, **options: Any) -> Array:
        return reference.sa_attention(q, k, v, **options)

    def sa_attention_vjp(self, q: Array, k: Array, v: Array, do: Array, *, device: str, **options: Any) -> Gradients:
        return reference.sa_attention_vjp(q, k, v, do, **options)
