"""Triton kernels behind the operators of :mod:`sa_softmax.backends.torch._kernels`. Not run on a GPU yet.

The tests run them in Triton's interpreter, and :mod:`sa_softmax.backends.torch._triton.compile_check` compiles them for
GPUs that need not be there. Triton is imported when a kernel is first called.
"""

from torch import Tensor

__all__ = ["NAME", "row", "row_vjp"]

NAME = "triton (not run on a GPU yet)"


def row(x: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    from sa_softmax.backends.torch._triton import rows

    return rows.row(x, where, axis, variant)


def row_vjp(x: Tensor, g: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    from sa_softmax.backends.torch._triton import rows

    return rows.row_vjp(x, g, where, axis, variant)
