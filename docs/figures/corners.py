"""Rows at the corners of the definition, and what each operation makes of them."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from operations import COLORS, OPERATIONS

__all__ = ["CORNERS", "corners"]

CORNERS = {
    "mixed signs": [-2.0, -0.5, 0.0, 1.0, 2.0],
    "all negative: the smallest gets 0 (C3)": [-5.0, -4.0, -3.0, -2.0, -1.0],
    "all positive: the largest has a = 1 (C3)": [1.0, 2.0, 3.0, 4.0, 5.0],
    "constant, above 0 (C4)": [1.5, 1.5, 1.5, 1.5, 1.5],
    "constant, below 0 (C4)": [-1.5, -1.5, -1.5, -1.5, -1.5],
    "zeros (C1)": [0.0, 0.0, 0.0, 0.0, 0.0],
    "-inf is excluded (R2)": [-np.inf, -1.0, 0.5, 1.0, -np.inf],
    "one entry left, below 0 (C4)": [-np.inf, -np.inf, -1.0, -np.inf, -np.inf],
}


def corners(path: Path) -> None:
    """Draw the values of all three operations on each of CORNERS, the scores below them."""
    figure = Figure(figsize=(10, 8), layout="constrained", facecolor="white")
    for axes, (title, row) in zip(figure.subplots(4, 2).flat, CORNERS.items(), strict=True):
        x, positions = np.array(row), np.arange(len(row))
        for i, (name, (forward, _)) in enumerate(OPERATIONS.items()):
            y = forward(x)
            label = name if title == "mixed signs" else None
            axes.bar(positions + 0.27 * (i - 1), y, width=0.25, color=COLORS[name], label=label)
            axes.plot(positions[y == 0] + 0.27 * (i - 1), y[y == 0], "_", color=COLORS[name], markersize=7)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(positions, [f"{value:g}" for value in row], fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.axhline(0, color="0.6", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.1)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
