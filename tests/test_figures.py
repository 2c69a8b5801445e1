"""The pictures of the documentation: the numbers in them, and that they are drawn."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support import VARIANTS, exact, exact_row

pytest.importorskip("matplotlib")
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    """Imports a module of the pictures by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PICTURES.parent / "figures")
        yield importlib.import_module


@pytest.fixture(scope="module")
def gradient(load: Any) -> ModuleType:
    made: ModuleType = load("gradient")
    return made


def test_curves_are_the_definitions(gradient: ModuleType) -> None:
    z = np.array([-25.0, -24.0, -20.0, -15.0, -10.0, -5.0, -0.5, 0.0, 0.5, 5.0, 7.0])
    curves = gradient.curves(z)
    for i, value in enumerate(z):
        x = list(exact([value, gradient.OTHER]))
        for variant in VARIANTS:
            row = exact_row(x, variant)
            y, largest = (curve[i] for curve in curves[variant])
            np.testing.assert_allclose(y, float(row.y[0]), rtol=1e-14, atol=1e-300)
            # 1 - p is formed by subtraction: absolute errors of a few roundoffs of the factor's size.
            factor = abs(value) if variant == "product" else 1
            expected = max(abs(entry) for entries in row.jacobian for entry in entries)
            np.testing.assert_allclose(largest, float(expected), rtol=1e-13, atol=4 * 2.0**-53 * factor)


def test_what_the_picture_says(gradient: ModuleType) -> None:
    """The formulas of the module's docstring, at the numbers that the picture shows and around them."""
    lead = np.array([10.0, 20.0, 30.0])
    curves = gradient.curves(gradient.OTHER + lead)
    rare = np.exp(-lead) / (1 + np.exp(-lead))  # 1 - p
    _, softmax = curves["softmax"]
    np.testing.assert_allclose(softmax, rare * (1 - rare), rtol=2e-3)
    z = gradient.OTHER + lead
    _, product = curves["product"]
    np.testing.assert_allclose(product, (1 - rare) * (1 + z * rare), rtol=1e-13)
    _, normalized = curves["normalized"]
    np.testing.assert_allclose(normalized[:2], (1 - rare[:2]) * (1 + lead[:2] * rare[:2]) / 25, rtol=1e-13)
    assert normalized[2] == pytest.approx(softmax[2], rel=2e-3)
    assert [f"{value:.2g}" for value in softmax] == ["4.5e-05", "2.1e-09", "9.4e-14"]


@pytest.mark.parametrize("name", ["gradient", "jacobians", "corners", "ring"])
def test_pictures_are_drawn_as_they_are_kept(load: Any, name: str, tmp_path: Path) -> None:
    drawn, kept = tmp_path / f"{name}.png", PICTURES / f"{name}.png"
    getattr(load("gradient" if name == "jacobians" else name), name)(drawn)
    for picture in (drawn, kept):
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(content) < 200_000
    assert drawn.read_bytes()[16:24] == kept.read_bytes()[16:24]  # width and height


def test_corner_titles_name_what_the_rows_do(load: Any) -> None:
    corners, operations = load("corners"), load("operations")
    y = {
        title: {name: forward(np.array(row)) for name, (forward, _) in operations.OPERATIONS.items()}
        for title, row in corners.CORNERS.items()
    }
    assert y["all negative: the smallest gets 0 (C3)"]["normalized"][0] == 0
    positive = y["all positive: the largest has a = 1 (C3)"]
    assert positive["normalized"][-1] == pytest.approx(positive["softmax"][-1], rel=1e-15)
    np.testing.assert_allclose(y["constant, above 0 (C4)"]["normalized"], 0.2, rtol=1e-15)
    assert not y["constant, below 0 (C4)"]["normalized"].any()
    assert not y["zeros (C1)"]["normalized"].any()
    assert not y["zeros (C1)"]["product"].any()
    assert not y["-inf is excluded (R2)"]["product"][[0, -1]].any()
    assert not y["one entry left, below 0 (C4)"]["normalized"].any()


def test_errors_count_units_of_the_last_place(load: Any) -> None:
    """A forward that is off by three units shows as three, and an exact one as at most a half."""
    from sa_softmax import reference

    accuracy = load("accuracy")

    def rounded(x: Any, variant: str) -> Any:
        return reference.sa_softmax(x.astype(np.float64), variant=variant).astype(np.float32)

    def off(x: Any, variant: str) -> Any:
        y = rounded(x, variant)
        return y + 3 * np.spacing(np.abs(y))

    assert max(accuracy.errors(rounded, "normalized")) <= 0.5
    assert all(2.4 < error < 3.6 for error in accuracy.errors(off, "normalized"))
