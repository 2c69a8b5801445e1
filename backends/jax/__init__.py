"""JAX arrays: plain ``jax.numpy``, which XLA fuses and partitions, with the derivative that the spec states."""

from sa_softmax.backends.jax._attention import sa_attention
from sa_softmax.backends.jax._softmax import sa_softmax
from sa_softmax.backends.jax._state import AttentionState, attention_from_state, attention_state, merge_states

__all__ = [
    "AttentionState",
    "attention_from_state",
    "attention_state",
    "merge_states",
    "sa_attention",
    "sa_softmax",
]
