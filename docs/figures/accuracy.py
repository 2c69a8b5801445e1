"""The error of every backend in units of the last place, from small scores to large ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sa_softmax import reference
from sa_softmax._validate import VARIANTS
from sa_softmax.backends import REGISTRY

__all__ = ["SCALES", "accuracy", "errors"]

SCALES = 10.0 ** np.arange(-3, 4)
_ROWS, _LENGTH = 64, 500


def errors(forward: Any, variant: str) -> list[float]:
    """The largest error of float32 values in ULP at each of SCALES, against the reference in float64.

    Entries whose p is below the smallest normal number may be flushed (D5) and do not count.
    """
    normal = np.random.default_rng(0).standard_normal((_ROWS, _LENGTH))
    worst = []
    for scale in SCALES:
        x = (scale * normal).astype(np.float32)
        exact = reference.sa_softmax(x.astype(np.float64), variant=variant)
        counted = np.abs(exact) > 2 * np.finfo(np.float32).tiny * np.maximum(np.abs(x), 1)
        got = np.asarray(forward(x, variant), np.float64)
        ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        worst.append(float((np.abs(got - exact) / ulp)[counted].max()))
    return worst


def _backends() -> Iterator[tuple[str, Any]]:
    """Every installed backend by the name of what runs, and plain composition in PyTorch as a yardstick."""
    for entry in REGISTRY:
        try:
            adapter = entry.adapter()
        except ImportError:
            continue
        device = adapter.devices[0]
        yield (
            f"{entry.name}: {adapter.implementation}",
            lambda x, variant, adapter=adapter, device=device: adapter.sa_softmax(
                x, axis=-1, variant=variant, where=None, device=device
            ),
        )
    import torch

    def composed(x: np.ndarray[Any, Any], variant: str) -> Any:
        t = torch.from_numpy(x)
        p = t.softmax(-1)
        if variant == "product":
            return (t * p).numpy()
        lo, hi = t.amin(-1, keepdim=True).clamp(max=0), t.amax(-1, keepdim=True).clamp(min=0)
        return ((t - lo) / (hi - lo) * p).numpy()

    yield "written with torch.softmax, for comparison", composed


def accuracy(path: Path) -> None:
    """Draw the errors of all backends, a panel for each variant."""
    figure = Figure(figsize=(10, 4.4), layout="constrained", facecolor="white")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, variant in zip(grid, VARIANTS, strict=True):
        for i, (name, forward) in enumerate(_backends()):
            label = name if variant == VARIANTS[0] else None
            style = {"color": "0.3", "linestyle": "--"} if "comparison" in name else {"color": f"C{i}"}
            axes.loglog(SCALES, errors(forward, variant), marker=".", linewidth=1.3, label=label, **style)
        axes.set_title(f"{variant}, float32, rows of {_LENGTH}", fontsize=10)
        axes.set_xlabel("standard deviation of the scores")
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("largest error, ULP")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
