"""The command ``bench`` of the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["add_command"]


def add_command(app: typer.Typer, fail: Callable[[Exception], typer.Exit]) -> None:
    """Add the command to ``app``; ``fail`` prints an error and gives the exit that ends the command."""
    from functools import partial

    from rich.console import Console
    from rich.progress import track

    from sa_softmax.benchmarks import GROUPS

    console = Console()

    @app.command()
    def bench(
        groups: Annotated[
            list[str] | None, typer.Argument(help=f"Some of {', '.join(GROUPS)}; all by default.", show_default=False)
        ] = None,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        rounds: Annotated[int, typer.Option(help="How many ratios each median is of.")] = 21,
        report: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
        plot: Annotated[Path | None, typer.Option(help="Draw all ratios into this PNG file.")] = None,
        markdown: Annotated[Path | None, typer.Option(help="Write the table to this Markdown file.")] = None,
    ) -> None:
        """Measure the kernels against named peers, all in one run. Exit status: 0, or 2 if it could not run."""
        from sa_softmax.benchmarks import report as reports
        from sa_softmax.benchmarks.suite import figures, machine

        def progress(title: str) -> Callable[[object], object]:
            return partial(track, description=title, console=console, transient=True)

        try:
            measured = list(figures(groups or list(GROUPS), device=device, rounds=rounds, progress=progress))
        except (ValueError, ImportError) as error:
            raise fail(error) from None
        about = machine(device)
        console.print(reports.table(measured, about))
        if report is not None:
            reports.write_json(measured, about, report)
        if plot is not None:
            reports.plot(measured, about, plot)
        if markdown is not None:
            markdown.write_text(reports.markdown(measured, about))
