"""Attention against PyTorch's own scaled_dot_product_attention, which computes plain softmax."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sa_softmax._validate import VARIANTS
from sa_softmax.backends.torch import sa_attention
from sa_softmax.benchmarks.measure import Figure, Progress, cuda, interleave, wall
from sa_softmax.benchmarks.shapes import ATTENTION, AttentionShape

__all__ = ["attention", "inputs"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(shape: AttentionShape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v, which require gradients, and the upstream gradient."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, do = (torch.randn(shape.qkv, generator=generator, device=device).to(dtype) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do


def attention(device: str, rounds: int, progress: Progress) -> Iterator[Figure]:
    """Both variants, full and causal: forward, and forward with backward in float32 (CPU) or bfloat16 (CUDA); forward
    in bfloat16. Beside them, one matrix product of as many operations as attention's own products have together: what
    is left of the peer's time when all else costs nothing. PyTorch's library is not the fastest one everywhere, so
    NumPy's computes it, too."""
    for shape in ATTENTION:
        for is_causal in (False, True):
            for dtype, backward in (
                ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False))
                if device == "cpu"
                else ((torch.bfloat16, False), (torch.bfloat16, True))
            ):
                yield from _figures(shape, is_causal, dtype, backward, device, rounds, progress)


def _figures(
    shape: AttentionShape, is_causal: bool, dtype: torch.dtype, backward: bool, device: str, rounds: int,
    progress: Progress,
) -> Iterator[Figure]:  # fmt: skip
    q, k, v, do = inputs(shape, dtype, device)
    # Pinned where there is a choice, so that the peer has a name; a CPU has one fused kernel.
    pinned: AbstractContextManager[Any] = nullcontext() if device == "cpu" else sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    peer = "SDPA" if device == "cpu" else "SDPA (flash)"
    candidates: dict[str, Attend] = {peer: lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=is_causal)}
    for variant in VARIANTS:
        candidates[variant] = lambda q, k, v, variant=variant: sa_attention(  # type: ignore[misc]
            q, k, v, variant=variant, is_causal=is_causal
        )

    batch, heads, length, dimension = shape.qkv
    products = (7 if backward else 2) / (2 if is_causal else 1)  # of 2 B H T^2 D operations
    n = round((products * batch * heads * length**2 * dimension) ** (1 / 3))
    a, b, out = (torch.rand(n, n, device=device).to(dtype) for _ in range(3))

    def call(attend: Attend) -> Callable[[], object]:
        if backward:
            return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), do)
        return torch.no_grad()(lambda: attend(q, k, v))

    part = "forward + backward" if backward else "forward"
    label = f"{part}, {'causal' if is_causal else 'full'}, {str(dtype).removeprefix('torch.')}"
    calls = {name: call(attend) for name, attend in candidates.items()}
    products_alone: dict[str, Callable[[], object]] = {"one matmul": lambda: torch.matmul(a, b, out=out)}
    if device == "cpu" and dtype == torch.float32:
        products_alone["one matmul by NumPy"] = lambda: np.matmul(a.numpy(), b.numpy(), out=out.numpy())
    calls |= products_alone
    with pinned:
        times = interleave(
            calls,
            rounds,
            wall if device == "cpu" else cuda,
            progress(f"attention {shape}, {label}"),
        )
    for name in (*VARIANTS, *products_alone):
        yield Figure.of("attention", name, str(shape), peer, times, label)
