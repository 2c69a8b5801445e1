"""MLX arrays: plain ``mlx.core``, with the derivative that the spec states.

Tested on the CPU under Linux; not tested on Metal. ``sa_softmax.backends.mlx.nn`` holds the operation as a module.
"""

from sa_softmax.backends.mlx._attention import sa_attention
from sa_softmax.backends.mlx._softmax import sa_softmax

__all__ = ["sa_attention", "sa_softmax"]
