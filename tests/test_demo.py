"""The demo, piece by piece and as a whole, and the picture of the documentation."""

import importlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support import VARIANTS, backends, exact, exact_row

from sa_softmax import reference
from sa_softmax.backends import REGISTRY, Entry
from sa_softmax.backends.numpy.adapter import Adapter as NumpyAdapter
from sa_softmax.conformance import oracle
from sa_softmax.conformance.golden import SAFETY

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
STEPS = 40
ROUNDOFF = 2.0**-24
TINY = float(np.finfo(np.float32).tiny) / ROUNDOFF


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module("demo")


@pytest.fixture(scope="module")
def char_model(demo: ModuleType) -> ModuleType:
    return importlib.import_module("char_model")


@pytest.fixture(scope="module")
def corpus(demo: ModuleType, char_model: ModuleType) -> Any:
    return char_model.Corpus.of(demo.read_text(None)[:40_000])


def untrained(char_model: ModuleType, corpus: Any, variant: str = "normalized") -> Any:
    torch.manual_seed(0)
    return char_model.CharModel(len(corpus.alphabet), variant)


def train(char_model: ModuleType, model: Any, corpus: Any, steps: int) -> list[Any]:
    """Train by a clock on which every step takes a second."""
    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(char_model, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
        return list(char_model.train(model, corpus, steps, seed=0))


@pytest.fixture(scope="module")
def trained(char_model: ModuleType, corpus: Any) -> tuple[Any, list[Any]]:
    model = untrained(char_model, corpus)
    history = train(char_model, model, corpus, STEPS)
    return model.eval(), history


# Training.


def test_training_lowers_the_loss(char_model: ModuleType, corpus: Any, trained: Any) -> None:
    model, history = trained
    assert [now.step for now in history] == list(range(1, STEPS + 1))
    assert [now.spent for now in history] == pytest.approx(np.arange(1, STEPS + 1) / STEPS)
    uniform = np.log2(len(corpus.alphabet))
    assert history[0].bits == pytest.approx(uniform, abs=1)
    # Better than the frequencies of the characters: the model makes use of what came before.
    frequencies = torch.cat([corpus.train, corpus.validation]).bincount().double()
    p = frequencies / frequencies.sum()
    unigram = -float((p * p.log2()).sum())
    assert np.mean([now.bits for now in history[-5:]]) < unigram < history[0].bits
    assert char_model.validation_bits(model, corpus) < unigram


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns_from_the_first_step(char_model: ModuleType, corpus: Any, variant: str) -> None:
    """Queries and keys that start at zero would have no gradient under normalized (semantics of R = 0)."""
    model = untrained(char_model, corpus, variant)
    train(char_model, model, corpus, 1)
    for name, parameter in model.named_parameters():
        assert bool((parameter.grad != 0).any()), name
    for block in model.blocks:
        q, k, _ = block.attention.qkv.weight.grad.chunk(3)
        assert bool((q != 0).any())
        assert bool((k != 0).any())


def test_training_repeats(char_model: ModuleType, corpus: Any, trained: Any) -> None:
    # The schedule follows the clock, so the first step of a longer training is the same step.
    again = train(char_model, untrained(char_model, corpus), corpus, STEPS)[:1]
    assert [now.bits for now in again] == [now.bits for now in trained[1][:1]]
