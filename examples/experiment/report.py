"""What the runs say: tables and a picture, spread included."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from digits import TEST, Accuracy
from matplotlib.figure import Figure
from model import ATTENTIONS, POSITIONS, Size
from rich import box
from rich.table import Table
from training import LENGTHS, Result

__all__ = ["digits_table", "plot", "table", "write_markdown"]

_COLORS = {"softmax": "0.35", "normalized": "#0a6ebd", "product": "#d1570c"}
_TITLE = "held-out loss in nats per character: mean over the seeds (lowest to highest)"


def _columns() -> list[str]:
    lengths = [f"{length} x context" if length > 1 else "context" for length in LENGTHS]
    return ["position", "attention", *lengths, "query/key gradient, last half"]


def _rows(results: Sequence[Result]) -> Iterator[list[str]]:
    for position in POSITIONS:
        for attention in ATTENTIONS:
            own = [r for r in results if (r.position, r.attention) == (position, attention)]
            losses = [_spread([r.held_out[length] for r in own]) for length in LENGTHS]
            gradients = [statistics.median(m.gradient for m in r.history[len(r.history) // 2 :]) for r in own]
            yield [position, attention, *losses, f"{statistics.mean(gradients):.3g}"]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _accuracies(digits: Sequence[Accuracy]) -> Iterator[list[str]]:
    for attention in ATTENTIONS:
        own = [100 * run.accuracy for run in digits if run.attention == attention]
        yield [attention, f"{statistics.mean(own):.1f} % ({min(own):.1f} to {max(own):.1f})"]


def table(results: Sequence[Result]) -> Table:
    """Losses at each length and gradients, a row for each position encoding and attention."""
    made = Table(title=_TITLE, box=box.SIMPLE_HEAD)
    for title in _columns():
        made.add_column(title, overflow="fold")
    for i, row in enumerate(_rows(results)):
        if i and i % len(ATTENTIONS) == 0:
            made.add_section()
        made.add_row(*row)
    return made


def digits_table(digits: Sequence[Accuracy]) -> Table:
    """Accuracies, a row for each attention."""
    made = Table(title=f"digits: accuracy on {TEST} images held out", box=box.SIMPLE_HEAD)
    for title in ("attention", "accuracy"):
        made.add_column(title)
    for row in _accuracies(digits):
        made.add_row(*row)
    return made


def write_markdown(results: Sequence[Result], digits: Sequence[Accuracy], steps: int, size: Size, path: Path) -> None:
    """Both tables for a page, with what was trained."""
    seeds = len({result.seed for result in results})
    parts = [
        f"{results[0].parameters:,} parameters ({size.layers} layers of width {size.width}, {size.heads} heads), "
        f"{steps} steps of {size.batch} x {size.context} characters, {seeds} seeds. {_TITLE}:",
        _markdown(_columns(), list(_rows(results))),
        f"Digits, accuracy on {TEST} images held out:",
        _markdown(["attention", "accuracy"], list(_accuracies(digits))),
    ]
    path.write_text("\n\n".join(parts) + "\n")


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def plot(results: Sequence[Result], path: Path) -> None:
    """Above the loss of training and below the gradient of queries and keys, for each position encoding."""
    figure = Figure(figsize=(11, 6), layout="constrained", facecolor="white")
    grid = figure.subplots(2, len(POSITIONS), sharex=True, sharey="row")
    for column, position in enumerate(POSITIONS):
        for attention in ATTENTIONS:
            own = [r for r in results if (r.position, r.attention) == (position, attention)]
            for i, result in enumerate(own):
                style = {"color": _COLORS[attention], "linewidth": 1, "alpha": 0.8}
                label = attention if i == 0 else None
                steps = [m.step for m in result.history]
                grid[0, column].plot(steps, [m.loss for m in result.history], label=label, **style)
                grid[1, column].semilogy(steps, [m.gradient for m in result.history], **style)
        grid[0, column].set_title(position, fontsize=10)
        grid[1, column].set_xlabel("step")
    grid[0, 0].set_ylabel("training loss, nats per character")
    grid[1, 0].set_ylabel("gradient norm, query and key projections")
    grid[0, -1].legend(frameon=False)
    for axes in grid.flat:
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
