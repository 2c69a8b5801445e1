"""Attention against length: time and memory, forward and backward, on this machine."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from sa_softmax.backends.torch import _attention, implementation, sa_attention
from sa_softmax.benchmarks.attention import inputs
from sa_softmax.benchmarks.measure import interleave
from sa_softmax.benchmarks.memory import mebibytes
from sa_softmax.benchmarks.shapes import AttentionShape
from sa_softmax.benchmarks.suite import machine

__all__ = ["LENGTHS", "speed"]

LENGTHS = (256, 512, 1024, 2048, 4096)
_PASS = "forward + backward"
_COLORS = {"softmax: SDPA": "0.25", "normalized": "#0a6ebd", "normalized, PyTorch's own operators": "#7fb2dc"}


def _times(length: int) -> dict[str, float]:
    """Median milliseconds of each candidate."""
    q, k, v, do = inputs(AttentionShape(1, 8, length, 64), torch.float32, "cpu")
    attends = {
        "softmax: SDPA": torch.nn.functional.scaled_dot_product_attention,
        "normalized": sa_attention,
        "normalized, PyTorch's own operators": lambda q, k, v: _attention.compose(
            q, k, v, None, None, None, -1, q.shape[-1] ** -0.5, "normalized"
        ),
    }
    calls = {
        name: lambda attend=attend: torch.autograd.grad(attend(q, k, v), (q, k, v), do)
        for name, attend in attends.items()
    }
    times = interleave(calls, 5 if length < 2048 else 3)
    return {name: 1e3 * sorted(each)[len(each) // 2] for name, each in times.items()}


def _mebibytes(length: int) -> dict[str, float]:
    """What memory grows by, of each candidate; at least 0.1, for the logarithmic axis."""
    found = {
        "softmax: SDPA": mebibytes("SDPA", _PASS, "cpu", length),
        "normalized": mebibytes("normalized", _PASS, "cpu", length),
        "normalized, PyTorch's own operators": mebibytes(
            "normalized", _PASS, "cpu", length, SA_SOFTMAX_IMPLEMENTATION="composition"
        ),
    }
    return {name: max(each, 0.1) for name, each in found.items()}


def speed(path: Path) -> None:
    """Draw time on the left and memory on the right against length."""
    figure = Figure(figsize=(10, 4.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    for axes, measured, title in (
        (left, [_times(length) for length in LENGTHS], "milliseconds, 8 heads of 64, float32"),
        (right, [_mebibytes(length) for length in LENGTHS], "MiB at the peak, 2 heads of 64, float32"),
    ):
        for name, color in _COLORS.items():
            axes.loglog(LENGTHS, [each[name] for each in measured], marker="o", color=color, label=name)
        axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
        axes.minorticks_off()
        axes.set_xlabel("length")
        axes.set_title(title, fontsize=10)
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    about = machine("cpu")
    figure.suptitle(
        f"attention, forward + backward: {about['hardware']}, {about['threads']} threads, {implementation('cpu')}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
