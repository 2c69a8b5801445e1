"""A small causal character model whose attention is SA attention, and its training against the clock.

Pre-norm transformer with ALiBi: the distance between two characters is a bias on their score, so it takes part in the
self-adjusting factor, as any score bias does. Everything a reader may want to look at is a plain attribute or method.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sa_softmax.backends.torch import sa_attention
from sa_softmax.onnx_export import export

CONTEXT = 128
WIDTH, HEADS, LAYERS = 128, 4, 2
BATCH = 8
PEAK_RATE, WARMUP = 3e-3, 0.05  # learning rate, and the share of the time it takes to get there


class TextError(Exception):
    """The text cannot be trained on."""


@dataclass(frozen=True)
class Corpus:
    """A text as indices into its alphabet; its last tenth is held out for validation."""

    alphabet: str
    train: Tensor
    validation: Tensor

    @classmethod
    def of(cls, text: str) -> "Corpus":
        """Raises TextError for a text that is too short to be split into contexts or has one character only."""
        needed = 20 * (CONTEXT + 1)
        if len(text) < needed:
            raise TextError(f"the text must have at least {needed} characters; got {len(text)}. Give a longer one")
        alphabet = "".join(sorted(set(text)))
        if len(alphabet) < 2:
            raise TextError(f"the text must have at least two different characters; got only {alphabet!r}")
        index = {character: i for i, character in enumerate(alphabet)}
        data = torch.tensor([index[character] for character in text])
        held_out = len(data) // 10
        return cls(alphabet, data[:-held_out], data[-held_out:])

    def decode(self, indices: Tensor) -> str:
        return "".join(self.alphabet[i] for i in indices.tolist())


class Attention(nn.Module):
    """Causal multi-head attention; ``scores`` gives what the row operation works on."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        # PyTorch's initialisation is random. Queries or keys that start at zero would never leave it: where every
        # score of a row is 0, the gradient of the normalized variant is 0 too.
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        slopes = 2.0 ** -(8 / HEADS * torch.arange(1, HEADS + 1))
        positions = torch.arange(CONTEXT)
        distance = positions[:, None] - positions
        self.register_buffer("alibi", -slopes[:, None, None] * distance, persistent=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v (B, H, T, D) and the bias (H, T, T) for inputs (B, T, WIDTH)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        length = x.shape[1]
        return q, k, v, self.alibi[:, :length, :length]

    def scores(self, x: Tensor) -> Tensor:
        """The scores (B, H, T, T) before the causal mask and the row operation."""
        q, k, _, bias = self.heads(x)
        return q @ k.mT / math.sqrt(q.shape[-1]) + bias

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, bias = self.heads(x)
        y = sa_attention(q, k, v, variant=self.variant, bias=bias, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, variant: str) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention(variant)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CharModel(nn.Module):
    """Logits (B, T, characters) of the next character for indices (B, T), T <= CONTEXT."""

    def __init__(self, characters: int, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.embedding = nn.Embedding(characters, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.1)  # of the size of what the blocks add: they learn sooner
        self.blocks = nn.ModuleList(Block(variant) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.embedding(indices)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def scores(self, indices: Tensor) -> Tensor:
        """The attention scores (layers, B, H, T, T) before mask and row operation."""
        x, scores = self.embedding(indices), []
        for block in self.blocks:
            scores.append(block.attention.scores(block.norm1(x)))
            x = block(x)
        return torch.stack(scores)


@dataclass(frozen=True)
class Progress:
    """One training step: its loss in bits per character, and how much of the time is spent (0 to 1)."""

    step: int
    bits: float
    spent: float


def train(model: CharModel, corpus: Corpus, seconds: float, seed: int) -> Iterator[Progress]:
    """Train for ``seconds`` with AdamW; warm-up and cosine decay follow the clock, so both end with the time.

    The batches are drawn from ``seed``. How many there are depends on the machine.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    model.train()
    start, step, spent = time.perf_counter(), 0, 0.0
    while spent < 1:
        rate = min(max(spent / WARMUP, 0.01), 0.5 * (1 + math.cos(math.pi * spent)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate
        loss = _loss(model, _batch(corpus.train, BATCH, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, spent = step + 1, min((time.perf_counter() - start) / seconds, 1.0)
        yield Progress(step, loss.item() / math.log(2), spent)


@torch.no_grad()
def validation_bits(model: CharModel, corpus: Corpus) -> float:
    """Bits per character on a fixed draw of held-out text."""
    batch = _batch(corpus.validation, 32, torch.Generator().manual_seed(0))
    return _loss(model, batch).item() / math.log(2)


@torch.no_grad()
def sample(model: CharModel, prompt: Tensor, length: int, seed: int, temperature: float = 0.7) -> Iterator[int]:
    """Draw ``length`` characters, one by one, that go on from ``prompt``."""
    generator = torch.Generator().manual_seed(seed)
    indices = prompt
    for _ in range(length):
        logits = model(indices[None, -CONTEXT:])[0, -1]
        drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        indices = torch.cat([indices, drawn])
        yield int(drawn)


def save_onnx(model: CharModel, alphabet: str, path: Path) -> None:
    """Write ``model`` to an .onnx file that holds whatever writing text with it takes.

    One input, indices (1, T) with 1 <= T <= CONTEXT, and one output, logits (1, T, characters). metadata_props has the
    ``alphabet``, whose characters the indices count, the ``context`` and a ``description``.
    """
    export(model, (torch.zeros(1, 16, dtype=torch.int64),), path, dynamic=({1: "length"},))
    proto = onnx.load(path)
    size = sum(parameter.numel() for parameter in model.parameters())
    description = f"character transformer with SA attention ({model.variant}), {size:,} parameters"
    onnx.helper.set_model_props(proto, {"alphabet": alphabet, "context": str(CONTEXT), "description": description})
    onnx.save(proto, path)


def _batch(data: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """(size, CONTEXT + 1) indices: inputs and, one later, targets."""
    starts = torch.randint(len(data) - CONTEXT, (size, 1), generator=generator)
    return data[starts + torch.arange(CONTEXT + 1)]


def _loss(model: CharModel, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
