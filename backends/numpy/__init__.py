"""NumPy arrays: the kernels of sa-softmax-native where it is installed, and else the reference.

Threads: as many as the processors that this process may use; the environment variable ``SA_SOFTMAX_NUM_THREADS`` says
otherwise. It is read at import, as is ``SA_SOFTMAX_IMPLEMENTATION`` (``native``, or ``composition`` for the reference).
"""

from types import ModuleType

from sa_softmax import reference
from sa_softmax.backends._native import native

__all__ = ["functions", "implementation", "sa_attention", "sa_softmax"]

functions: ModuleType = reference
"""The module whose ``sa_softmax``, ``sa_softmax_vjp``, ``sa_attention`` and ``sa_attention_vjp`` run."""

if native() is not None:
    from sa_softmax.backends.numpy import _native as functions

sa_softmax, sa_attention = functions.sa_softmax, functions.sa_attention


def implementation() -> str:
    """What runs: "reference", or "native" and the instruction set of the kernels."""
    kernels = native()
    return "reference" if kernels is None else f"native {kernels.instruction_set()}"
