"""Self-Adjust Softmax at work: train a small character model with it, and run every installed backend on its scores.

    python examples/demo.py [--text FILE] [--variant normalized|product] [--seconds 60] [--seed 0] [--output DIR]

Six steps, each explained as it runs: training on real text, a sample of what was learned, the agreement of the
backends on the trained model's own attention scores, the conformance matrix, a picture of one attention map, and the
model as an ONNX file that writes the same text in onnxruntime. Needs the extras torch, onnx and conformance of
sa-softmax, and matplotlib; other backends, and the kernels of sa-softmax-native, take part where installed.
"""

import argparse
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby, takewhile
from pathlib import Path
from typing import Any

# Before torch: threads that spin while they wait make every layer this small many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import numpy as np
import onnxruntime
import torch
from char_model import CONTEXT, CharModel, Corpus, TextError, sample, save_onnx, train, validation_bits
from matplotlib.figure import Figure
from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sa_softmax import conformance, reference
from sa_softmax.backends import REGISTRY
from sa_softmax.backends.onnxruntime import register
from sa_softmax.conformance.report import matrix, progress

VARIANTS = ("normalized", "product")
ROUNDOFF = 2.0**-24  # of float32
Array = np.ndarray[Any, Any]


def main(argv: list[str] | None = None) -> int:
    """Run the demo. Exit status: 0, 1 if a backend does not conform, 2 if the demo could not run."""
    args = _arguments(argv)
    console = Console()
    try:
        corpus = Corpus.of(read_text(args.text))
        args.output.mkdir(parents=True, exist_ok=True)
    except (TextError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2

    heading(console, "1  Train", f"A character model with SA attention ({args.variant}) learns from real text.")
    model = train_model(corpus, args.variant, args.seconds, args.seed, console)

    heading(console, "2  Sample", "It goes on from text that it has not seen: what it has learned.")
    console.print(sampled(model, corpus, args.seed))

    heading(console, "3  Agree", "Its attention scores go through every backend: all must give the same numbers.")
    with console.status("running every backend"):
        table = agreement_table(agreements(attention_scores(model, corpus), args.seed))
    console.print(table)

    heading(
        console, "4  Conform",
        "Real scores are kind; the cases of the suite are not: ties, masks, NaN, extremes. Here those in float32, "
        "with every dtype: sa-softmax conformance --backend NAME",
    )  # fmt: skip
    reports = conform(console)
    console.print(matrix(reports))

    heading(
        console, "5  Look",
        "What three row operations make of the same scores: softmax gives every key some weight, normalized the "
        "lowest below 0 none, product gives scores below 0 negative weights.",
    )  # fmt: skip
    picture = args.output / "attention.png"
    plot_attention(model, corpus, picture)
    console.print(f"saved {picture}", markup=False, soft_wrap=True)

    heading(
        console, "6  Deploy",
        "One .onnx file: it runs in any onnxruntime by the bodies that it carries, and on our kernels where they are "
        "registered.",
    )  # fmt: skip
    file = args.output / "char_model.onnx"
    with console.status("exporting"):
        save_onnx(model, corpus.alphabet, file)
    console.print(f"saved {file}, and checked it: every SA node is right in every client at hand", soft_wrap=True)
    console.print(deployment_table(deployments(model, corpus, file, args.seed)))

    failed = [report.backend for report in reports if not report.ok]
    for name in failed:
        console.print(f"[red]{name} does not conform[/]; see: sa-softmax conformance --backend {name}")
    return 1 if failed else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small character model with SA attention, compare backends.")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file (default: the topics of Python's help)")
    parser.add_argument("--variant", choices=VARIANTS, default="normalized", help="default: %(default)s")
    parser.add_argument("--seconds", type=positive_number, default=60.0, help="training time (default: %(default)g)")
    parser.add_argument("--seed", type=natural_number, default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder (default: %(default)s)")
    return parser.parse_args(argv)


def positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number; got {text}")
    return value


def natural_number(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be in [0, 2^63); got {text}")
    return value


def heading(console: Console, title: str, why: str) -> None:
    console.print()
    console.rule(f"[bold cyan]{title}", align="left")
    console.print(why, highlight=False)


def read_text(path: Path | None) -> str:
    """The text of a UTF-8 file, or by default the 460 kB of English in the topics of Python's help.

    Raises TextError for an empty or undecodable file, OSError for one that cannot be read.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} must be UTF-8 text; got {error}. Convert it first") from error
    if not text:
        raise TextError(f"{path} is empty; give a file with text in it")
    return text


# 1  Train


def train_model(corpus: Corpus, variant: str, seconds: float, seed: int, console: Console) -> CharModel:
    """A trained model, in evaluation mode; shows how far it is."""
    torch.manual_seed(seed)
    model = CharModel(len(corpus.alphabet), variant)
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{len(corpus.train) + len(corpus.validation):,} characters, {len(corpus.alphabet)} different; "
        f"{size:,} parameters; {seconds:g} seconds on {torch.get_num_threads()} threads"
    )
    columns = (
        TextColumn("step {task.fields[step]:>4}"),
        BarColumn(),
        TextColumn("training {task.fields[bits]:.2f}  held out {task.fields[held_out]:.2f} bits per character"),
        TimeElapsedColumn(),
    )
    held_out, due = validation_bits(model, corpus), 0.1
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=1.0, step=0, bits=held_out, held_out=held_out)
        for now in train(model, corpus, seconds, seed):
            if now.spent >= due:
                held_out, due = validation_bits(model, corpus), min(now.spent + 0.1, 1.0)
            bar.update(task, completed=now.spent, step=now.step, bits=now.bits, held_out=held_out)
    console.print(
        f"[bold]{held_out:.2f}[/] bits per character on held-out text; "
        f"the frequencies of its characters alone would need {_entropy(corpus.validation):.2f}"
    )
    return model.eval()


def _entropy(indices: torch.Tensor) -> float:
    p = indices.bincount().double() / len(indices)
    return -torch.special.xlogy(p, p).sum().item() / math.log(2)


# 2  Sample


def sampled(model: CharModel, corpus: Corpus, seed: int, length: int = 400) -> Panel:
    prompt = held_out_passage(corpus, 40)
    text = Text(corpus.decode(prompt), style="dim")
    text.append(corpus.decode(torch.tensor(list(sample(model, prompt, length, seed)))), style="not dim bold")
    return Panel(text, title="prompt (dim) and continuation", title_align="left")


def held_out_passage(corpus: Corpus, length: int) -> torch.Tensor:
    """``length`` characters of held-out text, from its first paragraph if it has paragraphs."""
    text = corpus.decode(corpus.validation[:-length])
    _, found, rest = text.partition("\n\n")
    start = len(text) - len(rest.lstrip()) if found and rest.strip() else 0
    return corpus.validation[start : start + length]


# 3  Agree


@dataclass(frozen=True)
class Agreement:
    """How far one operation of a backend is from the float64 reference; ``skipped`` says why it did not run."""

    backend: str
    variant: str = ""
    operation: str = ""
    error: float = math.nan
    relative: float = math.nan
    skipped: str = ""


def attention_scores(model: CharModel, corpus: Corpus, texts: int = 4) -> Array:
    """(layers, texts, heads, CONTEXT, CONTEXT) scores of held-out text, before causal mask and row operation."""
    starts = torch.linspace(0, len(corpus.validation) - CONTEXT, texts).long()
    return model.scores(corpus.validation[starts[:, None] + torch.arange(CONTEXT)]).numpy()


def agreements(scores: Array, seed: int) -> Iterator[Agreement]:
    """Every backend of the registry, both variants, value and gradient, on causal rows of ``scores``.

    The gradient's upstream is drawn from ``seed``. Errors are the largest of all entries; ``relative`` divides by the
    largest magnitude of the reference.
    """
    upstream: Array = np.random.default_rng(seed).standard_normal(scores.shape, np.float32)
    inputs = {"sa_softmax": (scores,), "sa_softmax_vjp": (scores, upstream)}
    causal = np.tri(scores.shape[-1], dtype=bool)
    cases = []
    for variant in VARIANTS:
        for operation, arrays in inputs.items():
            options: dict[str, Any] = {"axis": -1, "variant": variant, "where": causal}
            exact = getattr(reference, operation)(*(array.astype(np.float64) for array in arrays), **options)
            cases.append((operation, arrays, options, exact))
    for entry in REGISTRY:
        if not entry.installed():
            yield Agreement(entry.name, skipped=entry.missing())
            continue
        adapter = entry.adapter()
        for operation, arrays, options, exact in cases:
            if operation not in adapter.operations:
                yield Agreement(entry.name, options["variant"], operation, skipped="not declared")
                continue
            got = getattr(adapter, operation)(*arrays, **options, device=adapter.devices[0])
            error = float(abs(got - exact).max())
            yield Agreement(entry.name, options["variant"], operation, error, error / float(abs(exact).max()))


def agreement_table(results: Iterable[Agreement]) -> Group:
    """One line per backend and variant; below, what is not installed and how to install it."""
    table = Table(
        "backend", "variant", title="Largest error against the float64 reference", box=box.SIMPLE_HEAD,
        caption="rel: over the largest value; u: the same in units of 2^-24, the roundoff of float32",
    )  # fmt: skip
    for part in ("value", "gradient"):
        for unit in ("abs", "rel", "u"):
            table.add_column(f"{part if unit == 'abs' else ''}\n{unit}", justify="right")
    missing = []
    for (backend, variant), row in groupby(results, key=lambda result: (result.backend, result.variant)):
        if variant:
            table.add_row(backend, variant, *chain.from_iterable(_cells(result) for result in row))
        else:
            table.add_row(backend, "[dim]not installed[/]")
            missing += [Text(result.skipped) for result in row]
    return Group(table, *missing)


def _cells(result: Agreement) -> tuple[str, str, str]:
    if result.skipped:
        return f"[dim]{result.skipped}[/]", "", ""
    return f"{result.error:.1e}", f"{result.relative:.1e}", f"{result.relative / ROUNDOFF:.1f}"


# 4  Conform


def conform(console: Console) -> list[conformance.Report]:
    """A run of the suite's float32 cases for each installed backend."""
    reports = []
    for entry in REGISTRY:
        if entry.installed():
            adapter = entry.adapter()
            adapter.dtypes = ("float32",)  # all of them would take minutes; the suite skips what is not declared
            reports.append(conformance.run(adapter, progress=progress(f"conformance of {entry.name}", console)))
    return reports


# 5  Look


def plot_attention(model: CharModel, corpus: Corpus, path: Path, length: int = 40) -> None:
    """Save a PNG of one head's weights on held-out text: softmax beside both variants, on one scale.

    The head is the sharpest of the last layer: the one with the largest softmax weights, averaged over the queries.
    """
    passage = held_out_passage(corpus, length)
    causal = np.tri(length, dtype=bool)
    scores = model.scores(passage[None])[-1, 0].double()
    weights = scores.masked_fill(torch.from_numpy(~causal), -math.inf).softmax(-1)
    head = int(weights.amax(-1).mean(-1).argmax())
    x, p = scores[head].numpy(), weights[head].numpy()
    maps = {
        "softmax:  p": p,
        "normalized:  p (x - lo) / (hi - lo)": reference.sa_softmax(x, where=causal),
        "product:  p x": reference.sa_softmax(x, variant="product", where=causal),
    }
    characters = ["↵" if c == "\n" else "·" if c.isspace() else c for c in corpus.decode(passage)]
    colors = matplotlib.colormaps["RdBu"].with_extremes(bad="0.88")

    figure = Figure(figsize=(15, 6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (title, y) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(np.where(causal, y, np.nan), vmin=-1, vmax=1, cmap=colors)
        sums = y.sum(-1)
        axis.set_title(
            f"{title}\nweights {y.min():.2f} to {y.max():.2f}, row sums {sums.min():.2f} to {sums.max():.2f}"
        )
        axis.set_xticks(range(length), characters, fontsize=8, family="monospace")
        axis.set_yticks(range(length), characters, fontsize=8, family="monospace")
        axis.tick_params(length=0)
        axis.set_xlabel("key (grey: in the future)")
    axes[0].set_ylabel("query")
    figure.colorbar(image, ax=axes, extend="both", shrink=0.9, label="attention weight; darkest: 1 and beyond")
    figure.suptitle(
        f"The same scores x under three row operations (layer {len(model.blocks)}, head {head + 1}, "
        f"trained with {model.variant})",
        fontsize=15,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for what the font lacks
        figure.savefig(path, dpi=100)


# 6  Deploy

Client = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Deployment:
    """How one client writes text: the time of one step of the model in milliseconds, and what it wrote."""

    client: str
    milliseconds: float = math.nan
    text: str = ""
    skipped: str = ""


def deployments(model: CharModel, corpus: Corpus, file: Path, seed: int, length: int = 400) -> list[Deployment]:
    """The model in PyTorch and its file in onnxruntime, by the bodies and by the kernels: the same prompt and draws.

    Steps of a whole context are timed in turns, one client after the other, and the median is kept: what else the
    machine does then burdens all of them.
    """
    clients: dict[str, Client] = {"PyTorch": model, "ONNX, bodies": _opened(file)}
    skipped = []
    try:
        clients["ONNX, kernels"] = _opened(file, kernels=True)
    except ImportError as error:
        skipped = [Deployment("ONNX, kernels", skipped=str(error))]
    prompt, context = held_out_passage(corpus, 40), corpus.validation[None, :CONTEXT]
    texts = {name: list(sample(client, prompt, length, seed)) for name, client in clients.items()}
    times: dict[str, list[float]] = {name: [] for name in clients}
    with torch.inference_mode():
        for _ in range(30):
            for name, client in clients.items():
                start = time.perf_counter()
                client(context)
                times[name].append(time.perf_counter() - start)
                time.sleep(0.01)  # the threads of one client must not spin while the next one is timed
    return [
        Deployment(name, 1e3 * statistics.median(times[name]), corpus.decode(torch.tensor(texts[name])))
        for name in clients
    ] + skipped


def _opened(file: Path, *, kernels: bool = False) -> Client:
    """The model in onnxruntime, called like the module."""
    options = onnxruntime.SessionOptions()
    if kernels:
        register(options)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (given,) = (each.name for each in session.get_inputs())
    return lambda indices: torch.from_numpy(session.run(None, {given: indices.numpy()})[0])


def deployment_table(found: list[Deployment]) -> Group:
    """One line per client; the text of each is compared with that of the first."""
    first, *_ = found
    bodies = next(each.milliseconds for each in found if each.client.endswith("bodies"))
    table = Table("client", "writes", title="The same prompt, the same draws", box=box.SIMPLE_HEAD)
    for title in (f"ms a step of {CONTEXT}", "against the bodies"):
        table.add_column(title, justify="right")
    for each in found:
        if each.skipped:
            table.add_row(each.client, "[dim]not installed[/]")
            continue
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first.text, each.text, strict=True)))
        says = "the same text" if same == len(each.text) else f"the same {same} of {len(each.text)} characters"
        if each is first:
            says = f"{len(each.text)} characters"
        table.add_row(each.client, says, f"{each.milliseconds:.2f}", f"{bodies / each.milliseconds:.2f} times as fast")
    return Group(table, *(Text(each.skipped) for each in found if each.skipped))


if __name__ == "__main__":
    sys.exit(main())
