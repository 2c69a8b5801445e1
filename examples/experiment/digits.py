"""Handwritten digits (8 x 8 pixels, in scikit-learn) classified by a small vision Transformer."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from model import ATTENTIONS
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from sa_softmax.backends.torch import sa_attention

__all__ = ["Accuracy", "classify"]

WIDTH, HEADS, LAYERS, PATCH = 64, 4, 3, 2
BATCH, RATE, TEST = 64, 2e-3, 500


@dataclass(frozen=True)
class Accuracy:
    """The share of TEST images, never trained on, that one run classified right."""

    attention: str
    seed: int
    accuracy: float


class Layer(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.attention == "softmax":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = sa_attention(q, k, v, variant=self.attention)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Logits (B, 10) of images (B, 8, 8): 16 patches with learned positions, full attention, mean pooling."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn((8 // PATCH) ** 2, WIDTH))
        self.layers = nn.Sequential(*(Layer(attention) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images[:, None], PATCH, stride=PATCH).mT
        logits: Tensor = self.head(self.norm(self.layers(self.patches(patches) + self.position)).mean(1))
        return logits


def classify(seeds: int, epochs: int, path: Path, console: Console) -> list[Accuracy]:
    """The accuracies of every attention from every seed; those that ``path`` holds already are not trained again.

    Raises ValueError if they were trained for another number of epochs.
    """
    saved = json.loads(path.read_text()) if path.exists() else {"epochs": epochs, "runs": []}
    if saved["epochs"] != epochs:
        raise ValueError(f"{path} was trained for {saved['epochs']} epochs, not {epochs}. Choose another --output")
    done = {(run["attention"], run["seed"]): Accuracy(**run) for run in saved["runs"]}
    wanted = [(attention, seed) for seed in range(seeds) for attention in ATTENTIONS]
    for attention, seed in track(wanted, description="digits", console=console):
        if (attention, seed) not in done:
            done[attention, seed] = Accuracy(attention, seed, _accuracy(attention, seed, epochs))
            part = path.with_name(path.name + ".part")
            part.write_text(json.dumps({"epochs": epochs, "runs": [vars(run) for run in done.values()]}, indent=1))
            os.replace(part, path)
    return [done[key] for key in wanted]


def _accuracy(attention: str, seed: int, epochs: int) -> float:
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # one split for all runs
    test, train = order[:TEST], order[TEST:]
    torch.manual_seed(seed)
    model, generator = VisionTransformer(attention), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    steps = epochs * math.ceil(len(train) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train), generator=generator)].split(BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return (model(images[test]).argmax(-1) == labels[test]).double().mean().item()
