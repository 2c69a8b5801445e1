"""The Triton kernels on CPU tensors, in Triton's interpreter, under the conformance suite:

    TRITON_INTERPRET=1 SA_SOFTMAX_IMPLEMENTATION=composition \\
        sa-softmax conformance --backend sa_softmax.backends.torch._triton.interpreted:Adapter

The variables must be set before Python starts: Triton reads the first when it is imported, and the second keeps other
kernels from the CPU.
"""

import os

from sa_softmax.backends.torch import _kernels, _triton, adapter

__all__ = ["Adapter", "AttentionAdapter", "install"]

NAME = "triton in its interpreter"


def install() -> None:
    """Make the Triton kernels the ones of CPU tensors, for the rest of the process.

    Raises:
        RuntimeError: the variables above are not set, or other kernels have the CPU.
    """
    running = _kernels.implementation("cpu")
    if running == NAME:
        return
    if os.environ.get("TRITON_INTERPRET") != "1" or running != "composition":
        raise RuntimeError(
            f"interpreted kernels need TRITON_INTERPRET=1 and SA_SOFTMAX_IMPLEMENTATION=composition from the start; "
            f"got TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')!r}, and the CPU runs {running!r}"
        )
    _kernels.register("cpu", NAME, _triton)


class Adapter(adapter.Adapter):
    """The row kernels."""

    name = "torch-triton-interpreted"
    operations: tuple[str, ...] = ("sa_softmax", "sa_softmax_vjp")
    # Not bfloat16: the interpreter cuts off the bits that a GPU rounds to nearest.
    dtypes: tuple[str, ...] = ("float16", "float32", "float64")
    devices = ("cpu",)

    def __init__(self) -> None:
        install()
        super().__init__()


class AttentionAdapter(Adapter):
    """The attention kernels."""

    name = "torch-triton-attention-interpreted"
    operations = ("sa_attention", "sa_attention_vjp")
    dtypes = ("float16", "float32")
