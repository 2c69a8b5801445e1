"""The paper's claims, measured: softmax, product and normalized attention on the same small causal model.

    python examples/experiment [--steps N] [--seeds N] [--preset small|125m] [--text FILE] [--output DIR] [--device D]

Every attention is trained with rotary positions, ALiBi and a learned bias, from each seed, on the same batches. Then
the same three row operations classify handwritten digits. What was measured is printed and plotted as it is. Interrupt
it when you like: the same command goes on where it was.
"""

import argparse
import os
import sys
from itertools import product
from pathlib import Path

# Before torch: threads that spin while they wait make layers this small many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from digits import classify
from model import ATTENTIONS, POSITIONS, PRESETS
from report import digits_table, plot, table, write_markdown
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from training import Run, Text, train


def main(argv: list[str] | None = None) -> int:
    """Run the experiment. Exit status: 0, or 2 if it could not run."""
    args = _arguments(argv)
    console = Console()
    size = PRESETS[args.preset]
    steps = args.steps or size.steps
    runs = [Run(a, p, seed, size, steps) for seed, p, a in product(range(args.seeds), POSITIONS, ATTENTIONS)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        text = Text.of(_read(args.text), size)
        with Progress(*columns, console=console) as bar:
            results = []
            whole = bar.add_task("all runs", total=len(runs) * steps)
            for i, run in enumerate(runs):

                def advance(step: int, done: int = i * steps, name: str = run.name) -> None:
                    bar.update(whole, completed=done + step, description=name)

                results.append(train(run, text, args.output / "runs", args.device, advance))
        digits = classify(args.seeds, args.epochs, args.output / "digits.json", console)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    console.print(table(results))
    console.print(digits_table(digits))
    plot(results, args.output / "experiment.png")
    write_markdown(results, digits, steps, size, args.output / "experiment.md")
    console.print(f"saved {args.output / 'experiment.png'} and {args.output / 'experiment.md'}", soft_wrap=True)
    return 0


def _read(path: Path | None) -> str:
    """A text file, or the topics of Python's help: 460 kB of English in the standard library."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train softmax, product and normalized attention side by side.")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="default: %(default)s; 125m needs a GPU")
    parser.add_argument("--steps", type=_positive, help="of each run (default: the preset's)")
    parser.add_argument("--seeds", type=_positive, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--epochs", type=_positive, default=30, help="over the digits (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file (default: the topics of Python's help)")
    parser.add_argument("--output", type=Path, default=Path("experiment-output"), help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
