"""Self-Adjust Softmax (Zheng et al., EMNLP 2025, arXiv 2502.18277) for NumPy, PyTorch, JAX, MLX and the array API."""

from sa_softmax import reference
from sa_softmax._api import sa_attention, sa_softmax

__all__ = ["__version__", "reference", "sa_attention", "sa_softmax"]

__version__ = "0.1.0"
