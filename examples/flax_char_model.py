"""A character model in Flax, trained with plain softmax attention and with SA attention, one after the other.

    python examples/flax_char_model.py                # a minute for each, on the repository's own documents
    python examples/flax_char_model.py book.txt --seconds 300

The two models differ in ``attention_fn`` alone: start, data and steps of the optimiser are the same. What a minute on a
CPU shows is that both train; it says nothing about which is better.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sa_softmax.backends.jax.flax import attention_fn

ROOT = Path(__file__).parent.parent
BATCH, LAYERS, HEADS = 16, 2, 4
ATTENTION: dict[str, Callable[..., Any]] = {"softmax": nn.dot_product_attention, "SA, normalized": attention_fn}


class CharModel(nn.Module):
    """A pre-norm causal transformer: (batch, time) characters to (batch, time, alphabet) logits."""

    alphabet: int
    context: int
    width: int
    attention: Callable[..., Any]

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.alphabet, self.width)(tokens) + nn.Embed(self.context, self.width)(jnp.arange(self.context))
        mask = nn.make_causal_mask(tokens)
        for _ in range(LAYERS):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS, attention_fn=self.attention)(y, mask=mask)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.alphabet)(nn.LayerNorm()(x))


def batches(data: np.ndarray[Any, Any], context: int, seed: int) -> Iterator[jax.Array]:
    """(BATCH, context + 1) characters from random places, without end."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(data) - context, BATCH)
        yield jnp.asarray(np.stack([data[start : start + context + 1] for start in starts]))


def train(model: CharModel, data: np.ndarray[Any, Any], seconds: float, steps: int) -> tuple[float, float, int]:
    """Loss on held-out text before and after, in nats per character, and the steps taken in between."""
    held_out = len(data) // 10
    validation = [batch for batch, _ in zip(batches(data[-held_out:], model.context, seed=1), range(8), strict=False)]
    parameters = model.init(jax.random.key(0), validation[0][:, :-1])
    optimiser = optax.adamw(3e-3)
    state = optimiser.init(parameters)

    def loss(parameters: Any, batch: jax.Array) -> jax.Array:
        logits = model.apply(parameters, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @jax.jit
    def step(parameters: Any, state: Any, batch: jax.Array) -> Any:
        updates, state = optimiser.update(jax.grad(loss)(parameters, batch), state, parameters)
        return optax.apply_updates(parameters, updates), state

    evaluate = jax.jit(loss)

    def validate() -> float:
        return float(np.mean([evaluate(parameters, batch) for batch in validation]))

    before, taken, end = validate(), 0, time.monotonic() + seconds
    for batch in batches(data[:-held_out], model.context, seed=0):
        if taken == steps or time.monotonic() > end:
            break
        parameters, state = step(parameters, state, batch)
        taken += 1
    return before, validate(), taken


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, help="a text file; the repository's own documents by default")
    parser.add_argument("--seconds", type=float, default=60, help="of training for each attention")
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many steps, should they be done earlier")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--context", type=int, default=64)
    options = parser.parse_args(arguments)
    paths = (
        [options.text] if options.text else [Path(__file__), ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    )
    text = "".join(path.read_text() for path in paths)
    alphabet = sorted(set(text))
    index = {character: i for i, character in enumerate(alphabet)}
    data = np.array([index[character] for character in text], np.int32)
    if len(data) < 40 * options.context:
        raise SystemExit(f"the text must have at least {40 * options.context} characters; got {len(data)}")
    losses = {}
    for name, attention in ATTENTION.items():
        model = CharModel(len(alphabet), options.context, options.width, attention)
        first, last, taken = train(model, data, options.seconds, options.steps)
        losses[name] = first, last
        print(f"{name:15} {taken:5} steps, loss {first:.3f} -> {last:.3f} nats per character", flush=True)
    return losses


if __name__ == "__main__":
    main()
