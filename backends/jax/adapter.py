"""The JAX backend under the conformance suite: the public functions and their ``jax.vjp``, inside ``jax.jit``.

``Adapter`` runs what is chosen by itself. For ``--backend sa_softmax.backends.jax.adapter:NAME`` there are beside it
``BlockwiseAdapter``, attention by blocks of three queries, and ``PallasAdapter``, attention in the kernels.
"""

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sa_softmax._validate import check_attention
from sa_softmax.backends.jax import sa_attention, sa_softmax
from sa_softmax.backends.jax._attention import by_blocks, causal_offset
from sa_softmax.backends.jax._softmax import JAX
from sa_softmax.backends.protocol import OPERATIONS, Array, Gradients

__all__ = ["Adapter", "BlockwiseAdapter", "PallasAdapter"]

# The suite compiles some thousands of programs and runs most of them once. Without these options that takes three times
# as long. A program keeps memory maps, of which a process has a limited number, so they are dropped now and then.
_KEPT = 256
QUICK_COMPILATION = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


class Adapter:
    """The public functions, with the implementation of attention that they choose."""

    name = "jax"
    version = f"jax {jax.__version__}"
    implementation = "jax.jit, on the CPU with quick compilation"
    operations = OPERATIONS
    dtypes = ("float16", "bfloat16", "float32", "float64")
    devices = tuple(dict.fromkeys((jax.default_backend(), "cpu")))
    attention: Callable[..., Any] = staticmethod(sa_attention)

    def sa_softmax(self, x: Array, *, where: Array | None, device: str, **options: Any) -> Array:
        return _run(_softmax, device, x, where, **options)

    def sa_softmax_vjp(self, x: Array, g: Array, *, where: Array | None, device: str, **options: Any) -> Array:
        return _run(_softmax_vjp, device, x, g, where, **options)

    def sa_attention(
        self, q: Array, k: Array, v: Array, *, bias: Array | None, mask: Array | None, device: str, **options: Any
    ) -> Array:
        return _run(_attention, device, q, k, v, bias, mask, attention=self.attention, **options)

    def sa_attention_vjp(
        self, q: Array, k: Array, v: Array, do: Array, *,
        bias: Array | None, mask: Array | None, device: str, **options: Any,
    ) -> Gradients:  # fmt: skip
        return _run(_attention_vjp, device, q, k, v, do, bias, mask, attention=self.attention, **options)


def _by_blocks(
    q: Any, k: Any, v: Any, *,
    variant: str, bias: Any, mask: Any, is_causal: bool, q_offset: int, scale: float | None,
) -> Any:  # fmt: skip
    scale = check_attention(
        JAX, q, k, v, variant=variant, bias=bias, mask=mask, is_causal=is_causal, q_offset=q_offset, scale=scale
    )
    return by_blocks(q, k, v, bias, mask, scale, causal_offset(is_causal, q_offset), variant, size=3)


class BlockwiseAdapter(Adapter):
    """Attention by blocks of three queries, so that the suite's short sequences have several."""

    name = "jax, by blocks"
    implementation = "xla, blocks of 3 queries, on the CPU with quick compilation"
    attention = staticmethod(_by_blocks)


def _by_kernels(q: Any, *others: Any, **options: Any) -> Any:
    if jax.default_backend() == "cpu" and q.shape[0] > _INTERPRETED:
        raise NotImplementedError(f"interpreted, a batch of {q.shape[0]} takes hours; the most is {_INTERPRETED}")
    return sa_attention(q, *others, implementation="pallas", **options)


# At each step the interpreter copies what there is, so that it takes as long as the square of the batch.
_INTERPRETED = 2048


class PallasAdapter(Adapter):
    """Attention in the Pallas kernels; on a CPU Pallas interprets them, batches of up to 2048."""

    name = "jax, pallas"
    implementation = "pallas, interpreted on a CPU"
    attention = staticmethod(_by_kernels)


def _softmax(x: Any, where: Any, **options: Any) -> Any:
    return sa_softmax(x, where=where, **options)


def _softmax_vjp(x: Any, g: Any, where: Any, **options: Any) -> Any:
    _, vjp = jax.vjp(lambda x: sa_softmax(x, where=where, **options), x)
    return vjp(g)[0]


def _attention(q: Any, k: Any, v: Any, bias: Any, mask: Any, *, attention: Callable[..., Any], **options: Any) -> Any:
    return attention(q, k, v, bias=bias, mask=mask, **options)


def _attention_vjp(
    q: Any, k: Any, v: Any, do: Any, bias: Any, mask: Any, *, attention: Callable[..., Any], **options: Any
) -> Any:
    _, vjp = jax.vjp(lambda q, k, v, bias: attention(q, k, v, bias=bias, mask=mask, **options), q, k, v, bias)
    return vjp(do)


def _run(function: Callable[..., Any], device: str, *arrays: Array | None, **options: Any) -> Any:
    """Apply ``function`` to the arrays on ``device``; float64 is enabled for this call alone."""
    if next(_calls) % _KEPT == 0:
        jax.clear_caches()
    double = any(array is not None and array.dtype == np.float64 for array in arrays)
    with jax.enable_x64(double), jax.default_device(jax.devices(device)[0]):
        result = _jit(function, device)(*jax.tree.map(jnp.asarray, arrays), **options)
        return jax.tree.map(np.asarray, result)


_calls = itertools.count(1)


@cache
def _jit(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    return jax.jit(
        function,
        static_argnames=("axis", "variant", "is_causal", "q_offset", "scale", "attention"),
        compiler_options=QUICK_COMPILATION if device == "cpu" else None,
    )
