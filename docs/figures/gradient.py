"""One score grows: values, and where the gradient goes.

The row is x = (z, -25), so that z leads by s = z + 25; p = 1 / (1 + exp(-s)) is the softmax of z. For z > -25:

- softmax: dp/dz = p (1 - p), which falls like exp(-s).
- product: y = z p, and dy/dz = p + z p (1 - p) tends to 1.
- normalized, z <= 0: y = (s / 25) p, and dy/dz = p / 25 + (s / 25) p (1 - p) tends to 1 / 25, that is 1 / R.
- normalized, z > 0: the largest score has the factor 1, so y = p and dy/dz = p (1 - p): softmax's own.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from operations import COLORS, OPERATIONS, Array

__all__ = ["OTHER", "curves", "gradient", "jacobians"]

OTHER = -25.0


def curves(z: Array) -> dict[str, tuple[Array, Array]]:
    """For each operation on the rows (z, OTHER): y of z, and the largest magnitude in the row's Jacobian."""
    x = np.stack([z, np.full_like(z, OTHER)], -1)
    upstreams = np.broadcast_to(np.eye(2)[:, None], (2, *x.shape))
    rows = np.broadcast_to(x, upstreams.shape)
    return {name: (f(x)[:, 0], abs(vjp(rows, upstreams)).max((0, 2))) for name, (f, vjp) in OPERATIONS.items()}


def gradient(path: Path) -> None:
    """Draw the values on the left and the largest derivatives on the right."""
    # Positive z from just above 0, where the derivative of the normalized variant jumps.
    below, above = np.linspace(OTHER, 0, 400), np.linspace(1e-9, 7, 120)
    z = np.concatenate([below, above])
    values = curves(z)
    styles = {"softmax": (0, (4, 2)), "normalized": "-", "product": "-"}

    figure = Figure(figsize=(9, 3.9), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 3))
    top, bottom = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    right = figure.add_subplot(grid[:, 1])
    for name, (y, largest) in values.items():
        style: dict[str, Any] = {"color": COLORS[name], "linestyle": styles[name], "linewidth": 2, "label": name}
        if name == "softmax":
            style["zorder"] = 3
        (bottom if name == "product" else top).plot(z, y, **style)
        right.semilogy(z, largest, **style)

    top.set_title("value at z", fontsize=10)
    top.tick_params(labelbottom=False)
    bottom.set_xlabel("z")
    right.set_title(r"largest derivative $|\partial y_j / \partial x_k|$ of the row", fontsize=10)
    right.set_xlabel(f"z, in the row (z, {OTHER:g})")
    right.set_ylim(1e-15, 1e4)
    for axes in (top, bottom, right):
        axes.set_xlim(OTHER, z[-1])
        axes.axvspan(0, z[-1], color="0.93", zorder=0)
        axes.grid(color="0.88", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    top.legend(frameon=False, fontsize=9, loc="lower right")
    bottom.legend(frameon=False, fontsize=9, loc="upper left")
    right.legend(frameon=False, fontsize=9, loc="lower left")
    right.text(0.4, 50, "a score above 0:\nhere normalized\nequals softmax", fontsize=8)

    for point in (-15.0, -5.0, 5.0):
        for name, (_, (largest,)) in curves(np.array([point])).items():
            if point > 0 and name == "normalized":
                continue  # softmax's own number
            right.plot(point, largest, "o", color=COLORS[name], markersize=4, zorder=4)
            right.annotate(
                f"{largest:.2g}", (point, largest), xytext=(4, 5), textcoords="offset points", fontsize=8,
                color=COLORS[name],
            )  # fmt: skip
    figure.savefig(path, dpi=140)


def jacobians(path: Path) -> None:
    """Draw |dy_j / dx_k| of one row of eight scores below 0, while its largest moves away from the others."""
    others = np.array([-23.0, -21.0, -19.5, -19.0, -18.5, -18.0, -17.5])
    leads = (0.5, 5.0, 15.0)
    figure = Figure(figsize=(9, 7.6), layout="constrained", facecolor="white")
    grid = figure.subplots(len(OPERATIONS), len(leads), sharex=True, sharey=True)
    for column, lead in enumerate(leads):
        x = np.append(others, others.max() + lead)
        for row, (name, (_, vjp)) in enumerate(OPERATIONS.items()):
            jacobian = np.abs(np.stack([vjp(x, e) for e in np.eye(len(x))]))
            axes = grid[row, column]
            image = axes.imshow(np.log10(np.maximum(jacobian, 1e-8)), vmin=-8, vmax=0.5, cmap="viridis")
            axes.set_title(f"{name}, lead {lead:g}: at most {jacobian.max():.2g}", fontsize=9)
            axes.tick_params(labelsize=7)
    grid[-1, 1].set_xlabel("k, by rising score", fontsize=9)
    grid[1, 0].set_ylabel("j", fontsize=9)
    bar = figure.colorbar(image, ax=grid, shrink=0.6)
    bar.set_label(r"$\log_{10} |\partial y_j / \partial x_k|$", fontsize=9)
    figure.savefig(path, dpi=110)
