"""The array-API backend under the conformance suite, on the arrays of array-api-strict."""

from typing import Any

import array_api_strict as xp
import numpy as np

from sa_softmax.backends import array_api
from sa_softmax.backends.protocol import Array

__all__ = ["Adapter"]


class Adapter:
    """The public functions on arrays of array-api-strict; no gradients."""

    name = "array_api"
    version = f"array-api-strict {xp.__version__}"
    implementation = "array API functions"
    operations = ("sa_softmax", "sa_attention")
    dtypes = ("float32", "float64")
    devices = ("CPU_DEVICE", "device1", "device2")

    def sa_softmax(self, x: Array, *, where: Array | None, device: str, **options: Any) -> Array:
        return _numpy(array_api.sa_softmax(_strict(x, device), where=_strict(where, device), **options))

    def sa_attention(
        self, q: Array, k: Array, v: Array, *, bias: Array | None, mask: Array | None, device: str, **options: Any
    ) -> Array:
        q, k, v, bias, mask = (_strict(array, device) for array in (q, k, v, bias, mask))
        return _numpy(array_api.sa_attention(q, k, v, bias=bias, mask=mask, **options))


def _strict(array: Array | None, device: str) -> Any:
    return None if array is None else xp.asarray(array, device=xp.Device(device))


def _numpy(array: Any) -> Array:
    return np.asarray(array.to_device(xp.Device("CPU_DEVICE")))
