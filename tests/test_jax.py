"""The JAX backend: the spec's values and derivatives under everything that traces, batches or differentiates."""

import functools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import support
from support import (
    CORNER_ROWS,
    CORNERS,
    FLOATS,
    GARBAGE,
    VARIANTS,
    derivative_size,
    finfo,
    numpy_dtype,
    randn,
    variants,
)

jax = pytest.importorskip("jax", exc_type=ImportError)

import jax.numpy as jnp  # noqa: E402

import sa_softmax as top_level  # noqa: E402
from sa_softmax import reference  # noqa: E402
from sa_softmax.backends.jax import sa_attention, sa_softmax  # noqa: E402
from sa_softmax.backends.jax.adapter import QUICK_COMPILATION, Adapter  # noqa: E402

NAN, INF = np.nan, np.inf

Array = np.ndarray[Any, Any]
Function = Callable[..., Any]

# For the tests whose question is not what XLA's optimisations do to the values.
quick_jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILATION)


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def wide(x: Array | None) -> Array | None:
    """In float64, where the reference is exact as seen from float32."""
    return None if x is None or x.dtype == bool else x.astype(np.float64)


def assert_close(actual: Any, expected: Array, **tolerance: Any) -> None:
    support.assert_close(np.asarray(actual), expected, **tolerance)


ROWS = CORNERS.astype(np.float32)


@pytest.fixture(params=["-inf", "where"])
def rows(request: pytest.FixtureRequest) -> tuple[Array, Array | None]:
    """Corner rows; entries are excluded by -inf, or hold garbage and are excluded by ``where``."""
    if request.param == "-inf":
        return ROWS, None
    where = ROWS != -INF
    where[1::3, 0] = False
    return np.where(where, ROWS, GARBAGE.astype(np.float32)), where


def row_operation(variant: str) -> Function:
    return lambda x, where: sa_softmax(x, variant=variant, where=where)


def scanned(f: Function) -> Function:
    """``f`` applied to one row after the other by lax.scan."""
    return lambda *arrays: jax.lax.scan(lambda carry, row: (carry, f(*row)), None, arrays)[1]


# Ways to a gradient: f(x, where), x, where, g -> sum over y of g dy/dx. ``where`` may be None.


def vjp(f: Function, x: Any, where: Any, g: Any) -> Any:
    return jax.vjp(lambda x: f(x, where), x)[1](g)[0]


def grad(f: Function, x: Any, where: Any, g: Any) -> Any:
    return jax.grad(lambda x: jnp.vdot(f(x, where), g))(x)


def jacrev(f: Function, x: Any, where: Any, g: Any) -> Any:
    return jnp.tensordot(g, jax.jacrev(f)(x, where), x.ndim)


def transposed(f: Function, x: Any, where: Any, g: Any) -> Any:
    _, tangent_map = jax.linearize(lambda x: f(x, where), x)
    return jax.linear_transpose(tangent_map, x)(g)[0]


REVERSE: dict[str, Function] = {
    "vjp": vjp,
    "vjp of jit": lambda f, x, where, g: vjp(jax.jit(f), x, where, g),
    "grad": grad,
    "vmap of vjp": lambda f, x, where, g: jax.vmap(functools.partial(vjp, f))(x, where, g),
    "vjp of vmap": lambda f, x, where, g: vjp(jax.vmap(f), x, where, g),
    "checkpoint": lambda f, x, where, g: vjp(jax.checkpoint(f), x, where, g),
    "scan": lambda f, x, where, g: vjp(scanned(f), x, where, g),
    "jacrev": jacrev,
    "linear transpose": transposed,
}


# Ways to a tangent.


def jvp(f: Function, x: Any, where: Any, t: Any) -> Any:
    return jax.jvp(lambda x: f(x, where), (x,), (t,))[1]


FORWARD: dict[str, Function] = {
    "jvp": jvp,
    "vmap of jvp": lambda f, x, where, t: jax.vmap(functools.partial(jvp, f))(x, where, t),
    "jvp of vmap": lambda f, x, where, t: jvp(jax.vmap(f), x, where, t),
    "jvp of scan": lambda f, x, where, t: jvp(scanned(f), x, where, t),
    "jacfwd": lambda f, x, where, t: jnp.tensordot(jax.jacfwd(f)(x, where), t, x.ndim),
    "linearize": lambda f, x, where, t: jax.linearize(lambda x: f(x, where), x)[1](t),
}


def on_device(*arrays: Array | None) -> list[Any]:
    return [None if array is None else jnp.asarray(array) for array in arrays]


# The row operation: values.


@variants
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_corner_rows(variant: str, compiled: bool, rows: tuple[Array, Array | None]) -> None:
    x, where = rows
    f = functools.partial(sa_softmax, variant=variant)
    y = (jax.jit(f) if compiled else f)(jnp.asarray(x), where=on_device(where)[0])
    expected = reference.sa_softmax(wide(x), variant=variant, where=where)
    assert_close(y, expected, ulps=4)
    assert (np.asarray(y)[expected == 0] == 0).all()  # the spec's zeros are exact


@variants
@pytest.mark.parametrize("masked", [False, True])
def test_nan_and_inf_stay_in_their_row(variant: str, masked: bool) -> None:
    x = np.array([[NAN, 1, -INF, 2], [INF, 1, 2, 3], [-INF, INF, INF, 0], [1, 2, -3, 4]], np.float32)
    g = np.array([[1, 2, NAN, 1], [1, NAN, 2, 3], [INF, 1, 2, 3], [1, 2, 3, -1]], np.float32)
    where = np.array([True, True, True, False]) if masked else None
    f = functools.partial(sa_softmax, variant=variant, where=on_device(where)[0])

    @quick_jit
    def value_and_derivatives(x: Any, g: Any) -> Any:
        y, pullback = jax.vjp(f, x)
        return y, pullback(g)[0], jax.jvp(f, (x,), (g,))[1]

    y, dx, dy = value_and_derivatives(*on_device(x, g))
    expected = reference.sa_softmax(wide(x), variant=variant, where=where)
    assert np.isnan(expected[:3]).any(-1).all()
    assert_close(y, expected)
    assert_close(dx, reference.sa_softmax_vjp(wide(x), wide(g), variant=variant, where=where), size=16)
    assert_close(dy, reference.sa_softmax_jvp(wide(x), wide(g), variant=variant, where=where), size=16)


@variants
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_compute_in_float32_or_wider_and_round_once(variant: str, dtype: str) -> None:
    x, g = randn(5, 33, dtype=dtype), randn(5, 33, seed=1, dtype=dtype)
    with jax.enable_x64(dtype == "float64"):
        y, pullback = jax.vjp(lambda x: sa_softmax(x, variant=variant), jnp.asarray(x))
        (dx,) = pullback(jnp.asarray(g))
        assert y.dtype == dx.dtype == jnp.dtype(dtype)
    half_an_ulp = 0.51 if dtype in ("float16", "bfloat16") else 8
    tiny = float(finfo(x.dtype).smallest_subnormal / finfo(x.dtype).eps)  # where float16 is no longer relative
    assert_close(y, reference.sa_softmax(wide(x), variant=variant), size=tiny, ulps=half_an_ulp)
    expected = reference.sa_softmax_vjp(wide(x), wide(g), variant=variant)
    cancelled = float(np.finfo(np.float32).eps / finfo(x.dtype).eps) * 8
    assert_close(dx, expected, size=max(tiny, cancelled), ulps=half_an_ulp)


@variants
@pytest.mark.usefixtures("x64")
def test_float32_stays_float32_where_float64_is_enabled(variant: str) -> None:
    x = jax.ShapeDtypeStruct((1, 3, 4), jnp.float32)
    f = lambda x: sa_softmax(x, variant=variant)  # noqa: E731
    attention = lambda x: sa_attention(x, x, x, variant=variant)  # noqa: E731
    for function in (f, jax.jacrev(f), jax.jacfwd(f), jax.hessian(f), attention, jax.jacrev(attention)):
        assert jax.eval_shape(function, x).dtype == jnp.float32


@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 3, 5), (2, 3, 4, 5), (2, 1, 3, 2, 2, 3)])
def test_every_axis_of_one_to_six_dimensions(shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    for axis in {0, len(shape) // 2, -1, -len(shape)}:
        assert_close(sa_softmax(jnp.asarray(x), axis=axis), reference.sa_softmax(wide(x), axis=axis))


@variants
@pytest.mark.parametrize(("shape", "axis"), [((0,), 0), ((3, 0), 1), ((0, 3), 1), ((0, 3), 0)])
def test_zero_size(variant: str, shape: tuple[int, ...], axis: int) -> None:
    x = jnp.zeros(shape)
    y, pullback = jax.vjp(lambda x: sa_softmax(x, axis=axis, variant=variant), x)
    assert y.shape == pullback(y)[0].shape == shape


@variants
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_all_of_the_exponent_range(variant: str, compiled: bool) -> None:
    """XLA divides by multiplying with the reciprocal, which is flushed to 0 where the range of a row is large."""
    big = 3.4e38
    rows = [
        [big, big, 1.0],
        [big, -big, 0.0],
        [-big, -big, -big],
        [big, 1.0, 2.0],
        [-big, 0.5, 0.25],
        [big, 3.3e38, -1],
    ]
    rows += [[scale, -scale, scale / 2] for scale in (1e-37, 1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30, 1.7e38)]
    x = np.array(rows, np.float32)
    g = np.broadcast_to(np.array([4, -3, 2], np.float32), x.shape)  # beyond what G8 promises

    def value_and_derivatives(x: Any, g: Any) -> Any:
        f = functools.partial(sa_softmax, variant=variant)
        y, pullback = jax.vjp(f, x)
        return y, pullback(g)[0], jax.jvp(f, (x,), (g,))[1]

    results = (jax.jit(value_and_derivatives) if compiled else value_and_derivatives)(jnp.asarray(x), jnp.asarray(g))
    expected = [
        reference.sa_softmax(wide(x), variant=variant),
        reference.sa_softmax_vjp(wide(x), wide(g), variant=variant),
        reference.sa_softmax_jvp(wide(x), wide(g), variant=variant),
    ]
    size = 4 * derivative_size(x, None, variant)
    for actual, exact, terms in zip(results, expected, (abs(expected[0]), size, size), strict=True):
        got = np.asarray(actual)
        representable = abs(exact) < np.finfo(np.float32).max
        assert np.isfinite(got[representable]).all()
        assert (got[~representable] == np.sign(exact[~representable]) * INF).all()
        floor = np.finfo(np.float32).tiny / np.finfo(np.float32).eps  # D5
        assert_close(np.where(representable, got, 0), np.where(representable, exact, 0), size=np.maximum(terms, floor))


def test_legitimate_rows_make_no_nan_on_the_way() -> None:
    """What jax.debug_nans would stop at."""
    with jax.debug_nans(True):
        for variant in VARIANTS:
            y = vjp(lambda x, _, v=variant: sa_softmax(x, variant=v), jnp.asarray(ROWS), None, jnp.ones_like(ROWS))
            assert np.isfinite(y).all()


# The row operation: derivatives.


@variants
@pytest.mark.parametrize("way", REVERSE)
def test_gradient(way: str, variant: str, rows: tuple[Array, Array | None]) -> None:
    x, where = rows
    g = randn(*x.shape)
    if way not in ("grad", "jacrev"):  # which take the sum over y themselves
        g[~where if where is not None else x == -INF] = NAN
    dx = quick_jit(functools.partial(REVERSE[way], row_operation(variant)))(*on_device(x, where, g))
    expected = reference.sa_softmax_vjp(wide(x), wide(g), variant=variant, where=where)
    assert np.isfinite(expected).all()
    assert_close(dx, expected, size=derivative_size(x, where, variant))
    assert (np.asarray(dx)[~where if where is not None else x == -INF] == 0).all()


@variants
@pytest.mark.parametrize("way", FORWARD)
def test_tangent(way: str, variant: str, rows: tuple[Array, Array | None]) -> None:
    x, where = rows
    t = randn(*x.shape)
    if way != "jacfwd":  # which takes the sum over x itself
        t[~where if where is not None else x == -INF] = NAN
    dy = quick_jit(functools.partial(FORWARD[way], row_operation(variant)))(*on_device(x, where, t))
    expected = reference.sa_softmax_jvp(wide(x), wide(t), variant=variant, where=where)
    assert_close(dy, expected, size=derivative_size(x, where, variant))


HESSIANS: dict[str, Function] = {
    "hessian": jax.hessian,
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
}


@variants
@pytest.mark.parametrize("way", HESSIANS)
@pytest.mark.usefixtures("x64")
def test_second_derivatives_agree_with_finite_differences(way: str, variant: str) -> None:
    """At rows of mixed, of positive and of negative sign, without ties; a masked entry holds NaN."""
    x = np.array([[0.3, -1.2, 2.0, 0.7], [0.5, 1.5, 0.25, 3.0], [-0.5, -1.5, -0.25, -3.0]])
    where = np.array([[True] * 4, [True] * 4, [True, True, False, True]])
    g, h = randn(*x.shape, dtype="float64"), 1e-5
    gradient = functools.partial(reference.sa_softmax_vjp, variant=variant, where=where)
    expected = np.zeros((*x.shape, *x.shape))
    for at in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[at] = h
        expected[(..., *at)] = (gradient(x + step, g) - gradient(x - step, g)) / (2 * h)
    x[2, 2] = NAN
    on = jnp.asarray(where)
    loss = lambda x: jnp.vdot(sa_softmax(x, variant=variant, where=on), g)  # noqa: E731
    actual = quick_jit(HESSIANS[way](loss))(jnp.asarray(x))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-8 * abs(expected).max())


@variants
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_of_corner_rows_hold_no_nan(
    outer: Function, variant: str, rows: tuple[Array, Array | None]
) -> None:
    x, where = rows
    keep = [i for i, name in enumerate(CORNER_ROWS) if name != "tiny"]  # 1/R^2 is no float32 there
    x, where = x[keep], None if where is None else where[keep]
    gradient = functools.partial(vjp, row_operation(variant))
    second = quick_jit(outer(gradient))(*on_device(x, where, randn(*x.shape)))
    assert np.isfinite(second).all()
    off = (x == -INF) if where is None else ~where
    assert (np.asarray(second)[off] == 0).all()
    assert (np.moveaxis(np.asarray(second), (2, 3), (0, 1))[off] == 0).all()


def test_scores_that_xla_computes_inside_the_program_meet_their_extrema() -> None:
    """x = a b + c may be rounded once or twice wherever XLA computes it anew; the extremal terms hang on equality."""
    a, b, g = (randn(64, 33, seed=seed) for seed in range(3))
    A, B, G = on_device(a, b, g)
    dx, x = jax.jit(lambda a, b, g: (vjp(lambda x, _: sa_softmax(x), 0.3 * a + b, None, g), 0.3 * a + b))(A, B, G)
    assert_close(dx, reference.sa_softmax_vjp(wide(np.asarray(x)), wide(g)), size=4)


@variants
def test_second_derivatives_where_the_square_of_the_range_is_no_float(variant: str) -> None:
    """JAX differentiates a quotient by R^-2."""
    hessian = quick_jit(jax.hessian(lambda x: sa_softmax(x, variant=variant)[0]))
    for scale in (1e-18, 1e25):
        assert np.isfinite(hessian(jnp.asarray([1, -2, 0.5, 0.25]) * scale)).all()


# The row operation: vmap, jit, scan, sharding, export, dispatch.


@variants
def test_vmap_over_x_and_where_nested(variant: str) -> None:
    x, where = randn(2, 3, 5), randn(2, 3, 5, seed=1) > -0.5
    X, W = on_device(x, where)
    f = row_operation(variant)
    expected = reference.sa_softmax(wide(x), variant=variant, where=where)
    assert_close(quick_jit(jax.vmap(f))(X, W), expected)
    assert_close(quick_jit(jax.vmap(jax.vmap(f)))(X, W), expected)
    last = quick_jit(jax.vmap(f, in_axes=2, out_axes=2))(jnp.moveaxis(X, 0, 2), jnp.moveaxis(W, 0, 2))
    assert_close(jnp.moveaxis(last, 2, 0), expected)
    expected = reference.sa_softmax(np.stack([wide(x)[0]] * 2), variant=variant, where=where)
    assert_close(quick_jit(jax.vmap(f, in_axes=(None, 0)))(X[0], W), expected)


def test_donated_arguments_are_used() -> None:
    x = randn(64, 64)
    X = jnp.asarray(x.copy())
    y = jax.jit(sa_softmax, donate_argnums=0)(X)
    assert X.is_deleted()
    assert_close(y, reference.sa_softmax(wide(x)))


def test_sharded_arrays_stay_sharded() -> None:
    """Four devices, which XLA makes of one host; in a process of its own, since that is decided when JAX starts."""
    code = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from sa_softmax import reference
        from sa_softmax.backends.jax import sa_attention, sa_softmax

        assert len(jax.devices()) == 4
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        rng = np.random.default_rng(0)
        x, g = rng.standard_normal((2, 4, 6, 8)).astype(np.float32)[:2]

        def check(f, expected, spec, *arrays):
            sharding = NamedSharding(mesh, spec)
            y = jax.jit(f)(*(jax.device_put(array, sharding) for array in arrays))
            assert y.sharding.is_equivalent_to(sharding, y.ndim), y.sharding
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)

        def vjp(x, g):
            return jax.vjp(sa_softmax, x)[1](g)[0]

        for spec in (P("data"), P(("data", "model")), P("data", "model"), P(None, "data")):
            check(sa_softmax, reference.sa_softmax(x), spec, x)
            check(vjp, reference.sa_softmax_vjp(x, g), spec, x, g)
        q, k, v = rng.standard_normal((3, 4, 2, 6, 8)).astype(np.float32)
        check(sa_attention, reference.sa_attention(q, k, v), P("data", "model"), q, k, v)

        # Rows in pieces: right as well, wherever the result lands.
        pieces = jax.device_put(x, NamedSharding(mesh, P(None, None, ("data", "model"))))
        np.testing.assert_allclose(jax.jit(sa_softmax)(pieces), reference.sa_softmax(x), rtol=1e-5, atol=1e-6)
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_export_with_symbolic_shapes() -> None:
    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, n"), jnp.float32)
    exported = jax.export.export(jax.jit(sa_softmax))(batch)
    x = randn(3, 7)
    assert_close(exported.call(jnp.asarray(x)), reference.sa_softmax(wide(x)))


def test_the_top_level_functions_take_arrays_and_tracers() -> None:
    x = randn(1, 3, 5)
    expected = reference.sa_softmax(wide(x))
    for f in (top_level.sa_softmax, jax.jit(top_level.sa_softmax), jax.vmap(top_level.sa_softmax)):
        assert_close(f(jnp.asarray(x)), expected)
    dx = jax.grad(lambda x: jnp.vdot(top_level.sa_softmax(x), x))(jnp.asarray(x))
    assert_close(dx, expected + reference.sa_softmax_vjp(wide(x), wide(x)), size=4)
    o = jax.jit(lambda x: top_level.sa_attention(x, x, x))(jnp.asarray(x))
    assert_close(o, reference.sa_attention(*[wide(x)] * 3))


def test_other_arrays_are_refused() -> None:
    x = randn(2, 3)
    for call in (
        lambda: sa_softmax(x),
        lambda: sa_softmax(jnp.asarray(x), where=x > 0),
        lambda: sa_attention(jnp.asarray(x)[None], x[None], jnp.asarray(x)[None]),
    ):
        with pytest.raises(TypeError, match=r"got numpy.ndarray. Convert it with jax.numpy.asarray"):
            call()
    for dtype in (jnp.int32, jnp.bool_, jnp.complex64, jnp.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"got {jnp.dtype(dtype).name}"):
            sa_softmax(jnp.ones(3, dtype))
    with pytest.raises(ValueError, match="0-d"):
        jax.vmap(sa_softmax)(jnp.ones(3))
    with pytest.raises(TypeError, match="axis must be one integer"):
        jax.jit(lambda x, axis: sa_softmax(x, axis=axis))(jnp.ones(3), 0)


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
            mask = mask.copy()
            mask[..., -1] = False
            mask[0, :, 1] = False
            arrays = {key: array.copy() for key, array in arrays.items()} | {"bias": randn(Hq, Tq, Tk, seed=4)}
            arrays["k"][:, :, -1], arrays["v"][:, :, -1], arrays["bias"][..., -1] = [NAN, INF, -INF, 1], NAN, NAN
            arrays["v"][0, 0, -1], arrays["q"][0, :, 1] = INF, NAN
            return arrays, {"mask": mask, "scale": 0.3}
    raise AssertionError(name)


CASES = ("plain", "bias, mask, causal", "garbage")


def jax_options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: jnp.asarray(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}


def differentiable(options: dict[str, Any], variant: str) -> Function:
    def attention(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        return sa_attention(q, k, v, bias=bias, variant=variant, **jax_options(options))

    return attention


@variants
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["vjp", "vmap", "checkpoint"])
def test_attention_and_its_gradients(way: str, case: str, variant: str) -> None:
    arrays, options = attention_case(case)
    f = differentiable(options, variant)
    do = randn(2, 4, 3, 6, seed=5)
    if case == "garbage":
        do[0, :, 1] = NAN
    wides = [wide(array) for array in arrays.values()]
    bias = {"bias": wides[3]} if "bias" in arrays else {}
    expected = reference.sa_attention(*wides[:3], **bias, **options, variant=variant)
    expected_gradients = reference.sa_attention_vjp(*wides[:3], wide(do), **bias, **options, variant=variant)

    def value_and_gradients(f: Function, do: Any, *arrays: Any) -> Any:
        o, pullback = jax.vjp(f, *arrays)
        return o, pullback(do)

    match way:
        case "checkpoint":
            run = jax.checkpoint(f)
        case "vmap":  # over the batch axis; the mask and the bias ride along
            mask = options.get("mask")
            rest = {key: value for key, value in options.items() if key != "mask"}

            def one(q: Any, k: Any, v: Any, bias: Any, mask: Any) -> Any:
                return sa_attention(q, k, v, bias=bias, mask=mask, variant=variant, **rest)

            def run(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
                return jax.vmap(one, in_axes=(0, 0, 0, None, 0))(q, k, v, bias, on_device(mask)[0])

        case _:
            run = f
    o, gradients = quick_jit(functools.partial(value_and_gradients, run))(*on_device(do, *arrays.values()))
    assert np.isfinite(expected).all()
    assert_close(o, expected)
    for (name, array), actual, exact in zip(arrays.items(), gradients, expected_gradients[: len(arrays)], strict=True):
        assert actual.shape == array.shape, name
        assert np.isfinite(exact).all(), name
        assert_close(actual, exact, size=16)


@variants
@pytest.mark.parametrize("case", ["bias, mask, causal", "garbage"])
def test_attention_tangent_is_the_transpose_of_the_gradient(case: str, variant: str) -> None:
    arrays, options = attention_case(case)
    f, primals = differentiable(options, variant), on_device(*arrays.values())
    tangents = on_device(*(randn(*array.shape, seed=10 + i) for i, array in enumerate(arrays.values())))
    do = jnp.asarray(randn(2, 4, 3, 6, seed=5))
    _, dy = quick_jit(functools.partial(jax.jvp, f))(primals, tangents)
    gradients = quick_jit(lambda do, *primals: jax.vjp(f, *primals)[1](do))(do, *primals)
    forward = jnp.vdot(do, dy)
    backward = sum(jnp.vdot(gradient, t) for gradient, t in zip(gradients, tangents, strict=True))
    np.testing.assert_allclose(forward, backward, rtol=0, atol=1e-6 * float(abs(dy).sum()))


@variants
def test_participating_nan_reaches_its_query_or_column(variant: str) -> None:
    q, k, v, do = randn(2, 4, 3, 4), randn(2, 2, 5, 4, seed=1), randn(2, 2, 5, 6, seed=2), randn(2, 4, 3, 6, seed=5)
    bias = randn(4, 3, 5, seed=4)
    v[0, 0, 1, 2], k[1, 1, 4, 0], bias[3, 0, 0] = NAN, INF, NAN
    options = {"is_causal": True, "q_offset": 2}
    run = quick_jit(
        lambda do, *primals: (lambda o, pullback: (o, *pullback(do)))(
            *jax.vjp(differentiable(options, variant), *primals)
        )
    )
    arrays = [wide(array) for array in (q, k, v)]
    expected = (
        reference.sa_attention(*arrays, bias=wide(bias), **options, variant=variant),
        *reference.sa_attention_vjp(*arrays, wide(do), bias=wide(bias), **options, variant=variant),
    )
    for actual, exact in zip(run(*on_device(do, q, k, v, bias)), expected, strict=True):
        assert 0 < np.isnan(exact).sum() < exact.size
        assert_close(actual, exact, size=16)


@variants
@pytest.mark.usefixtures("x64")
def test_attention_second_derivatives(variant: str) -> None:
    """Against finite differences of the reference's gradient, beside excluded NaN and a query without keys."""
    q, k, v, do = (
        randn(*shape, seed=i, dtype="float64") for i, shape in enumerate([(1, 3, 3), (1, 4, 3), (1, 4, 2), (1, 3, 2)])
    )
    k[:, 3], v[:, 3], q[:, 2] = NAN, INF, NAN
    mask = np.array([[True, True, True, False], [True, True, False, False], [False] * 4])
    t, h = randn(1, 3, 3, seed=7, dtype="float64"), 1e-5

    def exact(q: Array) -> tuple[Any, ...]:
        return reference.sa_attention_vjp(q, k, v, do, mask=mask, variant=variant)[:3]

    expected = [(after - before) / (2 * h) for after, before in zip(exact(q + h * t), exact(q - h * t), strict=True)]
    loss = lambda q, k, v: jnp.vdot(sa_attention(q, k, v, mask=jnp.asarray(mask), variant=variant), do)  # noqa: E731
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    K, V, T = on_device(k, v, t)
    forward_over_reverse = quick_jit(lambda q: jax.jvp(lambda q: gradient(q, K, V), (q,), (T,))[1])(jnp.asarray(q))
    for actual, value in zip(forward_over_reverse, expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=0, atol=1e-8)
    reverse_over_reverse = quick_jit(jax.grad(lambda q: jnp.vdot(gradient(q, K, V)[0], T)))(jnp.asarray(q))
    np.testing.assert_allclose(reverse_over_reverse, expected[0], rtol=0, atol=1e-8)


def test_attention_products_are_of_full_precision() -> None:
    """By default XLA multiplies float32 as bfloat16 on TPUs and as TF32 on GPUs."""
    q = jnp.asarray(randn(1, 3, 4))
    loss = lambda q, k, v: sa_attention(q, k, v).sum()  # noqa: E731
    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(q, q, q)
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    full = [line for line in products if "precision = [HIGHEST, HIGHEST]" in line]
    # One in the forward pass and two in the backward pass for either product; one more counts what is not finite.
    assert len(full) == 6
    assert len(products) - len(full) == 1


def test_attention_offsets_and_sizes() -> None:
    q, k, v = randn(1, 2, 3), randn(1, 4, 3, seed=1), randn(1, 4, 2, seed=2)
    for offset in (-(2**40), -1, 0, 2**31 - 1, 2**31, 2**70):
        options = {"is_causal": True, "q_offset": offset}
        expected = reference.sa_attention(*map(wide, (q, k, v)), is_causal=True, q_offset=max(-9, min(offset, 9)))
        assert_close(sa_attention(*on_device(q, k, v), **options), expected)
    for shapes in (
        [(2, 2, 3), (2, 0, 3), (2, 0, 4)],
        [(2, 0, 3), (2, 5, 3), (2, 5, 4)],
        [(2, 2, 3), (2, 5, 3), (2, 5, 0)],
    ):
        primals = [jnp.zeros(shape) for shape in shapes]
        assert [
            dx.shape for dx in quick_jit(jax.grad(lambda *x: sa_attention(*x).sum(), (0, 1, 2)))(*primals)
        ] == shapes
        o = quick_jit(sa_attention)(*primals)
        assert o.shape == (*shapes[0][:2], shapes[2][-1])
        assert not o.any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_attention_of_16_bits_computes_in_float32(dtype: str) -> None:
    arrays, options = attention_case("bias, mask, causal")
    q, k, v = (arrays[key].astype(numpy_dtype(dtype)) for key in "qkv")
    bias = arrays["bias"]  # float32: the compute dtype is admitted
    f = lambda *arrays: sa_attention(*arrays[:3], bias=arrays[3], **jax_options(options))  # noqa: E731
    o, pullback = jax.vjp(f, *on_device(q, k, v, bias))
    gradients = pullback(o)
    assert o.dtype == jnp.dtype(dtype)
    assert [str(dx.dtype) for dx in gradients] == [dtype] * 3 + ["float32"]
    expected = reference.sa_attention(*map(wide, (q, k, v)), bias=wide(bias), **options)
    assert_close(o, expected, size=1e-3, ulps=0.51)


@variants
def test_without_implicit_promotion(variant: str) -> None:
    """Projects may forbid JAX to promote dtypes or ranks."""
    x, where = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones(4, bool)
    options = {"mask": where[:3], "bias": x[0, 0, :3], "is_causal": True, "variant": variant}
    f = lambda x: sa_softmax(x, variant=variant, where=where)[0, 0, 0]  # noqa: E731
    attention = lambda q: sa_attention(q, x, x, **options)[0, 0, 0]  # noqa: E731
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for function in (jax.hessian(f), jax.grad(attention)):
            assert jax.eval_shape(function, x).dtype == jnp.bfloat16


# The adapter.


@pytest.mark.parametrize("dtype", FLOATS)
def test_adapter(dtype: str) -> None:
    adapter = Adapter()
    assert "cpu" in adapter.devices
    q, x, where = randn(1, 2, 4, dtype=dtype), randn(3, 4, dtype=dtype), randn(3, 4) > 0
    row = {"axis": 1, "variant": "product", "where": where}
    heads = {"variant": "product", "mask": None, "is_causal": True, "q_offset": 1, "scale": None, "device": "cpu"}
    y, dx = adapter.sa_softmax(x, **row, device="cpu"), adapter.sa_softmax_vjp(x, x, **row, device="cpu")
    bias = randn(2, 2, dtype=dtype)
    for result in (y, dx, *adapter.sa_attention_vjp(q, q, q, q, bias=bias, **heads)):
        assert isinstance(result, np.ndarray)
        assert result.dtype == x.dtype
    o = adapter.sa_attention(q, q, q, bias=None, **heads)
    assert adapter.sa_attention_vjp(q, q, q, q, bias=None, **heads)[3] is None
    size = 1 if x.dtype != ml_dtypes.bfloat16 else 4
    assert_close(y, reference.sa_softmax(wide(x), **row), size=size)
    assert_close(dx, reference.sa_softmax_vjp(wide(x), wide(x), **row), size=size)
    assert_close(o, reference.sa_attention(*[wide(q)] * 3, variant="product", is_causal=True, q_offset=1), size=size)
    assert not jax.config.jax_enable_x64
