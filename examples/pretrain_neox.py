"""Pretrains a small GPT-NeoX from scratch on real text with transformers.Trainer: softmax against both variants.

    python examples/pretrain_neox.py [--text FILE] [--size small|125m] [--steps N] [--seed 0] [--output DIR]

The three models start from the same weights and see the same bytes in the same order; only the attention differs.
Tokens are the bytes of the text, by default the source of Python's standard library, whose last tenth is held out. A
run that was interrupted goes on from its last checkpoint in the output folder; one that is complete is not repeated.
At the end stand a table, and in the folder losses.png. Needs the extra transformers of sa-softmax, accelerate, rich
and matplotlib. The size 125m is meant for a GPU, on which it has not been run yet.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before torch: threads that spin while they wait make layers this small many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset
from transformers.trainer_utils import get_last_checkpoint

from sa_softmax.backends.torch.transformers import register

IMPLEMENTATIONS = {"softmax": "sdpa", "normalized": "sa_softmax", "product": "sa_softmax_product"}
EVALUATIONS = 20  # of each run, evenly spaced
HELD_OUT = 128  # sequences of held-out text that an evaluation reads
Curve = list[tuple[int, float]]  # steps, and bits per byte of held-out text


class TextError(Exception):
    """The text cannot be trained on."""


@dataclass(frozen=True)
class Size:
    """The shape of a model and of its batches; ``steps`` is the default budget."""

    width: int
    layers: int
    heads: int
    context: int
    batch: int
    steps: int
    rate: float  # of learning, at its peak


SIZES = {
    "small": Size(width=96, layers=4, heads=4, context=128, batch=16, steps=500, rate=3e-3),
    "125m": Size(width=768, layers=12, heads=12, context=1024, batch=32, steps=10_000, rate=6e-4),
}


class Blocks(Dataset[dict[str, Tensor]]):
    """The bytes of a text in sequences of ``length``, none of which overlap."""

    def __init__(self, data: bytes, length: int) -> None:
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        self.rows = whole[: len(whole) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def read_text(path: Path | None) -> bytes:
    """The bytes of a file, or by default of the modules at the top of Python's standard library (about 5 MB)."""
    if path is not None:
        return path.read_bytes()
    return b"".join(module.read_bytes() for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))


def split(text: bytes, size: Size) -> tuple[Blocks, Blocks]:
    """Training and held-out sequences."""
    needed = 10 * size.batch * size.context
    if len(text) < needed:
        raise TextError(f"the text must have at least {needed} bytes for this size; got {len(text)}. Give a longer one")
    cut = len(text) * 9 // 10
    held_out = Blocks(text[cut:], size.context)
    held_out.rows = held_out.rows[:: max(len(held_out) // HELD_OUT, 1)][:HELD_OUT]
    return Blocks(text[:cut], size.context), held_out


def make(size: Size, implementation: str, seed: int) -> transformers.PreTrainedModel:
    """A model whose weights depend on ``size`` and ``seed`` alone."""
    config = transformers.GPTNeoXConfig(
        vocab_size=256, hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        intermediate_size=4 * size.width, max_position_embeddings=size.context, bos_token_id=None, eos_token_id=None,
        use_cache=False,
    )  # fmt: skip
    transformers.set_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


class Report(transformers.TrainerCallback):
    """Shows the state of one run as a line of ``progress``."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def complete(self, steps: int) -> None:
        self.progress.update(self.task, completed=steps, bits="complete before")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)
        self.progress.start_task(self.task)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, bits=f"{curve(state.log_history)[-1][1]:.3f} bits per byte")


def train(
    name: str, size: Size, steps: int, seed: int, text: tuple[Blocks, Blocks], folder: Path, callback: Report
) -> Curve:
    """Train a model to the end, from its last checkpoint in ``folder`` if there is one."""
    checkpoint = get_last_checkpoint(str(folder)) if folder.exists() else None
    if checkpoint is not None:
        state = transformers.TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        if state.global_step >= steps:  # Trainer would take one step more
            callback.complete(steps)
            return curve(state.log_history)
    on_gpu = torch.cuda.is_available()
    every = max(steps // EVALUATIONS, 1)
    args = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=size.batch, per_device_eval_batch_size=size.batch,
        learning_rate=size.rate, lr_scheduler_type="cosine", warmup_steps=steps // 20, weight_decay=0.1,
        adam_beta2=0.98, seed=seed, data_seed=seed, bf16=on_gpu, use_cpu=not on_gpu, logging_steps=every,
        eval_strategy="steps", eval_steps=every, save_strategy="steps", save_steps=max(steps // 4, 1),
        save_total_limit=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=on_gpu,
    )  # fmt: skip
    if checkpoint is None:
        model = make(size, IMPLEMENTATIONS[name], seed)
    else:
        # Trainer by itself would leave the output layer as it was made: a file calls it embed_out, the model lm_head.
        auto = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(checkpoint, attn_implementation=IMPLEMENTATIONS[name])
    trainer = transformers.Trainer(model, args, train_dataset=text[0], eval_dataset=text[1], callbacks=[callback])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    return curve(trainer.state.log_history)


def curve(log: list[dict[str, Any]]) -> Curve:
    """Of what Trainer has logged."""
    return [(entry["step"], entry["eval_loss"] / math.log(2)) for entry in log if "eval_loss" in entry]


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises TextError where the folder holds runs with other settings, which would be resumed as if they were ours."""
    path = folder / "settings.json"
    if path.exists():
        found = json.loads(path.read_text())
        differ = [f"{key}: {found.get(key)} there, {value} now" for key, value in settings.items()
                  if found.get(key) != value]  # fmt: skip
        if differ:
            raise TextError(f"{folder} holds runs with other settings ({'; '.join(differ)}). Give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1))


def table(curves: dict[str, Curve]) -> Table:
    """Bits per byte of held-out text a quarter, half and all of the way."""
    some = next(iter(curves.values()))
    marks = sorted({max(len(some) * part // 4 - 1, 0) for part in (1, 2, 4)})
    result = Table("attention", *(f"step {some[mark][0]}" for mark in marks), title="bits per byte of held-out text")
    for name, points in curves.items():
        result.add_row(name, *(f"{points[mark][1]:.4f}" for mark in marks))
    return result


def plot(curves: dict[str, Curve], path: Path) -> None:
    """The curves on the left; on the right, their distance from softmax, in which a small gap shows."""
    colors = {"softmax": "0.25", "normalized": "#0a6ebd", "product": "#d1570c"}
    figure = Figure(figsize=(9, 3.6), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    baseline = [bits for _, bits in curves["softmax"]]
    for name, points in curves.items():
        steps, bits = zip(*points, strict=True)
        left.plot(steps, bits, color=colors[name], linewidth=2, label=name)
        right.plot(
            steps, [y - y0 for y, y0 in zip(bits, baseline, strict=True)], color=colors[name], linewidth=2, label=name
        )
    left.set_title("held-out text, bits per byte", fontsize=10)
    right.set_title("minus softmax (below 0: better)", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("steps")
        axes.grid(color="0.88", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=140)


def main(argv: list[str] | None = None) -> int:
    """Run the example. Exit status: 0, or 2 if it could not run."""
    args = _arguments(argv)
    console = Console()
    size = SIZES[args.size]
    steps = size.steps if args.steps is None else args.steps
    try:
        data = read_text(args.text)
        text = split(data, size)
        digest = hashlib.sha256(data).hexdigest()[:16]
        check_settings(args.output, {**asdict(size), "steps": steps, "seed": args.seed, "text": digest})
    except (TextError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    register()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console.print(f"{len(text[0]):,} sequences of {size.context} bytes; checkpoints in {args.output}", markup=False)
    columns = (
        TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[bits]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    curves = {}
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=steps, start=False, bits="") for name in IMPLEMENTATIONS}
        for name, task in tasks.items():
            callback = Report(progress, task)
            curves[name] = train(name, size, steps, args.seed, text, args.output / name, callback)
    console.print(table(curves))
    plot(curves, args.output / "losses.png")
    console.print(f"saved {args.output / 'losses.png'}", markup=False, soft_wrap=True)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain a small GPT-NeoX: softmax against both variants.")
    parser.add_argument("--text", type=Path, help="a file of text (default: Python's standard library)")
    parser.add_argument("--size", choices=SIZES, default="small", help="default: %(default)s")
    parser.add_argument("--steps", type=_positive, help="of each run (default: by size)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("pretrain-output"), help="folder (default: %(default)s)")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
