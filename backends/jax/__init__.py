"""JAX arrays: ``jax.numpy``, which XLA fuses and partitions, with the derivative that the spec states, and kernels."""

from sa_softmax.backends.jax._attention import implementation, sa_attention
from sa_softmax.backends.jax._dot_product import dot_product_attention
from sa_softmax.backends.jax._softmax import sa_softmax
from sa_softmax.backends.jax._state import AttentionState, attention_from_state, attention_state, merge_states

__all__ = [
    "AttentionState",
    "attention_from_state",
    "attention_state",
    "dot_product_attention",
    "implementation",
    "merge_states",
    "sa_attention",
    "sa_softmax",
]
