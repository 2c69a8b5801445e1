"""One run of the experiment: a model trained for a number of steps, saved so often that an interruption loses nothing.

A run is determined by its configuration: seeds draw weights and batches, and what was saved holds the generator's
state, so a run that was interrupted ends with the numbers of one that was not.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from model import Decoder, Size
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LENGTHS", "Measured", "Result", "Run", "Text", "train"]

WARMUP = 0.1  # share of the steps
SAVE_EVERY = 50  # steps: some seconds of work
MEASURE_EVERY = 20  # steps
LENGTHS = (1, 2, 4)  # validation lengths, in units of the context of training


@dataclass(frozen=True)
class Text:
    """Indices into an alphabet; the last tenth is held out."""

    characters: int
    train: Tensor
    validation: Tensor

    @classmethod
    def of(cls, text: str, size: Size) -> "Text":
        """Raises ValueError for a text whose held-out tenth is shorter than what validation reads."""
        needed = 10 * (2 * max(LENGTHS) * size.context + 1)
        if len(text) < needed:
            raise ValueError(f"the text must have at least {needed} characters for this size; got {len(text)}")
        index = {character: i for i, character in enumerate(sorted(set(text)))}
        data = torch.tensor([index[character] for character in text])
        return cls(len(index), data[: -len(data) // 10], data[-len(data) // 10 :])


@dataclass(frozen=True)
class Run:
    """The configuration of one run."""

    attention: str
    position: str
    seed: int
    size: Size
    steps: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.attention}-{self.position}-{self.seed}"


@dataclass(frozen=True)
class Measured:
    """At one step: loss of the batch in nats per character, and the gradient norm of the query and key projections."""

    step: int
    loss: float
    gradient: float


@dataclass
class Result:
    """A finished run: its history, and the held-out loss in nats per character at each of LENGTHS."""

    attention: str
    position: str
    seed: int
    parameters: int
    history: list[Measured] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Result":
        """What :func:`train` wrote."""
        content = json.loads(path.read_text())
        content["history"] = [Measured(**each) for each in content["history"]]
        content["held_out"] = {int(length): loss for length, loss in content["held_out"].items()}
        return cls(**content)


def train(
    run: Run, text: Text, folder: Path, device: str = "cpu", progress: Callable[[int], object] = lambda step: None
) -> Result:
    """The result of ``run``: read if it is in ``folder`` already, else trained on from what is saved there.

    Raises:
        ValueError: the folder holds a run of this name with another configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finished, saved = folder / f"{run.name}.json", folder / f"{run.name}.pt"
    configuration = {**asdict(run), "characters": text.characters, "length": len(text.train)}
    _check_configuration(configuration, folder / f"{run.name}.config.json")
    if finished.exists():
        progress(run.steps)
        return Result.read(finished)

    torch.manual_seed(run.seed)
    model = Decoder(text.characters, run.size, run.attention, run.position).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.size.rate, betas=(0.9, 0.98), weight_decay=0.1)
    generator = torch.Generator().manual_seed(run.seed)
    result = Result(run.attention, run.position, run.seed, sum(p.numel() for p in model.parameters()))
    start = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        result.history = [Measured(*each) for each in state["history"]]
        start = state["step"]
    for step in range(start, run.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.size.rate * _rate(step, run.steps)
        loss = _loss(model, _batch(text.train, run.size, generator).to(device))
        optimizer.zero_grad()
        loss.backward()
        if step % MEASURE_EVERY == 0:
            result.history.append(Measured(step, loss.item(), model.query_key_gradient()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            _save(saved, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state(),
                "history": [(m.step, m.loss, m.gradient) for m in result.history], "step": step + 1,
            })  # fmt: skip
        progress(step + 1)
    result.held_out = {length: held_out_loss(model, text, run.size, length, device) for length in LENGTHS}
    _replace(finished, lambda path: path.write_text(json.dumps(asdict(result), indent=1) + "\n"))
    saved.unlink(missing_ok=True)
    return result


@torch.no_grad()
def held_out_loss(model: Decoder, text: Text, size: Size, length: int, device: str) -> float:
    """Nats per character over the same held-out characters, read in windows of ``length`` contexts.

    Each window is as long as ``length`` times what the model was trained on; only its second half counts, so that every
    counted character has at least half of a window before it.
    """
    window = length * size.context
    count = max(1, (len(text.validation) - 1) // window)
    starts = torch.arange(min(count, 64 // length)) * window
    losses = []
    for start in starts:
        indices = text.validation[start + torch.arange(window + 1)].to(device)[None]
        logits = model(indices[:, :-1])[0, window // 2 :]
        losses.append(F.cross_entropy(logits, indices[0, 1 + window // 2 :]))
    return torch.stack(losses).mean().item()


def _check_configuration(configuration: dict[str, Any], path: Path) -> None:
    text = json.dumps(configuration, sort_keys=True)
    if not path.exists():
        _replace(path, lambda p: p.write_text(text))
    elif path.read_text() != text:
        raise ValueError(
            f"{path} belongs to a run with another configuration: {path.read_text()}, while {text} is asked for. "
            "Choose another --output, or remove the folder"
        )


def _rate(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _batch(data: Tensor, size: Size, generator: torch.Generator) -> Tensor:
    """(batch, context + 1) indices: inputs and, one later, targets."""
    starts = torch.randint(len(data) - size.context, (size.batch, 1), generator=generator)
    return data[starts + torch.arange(size.context + 1)]


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def _save(path: Path, state: dict[str, Any]) -> None:
    _replace(path, lambda p: torch.save(state, p))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside and rename: whenever the power goes, the old file or the new one is there, whole."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)
