"""What a backend implements so that the conformance suite can run it: NumPy arrays in, NumPy arrays out.

bfloat16 arrays have the dtype ``ml_dtypes.bfloat16``. The suite needs ``name``, ``operations``, ``dtypes`` and
``devices`` and the methods named in ``operations``; a plain class does, nothing has to be inherited.
"""

from typing import Any, Protocol

import numpy.typing as npt

__all__ = ["OPERATIONS", "Backend"]

OPERATIONS = ("sa_softmax", "sa_softmax_vjp", "sa_attention", "sa_attention_vjp")

Array = npt.NDArray[Any]
Gradients = tuple[Array, Array, Array, Array | None]


class Backend(Protocol):
    """A backend under test.

    Optional attributes, read with a default: ``version`` (str, of the framework, for the report), ``implementation``
    (str, what ran: kernel, instruction set, eager code) and ``bitwise_rows`` (bool, False: a row's result promises
    to be the same bits alone, in a batch and at any position; spec clause R1).
    """

    @property
    def name(self) -> str:
        """What reports call the backend; a plain attribute does, here and below."""

    @property
    def operations(self) -> tuple[str, ...]:
        """Which of ``OPERATIONS`` are implemented. What is not declared is skipped in plain sight."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Which of float16, bfloat16, float32, float64."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Names that ``device=`` may get; the first is the default of a run."""

    def sa_softmax(self, x: Array, *, axis: int, variant: str, where: Array | None, device: str) -> Array:
        """The row operation (spec clauses R, C, D)."""

    def sa_softmax_vjp(self, x: Array, g: Array, *, axis: int, variant: str, where: Array | None, device: str) -> Array:
        """The gradient of sum(g * sa_softmax(x)) with respect to x (spec clauses G)."""

    def sa_attention(
        self, q: Array, k: Array, v: Array, *,
        variant: str, bias: Array | None, mask: Array | None,
        is_causal: bool, q_offset: int, scale: float | None, device: str,
    ) -> Array:  # fmt: skip
        """Attention (spec clauses A)."""

    def sa_attention_vjp(
        self, q: Array, k: Array, v: Array, do: Array, *,
        variant: str, bias: Array | None, mask: Array | None,
        is_causal: bool, q_offset: int, scale: float | None, device: str,
    ) -> Gradients:  # fmt: skip
        """The gradients (dq, dk, dv, dbias) of sum(do * attention); dbias is None without a bias."""
