"""The figures as people look at them: a table, a plot, Markdown for the documentation, JSON for machines."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from rich import box
from rich.table import Table

from sa_softmax.benchmarks.measure import Figure

__all__ = ["markdown", "plot", "table", "write_json"]

_COLUMNS = ("figure", "shape", "peer", "ratio", "quartiles", "median")


def _row(figure: Figure) -> tuple[str, ...]:
    spread = f"{figure.low:.2f} to {figure.high:.2f}"
    return figure.name, figure.shape, figure.peer, f"{figure.ratio:.2f}", spread, f"{figure.value:.3g} {figure.unit}"


def table(figures: Sequence[Figure], machine: dict[str, str]) -> Table:
    """For a terminal."""
    caption = f"{machine['hardware']}, {machine['threads']} threads, {machine['implementation']}"
    made = Table(title="time over that of the peer; below 1 is faster", caption=caption, box=box.SIMPLE_HEAD)
    for title in _COLUMNS:
        made.add_column(title, justify="right" if title in _COLUMNS[3:] else "left", overflow="fold")
    for i, figure in enumerate(figures):
        if i and figure.group != figures[i - 1].group:
            made.add_section()
        made.add_row(*_row(figure))
    return made


def markdown(figures: Sequence[Figure], machine: dict[str, str]) -> str:
    """The same table for a page, with the machine above it."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "| --- | --- | --- | ---: | ---: | ---: |"]
    lines += ["| " + " | ".join(_row(figure)) + " |" for figure in figures]
    return "\n".join(lines) + "\n"


def write_json(figures: Sequence[Figure], machine: dict[str, str], path: Path) -> None:
    """Every figure, machine, versions and date."""
    date = datetime.now(UTC).date().isoformat()
    content = {"date": date, "machine": machine, "figures": [asdict(figure) for figure in figures]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def plot(figures: Sequence[Figure], machine: dict[str, str], path: Path) -> None:
    """A bar for each ratio, with its quartiles, and a line at 1."""
    from matplotlib.figure import Figure as Picture

    height = 0.24 * len(figures) + 1.2
    picture = Picture(figsize=(9, height), layout="constrained", facecolor="white")
    axes = picture.add_subplot()
    groups = list(dict.fromkeys(figure.group for figure in figures))
    colors = dict(zip(groups, ("#0a6ebd", "#7a5195", "#d1570c", "#2f8f4e"), strict=False))
    positions = range(len(figures))
    ratios = [figure.ratio for figure in figures]
    errors = (
        [figure.ratio - figure.low for figure in figures],
        [figure.high - figure.ratio for figure in figures],
    )
    bars = [colors[figure.group] for figure in figures]
    axes.barh(positions, ratios, xerr=errors, color=bars, height=0.7, error_kw={"linewidth": 1, "ecolor": "0.3"})
    axes.set_yticks(positions, [f"{figure.name}  {figure.shape}  / {figure.peer}" for figure in figures], fontsize=7)
    axes.set_ylim(len(figures) - 0.4, -0.6)  # from the top, and no empty bands
    axes.axvline(1, color="0.2", linewidth=1)
    axes.set_xlabel("time (or memory) over that of the peer")
    axes.set_title(f"{machine['hardware']}, {machine['threads']} threads, {machine['implementation']}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    picture.savefig(path, dpi=120)
