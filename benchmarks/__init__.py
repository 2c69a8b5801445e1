"""Benchmarks: every figure is the ratio to a named peer in the same run, as ``sa-softmax bench`` prints it."""

from sa_softmax.benchmarks.measure import Figure, interleave
from sa_softmax.benchmarks.suite import GROUPS, figures

__all__ = ["GROUPS", "Figure", "figures", "interleave"]
