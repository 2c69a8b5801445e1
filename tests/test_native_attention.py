"""The attention kernels of sa-softmax-native, through their C interface, against the reference in float64.

The conformance suite and the fuzz target hold every element to the bounds of the spec on small shapes. Here: sizes at
which blocks, panels and parts begin and end, the sliding window, threads, memory.
"""

import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from support import FLOATS, finfo, numpy_dtype, variants

from sa_softmax import reference

if importlib.util.find_spec("sa_softmax_native") is None:
    pytest.skip("needs sa-softmax-native: pip install ./backends/native", allow_module_level=True)

from sa_softmax_native import c_api

Array = np.ndarray[Any, Any]
NAN = np.nan
floats = pytest.mark.parametrize("dtype", FLOATS)


def draw(*shape: int, dtype: str = "float32", seed: int = 0) -> Array:
    x = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return np.asarray(x.astype(numpy_dtype(dtype)))


def described(a: Array | None) -> Any:
    if a is None:
        return None
    array = c_api.array(a.ctypes.data, a.shape, [stride // a.itemsize for stride in a.strides])
    array.owner = a
    return array


def attention(
    q: Array, k: Array, v: Array, do: Array, *,
    variant: str = "normalized", bias: Array | None = None, mask: Array | None = None,
    offset: int | None = None, left: int = -1, threads: int = 2,
) -> tuple[Array, ...]:  # fmt: skip
    """o, dq, dk, dv and, with a bias, dbias."""
    outputs = [np.full(a.shape, NAN, a.dtype) for a in (do, q, k, v, bias) if a is not None]
    options = q.dtype.name, variant, offset, left, q.shape[-1] ** -0.5
    inputs = [described(a) for a in (q, k, v, bias, mask)]
    o, *gradients = map(described, outputs)
    c_api.attention(*options, *inputs, o, threads)
    c_api.attention_vjp(*options, *inputs, described(do), *gradients, *[None] * (4 - len(gradients)), threads)
    return tuple(outputs)


def expected(
    q: Array, k: Array, v: Array, do: Array, *,
    variant: str = "normalized", bias: Array | None = None, mask: Array | None = None,
    offset: int | None = None, left: int = -1,
) -> tuple[Array, ...]:  # fmt: skip
    i, j = np.arange(q.shape[-2])[:, None], np.arange(k.shape[-2])
    seen = np.ones((q.shape[-2], k.shape[-2]), bool)
    if offset is not None:
        seen &= j - i <= max(-1000, min(offset, 1000))
    if left >= 0:
        seen &= j - i >= max(-1000, min((offset or 0) - left, 1000))
    options: dict[str, Any] = {
        "variant": variant,
        "bias": None if bias is None else bias.astype(np.float64),
        "mask": seen if mask is None else seen & mask,
        "scale": q.shape[-1] ** -0.5,
    }
    q, k, v, do = (a.astype(np.float64) for a in (q, k, v, do))
    gradients = reference.sa_attention_vjp(q, k, v, do, **options)
    return reference.sa_attention(q, k, v, **options), *(a for a in gradients if a is not None)


def assert_close(got: tuple[Array, ...], truth: tuple[Array, ...], roundings: int = 64) -> None:
    """Within the rounding of the result and of Y (A10), and of sums as long as these, relative to the largest value."""
    for a, b in zip(got, truth, strict=True):
        assert a.shape == b.shape
        compute = "float64" if a.dtype == np.float64 else "float32"
        bound = roundings * float(finfo(compute).eps) + float(finfo(a.dtype.name).eps)
        assert np.array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_allclose(
            a.astype(np.float64), b, rtol=0, atol=bound * max(1.0, np.nanmax(np.abs(b), initial=0))
        )


def inputs(
    batch: tuple[int, ...], heads: int, group: int, tq: int, tk: int, d: int, dv: int, dtype: str
) -> tuple[Array, Array, Array, Array]:
    return (
        draw(*batch, heads * group, tq, d, dtype=dtype),
        draw(*batch, heads, tk, d, dtype=dtype, seed=1),
        draw(*batch, heads, tk, dv, dtype=dtype, seed=2),
        draw(*batch, heads * group, tq, dv, dtype=dtype, seed=3),
    )


SHAPES = {
    "one": ((), 1, 1, 1, 1, 1, 1),
    "a block and a panel": ((), 1, 1, 96, 64, 64, 64),
    "one more of each": ((), 1, 1, 97, 65, 65, 129),
    "one less": ((1,), 1, 1, 95, 63, 63, 15),
    "grouped, batched": ((2,), 2, 3, 35, 130, 20, 37),
    "decoding": ((1,), 2, 4, 1, 517, 16, 16),
    "more than one depth": ((), 1, 1, 7, 300, 513, 5),
    "parts of a head": ((), 1, 1, 1100, 70, 8, 8),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@floats
@variants
@shapes
def test_shapes(shape: tuple[Any, ...], variant: str, dtype: str) -> None:
    arrays = inputs(*shape, dtype)
    assert_close(attention(*arrays, variant=variant), expected(*arrays, variant=variant))


@variants
@pytest.mark.parametrize("left", [-1, 0, 1, 63, 64, 200, 2**62])
@pytest.mark.parametrize("offset", [None, 0, 60, -50, 2**62, -(2**62)])
def test_window_and_causality(offset: int | None, left: int, variant: str) -> None:
    arrays = inputs((), 1, 2, 130, 190, 8, 8, "float64")
    truth = expected(*arrays, variant=variant, offset=offset, left=left)
    # A query that sees one key has the gradient 0 as a difference of two terms of the size 1 / |x|.
    assert_close(attention(*arrays, variant=variant, offset=offset, left=left), truth, roundings=2**16)


@variants
@pytest.mark.parametrize(
    "bias_shape", [(2, 4, 70, 90), (4, 70, 90), (1, 1, 70, 90), (2, 1, 1, 90), (4, 70, 1), (90,), (1,)]
)
def test_gradient_of_a_broadcast_bias(bias_shape: tuple[int, ...], variant: str) -> None:
    arrays = inputs((2,), 2, 2, 70, 90, 8, 12, "float64")
    options: dict[str, Any] = {
        "variant": variant,
        "bias": draw(*bias_shape, dtype="float64", seed=4),
        "offset": 20,
        "left": 30,
    }
    assert_close(attention(*arrays, **options), expected(*arrays, **options))


@floats
def test_what_is_masked_has_no_influence(dtype: str) -> None:
    q, k, v, do = inputs((2,), 2, 1, 70, 90, 8, 12, dtype)
    mask = np.random.default_rng(5).random((2, 2, 70, 90)) < 0.7
    mask[0, 0, 3] = mask[1, :, :, 5] = mask[0, :, :, 80] = False
    for a in (q, do):
        a[0, 0, 3] = NAN  # a query without keys
    for a in (k, v):
        a[1, :, 5] = NAN
        a[0, :, 80] = np.inf
    bias = np.where(mask, draw(2, 2, 70, 90, dtype=dtype, seed=6), numpy_dtype(dtype).type(NAN))
    clean = [np.where(np.isfinite(a), a, 0).astype(a.dtype) for a in (q, k, v, do, bias)]
    got = attention(q, k, v, do, bias=bias, mask=mask)
    assert all(np.isfinite(a.astype(np.float32)).all() for a in got)
    for a, b in zip(got, attention(*clean[:4], bias=clean[4], mask=mask), strict=True):
        assert np.array_equal(a, b)


def test_nan_where_the_reference_has_it() -> None:
    arrays = inputs((), 3, 1, 40, 50, 8, 12, "float64")
    mask = np.random.default_rng(5).random((3, 40, 50)) < 0.5
    q, k, v, do = arrays
    q[0, 3, 1] = k[1, 7, 2] = v[2, 9, 3] = do[2, 1, 4] = NAN
    assert_close(attention(*arrays, mask=mask, offset=20), expected(*arrays, mask=mask, offset=20))


@floats
@pytest.mark.parametrize("shape", [((3,), 1, 2, 70, 90, 8, 12), ((), 1, 1, 1100, 90, 8, 12)], ids=["heads", "parts"])
def test_bits_depend_on_neither_threads_nor_place(shape: tuple[Any, ...], dtype: str) -> None:
    arrays = inputs(*shape, dtype)
    bias = draw(shape[4], dtype=dtype, seed=4)
    results = [attention(*arrays, bias=bias, offset=5, threads=threads) for threads in (1, 2, 5)]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.tobytes() == b.tobytes()
    if shape[0]:  # a head alone, and at another place
        turned = attention(*(a[::-1].copy() for a in arrays), bias=bias, offset=5)
        alone = attention(*(a[:1].copy() for a in arrays), bias=bias, offset=5)
        for a, b, c in zip(results[0][:4], turned, alone, strict=False):
            assert a[0].tobytes() == b[-1].tobytes() == c[0].tobytes()


@variants
def test_any_strides(variant: str) -> None:
    arrays = inputs((2,), 2, 1, 33, 44, 16, 16, "float32")
    turned = [np.moveaxis(np.moveaxis(a, -1, 0)[::-1].copy(), 0, -1)[..., ::-1] for a in arrays]
    for a, b in zip(attention(*arrays, variant=variant), attention(*turned, variant=variant), strict=True):
        assert a.tobytes() == b.tobytes()


def test_errors() -> None:
    arrays = inputs((), 1, 1, 3, 4, 5, 6, "float32")
    with pytest.raises(ValueError, match="left must be at least 0, or -1"):
        attention(*arrays, left=-2)


# Scores of this length would take 1 GiB a head.
MEMORY = """
import resource, numpy as np
from sa_softmax.backends.numpy import functions
q, k, v, do = np.random.default_rng(0).standard_normal((4, 1, 2, 16384, 8), np.float32)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
functions.sa_attention(q[..., :64, :], k, v)
functions.sa_attention_vjp(q[..., :200, :], k, v, do[..., :200, :])
functions.sa_attention(q, k, v, is_causal=True)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_is_linear_in_the_length() -> None:
    env = {**os.environ, "SA_SOFTMAX_NUM_THREADS": "2", "SA_SOFTMAX_IMPLEMENTATION": "native"}
    run = subprocess.run([sys.executable, "-c", MEMORY], env=env, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 64
