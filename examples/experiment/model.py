"""A small causal Transformer of which the experiment changes two things: the row operation, and how positions enter."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sa_softmax.backends.torch import sa_attention

__all__ = ["ATTENTIONS", "POSITIONS", "PRESETS", "Decoder", "Size", "attend"]

ATTENTIONS = ("softmax", "product", "normalized")
POSITIONS = ("rope", "alibi", "learned")


@dataclass(frozen=True)
class Size:
    """The shape of a model and of its batches; ``rate`` is the peak learning rate, ``steps`` the default budget."""

    width: int
    heads: int
    layers: int
    context: int
    batch: int
    rate: float
    steps: int


PRESETS = {
    "small": Size(width=96, heads=4, layers=2, context=128, batch=8, rate=3e-3, steps=600),
    "125m": Size(width=768, heads=12, layers=12, context=2048, batch=32, rate=6e-4, steps=20000),  # GPT-NeoX 125M
}


def attend(q: Tensor, k: Tensor, v: Tensor, attention: str, bias: Tensor | None) -> Tensor:
    """Causal attention (B, H, T, D); ``bias`` (H, T, T) is part of the scores in all three."""
    if attention != "softmax":
        return sa_attention(q, k, v, variant=attention, bias=bias, is_causal=True)
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    hidden = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(hidden, -math.inf))


class Rope(nn.Module):
    """Rotary positions: pairs of dimensions of q and k turn by an angle proportional to the position; no bias."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.frequencies = size.width // size.heads // 2

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, None]:
        rates = 10000.0 ** (-torch.arange(self.frequencies, device=q.device) / self.frequencies)
        angles = torch.arange(q.shape[-2], device=q.device)[:, None] * rates
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

        def turned(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

        return turned(q), turned(k), None


def _distance(length: int, device: torch.device) -> Tensor:
    """(T, T): how far key j lies behind query i; 0 for the keys ahead, which causality hides."""
    i = torch.arange(length, device=device)
    return (i[:, None] - i).clamp(min=0)


class Alibi(nn.Module):
    """A bias of -slope * distance, with a slope for each head."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.register_buffer("slopes", 2.0 ** (-8 / size.heads * torch.arange(1, size.heads + 1)), persistent=False)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, (-self.slopes[:, None, None] * _distance(q.shape[-2], q.device)).to(q.dtype)


class Learned(nn.Module):
    """A learned bias for each head and class of distances: single ones up to 16, then growing with the distance."""

    EXACT, CLASSES = 16, 32

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size.heads, self.CLASSES))
        self.longest = size.context

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distance = _distance(q.shape[-2], q.device)
        octaves = torch.log(distance.clamp(min=1) / self.EXACT) / math.log(self.longest / self.EXACT)
        far = self.EXACT + (octaves * (self.CLASSES - self.EXACT)).long().clamp(max=self.CLASSES - self.EXACT - 1)
        classes = torch.where(distance < self.EXACT, distance, far)
        return q, k, self.bias[:, classes]


_ENCODINGS: dict[str, Callable[[Size], nn.Module]] = {"rope": Rope, "alibi": Alibi, "learned": Learned}


class Attention(nn.Module):
    def __init__(self, size: Size, attention: str, position: str) -> None:
        super().__init__()
        self.attention, self.heads = attention, size.heads
        self.query_key = nn.Linear(size.width, 2 * size.width, bias=False)
        self.value = nn.Linear(size.width, size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.position = _ENCODINGS[position](size)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.query_key(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        v = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, bias = self.position(q, k)
        y = attend(q, k, v, self.attention, bias)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, size: Size, attention: str, position: str) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(size.width), Attention(size, attention, position)
        self.norm2 = nn.LayerNorm(size.width)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Logits (B, T, characters) of the next character for indices (B, T) of any length."""

    def __init__(self, characters: int, size: Size, attention: str, position: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, size.width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.blocks = nn.ModuleList(Block(size, attention, position) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, characters)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.embedding(indices)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def query_key_gradient(self) -> float:
        """The norm of the loss's gradient in all query and key projections, all of it through the row operation."""
        gradients = [block.attention.query_key.weight.grad for block in self.blocks]
        return torch.stack([gradient.norm() for gradient in gradients]).norm().item()
