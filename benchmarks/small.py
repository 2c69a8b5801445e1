"""One call on one short row: what checks, dispatch and the way into a kernel cost."""

from collections.abc import Iterator

import numpy as np
import torch

import sa_softmax
from sa_softmax.backends.torch import sa_softmax as torch_sa_softmax
from sa_softmax.benchmarks.measure import Call, Figure, Progress, interleave, wall
from sa_softmax.benchmarks.shapes import SMALL_ROW

__all__ = ["small"]


def small(device: str, rounds: int, progress: Progress) -> Iterator[Figure]:
    """From NumPy against np.exp, from PyTorch against torch.softmax, with and without a gradient to record."""
    if device != "cpu":
        return
    x = np.random.default_rng(0).standard_normal(SMALL_ROW, np.float32)
    t, needs = torch.from_numpy(x), torch.from_numpy(x).requires_grad_()
    label = "x".join(map(str, SMALL_ROW))
    pairs: list[tuple[str, Call, str, Call]] = [
        ("from NumPy", lambda: sa_softmax.sa_softmax(x), "np.exp", lambda: np.exp(x)),
        ("from torch", lambda: torch_sa_softmax(t), "torch.softmax", lambda: torch.softmax(t, -1)),
        ("from torch, recorded", lambda: torch_sa_softmax(needs), "torch.softmax", lambda: torch.softmax(needs, -1)),
    ]
    for name, call, peer, peer_call in pairs:
        times = interleave({name: call, peer: peer_call}, rounds, wall, progress(f"small {label}, {name}"))
        yield Figure.of("small", name, label, peer, times)
