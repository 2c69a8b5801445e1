"""The JAX backend under the conformance suite: the public functions and their ``jax.vjp``, inside ``jax.jit``."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sa_softmax.backends.jax import sa_attention, sa_softmax
from sa_softmax.backends.protocol import OPERATIONS, Array, Gradients

__all__ = ["Adapter"]

# The suite compiles two thousand programs and runs most of them once. Without these options that takes three times as
# long, and the process runs out of memory maps.
QUICK_COMPILATION = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


class Adapter:
    name = "jax"
    version = f"jax {jax.__version__}"
    implementation = "jax.jit, on the CPU with quick compilation"
    operations = OPERATIONS
    dtypes = ("float16", "bfloat16", "float32", "float64")
    devices = tuple(dict.fromkeys((jax.default_backend(), "cpu")))

    def sa_softmax(self, x: Array, *, where: Array | None, device: str, **options: Any) -> Array:
        return _run(_softmax, device, x, where, **options)

    def sa_softmax_vjp(self, x: Array, g: Array, *, where: Array | None, device: str, **options: Any) -> Array:
        return _run(_softmax_vjp, device, x, g, where, **options)

    def sa_attention(
        self, q: Array, k: Array, v: Array, *, bias: Array | None, mask: Array | None, device: str, **options: Any
    ) -> Array:
        return _run(_attention, device, q, k, v, bias, mask, **options)

    def sa_attention_vjp(
        self, q: Array, k: Array, v: Array, do: Array, *,
        bias: Array | None, mask: Array | None, device: str, **options: Any,
    ) -> Gradients:  # fmt: skip
        return _run(_attention_vjp, device, q, k, v, do, bias, mask, **options)


def _softmax(x: Any, where: Any, **options: Any) -> Any:
    return sa_softmax(x, where=where, **options)


def _softmax_vjp(x: Any, g: Any, where: Any, **options: Any) -> Any:
    _, vjp = jax.vjp(lambda x: sa_softmax(x, where=where, **options), x)
    return vjp(g)[0]


def _attention(q: Any, k: Any, v: Any, bias: Any, mask: Any, **options: Any) -> Any:
    return sa_attention(q, k, v, bias=bias, mask=mask, **options)


def _attention_vjp(q: Any, k: Any, v: Any, do: Any, bias: Any, mask: Any, **options: Any) -> Any:
    _, vjp = jax.vjp(lambda q, k, v, bias: sa_attention(q, k, v, bias=bias, mask=mask, **options), q, k, v, bias)
    return vjp(do)


def _run(function: Callable[..., Any], device: str, *arrays: Array | None, **options: Any) -> Any:
    """Apply ``function`` to the arrays on ``device``; float64 is enabled for this call alone."""
    double = any(array is not None and array.dtype == np.float64 for array in arrays)
    with jax.enable_x64(double), jax.default_device(jax.devices(device)[0]):
        result = _jit(function, device)(*jax.tree.map(jnp.asarray, arrays), **options)
        return jax.tree.map(np.asarray, result)


@cache
def _jit(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    return jax.jit(
        function,
        static_argnames=("axis", "variant", "is_causal", "q_offset", "scale"),
        compiler_options=QUICK_COMPILATION if device == "cpu" else None,
    )
