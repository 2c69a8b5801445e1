"""The commands ``export`` and ``check`` of the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sa_softmax._load import named

__all__ = ["add_commands"]


def add_commands(app: typer.Typer, fail: Callable[[Exception], typer.Exit]) -> None:
    """Add the commands to ``app``; ``fail`` prints an error and gives the exit that ends the command."""

    def run(command: Callable[[Any], Any]) -> None:
        try:
            from sa_softmax import onnx_export
        except ImportError as error:
            raise fail(error) from None
        try:
            typer.echo(command(onnx_export))
        except onnx_export.CheckError as error:
            typer.echo(error.report)
            raise typer.Exit(1) from None
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise fail(error) from None

    @app.command()
    def export(
        model: Annotated[str, typer.Argument(help="module:attribute, a function that gives (model, args[, dynamic]).")],
        path: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
        opset: Annotated[int, typer.Option(help="The default opset, 18 or newer.")] = 18,
    ) -> None:
        """Export a model to an ONNX file and check it. Exit status: 0 is right, 1 is not, 2 could not run."""

        def command(onnx_export: Any) -> Any:
            made, args, *dynamic = _made(model)
            return onnx_export.export(made, args, path, dynamic=dynamic[0] if dynamic else None, opset=opset)

        run(command)

    @app.command()
    def check(path: Annotated[Path, typer.Argument(help="The .onnx file.")]) -> None:
        """Check an ONNX file against the reference. Exit status: 0 is right, 1 is not, 2 could not run."""
        run(lambda onnx_export: onnx_export.check(path))


def _made(name: str) -> tuple[Any, ...]:
    """What ``module:attribute`` gives: a model, its example inputs, and perhaps its dynamic axes."""
    made = named(name)
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise ValueError(
            f"{name} must give (model, args) or (model, args, dynamic), as sa_softmax.onnx_export.export takes them; "
            f"got {type(made).__qualname__}"
        )
    return made
