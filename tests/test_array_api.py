"""The array-API backend on array-api-strict, which admits nothing beyond the standard, against the reference.

NumPy and PyTorch arrays go through it too: they are array-API libraries like any other, and have 16-bit dtypes,
or devices, that array-api-strict lacks.
"""

from collections.abc import Iterator
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest
from support import CORNER_ROWS, variants

from sa_softmax import reference
from sa_softmax.backends import array_api, protocol
from sa_softmax.backends.array_api.adapter import Adapter

Array = np.ndarray[Any, Any]

CPU = strict.Device("CPU_DEVICE")
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(autouse=True, params=["2023.12", "2025.12"])
def only_the_standard(request: pytest.FixtureRequest) -> Iterator[None]:
    """No optional feature of the standard either, in the oldest version that is supported and in the newest."""
    with strict.ArrayAPIStrictFlags(
        api_version=request.param, boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
    ):
        yield


def to_strict(array: Array | None, device: strict.Device = CPU) -> Any:
    return None if array is None else strict.asarray(array, device=device)


def to_numpy(array: Any, like: Array) -> Array:
    """The values, once library, dtype and shape are known to be right."""
    assert type(array) is type(strict.asarray(0.0))
    assert array.dtype == getattr(strict, str(like.dtype))
    assert array.shape == like.shape
    return np.asarray(array.to_device(CPU))


def close(actual: Any, expected: Array, units: int = 8) -> None:
    """Both sides compute in the same dtype; an addition in another order costs a few units of roundoff."""
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    tolerance = units * np.finfo(expected.dtype).eps
    np.testing.assert_allclose(to_numpy(actual, expected), expected, rtol=tolerance, atol=tolerance * largest)


@variants
@dtypes
@pytest.mark.parametrize("row", CORNER_ROWS.values(), ids=CORNER_ROWS)
def test_corner_rows(variant: str, dtype: str, row: list[float]) -> None:
    x = np.array(row, dtype)
    y = array_api.sa_softmax(to_strict(x), variant=variant)
    expected = reference.sa_softmax(x, variant=variant)
    close(y, expected)
    np.testing.assert_array_equal(to_numpy(y, x) == 0, expected == 0)  # zeros are exact in both


@variants
@dtypes
def test_nan_and_inf_poison_their_row_only(variant: str, dtype: str) -> None:
    big = np.finfo(dtype).max
    x = np.array([[np.nan, 1, -np.inf], [np.inf, 1, 2], [big, -big, 0], [-big, big, big], [1, 2, 3]], dtype)
    where = np.array([True, True, False])
    for mask in (None, where):
        expected = reference.sa_softmax(x, variant=variant, where=mask)
        assert np.isnan(expected[:2, :2]).all()
        assert np.isfinite(expected[2:]).all()
        close(array_api.sa_softmax(to_strict(x), variant=variant, where=to_strict(mask)), expected)


@variants
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e308])
def test_excluded_entries_never_influence_anything(variant: str, garbage: float) -> None:
    where = np.array([[True, False, True], [False, True, True], [False, False, False]])
    x = np.where(where, np.array([0.5, -1.0, 2.0]), garbage)
    expected = reference.sa_softmax(np.where(where, x, 0), variant=variant, where=where)
    close(array_api.sa_softmax(to_strict(x), variant=variant, where=to_strict(where)), expected)


@variants
@dtypes
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (1, 1), (0,), (0, 3), (3, 0)])
def test_axes_shapes_and_masks_that_broadcast(
    variant: str, dtype: str, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    x = (3 * rng.normal(size=shape)).astype(dtype)
    for axis in range(-len(shape), len(shape)):
        for where in (None, np.array(True), rng.random(shape[-1:]) > 0.3, rng.random(shape) > 0.3):
            y = array_api.sa_softmax(to_strict(x), axis=axis, variant=variant, where=to_strict(where))
            close(y, reference.sa_softmax(x, axis=axis, variant=variant, where=where))


SHAPES = [  # batch, Hq, Hkv, Tq, Tk, D, Dv
    ((2, 3), 4, 2, 3, 5, 2, 3),
    ((), 3, 1, 4, 2, 3, 1),
    ((1,), 2, 2, 1, 6, 4, 2),
    ((2,), 1, 1, 5, 1, 1, 1),
    ((2,), 2, 1, 3, 0, 2, 2),
    ((0,), 2, 1, 3, 2, 2, 2),
    ((), 1, 1, 0, 3, 2, 2),
]


@variants
@dtypes
@pytest.mark.parametrize(("batch", "Hq", "Hkv", "Tq", "Tk", "D", "Dv"), SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"scale": -0.3}, {"is_causal": True}, {"is_causal": True, "q_offset": -1}], ids=str
)
def test_attention(
    variant: str, dtype: str, batch: tuple[int, ...], Hq: int, Hkv: int, Tq: int, Tk: int, D: int, Dv: int,
    options: dict[str, Any], rng: np.random.Generator,
) -> None:  # fmt: skip
    q, k, v = (rng.normal(size=(*batch, *rest)).astype(dtype) for rest in ((Hq, Tq, D), (Hkv, Tk, D), (Hkv, Tk, Dv)))
    full = rng.normal(size=(*batch, Hq, Tq, Tk)).astype(dtype)
    for bias, mask in ((None, None), (full, full > 0), (full[..., :1, :, :], None), (None, rng.random(Tk) > 0.5)):
        got = array_api.sa_attention(
            *map(to_strict, (q, k, v)), variant=variant, bias=to_strict(bias), mask=to_strict(mask), **options
        )
        # Near-zero rows stretch the error of their scores by 1/R.
        close(got, reference.sa_attention(q, k, v, variant=variant, bias=bias, mask=mask, **options), units=64)


@variants
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_excluded_keys_never_influence_attention(variant: str, garbage: float, rng: np.random.Generator) -> None:
    q, k, v = rng.normal(size=(3, 1, 4, 2))
    bias, mask = rng.normal(size=(4, 4)), np.array([True, True, True, False]) & (np.arange(4) != 1)[:, None]
    expected = reference.sa_attention(q, k, v, variant=variant, bias=bias, mask=mask)
    assert (expected[0, 1] == 0).all()
    k[:, 3], v[:, 3], q[:, 1], bias[~mask] = garbage, garbage, garbage, garbage
    arrays = (to_strict(array) for array in (q, k, v))
    got = array_api.sa_attention(*arrays, variant=variant, bias=to_strict(bias), mask=to_strict(mask))
    close(got, expected)


@variants
def test_a_value_that_some_queries_exclude_poisons_the_others_only(variant: str, rng: np.random.Generator) -> None:
    q, k, v = rng.normal(size=(3, 1, 4, 2))
    v[0, 2, 0] = np.nan
    expected = reference.sa_attention(q, k, v, variant=variant, is_causal=True)
    np.testing.assert_array_equal(np.isnan(expected[0]), [[0, 0], [0, 0], [1, 0], [1, 0]])
    close(array_api.sa_attention(*map(to_strict, (q, k, v)), variant=variant, is_causal=True), expected)


@variants
@pytest.mark.parametrize("name", ["device1", "device2", "no_float64", "no_x64"])
def test_results_stay_on_the_device_and_need_no_other_dtype_than_theirs(
    variant: str, name: str, rng: np.random.Generator
) -> None:
    device = strict.Device(name)
    x = rng.normal(size=(2, 3, 3)).astype(np.float32)
    mask = rng.random((3, 3)) > 0.3
    on_device = to_strict(x, device)
    y = array_api.sa_softmax(on_device, variant=variant, where=to_strict(mask, device))
    assert y.device == device
    close(y, reference.sa_softmax(x, variant=variant, where=mask))
    o = array_api.sa_attention(
        on_device, on_device, on_device,
        variant=variant, bias=to_strict(x, device), mask=to_strict(mask, device), is_causal=True, q_offset=1,
    )  # fmt: skip
    assert o.device == device
    everything = array_api.sa_attention(
        on_device, on_device, on_device, variant=variant, is_causal=True, q_offset=2**40
    )
    close(everything, reference.sa_attention(x, x, x, variant=variant), units=64)
    close(o, reference.sa_attention(x, x, x, variant=variant, bias=x, mask=mask, is_causal=True, q_offset=1), units=64)


def test_inputs_stay_as_they_were(rng: np.random.Generator) -> None:
    values = rng.normal(size=(1, 3, 3))
    values[0, 0, 1] = -np.inf
    x, mask = to_strict(values.copy()), to_strict(np.array([True, False, True]))
    array_api.sa_softmax(x, where=mask)
    array_api.sa_attention(x, x, x, bias=x, mask=mask)
    np.testing.assert_array_equal(to_numpy(x, values), values)


@variants
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numpy_arrays_pass_through_it_without_a_warning(variant: str, dtype: str, rng: np.random.Generator) -> None:
    x = rng.normal(size=(4, 3, 5)).astype(dtype)
    x[0, 0], x[1, 1] = [np.inf, -np.inf, np.nan, 1, 2], [np.finfo(dtype).max, np.finfo(dtype).min, 0, 1, -1]
    expected = reference.sa_softmax(x, variant=variant)
    got = array_api.sa_softmax(x, variant=variant)
    np.testing.assert_allclose(got, expected, rtol=8 * np.finfo(dtype).eps, strict=True)


def test_masked_arrays_are_refused() -> None:
    with pytest.raises(TypeError, match=r"x must be an array .* got numpy\.ma\."):
        array_api.sa_softmax(np.ma.masked_invalid([1.0, np.nan]))


@variants
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_16_bit_arrays_compute_in_float32_and_round_once(variant: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.linspace(-4, 5, 60, dtype=torch.float64).to(getattr(torch, dtype)).reshape(3, 4, 5)
    wide = x.to(torch.float64 if dtype == "float64" else torch.float32)
    for operation in (
        lambda x: array_api.sa_softmax(x, variant=variant),
        lambda x: array_api.sa_attention(x, x, x, variant=variant, bias=x[..., :4], is_causal=True),
    ):
        assert torch.equal(operation(x), operation(wide).to(x.dtype))
        assert operation(x).dtype == x.dtype
    expected = reference.sa_softmax(wide.numpy(), variant=variant)
    close_enough = 16 * np.finfo(expected.dtype).eps
    np.testing.assert_allclose(
        array_api.sa_softmax(wide, variant=variant).numpy(), expected, rtol=close_enough, strict=True
    )


def test_the_adapter_declares_what_it_has() -> None:
    adapter = Adapter()
    assert adapter.name == "array_api"
    assert adapter.operations == ("sa_softmax", "sa_attention")
    assert adapter.dtypes == ("float32", "float64")
    assert [name for name in protocol.OPERATIONS if hasattr(adapter, name)] == list(adapter.operations)


@variants
@pytest.mark.parametrize("device", Adapter.devices)
def test_the_adapter_speaks_numpy(variant: str, device: str, rng: np.random.Generator) -> None:
    adapter, x = Adapter(), rng.normal(size=(2, 3, 4))
    mask = rng.random(3) > 0.5
    y = adapter.sa_softmax(x, axis=1, variant=variant, where=mask[:, None], device=device)
    np.testing.assert_allclose(
        y, reference.sa_softmax(x, axis=1, variant=variant, where=mask[:, None]), rtol=1e-15, atol=1e-15, strict=True
    )
    options: dict[str, Any] = {
        "variant": variant, "bias": None, "mask": mask, "is_causal": True, "q_offset": 1, "scale": None,
    }  # fmt: skip
    o = adapter.sa_attention(x, x, x, device=device, **options)
    np.testing.assert_allclose(o, reference.sa_attention(x, x, x, **options), rtol=0, atol=1e-14, strict=True)
