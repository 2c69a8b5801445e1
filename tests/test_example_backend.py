"""examples/autograd_backend.py conforms, and the composition that it warns of does not."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import autograd.numpy as np
import pytest

from sa_softmax.conformance import cases, load, run

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("autograd_backend")


def test_example_conforms(example: ModuleType) -> None:
    report = run(load("autograd_backend:Adapter"))
    failed = [f"{result.id}: {result.message}" for result in report.results if result.status == "failed"]
    assert not failed, "\n".join(failed[:20])
    assert report.ok
    assert report.count("passed") == len(cases())  # nothing skipped, in any dtype
    passed = {result.id for result in report.results if result.status == "passed"}
    operations = {case.operation for case in cases() if case.id in passed}
    assert operations == {"sa_softmax", "sa_softmax_vjp", "sa_attention", "sa_attention_vjp"}


def naive(x: Any, *, axis: int, variant: str, where: Any) -> Any:
    """The formulas of the spec as they stand."""
    on = np.broadcast_to(True if where is None else where, x.shape)
    low = np.min(np.where(on, x, np.inf), axis, keepdims=True)
    high = np.max(np.where(on, x, -np.inf), axis, keepdims=True)
    e = np.where(on, np.exp(x - high), 0)
    p = e / np.sum(e, axis, keepdims=True)
    if variant == "product":
        return np.where(on, x * p, 0)
    lo, hi = np.minimum(low, 0), np.maximum(high, 0)
    return np.where(on, (x - lo) / (hi - lo) * p, 0)


def test_naive_composition_is_rejected(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "softmax", naive)
    report = run(example.Adapter())
    assert not report.ok
    failed = {result.id: result for result in report.results if result.status == "failed"}
    for row in ("row.corner/minimum-zero", "row.corner/maximum-zero", "row.ties/minimum-zero"):
        for dtype in example.Adapter.dtypes:
            result = failed.pop(f"{row}/{dtype}/normalized/vjp")
            assert "G4" in result.clauses
            assert "G3" in result.clauses or row.startswith("row.corner")
            assert "nan" not in result.message  # a number, and the wrong one
        assert not any(name.startswith(f"{row}/") for name in failed)  # the rest of the row is right
