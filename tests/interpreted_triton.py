"""Triton's interpreter runs the row kernels on the CPU. ``test_triton.py`` starts this file in a process of its own,
because Triton decides when it is imported whether it interprets."""

from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
import torch
from support import VARIANTS

from sa_softmax import reference
from sa_softmax.backends.torch import implementation
from sa_softmax.backends.torch._triton import interpreted, rows
from sa_softmax.conformance import execute

interpreted.install()

from test_torch_kernels import *  # noqa: E402, F403

# Of what Triton's interpreter does with NumPy.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *pytestmark]  # noqa: F405


def test_the_interpreted_kernels_run() -> None:
    assert implementation("cpu") == "triton in its interpreter"


def conform(*patterns: str) -> int:
    """Run the cases that match; the number that passed."""

    def chosen(cases: list[Any]) -> list[Any]:
        return [case for case in cases if any(fnmatchcase(case.id, pattern) for pattern in patterns)]

    results = list(execute(interpreted.Adapter(), progress=chosen))
    failed = [f"{result.id}: {result.message}" for result in results if result.status == "failed"]
    assert not failed, "\n".join(failed[:20])
    return sum(result.status == "passed" for result in results)


def test_conformance_in_one_pass() -> None:
    assert conform(*WHOLE_CASES) >= 100


def test_conformance_in_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows, and longer ones, as if 16 columns were all that a program can hold."""
    monkeypatch.setattr(rows, "WHOLE", {"forward": 16, "vjp": 16})
    rows._plan.cache_clear()
    try:
        assert conform(*CHUNKED_CASES) >= 20
    finally:
        rows._plan.cache_clear()


WHOLE_CASES = (
    "row.corner/*/float32/normalized/*", "row.ties/*/float32/*", "row.scale/max/float32/*", "row.where/*/float32/*",
    "row.layout/*/float32/*", "row.independence/*/float32/*", "row.length/n=7/*", "row.length/n=128/*", "row.errors/*",
)  # fmt: skip
CHUNKED_CASES = (
    "row.length/n=33/float32/*", "row.length/n=129/float32/*", "row.ties/*/float32/*", "row.where/*/float32/*",
)  # fmt: skip


@pytest.mark.parametrize("direction", ["forward", "vjp"])
def test_rows_on_both_sides_of_what_a_program_holds(direction: str) -> None:
    whole = rows.WHOLE[direction]
    for n, launches in ((whole, 1), (whole + 1, 2)):
        assert rows.triton.cdiv(n, rows._plan(direction, torch.float32, (2, n), 1, (n, 1), (n, 1)).columns) == launches
        x, g = (torch.randn(2, n, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
        where = torch.rand(n, generator=torch.Generator().manual_seed(3)) < 0.9
        for variant in VARIANTS:
            options = {"variant": variant, "where": where.numpy()}
            if direction == "forward":
                got, right = rows.row(x, where, 1, variant), reference.sa_softmax(x.double().numpy(), **options)
            else:
                got = rows.row_vjp(x, g, where, 1, variant)
                right = reference.sa_softmax_vjp(x.double().numpy(), g.double().numpy(), **options)
            error = np.abs(got.double().numpy() - right).max()
            assert error <= 2e-6 * np.abs(right).max()


def test_any_strides_without_a_copy() -> None:
    """Axes that no stride unites, in the input, the mask and the gradient, and repeated rows."""
    base = torch.randn(3, 4, 2, 2, 3, generator=torch.Generator().manual_seed(1))
    g = torch.randn(3, 2, 3, 2, 4, generator=torch.Generator().manual_seed(2)).permute(2, 4, 1, 3, 0)
    where = torch.rand(4, 1, 2, 1, generator=torch.Generator().manual_seed(3)) < 0.7
    for x in (base, base.transpose(0, 3), base[:, ::2, :, ::2], base[:, :1].expand(3, 4, 2, 2, 3)):
        for axis in range(5):
            shape = x.shape
            g_, where_ = g.as_strided(shape, g.stride()) if x is base else torch.ones(shape), None
            if x.shape == base.shape:
                where_ = where
            y, dx = rows.row(x, where_, axis, "normalized"), rows.row_vjp(x, g_, where_, axis, "normalized")
            w = None if where_ is None else where_.numpy()
            right = reference.sa_softmax(x.double().numpy(), axis=axis, where=w)
            torch.testing.assert_close(y.double(), torch.as_tensor(right), rtol=1e-5, atol=1e-6)
            right = reference.sa_softmax_vjp(x.double().numpy(), g_.double().numpy(), axis=axis, where=w)
            torch.testing.assert_close(dx.double(), torch.as_tensor(right), rtol=1e-4, atol=1e-4)
    x = base.transpose(0, 3)
    assert rows.row(x, None, 4, "product").stride() == x.stride()
