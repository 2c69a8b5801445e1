"""The command line: ``sa-softmax`` or ``python -m sa_softmax``."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated


def main() -> None:
    """Run the command line; says what to install where its libraries are missing."""
    try:
        import ml_dtypes  # noqa: F401
        import rich  # noqa: F401
        import safetensors  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(f"the command line needs {error.name}, which is not installed: pip install 'sa-softmax[conformance]'")
    _app()()


def _app() -> Callable[[], None]:
    """The application, made late: its libraries are an extra."""
    import typer
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from sa_softmax import backends as registry
    from sa_softmax._bench import add_command as add_bench
    from sa_softmax._onnx import add_commands as add_onnx

    about = "Self-Adjust Softmax: backends, conformance, ONNX, benchmarks."
    app = typer.Typer(no_args_is_help=True, add_completion=False, help=about)
    console = Console()

    def fail(error: Exception) -> typer.Exit:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return typer.Exit(2)

    add_onnx(app, fail)
    add_bench(app, fail)

    @app.command()
    def backends() -> None:
        """List the backends: what is installed, and which implementation runs where."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("backend", "installed", "implementation", "devices", "dtypes"):
            table.add_column(title, overflow="fold")
        for entry in registry.REGISTRY:
            if not entry.installed():
                table.add_row(entry.name, escape(f"no: {entry.install()}"))
                continue
            try:
                adapter = entry.adapter()
            except ImportError as error:
                table.add_row(entry.name, escape(f"no: {error}"))
                continue
            dtypes = ", ".join(adapter.dtypes)
            table.add_row(entry.name, adapter.version, adapter.implementation, ", ".join(adapter.devices), dtypes)
        console.print(table)

    @app.command()
    def conformance(
        backend: Annotated[str, typer.Option(help="A backend's name, or module:attribute for one of your own.")],
        device: Annotated[str | None, typer.Option(help="One of the backend's devices; its first by default.")] = None,
        expect: Annotated[Path | None, typer.Option(help="Expected failures, one 'ID reason' a line.")] = None,
        report: Annotated[Path | None, typer.Option(help="Write every result to this JSON file.")] = None,
    ) -> None:
        """Run the conformance suite. Exit status: 0 conforms, 1 does not, 2 could not run."""
        from sa_softmax.conformance import GoldenDataError, load, run
        from sa_softmax.conformance.report import print_report, progress

        if report is not None and not report.parent.is_dir():
            raise fail(ValueError(f"--report {report}: there is no folder {report.parent}. Make it first"))
        try:
            tested = load(backend)
            result = run(tested, device=device, expect=expect, progress=progress(f"conformance of {backend}", console))
        except (ValueError, ImportError, OSError, GoldenDataError) as error:
            raise fail(error) from None
        print_report(result, console)
        if report is not None:
            result.write(report)
        raise typer.Exit(0 if result.ok else 1)

    return app


if __name__ == "__main__":
    main()
