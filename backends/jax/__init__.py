"""JAX arrays: plain ``jax.numpy``, which XLA fuses and partitions, with the derivative that the spec states."""

from sa_softmax.backends.jax._attention import sa_attention
from sa_softmax.backends.jax._softmax import sa_softmax

__all__ = ["sa_attention", "sa_softmax"]
