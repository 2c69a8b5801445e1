"""NumPy arrays: the reference itself."""

from sa_softmax.reference import sa_attention, sa_softmax

__all__ = ["sa_attention", "sa_softmax"]
