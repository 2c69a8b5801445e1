"""The reference against the definitions in exact arithmetic, and against literal values where the spec fixes them."""

import itertools
import math
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mpmath import mpf
from support import (
    CORNER_ROWS,
    FLOATS,
    VARIANTS,
    exact,
    exact_attention,
    exact_row,
    finfo,
    numpy_dtype,
    sa_softmax_row,
    stretches,
    variants,
)

from sa_softmax.reference import (
    AttentionState,
    attention_from_state,
    attention_state,
    merge_states,
    sa_attention,
    sa_attention_vjp,
    sa_softmax,
    sa_softmax_jvp,
    sa_softmax_vjp,
)

Array = np.ndarray[Any, Any]

U = 2.0**-53  # roundoff of float64
LEAST = 2.0**-1074  # its smallest subnormal, the error of an underflow
ROUNDINGS = 4  # the accuracy that the reference states, in units of roundoff times condition


def value(x: Array, g: Array, **options: Any) -> Array:
    return sa_softmax(x, **options)


operations = pytest.mark.parametrize("operation", [value, sa_softmax_vjp, sa_softmax_jvp])
derivatives = pytest.mark.parametrize("derivative", [sa_softmax_vjp, sa_softmax_jvp])
examples = settings(deadline=None, max_examples=60, derandomize=True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20250218)


@pytest.fixture(autouse=True)
def fifty_digits() -> Any:
    with mpmath.workdps(50):
        yield


def same(actual: Any, expected: Any) -> None:
    """Equal to the last bit, NaN where NaN is expected, same shape and dtype."""
    np.testing.assert_array_equal(actual, expected, strict=True)


def close(actual: Any, expected: Any, rtol: float, atol: float = 0.0) -> None:
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, strict=True)


# Accuracy.


@variants
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3, 1e300])
def test_the_oracle_s_jacobian_is_the_limit_of_differences(variant: str, scale: float) -> None:
    digits = 60 + 2 * abs(round(math.log10(scale)))  # x + h must hold both x and h
    with mpmath.workdps(digits):
        for row in ([0.7, -0.3, 1.1, -0.9], [-0.4, -0.2, -1.3], [0.4, 0.2, 1.3]):
            x = exact(scale * np.array(row))
            truth = exact_row(x, variant)
            h = mpf(10) ** -20 * min(scale, 1)
            for k in range(len(x)):
                step = np.array([h * (j == k) for j in range(len(x))])
                up, down = sa_softmax_row(x + step, variant), sa_softmax_row(x - step, variant)
                for j in range(len(x)):
                    difference = (up[j] - down[j]) / (2 * h)
                    assert abs(difference - truth.jacobian[j][k]) <= 1e-30 * np.max(truth.jacobian_size)


@variants
@pytest.mark.parametrize("n", [1, 2, 3, 17, 40])
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e-4, 1.0, 10.0, 1e3, 1e30, 1e300])
def test_value_and_derivatives_are_accurate_at_every_scale(
    variant: str, n: int, scale: float, rng: np.random.Generator
) -> None:
    for shift in (0.0, -3.0, 3.0):
        x, g = scale * (rng.normal(size=n) + shift), rng.normal(size=n)
        if n > 3:  # ties at both extrema
            x[rng.integers(n, size=3)], x[rng.integers(n, size=2)] = x.min(), x.max()
        truth = exact_row(exact(x), variant)
        jacobian, size = np.array(truth.jacobian), np.array(truth.jacobian_size)
        # p may underflow, and then meets the largest factor that the formulas hold.
        underflow = LEAST * n * (1 + abs(x).max() + (1 / abs(x).max() if variant == "normalized" else 0))
        for got, expected, bound in (
            (sa_softmax(x, variant=variant), truth.y, truth.y_size),
            (sa_softmax_vjp(x, g, variant=variant), g @ jacobian, abs(g) @ size),
            (sa_softmax_jvp(x, g, variant=variant), jacobian @ g, size @ abs(g)),
        ):
            for j in range(n):
                assert abs(mpf(got[j]) - expected[j]) <= ROUNDINGS * U * bound[j] + underflow


@variants
@pytest.mark.parametrize("scale", [1e-8, 1.0, 10.0])
def test_long_rows_are_almost_as_accurate(variant: str, scale: float, rng: np.random.Generator) -> None:
    x = scale * rng.normal(size=700)
    truth = exact(x)
    for got, expected, stretch in zip(
        sa_softmax(x, variant=variant), sa_softmax_row(truth, variant), stretches(truth), strict=True
    ):
        assert abs(mpf(got) - expected) <= 6 * U * abs(expected) * stretch + LEAST * (1 + 5 * scale)


@variants
@operations
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_dtype_computes_in_its_compute_dtype_and_rounds_once(
    variant: str, operation: Any, dtype: str, rng: np.random.Generator
) -> None:
    x, g = rng.normal(size=(2, 5, 9)).astype(numpy_dtype(dtype))
    wide = np.float64 if dtype == "float64" else np.float32
    got = operation(x, g, variant=variant)
    same(got, operation(x.astype(wide), g.astype(wide), variant=variant).astype(x.dtype))
    truth = operation(x.astype(np.float64), g.astype(np.float64), variant=variant)
    roundoff = float(finfo(x.dtype).eps) / 2
    # One rounding of the dtype itself, and some of the compute dtype where the terms cancel.
    close(got.astype(np.float64), truth, rtol=roundoff, atol=16 * np.finfo(wide).eps * abs(truth).max())


# Corner rows, clause by clause.


@variants
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_c1_a_row_of_zeros_gives_zeros(variant: str, zero: float) -> None:
    same(sa_softmax(np.full(3, zero), variant=variant), np.zeros(3))


@variants
def test_c2_an_empty_row_gives_zeros(variant: str) -> None:
    same(sa_softmax(np.array([1.0, 2.0]), variant=variant, where=np.array([False, False])), np.zeros(2))
    same(sa_softmax(np.full(2, -np.inf), variant=variant), np.zeros(2))
    x, where = np.array([[1.0, -np.inf], [0.0, 3.0]]), np.array([False, True])
    only = 1.0 if variant == "normalized" else 3.0
    same(sa_softmax(x, variant=variant, where=where), np.array([[0.0, 0.0], [0.0, only]]))


@variants
@operations
@pytest.mark.parametrize(("shape", "axis"), [((0,), 0), ((3, 0), 1), ((3, 0), 0), ((0, 3), 0), ((0, 3), 1)])
def test_c2_an_empty_axis_gives_an_empty_result(
    variant: str, operation: Any, shape: tuple[int, ...], axis: int
) -> None:
    x = np.ones(shape, np.float32)
    same(operation(x, x, axis=axis, variant=variant), x)


def test_c3_one_sign_only() -> None:
    e = np.exp([0.0, -1.0, -2.0])
    p = e / e.sum()
    close(sa_softmax(np.array([-1.0, -2.0, -3.0])), np.array([2 / 3, 1 / 3, 0.0]) * p, rtol=8 * U)
    assert sa_softmax(np.array([-0.1, -0.7, -0.3]))[1] == 0
    close(sa_softmax(np.array([3.0, 2.0, 1.0])), np.array([1.0, 2 / 3, 1 / 3]) * p, rtol=8 * U)
    x = np.array([4.0, 3.3, 0.1])
    assert sa_softmax(x)[0] == sa_softmax(x, variant="product")[0] / 4  # a is 1 exactly, so both are p


def test_c4_constant_rows_and_single_entries() -> None:
    same(sa_softmax(np.full(4, 2.5)), np.full(4, 0.25))
    same(sa_softmax(np.full(4, -2.5)), np.zeros(4))
    same(sa_softmax(np.array([0.3])), np.array([1.0]))
    same(sa_softmax(np.array([-0.3])), np.array([0.0]))
    same(sa_softmax(np.array([0.0])), np.array([0.0]))
    same(sa_softmax(np.full(4, 2.5), variant="product"), np.full(4, 0.625))
    same(sa_softmax(np.array([-0.3]), variant="product"), np.array([-0.3]))


@variants
@operations
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e300, -1e300, 0.0])
def test_c5_excluded_entries_never_influence_anything(variant: str, operation: Any, garbage: float) -> None:
    where = np.array([True, False, True, True, False])
    x, g = np.full((2, 5), garbage)
    x[where], g[where] = [0.5, -1.0, 2.0], [0.3, 0.7, -0.2]
    alone = operation(x[where], g[where], variant=variant)
    whole = operation(x, g, variant=variant, where=where)
    same(whole[where], alone)
    same(whole[~where], np.zeros(2))
    x[~where] = -np.inf  # excludes by itself
    whole = operation(x, g, variant=variant)
    same(whole[where], alone)
    same(whole[~where], np.zeros(2))


@variants
@operations
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_c6_g7_nan_and_inf_poison_their_row_only(variant: str, operation: Any, poison: float) -> None:
    x = np.array([[1.0, 2.0, 0.5, -1.0], [poison, -np.inf, 1.0, 7.0], [0.1, -0.2, 0.3, 0.4]])
    where, g = np.array([True, True, True, False]), np.ones((3, 4))
    got = operation(x, g, variant=variant, where=where)
    same(got[1], np.array([np.nan, 0.0, np.nan, 0.0]))
    same(got[::2], operation(x[::2], g[::2], variant=variant, where=where))


@pytest.mark.parametrize("dtype", FLOATS)
def test_c7_g8_finite_input_gives_finite_output(dtype: str) -> None:
    big = float(finfo(numpy_dtype(dtype)).max)
    x = np.array([[big, -big, 0], [big, big, -big], [-big, -big, -big / 2], [big, 0, 0]]).astype(numpy_dtype(dtype))
    y = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 0.5], [1, 0, 0]]).astype(x.dtype)
    g = np.broadcast_to(np.array([0.5, -1.0, 0.25]).astype(x.dtype), x.shape)
    same(sa_softmax(x), y)
    for variant in VARIANTS:
        for operation in (value, sa_softmax_vjp, sa_softmax_jvp):
            assert np.isfinite(operation(x, g, variant=variant)).all()


def test_g1_where_p_is_one_hot_the_slope_of_the_product_is_one() -> None:
    for big in (100.0, 1e300):  # the terms g x and D cancel, and g p must outlive them
        got = sa_softmax_vjp(np.array([big, -big, 0.0]), np.array([1.0, -1.0, 1.0]), variant="product")
        close(got, np.array([1.0, 0.0, 0.0]), rtol=0, atol=1e-40)


@operations
def test_c7_an_upstream_above_one_meets_the_least_finite_number(operation: Any) -> None:
    x = np.array([1.0, np.finfo(np.float64).min, 2.0])
    g = np.array([3.0, 5.0, -7.0])  # g x overflows where p is 0
    got = operation(x, g, variant="product")
    same(got[[0, 2]], operation(x[[0, 2]], g[[0, 2]], variant="product"))
    assert got[1] == 0


@variants
@operations
def test_no_floating_point_error_escapes(variant: str, operation: Any) -> None:
    x = np.array([[0.0, 1e-310, 1e308], [-1e308, 1e308, -500.0], [0.0, 0.0, -np.inf], [np.inf, np.nan, 1.0]])
    with np.errstate(all="raise"):
        operation(x, np.ones_like(x), variant=variant)


def test_c7_the_least_finite_number_is_a_score_like_any_other() -> None:
    x = np.array([np.finfo(np.float64).min, 0.0, 1.0])
    e = np.exp([-1.0, 0.0])
    close(sa_softmax(x), np.array([0.0, *e / e.sum()]), rtol=8 * U)  # R = finfo.max makes every other a 1
    close(sa_softmax(x, where=x > x[0]), np.array([0.0, 0.0, e[1] / e.sum()]), rtol=8 * U)


# Gradients, clause by clause: G1 to G5, G6 (tangents are the transpose), G7.


def test_g3_ties_share_equally() -> None:
    # x = (-1, -1, 0) has a = (0, 0, 1). Only da0 = dx0 - dlo can move y0; both minima move lo by one half.
    p0 = math.exp(-1.0) / (1 + 2 * math.exp(-1.0))
    tied = sa_softmax_vjp(np.array([-1.0, -1.0, 0.0]), np.array([1.0, 0.0, 0.0]))
    close(tied, np.array([p0 / 2, -p0 / 2, 0.0]), rtol=8 * U)
    # x = (1, 1) has a = 1, dhi = 1/2 each: dy0/dx = p0 (1 - p0) + p0 - p0/2 and -p0 p1 - p0/2.
    same(sa_softmax_vjp(np.array([1.0, 1.0]), np.array([1.0, 0.0])), np.array([0.5, -0.5]))


@variants
@derivatives
@examples
@given(data=st.data())
def test_g3_derivatives_are_permutation_equivariant_at_ties(variant: str, derivative: Any, data: st.DataObject) -> None:
    x = data.draw(hnp.arrays(np.float64, st.integers(1, 6), elements=st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0])))
    order = np.array(data.draw(st.permutations(range(len(x)))))
    g = np.arange(1.0, len(x) + 1)
    permuted = derivative(x[order], g[order], variant=variant)
    close(permuted, derivative(x, g, variant=variant)[order], rtol=0, atol=16 * U * g.sum())


def test_g4_the_clamp_at_zero_is_strict() -> None:
    p0, p1 = 1 / (1 + math.exp(2.0)), 1 / (1 + math.exp(-2.0))
    # x = (0, 2): lo = 0 is the constant's, so a0 = x0/hi has the slope 1/2 and a1 = 1 none.
    close(sa_softmax_vjp(np.array([0.0, 2.0]), np.array([1.0, 0.0])), np.array([p0 / 2, 0.0]), rtol=8 * U)
    close(sa_softmax_vjp(np.array([0.0, 2.0]), np.array([0.0, 1.0])), np.array([-p0 * p1, p0 * p1]), rtol=0, atol=4 * U)
    # x = (0, -2): hi = 0 is the constant's, so a0 = (x0 - lo)/-lo has the slope 1/2 in x0, and none in lo.
    mirrored = sa_softmax_vjp(np.array([0.0, -2.0]), np.array([1.0, 0.0]))
    close(mirrored, np.array([p1 / 2 + p0 * p1, -p0 * p1]), rtol=8 * U)


@derivatives
def test_g5_zero_rows_empty_rows_and_excluded_entries_have_no_gradient(derivative: Any) -> None:
    g = np.array([1.0, -2.0, 3.0])
    same(derivative(np.zeros(3), g), np.zeros(3))
    for variant in VARIANTS:
        same(derivative(np.ones(3), g, variant=variant, where=np.zeros(3, bool)), np.zeros(3))
        same(derivative(np.full(3, -np.inf), g, variant=variant), np.zeros(3))
    # The product has no R: at a row of zeros its slope is p.
    close(derivative(np.zeros(3), g, variant="product"), g / 3, rtol=2 * U)


@variants
@pytest.mark.parametrize("row", CORNER_ROWS.values(), ids=CORNER_ROWS)
def test_g6_the_jvp_is_the_transpose_of_the_vjp(variant: str, row: list[float]) -> None:
    unit = np.eye(len(row))
    x = np.broadcast_to(np.array(row), unit.shape)
    vjp, jvp = sa_softmax_vjp(x, unit, variant=variant), sa_softmax_jvp(x, unit, variant=variant)
    close(vjp, jvp.T, rtol=16 * U, atol=16 * U * abs(vjp).max())


@variants
@examples
@given(data=st.data())
def test_g6_dot_products_agree(variant: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 8))
    x = data.draw(hnp.arrays(np.float64, n, elements=st.sampled_from([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0, -math.inf])))
    where = data.draw(hnp.arrays(bool, n))
    g, t = data.draw(hnp.arrays(np.float64, (2, n), elements=st.floats(-1, 1, width=16)))
    forward = g @ sa_softmax_jvp(x, t, variant=variant, where=where)
    backward = t @ sa_softmax_vjp(x, g, variant=variant, where=where)
    # The terms of a Jacobian column sum to less than 1 + 2/R + 2 <= 7, or to 1 + 2 max |x| = 7 for the product.
    assert abs(forward - backward) <= 8 * U * 7 * n


@variants
@derivatives
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_upstream_stays_in_its_row(variant: str, derivative: Any, poison: float) -> None:
    x = np.array([[1.0, 2.0, -1.0, -np.inf], [0.5, -0.5, 3.0, 1.0]])
    g = np.array([[1.0, poison, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    got = derivative(x, g, variant=variant)
    assert not np.isfinite(got[0, :3]).any()
    assert got[0, 3] == 0
    same(got[1], derivative(x[1], g[1], variant=variant))


# Rows, axes, memory.


@variants
@operations
def test_rows_do_not_see_each_other(variant: str, operation: Any, rng: np.random.Generator) -> None:
    x, g = rng.normal(size=(2, 6, 300))
    whole = operation(x, g, variant=variant)
    for other in (np.nan, np.inf, -np.inf, 1e308, 0.0):
        y, h = np.full((2, *x.shape), other)
        y[3], h[3] = x[3], g[3]
        same(operation(y, h, variant=variant)[3], whole[3])
    for i in range(len(x)):
        same(operation(x[i], g[i], variant=variant), whole[i])


@variants
@operations
@pytest.mark.parametrize("shape", [(5,), (3, 300), (2, 3, 5), (5, 1, 2, 3), (1, 1)])
def test_every_axis_is_the_last_axis_moved(
    variant: str, operation: Any, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    x, g = rng.normal(size=(2, *shape))
    where = rng.random(shape) > 0.3
    for axis in range(-len(shape), len(shape)):
        got = operation(x, g, axis=axis, variant=variant, where=where)
        moved = (np.moveaxis(array, axis, -1) for array in (x, g))
        expected = operation(*moved, variant=variant, where=np.moveaxis(where, axis, -1))
        same(np.moveaxis(got, axis, -1), expected)


@variants
@operations
def test_memory_layout_changes_nothing_and_inputs_stay_as_they_were(
    variant: str, operation: Any, rng: np.random.Generator
) -> None:
    x, g = rng.normal(size=(2, 4, 300))
    before, expected = x.copy(), operation(x, g, variant=variant)
    for layout in (np.asfortranarray(x), np.repeat(x, 2, 1)[:, ::2], x[::-1, ::-1].copy()[::-1, ::-1]):
        layout.flags.writeable = False
        same(operation(layout, g, variant=variant), expected)
    same(x, before)
    repeated = operation(np.broadcast_to(x[0], x.shape), np.broadcast_to(g[0], g.shape), variant=variant)
    same(repeated, np.broadcast_to(expected[0], x.shape))


@variants
@operations
def test_where_broadcasts(variant: str, operation: Any, rng: np.random.Generator) -> None:
    x, g = rng.normal(size=(2, 2, 3, 4))
    for shape in ((), (1,), (4,), (3, 1), (2, 1, 4), (1, 1, 1), (2, 3, 4)):
        where = np.asarray(rng.random(shape) > 0.4)
        whole = np.broadcast_to(where, x.shape)
        for axis in range(3):
            got = operation(x, g, axis=axis, variant=variant, where=where)
            same(got, operation(x, g, axis=axis, variant=variant, where=whole))


# Properties.

scores = hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(-60, 60, width=32))


@examples
@given(x=scores)
def test_the_normalized_variant_lies_between_zero_and_softmax(x: Array) -> None:
    y, e = sa_softmax(x), np.exp(x - x.max())
    assert (y >= 0).all()
    assert (y <= e / e.sum() * (1 + 16 * U)).all()


@examples
@given(x=scores)
def test_the_factor_is_invariant_under_scaling(x: Array) -> None:
    lo, hi = min(0.0, x.min()), max(0.0, x.max())
    a = (x - lo) / (hi - lo or np.inf)
    near_zero = sa_softmax(x * 2.0**-70)  # p is 1/n there
    close(near_zero, a / len(x), rtol=8 * U, atol=LEAST)
    same(sa_softmax(x * 2.0**-90), near_zero)


@variants
@operations
@examples
@given(data=st.data())
def test_shuffled_in_garbage_changes_nothing(variant: str, operation: Any, data: st.DataObject) -> None:
    x = data.draw(hnp.arrays(np.float64, st.integers(1, 8), elements=st.sampled_from([-2.0, -0.5, 0.0, 1.0, 1.5])))
    garbage = data.draw(hnp.arrays(np.float64, st.integers(1, 4)))
    order = np.array(data.draw(st.permutations(range(len(x) + len(garbage)))))
    where = order < len(x)
    g = np.concatenate([np.cos(np.arange(len(x))), garbage])
    whole = operation(np.concatenate([x, garbage])[order], g[order], variant=variant, where=where)
    same(whole[~where], np.zeros(len(garbage)))
    alone = operation(x, g[: len(x)], variant=variant)
    close(whole[where], alone[order[where]], rtol=0, atol=32 * U * len(x))


# Attention.


class Problem:
    """Random attention arguments with the shapes that the docstring of sa_attention names, and no batch axes."""

    def __init__(self, Hq: int, Hkv: int, Tq: int, Tk: int, D: int, Dv: int) -> None:
        rng = np.random.default_rng(Hq + Tq + Tk)
        self.qkv = rng.normal(size=(Hq, Tq, D)), rng.normal(size=(Hkv, Tk, D)), rng.normal(size=(Hkv, Tk, Dv))
        self.do, self.bias = rng.normal(size=(Hq, Tq, Dv)), rng.normal(size=(Hq, Tq, Tk))
        self.mask = rng.random((Hq, Tq, Tk)) > 0.3


SHAPES = [(4, 2, 3, 5, 2, 3), (3, 1, 4, 2, 3, 1), (2, 2, 1, 6, 4, 2), (1, 1, 5, 1, 1, 1)]
problems = pytest.mark.parametrize("problem", [pytest.param(Problem(*shape), id=str(shape)) for shape in SHAPES])


def true_attention(arrays: tuple[Array, ...], variant: str, **options: Any) -> Array:
    options = {"scale": 1 / math.sqrt(arrays[0].shape[-1])} | options
    return exact_attention(*map(exact, arrays), variant, **options).astype(np.float64)


@variants
@problems
def test_attention_is_the_row_operation_over_the_scores(variant: str, problem: Problem) -> None:
    for bias in (None, problem.bias, problem.bias[:, :1], problem.bias[0, :, :1]):
        for mask in (None, problem.mask, problem.mask[:1], problem.mask[0, 0]):
            got = sa_attention(*problem.qkv, variant=variant, bias=bias, mask=mask)
            expected = true_attention(problem.qkv, variant, bias=None if bias is None else exact(bias), mask=mask)
            close(got, expected, rtol=0, atol=64 * U)


@variants
@problems
@pytest.mark.parametrize("q_offset", [-5, -2, -1, 0, 1, 3, 9])
def test_causal_means_keys_up_to_the_query_plus_offset(variant: str, problem: Problem, q_offset: int) -> None:
    keep = np.zeros(problem.mask.shape, bool)
    for i in range(keep.shape[1]):
        keep[:, i, : max(0, i + q_offset + 1)] = True
    got = sa_attention(*problem.qkv, variant=variant, is_causal=True, q_offset=q_offset)
    close(got, true_attention(problem.qkv, variant, mask=keep), rtol=0, atol=64 * U)
    both = sa_attention(*problem.qkv, variant=variant, is_causal=True, q_offset=q_offset, mask=problem.mask)
    same(both, sa_attention(*problem.qkv, variant=variant, mask=keep & problem.mask))


@variants
@problems
@pytest.mark.parametrize("scale", [0.0, -1.0, 0.25, 3, None])
def test_the_scale_multiplies_the_scores(variant: str, problem: Problem, scale: float | None) -> None:
    got = sa_attention(*problem.qkv, variant=variant, scale=scale)
    used = 1 / math.sqrt(problem.qkv[0].shape[-1]) if scale is None else scale
    close(got, true_attention(problem.qkv, variant, scale=used), rtol=0, atol=256 * U)


@problems
def test_product_attention_is_a_derivative_of_plain_attention_in_the_scale(problem: Problem) -> None:
    q, k, v = problem.qkv
    k, v = (np.repeat(array, len(q) // len(k), 0) for array in (k, v))
    x = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    step = 1e-30j  # softmax(b x) V is analytic in b, so a complex step is exact
    e = np.exp((1 + step) * x)
    plain = e @ v / e.sum(-1, keepdims=True)
    mean = (e.real * x).sum(-1, keepdims=True) / e.real.sum(-1, keepdims=True)
    expected = plain.imag / step.imag + mean * plain.real
    close(sa_attention(*problem.qkv, variant="product"), expected, rtol=0, atol=64 * U)


@variants
@problems
@pytest.mark.parametrize("options", [{}, {"mask": True}, {"is_causal": True, "q_offset": 1}], ids=str)
@pytest.mark.parametrize("bias_shape", [None, "full", "key", "query"])
def test_attention_gradients_are_the_limit_of_differences(
    variant: str, problem: Problem, options: dict[str, Any], bias_shape: str | None
) -> None:
    bias = {
        None: None,
        "full": problem.bias,
        "key": problem.bias[0, :1],
        "query": problem.bias[:, :, :1],
    }[bias_shape]
    if "mask" in options:
        options, exact_options = {"mask": problem.mask}, {"mask": problem.mask}
    elif options:
        exact_options = {"mask": np.tri(*problem.mask.shape[1:], options["q_offset"], dtype=bool)}
    else:
        exact_options = {}
    got = sa_attention_vjp(*problem.qkv, problem.do, variant=variant, bias=bias, **options)
    assert (got[3] is None) == (bias is None)

    scale, h = mpf(1 / math.sqrt(problem.qkv[0].shape[-1])), mpf(10) ** -20
    inputs = [exact(array) for array in (*problem.qkv, 0.0 if bias is None else bias)]
    rng = np.random.default_rng(1)
    for which, gradient in enumerate(got):
        if gradient is None:
            continue
        assert gradient.shape == inputs[which].shape
        direction = rng.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            *qkv, moved_bias = [x + sign * h * direction if i == which else x for i, x in enumerate(inputs)]
            o = exact_attention(*qkv, variant, scale=scale, bias=moved_bias, **exact_options)
            ends.append((problem.do * o).sum())
        slope = (ends[0] - ends[1]) / (2 * h)
        assert abs((gradient * direction).sum() - slope) <= 64 * U * (1 + abs(gradient * direction).sum())


@variants
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e300])
def test_a6_excluded_keys_never_influence(variant: str, garbage: float) -> None:
    problem = Problem(2, 1, 4, 6, 2, 3)
    q, k, v = problem.qkv
    bias, mask = problem.bias, problem.mask.copy()
    mask[:, :, 4:] = False  # keys that no query sees
    mask[:, 2] = False  # a query that sees no key
    clean = sa_attention(q, k, v, variant=variant, bias=bias, mask=mask)
    gradients = sa_attention_vjp(q, k, v, problem.do, variant=variant, bias=bias, mask=mask)
    same(clean[:, 2], np.zeros((2, 3)))

    q, k, v, bias, do = (array.copy() for array in (q, k, v, bias, problem.do))
    k[:, 4:], v[:, 4:], q[:, 2], do[:, 2] = garbage, garbage, garbage, garbage
    bias[~mask] = garbage
    same(sa_attention(q, k, v, variant=variant, bias=bias, mask=mask), clean)
    for got, expected in zip(
        sa_attention_vjp(q, k, v, do, variant=variant, bias=bias, mask=mask), gradients, strict=True
    ):
        same(got, expected)
    bias[~mask] = -np.inf  # excludes by itself, as long as the score is a number
    k[:, 4:], q[:, 2] = 0.0, 0.0
    same(sa_attention(q, k, v, variant=variant, bias=bias)[:, [0, 1, 3]], clean[:, [0, 1, 3]])


@variants
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a6_a_value_that_some_queries_exclude_poisons_the_others_only(variant: str, poison: float) -> None:
    problem = Problem(1, 1, 4, 4, 2, 2)
    q, k, v = (array.copy() for array in problem.qkv)
    clean = sa_attention(q, k, v, variant=variant, is_causal=True)
    v[0, 2, 0] = poison
    got = sa_attention(q, k, v, variant=variant, is_causal=True)
    same(got[0, :2], clean[0, :2])
    same(got[0, :, 1], clean[0, :, 1])
    assert not np.isfinite(got[0, 2:, 0]).any()
    dq = sa_attention_vjp(q, k, v, problem.do, variant=variant, is_causal=True)[0]
    assert np.isfinite(dq[0, :2]).all()
    assert np.isnan(dq[0, 2:]).all()


@variants
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a6_a_poisoned_upstream_reaches_the_keys_of_its_query_only(variant: str, poison: float) -> None:
    problem = Problem(1, 1, 4, 4, 2, 2)
    do = problem.do.copy()
    do[0, 1] = poison
    clean = sa_attention_vjp(*problem.qkv, problem.do, variant=variant, is_causal=True)
    dq, dk, dv, _ = sa_attention_vjp(*problem.qkv, do, variant=variant, is_causal=True)
    assert not np.isfinite(dq[0, 1]).any()
    assert not np.isfinite(np.stack([dk[0, :2], dv[0, :2]])).any()
    same(dq[0, [0, 2, 3]], clean[0][0, [0, 2, 3]])
    same(dk[0, 2:], clean[1][0, 2:])
    same(dv[0, 2:], clean[2][0, 2:])


@variants
@pytest.mark.parametrize(
    ("Hq", "Hkv", "Tq", "Tk", "D", "Dv"),
    [(2, 1, 0, 3, 2, 2), (2, 1, 3, 0, 2, 4), (2, 1, 3, 2, 2, 0), (0, 1, 2, 2, 2, 2), (1, 1, 2, 3, 0, 2)],
)
def test_a9_sizes_of_zero(variant: str, Hq: int, Hkv: int, Tq: int, Tk: int, D: int, Dv: int) -> None:
    q, k, v = np.ones((2, Hq, Tq, D)), np.ones((2, Hkv, Tk, D)), np.ones((2, Hkv, Tk, Dv))
    o = sa_attention(q, k, v, variant=variant, scale=1.0)
    same(o, np.zeros((2, Hq, Tq, Dv)) if min(o.shape) == 0 or Tk * D == 0 else o)
    dq, dk, dv, dbias = sa_attention_vjp(q, k, v, o, variant=variant, scale=1.0)
    assert (dq.shape, dk.shape, dv.shape, dbias) == (q.shape, k.shape, v.shape, None)


@variants
@pytest.mark.parametrize("dtype", FLOATS)
def test_a10_attention_computes_in_the_compute_dtype_and_rounds_once(variant: str, dtype: str) -> None:
    problem, wide = Problem(2, 1, 3, 4, 2, 2), np.float64 if dtype == "float64" else np.float32
    narrow = [array.astype(numpy_dtype(dtype)) for array in (*problem.qkv, problem.do)]
    for bias in (problem.bias.astype(wide), problem.bias.astype(numpy_dtype(dtype))):
        options = {"variant": variant, "bias": bias}
        o = sa_attention(*narrow[:3], **options)
        gradients = sa_attention_vjp(*narrow, **options)
        widened = [array.astype(wide) for array in narrow]
        options["bias"] = bias.astype(wide)
        same(o, sa_attention(*widened[:3], **options).astype(numpy_dtype(dtype)))
        expected = sa_attention_vjp(*widened, **options)
        for got, value, like in zip(gradients, expected, (*narrow[:3], bias), strict=True):
            same(got, value.astype(like.dtype))


@variants
@problems
def test_batch_axes_are_a_loop(variant: str, problem: Problem) -> None:
    arrays = [np.stack([[array, -array, 2 * array]] * 2) for array in (*problem.qkv, problem.do)]
    together = sa_attention(*arrays[:3], variant=variant, bias=problem.bias, mask=problem.mask)
    gradients = sa_attention_vjp(*arrays, variant=variant, bias=problem.bias, mask=problem.mask)
    dbias = np.zeros_like(problem.bias)
    for index in np.ndindex(2, 3):
        one = [array[index] for array in arrays]
        alone = sa_attention(*one[:3], variant=variant, bias=problem.bias, mask=problem.mask)
        close(together[index], alone, rtol=0, atol=16 * U)
        parts = sa_attention_vjp(*one, variant=variant, bias=problem.bias, mask=problem.mask)
        for got, expected in zip(gradients[:3], parts[:3], strict=True):
            close(got[index], expected, rtol=16 * U, atol=16 * U)
        dbias += parts[3]
    close(gradients[3], dbias, rtol=32 * U, atol=32 * U)


# Partial states (A11).


def split_states(problem: Problem, cuts: list[int], **options: Any) -> list[AttentionState]:
    q, k, v = problem.qkv
    edges = [0, *cuts, k.shape[1]]
    states = []
    for start, stop in itertools.pairwise(edges):
        part = {name: array[..., start:stop] for name, array in options.items()}
        states.append(attention_state(q, k[:, start:stop], v[:, start:stop], **part))
    return states


def merged(states: list[AttentionState]) -> AttentionState:
    total, *rest = states
    for state in rest:
        total = merge_states(total, state)
    return total


@variants
@examples
@given(data=st.data())
def test_a11_states_of_any_split_give_the_attention(variant: str, data: st.DataObject) -> None:
    Tk = data.draw(st.integers(0, 9))
    problem = Problem(2, 1, 3, Tk, 2, 3)
    cuts = sorted(data.draw(st.lists(st.integers(0, Tk), max_size=4)))
    bias = problem.bias * data.draw(st.sampled_from([0.0, 1.0, 30.0, 800.0]))
    states = split_states(problem, cuts, bias=bias, mask=problem.mask)
    order = data.draw(st.permutations(range(len(states))))
    got = attention_from_state(merged([states[i] for i in order]), variant=variant)
    expected = sa_attention(*problem.qkv, variant=variant, bias=bias, mask=problem.mask)
    largest = 1 + abs(bias).max(initial=0)  # a relative error of the scores is an absolute one of the exponents
    close(got, expected, rtol=0, atol=32 * U * largest * (largest if variant == "product" else 1))


def test_a11_the_merge_is_associative_commutative_and_has_an_identity() -> None:
    problem = Problem(2, 1, 3, 7, 2, 3)
    a, b, c = split_states(problem, [2, 5], bias=5 * problem.bias, mask=problem.mask)
    empty = split_states(problem, [0], bias=problem.bias)[0]
    same(empty.m, np.full_like(a.m, -np.inf))
    same(empty.lo, np.full_like(a.lo, np.inf))
    for left, right in (
        (merge_states(a, b), merge_states(b, a)),
        (merge_states(a, empty), a),
        (merge_states(empty, a), a),
    ):
        for x, y in zip(left, right, strict=True):
            same(x, y)
    for x, y in zip(merge_states(merge_states(a, b), c), merge_states(a, merge_states(b, c)), strict=True):
        close(x, y, rtol=32 * U, atol=32 * U)


def test_a11_the_offset_of_a_part_is_the_whole_one_less_its_start() -> None:
    problem = Problem(2, 1, 4, 6, 2, 2)
    q, k, v = problem.qkv
    states = [
        attention_state(q, k[:, s : s + 2], v[:, s : s + 2], is_causal=True, q_offset=1 - s) for s in range(0, 6, 2)
    ]
    whole = sa_attention(q, k, v, is_causal=True, q_offset=1)
    close(attention_from_state(merged(states)), whole, rtol=0, atol=32 * U)


def test_a11_extreme_scores_and_excluded_garbage() -> None:
    problem = Problem(1, 1, 2, 6, 1, 2)
    q, k, v = problem.qkv
    v = 0.75 + np.tanh(v) / 4
    big = np.finfo(np.float64).max
    bias = np.array([[[big, -big, 0, big, -big, 1], [-big, -big / 2, -np.inf, -big, -np.inf, -big / 4]]])
    mask = np.array([True, True, True, True, False, False])
    v[:, 4:] = np.nan
    problem.qkv = q, 0 * k, v
    state = merged(split_states(problem, [2, 4], bias=bias, mask=mask))
    tied, single = (v[0, 0] + v[0, 3]) / 2, v[0, 1]
    close(attention_from_state(state)[0], np.array([tied, single / 2]), rtol=4 * U)
    close(attention_from_state(state, variant="product")[0], np.array([big * tied, -big / 2 * single]), rtol=4 * U)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a11_poison_survives_the_merge(poison: float) -> None:
    problem = Problem(1, 1, 2, 4, 2, 2)
    bias = np.zeros((1, 2, 4))
    bias[0, 0, 1] = poison
    for states in (split_states(problem, [2], bias=bias), split_states(problem, [2], bias=bias)[::-1]):
        got = attention_from_state(merged(states))
        assert np.isnan(got[0, 0]).all()
        close(got[0, 1:], sa_attention(*problem.qkv)[0, 1:], rtol=0, atol=32 * U)


# Arrays that are not what they seem.


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("make", [np.ma.masked_invalid, np.asmatrix])
def test_subclasses_that_redefine_arithmetic_are_refused(make: Any) -> None:
    plain = np.ones((2, 2))
    for arguments, options in (((make(plain),), {}), ((plain,), {"where": make(plain > 0)})):
        with pytest.raises(TypeError, match=type(make(plain)).__name__):
            sa_softmax(*arguments, **options)
    with pytest.raises(TypeError, match="g must be an array"):
        sa_softmax_vjp(plain, make(plain))
    cube = np.ones((1, 2, 2))
    with pytest.raises(TypeError, match="mask must be an array"):
        sa_attention(cube, cube, cube, mask=make(plain > 0))


def test_a_state_knows_two_variants_only() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 4))
    state = attention_state(q, k, v)
    with pytest.raises(ValueError, match="variant must be one of"):
        attention_from_state(state, variant="softmax")
