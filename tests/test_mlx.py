"""The MLX backend on the CPU: the spec's values and derivatives under MLX's function transformations."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from support import (
    CORNER_ROWS,
    CORNERS,
    FLOATS,
    GARBAGE,
    derivative_size,
    finfo,
    numpy_dtype,
    randn,
    variants,
)

mx = pytest.importorskip("mlx.core", exc_type=ImportError)

import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optimizers  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

import sa_softmax as top_level  # noqa: E402
from sa_softmax import reference  # noqa: E402
from sa_softmax.backends.mlx import (  # noqa: E402
    _attention,
    sa_attention,
    sa_softmax,
    scaled_dot_product_attention,
)
from sa_softmax.backends.mlx.adapter import Adapter, _to_mlx, _to_numpy  # noqa: E402
from sa_softmax.backends.mlx.nn import SAMultiHeadAttention, SASoftmax  # noqa: E402

GUIDE = (Path(__file__).parent.parent / "docs" / "mlx.md").read_text()

NAN, INF = np.nan, np.inf

Array = np.ndarray[Any, Any]
Function = Callable[..., Any]


def wide(x: Array) -> Array:
    """In float64, where the reference is exact as seen from float32."""
    return x.astype(np.float64)


def to_mlx(*arrays: Array | None) -> list[Any]:
    return [_to_mlx(array) for array in arrays]


def assert_close(actual: Any, expected: Array, **tolerance: Any) -> None:
    assert isinstance(actual, mx.array)
    support.assert_close(_to_numpy(actual), expected, **tolerance)


ROWS = CORNERS.astype(np.float32)


@pytest.fixture(params=["-inf", "where"])
def rows(request: pytest.FixtureRequest) -> tuple[Array, Array]:
    """Corner rows and participation; excluded entries are -inf, or hold garbage that only ``where`` excludes."""
    where = ROWS != -INF
    if request.param == "-inf":
        return ROWS, where
    where[1::3, 0] = False
    return np.where(where, ROWS, GARBAGE.astype(np.float32)), where


def row_operation(variant: str) -> Function:
    return lambda x, where: sa_softmax(x, variant=variant, where=where)


# Ways to a gradient of sum(g * f(x, where)), and to a tangent.


def vjp(f: Function, x: Any, where: Any, g: Any) -> Any:
    return mx.vjp(lambda x: f(x, where), [x], [g])[1][0]


def jvp(f: Function, x: Any, where: Any, t: Any) -> Any:
    return mx.jvp(lambda x: f(x, where), [x], [t])[1][0]


def weighted(f: Function) -> Function:
    """sum(g * f), leaving out what is excluded, where f is 0 and g may be NaN."""
    return lambda x, where, g: (f(x, where) * mx.where(where, g, 0)).sum()


REVERSE: dict[str, Function] = {
    "vjp": vjp,
    "grad": lambda f, *arrays: mx.grad(weighted(f))(*arrays),
    "value_and_grad": lambda f, *arrays: mx.value_and_grad(weighted(f))(*arrays)[1],
    "compile of grad": lambda f, *arrays: mx.compile(mx.grad(weighted(f)))(*arrays),
    "vmap of vjp": lambda f, *arrays: mx.vmap(lambda x, where, g: vjp(f, x, where, g))(*arrays),
    "vjp of vmap": lambda f, *arrays: vjp(mx.vmap(f), *arrays),
    "vjp of vmap of vmap": lambda f, x, where, g: mx.squeeze(
        vjp(mx.vmap(mx.vmap(f, in_axes=1, out_axes=1)), x[:, :, None], where[:, :, None], g[:, :, None]), 2
    ),
    "checkpoint": lambda f, *arrays: vjp(mx.checkpoint(f), *arrays),
}

FORWARD: dict[str, Function] = {
    "jvp": jvp,
    "vmap of jvp": lambda f, *arrays: mx.vmap(lambda x, where, t: jvp(f, x, where, t))(*arrays),
    "jvp of vmap": lambda f, *arrays: jvp(mx.vmap(f), *arrays),
}


# The row operation: values.


@variants
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
def test_corner_rows(variant: str, compiled: bool, rows: tuple[Array, Array]) -> None:
    x, where = rows
    f = row_operation(variant)
    y = (mx.compile(f) if compiled else f)(*to_mlx(x, where))
    expected = reference.sa_softmax(wide(x), variant=variant, where=where)
    assert_close(y, expected, ulps=4)
    assert (np.array(y)[expected == 0] == 0).all()  # the spec's zeros are exact
    assert_close(sa_softmax(mx.array(ROWS), variant=variant), reference.sa_softmax(wide(ROWS), variant=variant))


@variants
@pytest.mark.parametrize("masked", [False, True])
def test_nan_and_inf_stay_in_their_row(variant: str, masked: bool) -> None:
    x = np.array([[NAN, 1, -INF, 2], [INF, 1, 2, 3], [-INF, INF, INF, 0], [1, 2, -3, 4]], np.float32)
    g = np.array([[1, 2, NAN, 1], [1, NAN, 2, 3], [INF, 1, 2, 3], [1, 2, 3, -1]], np.float32)
    where = np.array([True, True, True, not masked])
    arrays = to_mlx(x, where, g)
    expected = reference.sa_softmax(wide(x), variant=variant, where=where)
    assert np.isnan(expected[:3]).any(-1).all()
    assert_close(row_operation(variant)(*arrays[:2]), expected)
    exact = reference.sa_softmax_vjp(wide(x), wide(g), variant=variant, where=where)
    assert_close(vjp(row_operation(variant), *arrays), exact, size=16)
    exact = reference.sa_softmax_jvp(wide(x), wide(g), variant=variant, where=where)
    assert_close(jvp(row_operation(variant), *arrays), exact, size=16)


@variants
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_compute_in_float32_or_wider_and_round_once(variant: str, dtype: str) -> None:
    x, g = randn(5, 33, dtype=dtype), randn(5, 33, seed=1, dtype=dtype)
    (y,), (dx,) = mx.vjp(lambda x: sa_softmax(x, variant=variant), to_mlx(x), to_mlx(g))
    assert y.dtype == dx.dtype == getattr(mx, dtype)
    half_an_ulp = 0.51 if dtype in ("float16", "bfloat16") else 8
    tiny = float(finfo(x.dtype).smallest_subnormal / finfo(x.dtype).eps)  # where float16 is no longer relative
    assert_close(y, reference.sa_softmax(wide(x), variant=variant), size=tiny, ulps=half_an_ulp)
    expected = reference.sa_softmax_vjp(wide(x), wide(g), variant=variant)
    cancelled = float(np.finfo(np.float32).eps / finfo(x.dtype).eps) * 8
    assert_close(dx, expected, size=max(tiny, cancelled), ulps=half_an_ulp)


@variants
def test_float64_weights_are_float64(variant: str) -> None:
    """mx.exp is not: its float64 has the accuracy of float32."""
    x = np.array([[1.0, -1.0, -20.0]])
    assert_close(sa_softmax(*to_mlx(x), variant=variant), reference.sa_softmax(x, variant=variant), size=0)


def test_long_rows_are_added_up_in_blocks() -> None:
    x = np.full((1, 100_001), -1.0, np.float32)
    x[0, 0] = 1.0
    y = sa_softmax(mx.array(x), variant="product")
    assert_close(y, reference.sa_softmax(wide(x), variant="product"), size=0, ulps=64)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 2, 3), (2, 1, 3, 2, 2, 3)])
def test_every_axis_of_one_to_six_dimensions(shape: tuple[int, ...]) -> None:
    x, where = randn(*shape), randn(*shape[-1:], seed=1) > -1
    for axis in range(-len(shape), len(shape)):
        y = sa_softmax(*to_mlx(x), axis=axis, where=to_mlx(where)[0])
        assert_close(y, reference.sa_softmax(wide(x), axis=axis, where=where))


@variants
@pytest.mark.parametrize(("shape", "axis"), [((0,), 0), ((3, 0), 1), ((0, 3), 1), ((0, 3), 0)])
def test_zero_size(variant: str, shape: tuple[int, ...], axis: int) -> None:
    x = mx.zeros(shape)
    f = lambda x: sa_softmax(x, axis=axis, variant=variant)  # noqa: E731
    (y,), (dx,) = mx.vjp(f, [x], [x])
    (dy,) = mx.jvp(f, [x], [x])[1]
    assert y.shape == dx.shape == dy.shape == shape


@variants
def test_all_of_the_exponent_range(variant: str) -> None:
    big = 3.4e38
    rows = [[big, big, 1], [big, -big, 0], [-big, -big, -big], [big, 1, 2], [-big, 0.5, 0.25], [big, 3.3e38, -1]]
    rows += [[scale, -scale, scale / 2] for scale in (1e-37, 1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30, 1.7e38)]
    x = np.array(rows, np.float32)
    g = np.array([[4, -3, 2]] * len(x), np.float32)  # beyond what G8 promises
    where = np.ones_like(x, bool)
    results = (
        sa_softmax(mx.array(x), variant=variant),
        vjp(row_operation(variant), *to_mlx(x, where, g)),
        jvp(row_operation(variant), *to_mlx(x, where, g)),
    )
    expected = (
        reference.sa_softmax(wide(x), variant=variant),
        reference.sa_softmax_vjp(wide(x), wide(g), variant=variant),
        reference.sa_softmax_jvp(wide(x), wide(g), variant=variant),
    )
    size = 4 * derivative_size(x, where, variant)
    floor = np.finfo(np.float32).tiny / np.finfo(np.float32).eps  # D5
    for actual, exact, terms in zip(results, expected, (0, size, size), strict=True):
        fits = abs(exact) < np.finfo(np.float32).max
        assert (np.array(actual)[~fits] == np.sign(exact[~fits]) * INF).all()
        assert_close(mx.where(mx.array(fits), actual, 0), np.where(fits, exact, 0), size=np.maximum(terms, floor))


# The row operation: derivatives.


@variants
@pytest.mark.parametrize("way", REVERSE)
def test_gradient(way: str, variant: str, rows: tuple[Array, Array]) -> None:
    x, where = rows
    g = np.where(where, randn(*x.shape), NAN).astype(np.float32)
    dx = REVERSE[way](row_operation(variant), *to_mlx(x, where, g))
    expected = reference.sa_softmax_vjp(wide(x), wide(g), variant=variant, where=where)
    assert np.isfinite(expected).all()
    assert_close(dx, expected, size=derivative_size(x, where, variant))
    assert (np.array(dx)[~where] == 0).all()


@variants
@pytest.mark.parametrize("way", FORWARD)
def test_tangent(way: str, variant: str, rows: tuple[Array, Array]) -> None:
    """mx.min, which the operation is made of, gives a tied minimum's tangent to one entry."""
    x, where = rows
    t = np.where(where, randn(*x.shape), NAN).astype(np.float32)
    dy = FORWARD[way](row_operation(variant), *to_mlx(x, where, t))
    expected = reference.sa_softmax_jvp(wide(x), wide(t), variant=variant, where=where)
    assert_close(dy, expected, size=derivative_size(x, where, variant))


# Ways to the derivative, along t, of the gradient of sum(g * f(x)).

SECOND: dict[str, Function] = {
    "grad of grad": lambda f, x, g, t: mx.grad(lambda x: (mx.grad(lambda x: (f(x) * g).sum())(x) * t).sum())(x),
    "jvp of grad": lambda f, x, g, t: mx.jvp(mx.grad(lambda x: (f(x) * g).sum()), [x], [t])[1][0],
    "grad of jvp": lambda f, x, g, t: mx.grad(lambda x: (mx.jvp(f, [x], [t])[1][0] * g).sum())(x),
    "grad of grad of vmap": lambda f, x, g, t: SECOND["grad of grad"](mx.vmap(f), x, g, t),
}


@variants
@pytest.mark.parametrize("way", SECOND)
def test_second_derivatives_agree_with_finite_differences(way: str, variant: str) -> None:
    """At rows of mixed, of positive and of negative sign, without ties; an excluded entry holds NaN."""
    x = np.array([[0.3, -1.2, 2.0, 0.7], [0.5, 1.5, 0.25, 3.0], [-0.5, -1.5, -0.25, -3.0]])
    where = np.array([True, True, False, True])
    g, t, h = randn(*x.shape, dtype="float64"), randn(*x.shape, seed=1, dtype="float64"), 1e-5
    after = reference.sa_softmax_vjp(x + h * t, g, variant=variant, where=where)
    before = reference.sa_softmax_vjp(x - h * t, g, variant=variant, where=where)
    expected = (after - before) / (2 * h)
    x[:, 2] = NAN
    on = mx.array(where)
    actual = SECOND[way](lambda x: sa_softmax(x, variant=variant, where=on), *to_mlx(x, g, t))
    np.testing.assert_allclose(np.array(actual), expected, rtol=0, atol=1e-8)


@variants
def test_second_derivatives_of_corner_rows_hold_no_nan(variant: str, rows: tuple[Array, Array]) -> None:
    x, where = rows
    keep = [i for i, name in enumerate(CORNER_ROWS) if name != "tiny"]  # 1/R^2 is no float32 there
    x, where = x[keep], where[keep]
    on = mx.array(where)
    for way, second in SECOND.items():
        if "vmap" not in way:
            f = lambda x: sa_softmax(x, variant=variant, where=on)  # noqa: E731
            result = np.array(second(f, *to_mlx(x, randn(*x.shape), randn(*x.shape, seed=1))))
            assert np.isfinite(result).all()
            assert (result[~where] == 0).all()


# The row operation: vmap, dispatch, module.


@variants
def test_vmap_over_x_and_where(variant: str) -> None:
    x, where = randn(2, 3, 5), randn(2, 3, 5, seed=1) > -0.5
    X, W = to_mlx(x, where)
    f = row_operation(variant)
    expected = reference.sa_softmax(wide(x), variant=variant, where=where)
    assert_close(mx.vmap(f)(X, W), expected)
    assert_close(mx.vmap(mx.vmap(f))(X, W), expected)
    last = mx.vmap(f, in_axes=2, out_axes=2)(mx.moveaxis(X, 0, 2), mx.moveaxis(W, 0, 2))
    assert_close(mx.moveaxis(last, 2, 0), expected)
    for in_axes, arrays in (((None, 0), (X[0], W)), ((0, None), (X, W[0]))):
        xs, ws = (np.broadcast_to(np.array(array), x.shape) for array in arrays)
        expected = reference.sa_softmax(wide(xs), variant=variant, where=ws)
        assert_close(mx.vmap(f, in_axes=in_axes)(*arrays), expected)
    columns = mx.vmap(lambda x: sa_softmax(x, axis=0, variant=variant))(X)
    assert_close(columns, reference.sa_softmax(wide(x), axis=1, variant=variant))


def test_the_top_level_functions_take_arrays_and_tracers() -> None:
    x = randn(1, 3, 5)
    X = mx.array(x)
    expected = reference.sa_softmax(wide(x))
    for f in (top_level.sa_softmax, mx.compile(top_level.sa_softmax), mx.vmap(top_level.sa_softmax)):
        assert_close(f(X), expected)
    dx = mx.grad(lambda x: (top_level.sa_softmax(x) * x).sum())(X)
    assert_close(dx, expected + reference.sa_softmax_vjp(wide(x), wide(x)), size=4)
    o = mx.compile(lambda x: top_level.sa_attention(x, x, x))(X)
    assert_close(o, reference.sa_attention(*[wide(x)] * 3))


def test_other_arrays_are_refused() -> None:
    x = randn(2, 3)
    for call in (
        lambda: sa_softmax(x),
        lambda: sa_softmax(mx.array(x), where=x > 0),
        lambda: sa_attention(mx.array(x)[None], x[None], mx.array(x)[None]),
    ):
        with pytest.raises(TypeError, match=r"got numpy.ndarray. Convert it with mlx.core.array"):
            call()
    for dtype in (mx.int32, mx.bool_, mx.complex64):
        with pytest.raises(TypeError, match=f"got {str(dtype).removeprefix('mlx.core.')}"):
            sa_softmax(mx.ones(3, dtype))
    for call in (lambda: sa_softmax(mx.array(1.0)), lambda: mx.vmap(sa_softmax)(mx.ones(3))):
        with pytest.raises(ValueError, match="0-d"):
            call()


@variants
def test_module(variant: str) -> None:
    x, where = randn(3, 4), randn(3, 4, seed=1) > 0
    module = SASoftmax(0, variant)
    assert_close(module(mx.array(x)), reference.sa_softmax(wide(x), axis=0, variant=variant))
    assert_close(module(*to_mlx(x, where)), reference.sa_softmax(wide(x), axis=0, variant=variant, where=where))
    assert repr(module) == f"SASoftmax(axis=0, variant={variant!r})"
    assert repr(SASoftmax()) == "SASoftmax(axis=-1, variant='normalized')"
    model = nn.Sequential(nn.Linear(4, 4), module)
    assert list(model.parameters()["layers"][1]) == []
    _, gradients = nn.value_and_grad(model, lambda x: model(x)[0, 0])(mx.array(x))
    assert mx.isfinite(gradients["layers"][0]["weight"]).all()


# Attention.


def attention_case(name: str) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays and options by name."""
    Hq, Hkv, Tq, Tk = 4, 2, 3, 5
    arrays = {"q": randn(2, Hq, Tq, 4), "k": randn(2, Hkv, Tk, 4, seed=1), "v": randn(2, Hkv, Tk, 6, seed=2)}
    mask = randn(2, 1, Tq, Tk, seed=3) > -0.7
    match name:
        case "plain":
            return arrays, {}
        case "bias, mask, causal":
            return arrays | {"bias": randn(Hq, 1, Tk, seed=4)}, {"mask": mask, "is_causal": True, "q_offset": 2}
        case "garbage":
            # The last key and the second query of the first batch entry are excluded; they hold what must not leak.
            mask[..., -1] = False
            mask[0, :, 1] = False
            arrays["bias"] = randn(Hq, Tq, Tk, seed=4)
            arrays["k"][:, :, -1], arrays["v"][:, :, -1], arrays["bias"][..., -1] = [NAN, INF, -INF, 1], NAN, NAN
            arrays["v"][0, 0, -1], arrays["q"][0, :, 1] = INF, NAN
            return arrays, {"mask": mask, "scale": 0.3}
    raise AssertionError(name)


def on_mlx(options: dict[str, Any]) -> dict[str, Any]:
    return {key: _to_mlx(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}


def attention(options: dict[str, Any], variant: str) -> Function:
    def f(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        return sa_attention(q, k, v, bias=bias, variant=variant, **on_mlx(options))

    return f


def vmapped_attention(options: dict[str, Any], variant: str) -> Function:
    """Over the batch axis, with the mask's; the bias is shared."""
    options = on_mlx(options)
    mask = options.pop("mask", None)

    def f(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        def one(q: Any, k: Any, v: Any, *mask: Any) -> Any:
            return sa_attention(q, k, v, bias=bias, mask=mask[0] if mask else None, variant=variant, **options)

        return mx.vmap(one)(q, k, v, *([] if mask is None else [mask]))

    return f


WAYS: dict[str, Function] = {
    "eager": attention,
    "compile": lambda options, variant: mx.compile(attention(options, variant)),
    "vmap": vmapped_attention,
    "checkpoint": lambda options, variant: mx.checkpoint(attention(options, variant)),
}


@variants
@pytest.mark.parametrize("case", ["plain", "bias, mask, causal", "garbage"])
@pytest.mark.parametrize("way", WAYS)
def test_attention_and_its_derivatives(way: str, case: str, variant: str) -> None:
    arrays, options = attention_case(case)
    do = randn(2, 4, 3, 6, seed=5)
    if case == "garbage":
        do[0, :, 1] = NAN
    f, primals = WAYS[way](options, variant), to_mlx(*arrays.values())
    wides = {name: wide(array) for name, array in arrays.items()}
    expected = reference.sa_attention(**wides, **options, variant=variant)
    exact_gradients = reference.sa_attention_vjp(**wides, do=wide(do), **options, variant=variant)
    (o,), gradients = mx.vjp(f, primals, to_mlx(do))
    assert np.isfinite(expected).all()
    assert_close(o, expected)
    for (name, array), actual, exact in zip(arrays.items(), gradients, exact_gradients[: len(arrays)], strict=True):
        assert actual.shape == array.shape, name
        assert np.isfinite(exact).all(), name
        assert_close(actual, exact, size=16)
    # The tangent map is the transpose of the gradient.
    do = np.nan_to_num(do)
    tangents = [randn(*array.shape, seed=10 + i) for i, array in enumerate(arrays.values())]
    (dy,) = mx.jvp(f, primals, to_mlx(*tangents))[1]
    forward = np.vdot(do, np.array(dy))
    backward = sum(np.vdot(dx, t) for dx, t in zip(exact_gradients, tangents, strict=False))
    np.testing.assert_allclose(forward, backward, rtol=0, atol=1e-6 * abs(np.array(dy)).sum())


@variants
def test_participating_nan_reaches_its_query_or_column(variant: str) -> None:
    q, k, v, do = randn(2, 4, 3, 4), randn(2, 2, 5, 4, seed=1), randn(2, 2, 5, 6, seed=2), randn(2, 4, 3, 6, seed=5)
    bias = randn(4, 3, 5, seed=4)
    v[0, 0, 1, 2], k[1, 1, 4, 0], bias[3, 0, 0] = NAN, INF, NAN
    options = {"is_causal": True, "q_offset": 2, "variant": variant}
    wides = [wide(array) for array in (q, k, v)]
    (o,), gradients = mx.vjp(
        lambda q, k, v, bias: sa_attention(q, k, v, bias=bias, **options), to_mlx(q, k, v, bias), to_mlx(do)
    )
    exact_gradients = reference.sa_attention_vjp(*wides, wide(do), bias=wide(bias), **options)
    exact = (reference.sa_attention(*wides, bias=wide(bias), **options), *exact_gradients)
    for actual, expected in zip((o, *gradients), exact, strict=True):
        assert 0 < np.isnan(expected).sum() < expected.size
        assert_close(actual, expected, size=16)


@variants
def test_attention_second_derivatives(variant: str) -> None:
    """Against finite differences of the reference's gradient, beside excluded NaN and a query without keys."""
    shapes = [(1, 3, 3), (1, 4, 3), (1, 4, 2), (1, 3, 2)]
    q, k, v, do = (randn(*shape, seed=i, dtype="float64") for i, shape in enumerate(shapes))
    k[:, 3], v[:, 3], q[:, 2] = NAN, INF, NAN
    mask = np.array([[True, True, True, False], [True, True, False, False], [False] * 4])
    t, h = randn(1, 3, 3, seed=7, dtype="float64"), 1e-5

    def exact(q: Array) -> tuple[Any, ...]:
        return reference.sa_attention_vjp(q, k, v, do, mask=mask, variant=variant)[:3]

    expected = [(after - before) / (2 * h) for after, before in zip(exact(q + h * t), exact(q - h * t), strict=True)]
    Q, K, V, M, DO, T = to_mlx(q, k, v, mask, do, t)
    gradient = mx.grad(lambda q, k, v: (sa_attention(q, k, v, mask=M, variant=variant) * DO).sum(), argnums=(0, 1, 2))
    forward_over_reverse = mx.jvp(lambda q: gradient(q, K, V), [Q], [T])[1]
    for actual, value in zip(forward_over_reverse, expected, strict=True):
        np.testing.assert_allclose(np.array(actual), value, rtol=0, atol=1e-8)
    reverse_over_reverse = mx.grad(lambda q: (gradient(q, K, V)[0] * T).sum())(Q)
    np.testing.assert_allclose(np.array(reverse_over_reverse), expected[0], rtol=0, atol=1e-8)


def test_attention_offsets_and_sizes() -> None:
    q, k, v = randn(1, 2, 3), randn(1, 4, 3, seed=1), randn(1, 4, 2, seed=2)
    for offset in (-(2**40), -1, 0, 2**31 - 1, 2**31, 2**70):
        expected = reference.sa_attention(*map(wide, (q, k, v)), is_causal=True, q_offset=max(-9, min(offset, 9)))
        assert_close(sa_attention(*to_mlx(q, k, v), is_causal=True, q_offset=offset), expected)
    for shapes in (
        [(2, 2, 3), (2, 0, 3), (2, 0, 4)],
        [(2, 0, 3), (2, 5, 3), (2, 5, 4)],
        [(2, 2, 3), (2, 5, 3), (2, 5, 0)],
    ):
        (o,), gradients = mx.vjp(sa_attention, list(map(mx.zeros, shapes)), [mx.zeros((*shapes[0][:2], shapes[2][-1]))])
        assert o.shape == (*shapes[0][:2], shapes[2][-1])
        assert not o.any()
        assert [dx.shape for dx in gradients] == shapes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_attention_of_16_bits_computes_in_float32(dtype: str) -> None:
    arrays, options = attention_case("bias, mask, causal")
    q, k, v = (arrays[key].astype(numpy_dtype(dtype)) for key in "qkv")
    bias = arrays["bias"]  # float32: the compute dtype is admitted
    (o,), gradients = mx.vjp(attention(options, "normalized"), to_mlx(q, k, v, bias), [mx.ones((2, 4, 3, 6))])
    assert o.dtype == getattr(mx, dtype)
    assert [dx.dtype for dx in gradients] == [getattr(mx, dtype)] * 3 + [mx.float32]
    expected = reference.sa_attention(*map(wide, (q, k, v)), bias=wide(bias), **options)
    assert_close(o, expected, size=1e-3, ulps=0.51)


# Blocks of queries.


@pytest.fixture
def one_query_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "_SCORES", 1)
    monkeypatch.setattr(_attention, "_ROWS", 1)


@variants
@pytest.mark.parametrize("case", ["plain", "bias, mask, causal", "garbage"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("one_query_a_block")
def test_blocks_have_all_derivatives(way: str, case: str, variant: str) -> None:
    q, k = (mx.zeros((2, 4, 3, 4)),) * 2
    assert len(_attention._blocks(q, k)) == 3
    test_attention_and_its_derivatives(way, case, variant)


@variants
@pytest.mark.usefixtures("one_query_a_block")
def test_blocks_have_second_derivatives(variant: str) -> None:
    test_attention_second_derivatives(variant)


@pytest.mark.usefixtures("one_query_a_block")
def test_blocks_at_all_offsets_and_sizes() -> None:
    test_attention_offsets_and_sizes()


def test_blocks_cover_the_queries_and_keep_to_their_number_of_scores() -> None:
    for shape, keys in (
        ((2, 3, 5000, 1), 4096),
        ((1, 2**20, 1), 2**18),
        ((1, 7, 1), 3),
        ((0, 9, 1), 3),
        ((1, 0, 1), 3),
    ):
        blocks = _attention._blocks(mx.zeros(shape), mx.zeros((*shape[:-2], keys, 1)))
        assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(shape[-2]))
        assert all(b.stop - b.start <= max(32, 2**20 // max(1, np.prod(shape[:-2]) * keys)) for b in blocks)


def peak(f: Function, *arrays: Any) -> float:
    """MiB that f takes at most, beside its arguments."""
    mx.eval(arrays)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(f(*arrays))
    return (mx.get_peak_memory() - before) / 2**20


@pytest.mark.parametrize("way", ["forward", "grad", "compile", "grad of vmap", "jvp"])
def test_memory_grows_linearly(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of 2^16 scores, a quarter of a MiB an array; all of the scores would be 4 and 64 MiB an array."""
    monkeypatch.setattr(_attention, "_SCORES", 2**16)

    def f(q: Any, k: Any, v: Any) -> Any:
        return sa_attention(q, k, v, is_causal=True)

    def gradient(f: Function) -> Function:
        return mx.grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2))

    run = {
        "forward": f,
        "grad": gradient(f),
        "compile": mx.compile(f),
        "grad of vmap": gradient(mx.vmap(f)),
        "jvp": lambda *x: mx.jvp(f, x, x)[1],
    }[way]
    short, long = (peak(run, *[mx.random.normal((1, 1, T, 8)) for _ in range(3)]) for T in (1024, 4096))
    assert long < 4 * short
    assert long < 16


# MLX's own conventions.


def additive(mask: Array, low: float, dtype: str = "float32") -> Any:
    return mx.array(np.where(mask, 0, low), getattr(mx, dtype))


@variants
def test_scaled_dot_product_attention_takes_every_form_of_mask(variant: str) -> None:
    q, k, v = randn(2, 4, 3, 4), randn(2, 2, 5, 4, seed=1), randn(2, 2, 5, 6, seed=2)
    options: dict[str, Any] = {"variant": variant, "scale": 0.3}
    arrays, wides = to_mlx(q, k, v), [wide(x) for x in (q, k, v)]

    def f(mask: Any) -> Any:
        return scaled_dot_product_attention(*arrays, mask=mask, **options)

    assert_close(f(None), reference.sa_attention(*wides, **options))
    mask = np.arange(5) <= np.arange(3)[:, None] + 2
    expected = reference.sa_attention(*wides, mask=mask, **options)
    low = {dtype: mx.finfo(getattr(mx, dtype)).min for dtype in FLOATS}
    masks = [additive(mask, low[dtype], dtype) for dtype in FLOATS] + [additive(mask, low["float32"] / 2)]
    for form in ("causal", mx.array(mask), additive(mask, -INF), *masks):
        assert_close(f(form), expected)
    # Every other number is bias, and has a gradient.
    bias = np.where(mask, randn(4, 3, 5, seed=3), -INF).astype(np.float32)
    finite = np.where(mask, bias, 0)
    assert_close(f(mx.array(bias)), reference.sa_attention(*wides, bias=wide(finite), mask=mask, **options))
    do = randn(2, 4, 3, 6, seed=4)
    dbias = reference.sa_attention_vjp(*wides, wide(do), bias=wide(finite), mask=mask, **options)[3]
    assert_close(mx.vjp(f, to_mlx(bias), to_mlx(do))[1][0], dbias, size=16)
    half = scaled_dot_product_attention(*(x.astype(mx.float16) for x in arrays), mask=mx.array(finite), **options)
    assert half.dtype == mx.float16
    # -1e9 is the bias that the docstring says it is: plain softmax, under normalized, where a query has such a key.
    if variant == "normalized":
        softmax = mx.fast.scaled_dot_product_attention(*arrays, scale=0.3, mask=mx.array(mask))
        assert_close(f(additive(mask, -1e9))[..., :2, :], wide(np.array(softmax))[..., :2, :], ulps=16)


def test_causal_is_aligned_as_in_mlx() -> None:
    """Values that tell which keys a query sees: softmax and product of equal scores see the same ones."""
    for Tq, Tk in ((2, 4), (4, 4), (4, 2)):
        q, k, v = mx.ones((1, 1, Tq, 1)), mx.ones((1, 1, Tk, 1)), mx.eye(Tk)[None, None]
        ours = scaled_dot_product_attention(q, k, v, scale=1.0, mask="causal", variant="product")
        theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask="causal")
        seen = np.array(theirs)[0, 0, max(Tq - Tk, 0) :] > 0  # queries before all keys are undefined there
        assert ((np.array(ours)[0, 0, max(Tq - Tk, 0) :] > 0) == seen).all()
        assert not np.array(ours)[0, 0, : max(Tq - Tk, 0)].any()


def test_scaled_dot_product_attention_refuses() -> None:
    q = mx.ones((1, 1, 2, 2))
    call = lambda **options: scaled_dot_product_attention(q, q, q, scale=1.0, **options)  # noqa: E731
    with pytest.raises(ValueError, match="does not define attention sinks"):
        call(sinks=mx.zeros(1))
    with pytest.raises(ValueError, match="'causal'; got 'full'"):
        call(mask="full")
    with pytest.raises(TypeError, match=r"mask must be boolean.*got int32"):
        call(mask=mx.ones((2, 2), mx.int32))
    with pytest.raises(TypeError, match="mask must be an array of the same framework"):
        call(mask=np.zeros((2, 2), np.float32))
    for mask in (mx.zeros((3, 2)), mx.ones((3, 2), mx.bool_)):
        with pytest.raises(ValueError, match="mask must broadcast"):
            call(mask=mask)
    with pytest.raises(TypeError, match="q must have a floating dtype"):
        scaled_dot_product_attention(*[q.astype(mx.int32)] * 3, scale=1.0, mask=mx.zeros((2, 2)))


@variants
def test_multi_head_attention(variant: str) -> None:
    """Weights of MLX's module load; the result is the reference's between the projections, under each form of mask."""
    sizes = (8, 2, 6, 5, 7, 4, 10)
    theirs, module = nn.MultiHeadAttention(*sizes, bias=True), SAMultiHeadAttention(*sizes, bias=True, variant=variant)
    module.load_weights(tree_flatten(theirs.parameters()))
    x, y, z = to_mlx(randn(2, 3, 6), randn(2, 3, 5, seed=1), randn(2, 3, 7, seed=2))
    heads = [
        wide(np.array(projection(array))).reshape(2, 3, 2, -1).transpose(0, 2, 1, 3)
        for projection, array in ((theirs.query_proj, x), (theirs.key_proj, y), (theirs.value_proj, z))
    ]
    for mask, options in (
        (None, {}),
        ("causal", {"is_causal": True}),
        (SAMultiHeadAttention.create_additive_causal_mask(3), {"is_causal": True}),
        (SAMultiHeadAttention.create_additive_causal_mask(3, mx.bfloat16), {"is_causal": True}),
    ):
        o = reference.sa_attention(*heads, **options, variant=variant).transpose(0, 2, 1, 3).reshape(2, 3, 4)
        expected = o @ wide(np.array(theirs.out_proj.weight)).T + wide(np.array(theirs.out_proj.bias))
        assert_close(module(x, y, z, mask), expected, ulps=16)
    theirs.load_weights(tree_flatten(module.parameters()))
    assert SAMultiHeadAttention(4, 2).variant == "normalized"


def test_multi_head_attention_trains() -> None:
    mx.random.seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    layer.attention = SAMultiHeadAttention(8, 2)
    x, mask = mx.random.normal((4, 5, 8)), nn.MultiHeadAttention.create_additive_causal_mask(5)
    optimizer = optimizers.Adam(1e-2)
    loss_and_gradients = nn.value_and_grad(layer, lambda x: ((layer(x, mask) - mx.sin(x)) ** 2).mean())
    losses = []
    for _ in range(20):
        loss, gradients = loss_and_gradients(x)
        optimizer.update(layer, gradients)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_multi_head_attention_warns_once_of_what_cannot_learn() -> None:
    def zeroed(**options: Any) -> Any:
        module = SAMultiHeadAttention(4, 2, **options)
        module.key_proj.weight = mx.zeros((4, 4))
        return module

    x = mx.ones((1, 3, 4))
    run = nn.value_and_grad(module := zeroed(), lambda x: module(x, x, x).sum())
    with pytest.warns(UserWarning, match=r"every key of SAMultiHeadAttention is exactly 0.*variant='product'"):
        _, gradients = run(x)
    assert not gradients["query_proj"]["weight"].any()
    assert not gradients["key_proj"]["weight"].any()
    run(x)
    other = zeroed(variant="product")
    other(x, x, x)
    other = zeroed()
    other.eval()
    other(x, x, x)
    other = zeroed()
    mx.compile(lambda x: other(x, x, x))(x)  # no value can be seen there
    with pytest.warns(UserWarning, match="every key"):
        other(x, x, x)


# The adapter.


@pytest.mark.parametrize("dtype", FLOATS)
def test_adapter_keeps_dtype_and_values(dtype: str) -> None:
    """float64 above all, which mx.array makes float32 of; and views, whose negative strides it refuses."""
    adapter = Adapter()
    x = randn(3, 8, dtype=dtype)[::-1, ::-2]
    where = np.array([True, True, False, True])
    row = {"axis": 1, "variant": "product", "where": where}
    heads = {"variant": "product", "mask": None, "is_causal": True, "q_offset": 1, "scale": None}
    y, dx = adapter.sa_softmax(x, **row, device="cpu"), adapter.sa_softmax_vjp(x, x, **row, device="cpu")
    q, bias = randn(1, 2, 4, dtype=dtype), randn(2, 2, seed=1, dtype=dtype)
    o = adapter.sa_attention(q, q, q, bias=bias, **heads, device="cpu")
    gradients = adapter.sa_attention_vjp(q, q, q, q, bias=bias, **heads, device="cpu")
    assert adapter.sa_attention_vjp(q, q, q, q, bias=None, **heads, device="cpu")[3] is None
    for result in (y, dx, o, *gradients):
        assert isinstance(result, np.ndarray)
        assert result.dtype == x.dtype
    ulps = 0.51 if dtype in ("float16", "bfloat16") else 8
    assert_close(_to_mlx(y), reference.sa_softmax(wide(x), **row), ulps=ulps)
    assert_close(_to_mlx(dx), reference.sa_softmax_vjp(wide(x), wide(x), **row), ulps=ulps, size=4)
    assert_close(_to_mlx(o), reference.sa_attention(*[wide(q)] * 3, bias=wide(bias), **heads), ulps=ulps, size=4)


def test_adapter_honours_the_device() -> None:
    adapter = Adapter()
    assert adapter.devices == (("cpu", "gpu") if mx.metal.is_available() else ("cpu",))
    options = {"axis": 0, "variant": "product", "where": None}
    with pytest.raises(KeyError):
        adapter.sa_softmax(randn(3), **options, device="tpu")


# The guide.


def test_the_code_of_the_guide_runs() -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert names["peak"] < 128
    assert names["o"].shape == names["x"].shape
