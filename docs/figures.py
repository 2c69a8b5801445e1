"""Draws docs/gradient.png from the reference:  python docs/figures.py [FOLDER]

The row is x = (z, -25), so that z leads by s = z + 25; p = 1 / (1 + exp(-s)) is the softmax of z. For z > -25:

- softmax: dp/dz = p (1 - p), which falls like exp(-s).
- product: y = z p, and dy/dz = p + z p (1 - p) tends to 1.
- normalized, z <= 0: y = (s / 25) p, and dy/dz = p / 25 + (s / 25) p (1 - p) tends to 1 / 25, that is 1 / R.
- normalized, z > 0: the largest score has the factor 1, so y = p and dy/dz = p (1 - p): softmax's own.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sa_softmax import reference

OTHER = -25.0
Array = np.ndarray[Any, np.dtype[np.float64]]


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _softmax_vjp(x: Array, g: Array) -> Array:
    p = _softmax(x)
    return p * (g - (g * p).sum(-1, keepdims=True))


Operation = tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]
OPERATIONS: dict[str, Operation] = {
    "softmax": (_softmax, _softmax_vjp),
    "normalized": (reference.sa_softmax, reference.sa_softmax_vjp),
    "product": (
        lambda x: reference.sa_softmax(x, variant="product"),
        lambda x, g: reference.sa_softmax_vjp(x, g, variant="product"),
    ),
}


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
    colors = {"softmax": "0.25", "normalized": "#0a6ebd", "product": "#d1570c"}
    styles = {"softmax": (0, (4, 2)), "normalized": "-", "product": "-"}

    figure = Figure(figsize=(9, 3.9), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 3))
    top, bottom = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    right = figure.add_subplot(grid[:, 1])
    for name, (y, largest) in values.items():
        style: dict[str, Any] = {"color": colors[name], "linestyle": styles[name], "linewidth": 2, "label": name}
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
            right.plot(point, largest, "o", color=colors[name], markersize=4, zorder=4)
            right.annotate(
                f"{largest:.2g}", (point, largest), xytext=(4, 5), textcoords="offset points", fontsize=8,
                color=colors[name],
            )  # fmt: skip
    figure.savefig(path, dpi=140)


def main(folder: Path) -> None:
    gradient(folder / "gradient.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
