"""MLX arrays: plain ``mlx.core``, with the derivative that the spec states.

Tested on the CPU under Linux; not run on Metal yet. ``sa_softmax.backends.mlx.nn`` holds the operation and multi-head
attention as modules; docs/mlx.md is the guide.
"""

from sa_softmax.backends.mlx._attention import sa_attention
from sa_softmax.backends.mlx._sdpa import scaled_dot_product_attention
from sa_softmax.backends.mlx._softmax import sa_softmax

__all__ = ["sa_attention", "sa_softmax", "scaled_dot_product_attention"]
