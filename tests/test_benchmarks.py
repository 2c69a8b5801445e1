"""The benchmarks measure what they say, at the shapes of the one list."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")

from sa_softmax import reference  # noqa: E402
from sa_softmax.benchmarks import GROUPS, Figure, figures, interleave  # noqa: E402
from sa_softmax.benchmarks import report as reports  # noqa: E402
from sa_softmax.benchmarks.measure import ratios  # noqa: E402
from sa_softmax.benchmarks.shapes import ATTENTION, ROWS  # noqa: E402

MACHINE = {"hardware": "a machine", "threads": "2", "implementation": "native"}
FIGURES = [
    Figure("rows", "normalized forward", "4x8", "torch.softmax(out=)", 0.5, 0.4, 0.625, 1.25),
    Figure("memory", "normalized forward", "1x2x8x4", "SDPA", 2.0, 2.0, 2.0, 9.0, "MiB"),
]


def quiet(title: str) -> Any:
    return iter


def test_candidates_take_turns_and_warm_up_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    times = interleave(
        {"slow": lambda: order.append("slow"), "fast": lambda: order.append("fast")},
        3,
        clock=lambda call, count: count * (4.0 if call() is None and order[-1] == "slow" else 2.0),
    )
    assert times == {"slow": [4.0] * 3, "fast": [2.0] * 3}
    assert order[4:] == ["slow", "slow", "fast", "fast", "fast", "fast", "slow", "slow", "slow", "slow", "fast", "fast"]


def test_ratios_are_of_one_round() -> None:
    """A disturbance that takes a whole round in both does not show."""
    assert ratios([1.0, 10.0, 2.0], [2.0, 20.0, 4.0]) == (0.5, 0.5, 0.5)
    assert ratios([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_the_row_kernels_are_right_at_the_shapes_that_are_timed(shape: tuple[int, int]) -> None:
    """The first and the last rows of each: the whole would take the reference minutes."""
    from sa_softmax.backends.torch import sa_softmax
    from sa_softmax.benchmarks.rows import inputs

    x, g = inputs(shape, "cpu")
    x.requires_grad_()
    y = sa_softmax(x)
    (dx,) = torch.autograd.grad(y, x, g)
    for rows in (slice(0, 4), slice(-4, None)):
        x_, g_ = (a[rows].detach().double().numpy() for a in (x, g))
        np.testing.assert_allclose(y[rows].detach(), reference.sa_softmax(x_), rtol=1e-5, atol=1e-9)
        expected = reference.sa_softmax_vjp(x_, g_)
        np.testing.assert_allclose(dx[rows], expected, atol=2e-5 * abs(expected).max(), rtol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_right_at_the_shapes_that_are_timed(is_causal: bool) -> None:
    from sa_softmax.backends.torch import sa_attention
    from sa_softmax.benchmarks.attention import inputs

    for shape in ATTENTION[:2]:
        q, k, v, _ = (a.detach() for a in inputs(shape, torch.float32, "cpu"))
        o = sa_attention(q, k, v, is_causal=is_causal)
        for i in (0, shape.length // 2, shape.length - 1):
            one = [a.double().numpy() for a in (q[:, :2, i : i + 1], k[:, :2], v[:, :2])]
            expected = reference.sa_attention(*one, is_causal=is_causal, q_offset=i if is_causal else 0)
            np.testing.assert_allclose(o[:, :2, i : i + 1], expected, rtol=1e-4, atol=1e-5)


def test_small_rows_are_measured() -> None:
    measured = list(figures(["small"], device="cpu", rounds=2, progress=quiet))
    assert [figure.peer for figure in measured] == ["np.exp", "torch.softmax", "torch.softmax"]
    for figure in measured:
        assert 0 < figure.low <= figure.ratio <= figure.high
        assert 0 < figure.value < 1000


@pytest.mark.parametrize(
    ("groups", "device", "rounds", "message"),
    [
        (["speed"], "cpu", 1, "a group must be one of rows, small"),
        (["rows"], "tpu", 1, "device must be 'cpu' or 'cuda'; got 'tpu'"),
        (["rows"], "cpu", 0, "rounds must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_refused(groups: list[str], device: str, rounds: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(figures(groups, device=device, rounds=rounds, progress=quiet))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        next(figures(["rows"], device="cuda", rounds=1, progress=quiet))


def test_every_group_is_a_function_of_its_module() -> None:
    for group in GROUPS:
        module = pytest.importorskip(f"sa_softmax.benchmarks.{group}")
        assert callable(getattr(module, group))


def test_reports_hold_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = reports.markdown(FIGURES, MACHINE)
    assert "| normalized forward | 4x8 | torch.softmax(out=) | 0.50 | 0.40 to 0.62 | 1.25 ms |" in page
    assert "hardware a machine" in page
    reports.write_json(FIGURES, MACHINE, tmp_path / "bench.json")
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [Figure(**each) for each in content["figures"]] == FIGURES
    assert content["machine"] == MACHINE
    reports.plot(FIGURES, MACHINE, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 5000
    assert reports.table(FIGURES, MACHINE).row_count == 2
