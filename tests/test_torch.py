"""The PyTorch backend: the spec's gradients under everything that differentiates, traces, batches or casts tensors."""

# ruff: noqa: E402
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from support import VARIANTS, numpy_dtype, weights_rounding

torch = pytest.importorskip("torch")

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import sa_softmax as top_level
from sa_softmax import reference
from sa_softmax.backends.torch import SASoftmax, _kernels, implementation, sa_attention, sa_softmax, varlen_sa_attention
from sa_softmax.backends.torch.adapter import Adapter, _array, _tensor

# What PyTorch warns of in its own doings, when it compiles and enters forward mode.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Function = Callable[..., Any]
Tensors = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them only cost time on tensors as small as these
    yield
    torch.set_num_threads(threads)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arrays(options: dict[str, Any]) -> dict[str, Any]:
    return {name: to_numpy(option) if isinstance(option, Tensor) else option for name, option in options.items()}


def to_numpy(x: Tensor) -> Any:
    return x.detach().numpy()


def assert_close(actual: Tensor, expected: Any, ulps: float = 64) -> None:
    """Same shape and NaN, and values within ``ulps`` roundoffs of the dtype (of 1, where they are smaller)."""
    bound = ulps * torch.finfo(actual.dtype).eps
    expected = torch.as_tensor(expected).double()
    torch.testing.assert_close(actual.detach().double(), expected, rtol=bound, atol=bound, equal_nan=True)


def compiled(f: Function, *, backend: str = "eager", dynamic: bool | None = None) -> Function:
    return torch.compile(f, fullgraph=True, backend=backend, dynamic=dynamic)


def on_computed(f: Function) -> Function:
    """Under torch.func, Dynamo uses a Function's own gradient on computed tensors only, and its forward on inputs."""
    return lambda *inputs: f(*(x * 1 for x in inputs))


# Ways to get the value and the gradients of sum(g * value): (f, inputs, g) -> (value, one gradient per input).


def backward(f: Function, inputs: Tensors, g: Tensor) -> tuple[Tensor, Tensors]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = f(*leaves)
    return y, torch.autograd.grad(y, leaves, g)


def func_vjp(f: Function, inputs: Tensors, g: Tensor) -> tuple[Tensor, Tensors]:
    y, pull_back = torch.func.vjp(f, *inputs)
    return y, pull_back(g)


def jacrev(f: Function, inputs: Tensors, g: Tensor) -> tuple[Tensor, Tensors]:
    jacobians = torch.func.jacrev(f, argnums=tuple(range(len(inputs))))(*inputs)
    return f(*inputs), tuple(torch.tensordot(g, jacobian, g.ndim) for jacobian in jacobians)


def in_forward_mode(f: Function, inputs: Tensors, g: Tensor) -> tuple[Tensor, Tensors]:
    with forward_ad.dual_level():
        return backward(f, inputs, g)


REVERSE: dict[str, Callable[[Function, Tensors, Tensor], tuple[Tensor, Tensors]]] = {
    "eager": backward,
    "checkpoint": lambda f, inputs, g: backward(lambda *x: checkpoint(f, *x, use_reentrant=False), inputs, g),
    "func.vjp": func_vjp,
    "jacrev": jacrev,
    "in forward mode": in_forward_mode,
    "compile": lambda f, inputs, g: backward(compiled(f, backend="aot_eager"), inputs, g),
    "compile func.vjp": lambda f, inputs, g: compiled(lambda *x: func_vjp(f, x, g))(*inputs),
    "compile func.vjp computed": lambda f, inputs, g: compiled(lambda *x: func_vjp(on_computed(f), x, g))(*inputs),
}


# Ways to get the tangent of the value: (f, inputs, tangents) -> tangent.


def func_jvp(f: Function, inputs: Tensors, tangents: Tensors) -> Tensor:
    return torch.func.jvp(f, inputs, tangents)[1]


def dual(f: Function, inputs: Tensors, tangents: Tensors) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, inputs, tangents))).tangent


def jacfwd(f: Function, inputs: Tensors, tangents: Tensors) -> Tensor:
    jacobians = torch.func.jacfwd(f, argnums=tuple(range(len(inputs))))(*inputs)
    return sum(torch.tensordot(jacobian, t, t.ndim) for jacobian, t in zip(jacobians, tangents, strict=True))


FORWARD: dict[str, Callable[[Function, Tensors, Tensors], Tensor]] = {
    "func.jvp": func_jvp,
    "dual_level": dual,
    "jacfwd": jacfwd,
    "compile func.jvp": lambda f, inputs, t: compiled(lambda *x: func_jvp(f, x, t))(*inputs),
    "compile func.jvp computed": lambda f, inputs, t: compiled(lambda *x: func_jvp(on_computed(f), x, t))(*inputs),
    "compile dual_level": lambda f, inputs, t: compiled(lambda *x: dual(f, x, t))(*inputs),
}

HESSIANS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
    "jacrev of jacfwd": lambda f, x: torch.func.jacrev(torch.func.jacfwd(f))(x),
    "jacfwd of jacfwd": lambda f, x: torch.func.jacfwd(torch.func.jacfwd(f))(x),
    "autograd": torch.autograd.functional.hessian,
    "autograd vectorized": partial(torch.autograd.functional.hessian, vectorize=True),
}


def differences_of_gradient(f: Function, x: Tensor, step: float = 1e-5) -> Tensor:
    """The Hessian of scalar f, by central differences of its gradient."""
    columns = []
    for e in torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape) * step:
        (up,), (down,) = (backward(f, (x + s * e,), x.new_ones(()))[1] for s in (1, -1))
        columns.append((up - down) / (2 * step))
    return torch.stack(columns, -1).reshape(*x.shape, *x.shape)


# The row operation.

ROWS = torch.tensor(
    [
        [0.3, -1.2, 2.0, 0.7, -0.4, 1.1],
        [-1.0, 2.0, -1.0, 2.0, 0.5, 2.0],  # ties at both extrema
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [-3.0, -3.0, -3.0, -3.0, -3.0, -3.0],
        [3.0, 3.0, 3.0, 3.0, 3.0, 3.0],
        [0.0, 1.0, 2.0, 0.0, 2.0, 0.5],  # minimum exactly 0
        [0.0, -1.0, -2.0, -2.0, 0.0, -0.5],  # maximum exactly 0
        [-INF, 1.0, -INF, -2.0, 0.5, 1.0],
        [-INF, -INF, -INF, -INF, -INF, -INF],
    ],
    dtype=torch.float64,
)
KEPT = torch.tensor([True, True, True, False, True, True]).repeat(len(ROWS), 1)
KEPT[0] = False
KEPT[1, 0] = False
GARBAGE = torch.tensor([NAN, INF, -INF, NAN, 1e300, -1e300], dtype=torch.float64)
G = randn(*ROWS.shape, seed=1)


@pytest.fixture(params=[None, KEPT], ids=["all", "where"])
def where(request: pytest.FixtureRequest) -> Tensor | None:
    return request.param


@pytest.fixture
def x(where: Tensor | None) -> Tensor:
    """Rows with ties and corners, with garbage where ``where`` excludes."""
    return ROWS if where is None else torch.where(where, ROWS, GARBAGE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", REVERSE)
def test_row_value_and_gradient(way: str, variant: str, x: Tensor, where: Tensor | None) -> None:
    options = {"variant": variant, "where": where}
    y, (dx,) = REVERSE[way](lambda x: sa_softmax(x, **options), (x,), G)
    assert_close(y, reference.sa_softmax(to_numpy(x), **arrays(options)))
    assert_close(dx, reference.sa_softmax_vjp(to_numpy(x), to_numpy(G), **arrays(options)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", FORWARD)
def test_row_tangent(way: str, variant: str, x: Tensor, where: Tensor | None) -> None:
    options = {"variant": variant, "where": where}
    tangent = FORWARD[way](lambda x: sa_softmax(x, **options), (x,), (G,))
    assert_close(tangent, reference.sa_softmax_jvp(to_numpy(x), to_numpy(G), **arrays(options)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_row_passes_gradcheck_and_gradgradcheck(variant: str) -> None:
    x = randn(4, seed=2).requires_grad_()  # smooth: no ties, no extremum of 0
    for where in (None, torch.tensor([True, True, False, True])):
        f = partial(sa_softmax, variant=variant, where=where)
        batched = {"check_batched_grad": True}
        assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_forward_grad=True, **batched)
        assert torch.autograd.gradgradcheck(f, x, check_fwd_over_rev=True, **batched)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", HESSIANS)
def test_row_second_derivatives(way: str, variant: str) -> None:
    """Nested forward mode included, where the jvp of a Function would silently drop the outer tangent."""

    def f(x: Tensor) -> Tensor:
        return (sa_softmax(x, variant=variant) ** 2).sum()

    x = randn(2, 4, seed=3)
    torch.testing.assert_close(HESSIANS[way](f, x), differences_of_gradient(f, x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", HESSIANS)
def test_row_second_derivatives_are_finite_at_corners(way: str, variant: str, x: Tensor, where: Tensor | None) -> None:
    hessian = HESSIANS[way](lambda x: (G * sa_softmax(x, variant=variant, where=where) ** 2).sum(), x)
    assert hessian.isfinite().all()
    excluded = x == -INF if where is None else ~where | (x == -INF)
    assert (hessian[excluded] == 0).all()
    assert (hessian.movedim((0, 1), (2, 3))[excluded] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mapped", ["x and where", "x", "where"])
def test_row_vmap_and_vmap_of_grad(mapped: str, variant: str) -> None:
    axes = (0 if "x" in mapped.split() else None, 0 if "where" in mapped else None, 0)
    x = ROWS if axes[0] == 0 else ROWS[1]
    where = KEPT if axes[1] == 0 else KEPT[1]

    def y(x: Tensor, where: Tensor, g: Tensor) -> Tensor:
        return sa_softmax(x, variant=variant, where=where)

    def dx(x: Tensor, where: Tensor, g: Tensor) -> Tensor:
        return torch.func.grad(lambda x: (g * y(x, where, g)).sum())(x)

    full, kept = to_numpy(x.expand(ROWS.shape)), to_numpy(where.expand(ROWS.shape))
    for transform in (lambda f: torch.vmap(f, axes), lambda f: compiled(torch.vmap(f, axes))):
        assert_close(transform(y)(x, where, G), reference.sa_softmax(full, variant=variant, where=kept))
        expected = reference.sa_softmax_vjp(full, to_numpy(G), variant=variant, where=kept)
        assert_close(transform(dx)(x, where, G), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_dtypes(dtype: torch.dtype, variant: str) -> None:
    """16-bit is computed in float32 and rounded once (D1): half a unit in the last place, and what float32 adds."""
    x, g = randn(4, 33, seed=4, dtype=dtype), randn(4, 33, seed=5, dtype=dtype)
    y, (dx,) = backward(partial(sa_softmax, variant=variant), (x,), g)
    wide = torch.promote_types(dtype, torch.float32)
    computed = 64 * torch.finfo(wide).eps
    half_ulp = 0.0 if wide == dtype else torch.finfo(dtype).eps / 2
    x_, g_ = to_numpy(x.double()), to_numpy(g.double())
    for actual, expected in (
        (y, reference.sa_softmax(x_, variant=variant)),
        (dx, reference.sa_softmax_vjp(x_, g_, variant=variant)),
    ):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=half_ulp + computed, atol=computed)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ndim", range(1, 7))
def test_row_ranks_and_axes(ndim: int, variant: str) -> None:
    x = randn(*(2, 3, 1, 4, 2, 3)[:ndim], seed=6)
    g = randn(*x.shape, seed=7)
    for axis in range(-ndim, ndim):
        y, (dx,) = backward(partial(sa_softmax, axis=axis, variant=variant), (x,), g)
        assert_close(y, reference.sa_softmax(to_numpy(x), axis=axis, variant=variant))
        R = x.clamp(min=0).amax(axis) - x.clamp(max=0).amin(axis)  # the terms of the gradient have the size of 1 / R
        expected = reference.sa_softmax_vjp(to_numpy(x), to_numpy(g), axis=axis, variant=variant)
        assert_close(dx, expected, ulps=64 * max(1, 1 / float(R.min())))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["eager", "func.vjp", "in forward mode", "compile"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)], ids=str)
def test_row_of_size_zero(shape: tuple[int, ...], way: str, variant: str) -> None:
    x = torch.empty(shape)
    y, (dx,) = REVERSE[way](lambda x: sa_softmax(x, variant=variant, where=torch.ones(shape) > 0), (x,), x)
    for actual in (y, dx):
        assert (actual.shape, actual.dtype) == (shape, torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_row_layouts(layout: str, variant: str) -> None:
    x, g = {
        "transposed": lambda: (randn(6, 5, seed=8).mT, randn(6, 5, seed=9).mT),
        "strided": lambda: (randn(10, 12, seed=8)[::2, 1::2], randn(5, 18, seed=9)[:, ::3]),
        "expanded": lambda: (randn(1, 6, seed=8).expand(5, 6), randn(5, 1, seed=9).expand(5, 6)),
    }[layout]()
    for axis in (0, 1):
        leaf = x.detach().requires_grad_()
        assert leaf.stride() == x.stride()
        y = sa_softmax(leaf, axis=axis, variant=variant)
        (dx,) = torch.autograd.grad(y, leaf, g)
        assert_close(y, reference.sa_softmax(to_numpy(x), axis=axis, variant=variant))
        assert_close(dx, reference.sa_softmax_vjp(to_numpy(x), to_numpy(g), axis=axis, variant=variant))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_is_finite_up_to_the_largest_scores(dtype: torch.dtype, variant: str) -> None:
    """C7 and G8, against float64 (float64 against scores that float64 can square)."""
    big = torch.finfo(dtype).max if dtype != torch.float64 else 1e300
    signs = torch.tensor([[1, 1, -1], [1, -1, 0], [1, -1, -1], [-1, -1, -1]], dtype=torch.float64)
    x, g = (big * signs).to(dtype), torch.tensor([[1, 0.5, -1], [1, -1, 1], [1, 1, 1], [1, 0, -1]], dtype=dtype)
    y, (dx,) = backward(partial(sa_softmax, variant=variant), (x,), g)
    for actual, expected in (
        (y, reference.sa_softmax(to_numpy(x.double()), variant=variant)),
        (dx, reference.sa_softmax_vjp(to_numpy(x.double()), to_numpy(g.double()), variant=variant)),
    ):
        assert actual.isfinite().all()
        torch.testing.assert_close(
            actual.double() / big, torch.from_numpy(expected) / big, rtol=8 * torch.finfo(dtype).eps, atol=1e-7 / big
        )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["eager", "compile"])
def test_row_nan_and_inf_stay_in_their_row(way: str, variant: str) -> None:
    x = torch.stack([ROWS[0], ROWS[0], ROWS[0]])
    x[0, 1], x[1, 2], x[:2, 4] = NAN, INF, -INF
    y, (dx,) = REVERSE[way](partial(sa_softmax, variant=variant), (x,), G[:3])
    for actual in (y, dx):
        spoiled = torch.zeros_like(x, dtype=torch.bool)
        spoiled[:2] = x[:2] != -INF
        assert torch.equal(actual.isnan(), spoiled)
        assert (actual[:2, 4] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_row_keeps_its_input_alone_for_the_backward_pass(variant: str) -> None:
    x, where = randn(3, 5, seed=2).requires_grad_(), torch.ones(5) > 0
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        sa_softmax(x, variant=variant, where=where)
    assert set(kept) == {x.data_ptr(), where.data_ptr()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_row_ignores_autocast_and_default_dtype(variant: str) -> None:
    x, g = randn(3, 5, seed=2, dtype=torch.float32), randn(3, 5, seed=3, dtype=torch.float32)
    y, (dx,) = backward(partial(sa_softmax, variant=variant), (x,), g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for way in ("eager", "func.vjp", "compile"):
            y_, (dx_,) = REVERSE[way](partial(sa_softmax, variant=variant), (x,), g)
            assert torch.equal(y_, y)
            assert torch.equal(dx_, dx)
    torch.set_default_dtype(torch.float64)
    try:
        y_, (dx_,) = backward(partial(sa_softmax, variant=variant), (x,), g)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(y_, y)
    assert torch.equal(dx_, dx)


class _Tagged(Tensor):
    pass


@pytest.mark.parametrize("variant", VARIANTS)
def test_row_takes_parameters_subclasses_and_inference_tensors(variant: str) -> None:
    expected = reference.sa_softmax(to_numpy(ROWS), variant=variant)
    parameter = nn.Parameter(ROWS.clone())
    y = sa_softmax(parameter, variant=variant)
    y.backward(G)
    assert_close(parameter.grad, reference.sa_softmax_vjp(to_numpy(ROWS), to_numpy(G), variant=variant))
    tagged = sa_softmax(ROWS.as_subclass(_Tagged), variant=variant)
    assert type(tagged) is _Tagged
    with torch.inference_mode():
        inferred = sa_softmax(ROWS.clone(), variant=variant)
    assert inferred.is_inference()
    for actual in (y, tagged.as_subclass(Tensor), inferred):
        assert_close(actual, expected)


# Attention.

# All sizes differ, since Dynamo takes equal ones for the same.
BATCH, HQ, HKV, TQ, TK, D, DV = 2, 6, 3, 4, 7, 5, 8
Q = randn(BATCH, HQ, TQ, D, seed=10)
K = randn(BATCH, HKV, TK, D, seed=11)
V = randn(BATCH, HKV, TK, DV, seed=12)
DO = randn(BATCH, HQ, TQ, DV, seed=13)
BIAS = randn(HQ, 1, TK, seed=14)
MASK = randn(BATCH, 1, TQ, TK, seed=15) > -0.5
MASK[..., -1] = False
MASK[0, :, 1] = False


def attention_case(name: str) -> tuple[Tensors, dict[str, Any]]:
    """Inputs to differentiate (q, k, v and perhaps bias) and options.

    In "everything" no query sees the last key, which holds garbage, and one query sees no key at all. In "window" it
    is the last query.
    """
    if name == "plain":
        return (Q, K, V), {}
    k, v, bias = K.clone(), V.clone(), BIAS.clone()
    k[..., -1, :], v[..., -1, :], bias[..., -1] = NAN, INF, NAN
    options = {"mask": MASK, "scale": 0.7}
    if name == "window":
        return (Q, k, v, bias), options | {"window_size": (1, 2), "q_offset": TK - TQ + 1}
    return (Q, k, v, bias), options | {"is_causal": True, "q_offset": TK - TQ}


CASES = ("plain", "everything", "window")


def attention(*inputs: Tensor, **options: Any) -> Tensor:
    q, k, v, *bias = inputs
    return sa_attention(q, k, v, bias=bias[0] if bias else None, **options)


def as_mask(options: dict[str, Any], tq: int, tk: int) -> dict[str, Any]:
    """The same options for the reference, to which a window is a mask like any other."""
    left, right = options.pop("window_size", (-1, -1))
    right = 0 if options.pop("is_causal", False) else right
    ahead = np.arange(tk) - np.arange(tq)[:, None] - options.pop("q_offset", 0)
    seen = np.ones((tq, tk), bool)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    mask = options.get("mask")
    return options | {"mask": seen if mask is None else seen & mask}


def reference_attention(inputs: Tensors, options: dict[str, Any], do: Tensor = DO) -> tuple[Any, tuple[Any, ...]]:
    q, k, v, *bias = map(to_numpy, inputs)
    given = as_mask(arrays(options), q.shape[-2], k.shape[-2]) | {"bias": bias[0] if bias else None}
    gradients = reference.sa_attention_vjp(q, k, v, to_numpy(do), **given)
    return reference.sa_attention(q, k, v, **given), gradients[: len(inputs)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", REVERSE)
def test_attention_value_and_gradients(way: str, case: str, variant: str) -> None:
    inputs, options = attention_case(case)
    options["variant"] = variant
    o, gradients = REVERSE[way](lambda *inputs: attention(*inputs, **options), inputs, DO)
    expected, expected_gradients = reference_attention(inputs, options)
    assert_close(o, expected)
    for gradient, reference_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, reference_gradient)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", FORWARD)
def test_attention_tangent_is_the_transpose_of_its_gradients(way: str, case: str, variant: str) -> None:
    inputs, options = attention_case(case)
    options["variant"] = variant
    tangents = tuple(randn(*x.shape, seed=20 + i) for i, x in enumerate(inputs))
    tangent = FORWARD[way](lambda *inputs: attention(*inputs, **options), inputs, tangents)
    _, gradients = reference_attention(inputs, options)
    assert_close((tangent * DO).sum(), sum((to_numpy(t) * g).sum() for t, g in zip(tangents, gradients, strict=True)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["eager", "func.vjp", "compile"])
def test_attention_key_that_some_queries_see_spoils_those_alone(way: str, variant: str) -> None:
    """A6 where selecting keys does not help: 0 * NaN must stay out of the matrix products themselves."""
    for spoiled, value in ((0, NAN), (0, INF), (1, NAN), (1, -INF), (2, NAN), (2, INF), (3, NAN)):
        inputs = tuple(t.clone() for t in (Q, K, V, BIAS.expand(HQ, TQ, TK)))
        inputs[spoiled][..., 1, 1] = value
        options = {"variant": variant, "is_causal": True}
        o, gradients = REVERSE[way](partial(attention, **options), inputs, DO)
        expected, expected_gradients = reference_attention(inputs, options)
        assert np.isfinite(expected[..., 0, :]).all()
        assert not np.isfinite(expected[..., 1, :]).all()
        for actual, wanted in zip((o, *gradients), (expected, *expected_gradients), strict=True):
            # An infinite v makes gradients infinite or NaN, which the order of operations decides.
            assert_close(actual.masked_fill(~actual.isfinite(), NAN), np.where(np.isfinite(wanted), wanted, NAN))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["eager", "func.vjp"])
def test_attention_upstream_gradient_of_nan_spoils_the_keys_its_query_sees_alone(way: str, variant: str) -> None:
    inputs, options = attention_case("everything")
    options["variant"] = variant
    for query, finite in ((1, True), (2, False)):  # of the first batch, where query 1 sees no key
        do = DO.clone()
        do[0, :, query] = NAN
        _, gradients = REVERSE[way](lambda *inputs: attention(*inputs, **options), inputs, do)
        wanted = reference_attention(inputs, options, do)[1]
        for gradient, reference_gradient in zip(gradients, wanted, strict=True):
            assert_close(gradient, reference_gradient)
            assert np.isfinite(reference_gradient).all() == finite
        assert np.isfinite(wanted[2][:, :, -1]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_passes_gradcheck_and_gradgradcheck(variant: str) -> None:
    q, k, v = (randn(1, heads, 3, 2, seed=30 + i).requires_grad_() for i, heads in enumerate((2, 1, 1)))
    bias = randn(2, 1, 3, seed=33).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    for inputs, options in (
        ((q, k, v), {}),
        ((q, k, v, bias), {"mask": mask, "is_causal": True, "q_offset": 1}),
        ((q, k, v), {"window_size": (1, 0), "q_offset": 1}),
    ):
        f = partial(attention, variant=variant, **options)
        fast = {"fast_mode": True, "check_batched_grad": True}
        assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_forward_grad=True, **fast)
        assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, **fast)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["hessian", "jacrev of jacrev", "jacfwd of jacfwd", "autograd vectorized"])
@pytest.mark.parametrize("argument", range(4), ids=["q", "k", "v", "bias"])
def test_attention_second_derivatives_are_finite_whatever_hidden_keys_hold(
    argument: int, way: str, variant: str
) -> None:
    (q, k, v, bias), options = attention_case("everything")
    inputs, mask = (q[:1], k[:1], v[:1], bias), options.pop("mask")[:1]

    def f(x: Tensor) -> Tensor:
        given = [*inputs[:argument], x, *inputs[argument + 1 :]]
        return (DO[:1] * attention(*given, mask=mask, variant=variant, **options) ** 2).sum()

    hessian = HESSIANS[way](f, inputs[argument])
    assert hessian.isfinite().all()
    assert hessian.any()


@pytest.mark.parametrize("case", ["everything", "window"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_vmap_and_vmap_of_grad(variant: str, case: str) -> None:
    (q, k, v, bias), options = attention_case(case)
    mask = options.pop("mask")

    def o(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, do: Tensor) -> Tensor:
        return attention(q, k, v, bias, mask=mask, variant=variant, **options)

    def gradients(*args: Tensor) -> Tensors:
        return torch.func.grad(lambda *args: (args[-1] * o(*args)).sum(), argnums=(0, 1, 2, 3))(*args)

    expected, (dq, dk, dv, dbias) = reference_attention((q, k, v, bias), options | {"mask": mask, "variant": variant})
    axes = (0, 0, 0, None, 0, 0)
    for transform in (lambda f: torch.vmap(f, axes), lambda f: compiled(torch.vmap(f, axes))):
        assert_close(transform(o)(q, k, v, bias, mask, DO), expected)
        dq_, dk_, dv_, dbias_ = transform(gradients)(q, k, v, bias, mask, DO)
        for actual, reference_gradient in ((dq_, dq), (dk_, dk), (dv_, dv), (dbias_.sum(0), dbias)):
            assert_close(actual, reference_gradient)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["eager", "compile"])
def test_attention_of_which_some_inputs_require_a_gradient(way: str, variant: str) -> None:
    inputs, options = attention_case("everything")
    _, expected = reference_attention(inputs, options | {"variant": variant})
    for subset in [s for n in range(1, 5) for s in combinations(range(4), n)] if way == "eager" else [(1, 3)]:

        def f(*some: Tensor, subset: tuple[int, ...] = subset) -> Tensor:
            given = dict(enumerate(inputs)) | dict(zip(subset, some, strict=True))
            return attention(*(given[i] for i in range(4)), variant=variant, **options)

        _, gradients = REVERSE[way](f, tuple(inputs[i] for i in subset), DO)
        for i, gradient in zip(subset, gradients, strict=True):
            assert_close(gradient, expected[i])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_dtypes(dtype: torch.dtype, variant: str) -> None:
    inputs, options = attention_case("everything")
    options["variant"] = variant
    compute = torch.promote_types(dtype, torch.float32)
    narrow = tuple(x.to(dtype) for x in inputs)
    o, gradients = backward(partial(attention, **options), narrow, DO.to(dtype))
    wide, wide_gradients = backward(
        partial(attention, **options), tuple(x.to(compute) for x in narrow), DO.to(dtype).to(compute)
    )
    if dtype == torch.bfloat16:  # Y may be rounded, too, before it multiplies V (A10)
        q, k, v, bias = map(_array, narrow)
        besides = torch.from_numpy(weights_rounding(q, k, v, bias=bias, **arrays(options)))
        u, c = torch.finfo(dtype).eps / 2, torch.finfo(compute).eps
        assert o.dtype == dtype
        assert ((o.double() - wide).abs() <= u * wide.abs() + besides + 64 * c * wide.abs().clamp(min=1)).all()
    else:
        assert torch.equal(o, wide.to(dtype))
    for actual, expected in zip(gradients, wide_gradients, strict=True):
        assert torch.equal(actual, expected.to(dtype))  # computed in the compute dtype, rounded once
    bias = inputs[3].to(compute)
    _, (dbias,) = backward(lambda bias: attention(*narrow[:3], bias, **options), (bias,), DO.to(dtype))
    assert dbias.dtype == compute


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "shapes",
    {
        "one query": ((2, 1, 1, 3), (2, 1, 5, 3), (2, 1, 5, 4)),
        "one key": ((2, 1, 4, 3), (2, 1, 1, 3), (2, 1, 1, 4)),
        "no batch axes": ((6, 4, 3), (2, 5, 3), (2, 5, 2)),
        "three batch axes": ((1, 2, 1, 2, 4, 3), (1, 2, 1, 1, 5, 3), (1, 2, 1, 1, 5, 2)),
        "no batch": ((0, 2, 4, 3), (0, 1, 5, 3), (0, 1, 5, 2)),
        "no query": ((1, 2, 0, 3), (1, 1, 5, 3), (1, 1, 5, 2)),
        "no key": ((1, 2, 4, 3), (1, 1, 0, 3), (1, 1, 0, 2)),
        "Dv of 0": ((1, 2, 4, 3), (1, 1, 5, 3), (1, 1, 5, 0)),
        "D of 0": ((1, 2, 4, 0), (1, 1, 5, 0), (1, 1, 5, 2)),
        "no query head": ((1, 0, 4, 3), (1, 1, 5, 3), (1, 1, 5, 2)),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_shapes(is_causal: bool, shapes: tuple[str, tuple[tuple[int, ...], ...]], variant: str) -> None:
    q, k, v = (randn(*shape, seed=40 + i) for i, shape in enumerate(shapes[1]))
    do = randn(*q.shape[:-1], v.shape[-1], seed=43)
    options = {"variant": variant, "is_causal": is_causal, "scale": 0.5}
    o, gradients = backward(partial(sa_attention, **options), (q, k, v), do)
    assert_close(o, reference.sa_attention(*map(to_numpy, (q, k, v)), **options))
    expected = reference.sa_attention_vjp(*map(to_numpy, (q, k, v, do)), **options)
    for gradient, reference_gradient in zip(gradients, expected[:3], strict=True):
        assert_close(gradient, reference_gradient)


@pytest.mark.parametrize("kernels", [True, False], ids=["as it is", "composition"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_windows(variant: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the mask of the same meaning: open and closed sides, of width 0, beside and beyond the keys."""
    if not kernels:
        monkeypatch.setattr(_kernels, "_IMPLEMENTATIONS", {})
        assert implementation("cpu") == "composition"
    far = 2**31 - 1
    empty = 0
    for (left, right), q_offset, is_causal in product(
        product((-1, 0, 1, 5, far), (-1, 0, 1, 4, far)), (0, 3, -2, 9, -(2**40)), (False, True)
    ):
        if (is_causal and right > 0) or (q_offset and right < 0 and not is_causal):
            continue
        options = {"variant": variant, "window_size": (left, right), "q_offset": q_offset, "is_causal": is_causal}
        o, gradients = backward(partial(sa_attention, **options), (Q, K, V), DO)
        expected, expected_gradients = reference_attention((Q, K, V), options)
        # A query that sees one key has the gradient 0 as a difference of two terms of the size 1 / |x|.
        for actual, wanted in zip((o, *gradients), (expected, *expected_gradients), strict=True):
            assert_close(actual, wanted, ulps=2**12)
        empty += not o.any()
    assert empty > 5


@pytest.mark.parametrize("window", [(2, -1), (1, 0), (-1, 1), (0, 2), (-1, -1)])
def test_window_of_one_packed_sequence_is_that_of_attention(window: tuple[int, int]) -> None:
    for tq, tk in ((TQ, TK), (TK, TQ)):
        q, k, v = randn(HQ, tq, D, seed=45), randn(HKV, tk, D, seed=46), randn(HKV, tk, DV, seed=47)
        packed = (x.transpose(0, 1) for x in (q, k, v))
        lengths = (torch.tensor([0, t], dtype=torch.int32) for t in (tq, tk))
        o = varlen_sa_attention(*packed, *lengths, tq, tk, window_size=window)
        options = as_mask({"window_size": window, "q_offset": tk - tq}, tq, tk)
        assert_close(o.transpose(0, 1), reference.sa_attention(*map(to_numpy, (q, k, v)), **options))


def test_attention_refuses_windows_that_contradict() -> None:
    for match, options in (
        (r"window_size must be \(left, right\).*got \(-2, 0\)", {"window_size": (-2, 0)}),
        (r"window_size must be \(left, right\).*got 4", {"window_size": 4}),
        (r"window_size must be \(left, right\).*got \(1, 2, 3\)", {"window_size": (1, 2, 3)}),
        (r"window_size must be \(left, right\).*got \(1\.0, 0\)", {"window_size": (1.0, 0)}),
        (r"window_size must be \(left, right\).*to 2\*\*31 - 1", {"window_size": (sys.maxsize, 0)}),
        (r"right > 0\. Pass \(2, 0\), or is_causal=False", {"window_size": (2, 1), "is_causal": True}),
        (r"right >= 0 in window_size, which is \(2, -1\); got q_offset=1", {"window_size": (2, -1), "q_offset": 1}),
    ):
        with pytest.raises(ValueError, match=match):
            sa_attention(Q, K, V, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_layout_of_bthd(variant: str) -> None:
    inputs = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (Q, K, V))
    o, gradients = func_vjp(
        partial(sa_attention, variant=variant), inputs, DO.transpose(1, 2).contiguous().transpose(1, 2)
    )
    expected, expected_gradients = reference_attention((Q, K, V), {"variant": variant})
    for actual, wanted in zip((o, *gradients), (expected, *expected_gradients), strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_keeps_its_inputs_alone_for_the_backward_pass(variant: str) -> None:
    inputs, options = attention_case("everything")
    leaves = [x.clone().requires_grad_() for x in inputs]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        attention(*leaves, variant=variant, **options)
    assert set(kept) == {t.data_ptr() for t in (*leaves, options["mask"])}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        ("eager", torch.float16),
        ("eager", torch.bfloat16),
        ("func.vjp", torch.bfloat16),
        ("compile", torch.bfloat16),
        ("compile func.vjp", torch.bfloat16),
    ],
    ids=str,
)
def test_attention_under_autocast_is_attention_of_what_autocast_casts(
    way: str, dtype: torch.dtype, variant: str
) -> None:
    """To the bit, forward and backward, so that nothing inside is cast; mixed dtypes are, as by SDPA."""
    q, k, v, bias = (t.float() for t in (Q, K, V, BIAS))
    inputs = q, k, v.to(dtype), bias
    f = partial(attention, variant=variant, mask=MASK)
    expected, gradients = backward(f, (q.to(dtype), k.to(dtype), v.to(dtype), bias), DO.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        o, autocast_gradients = REVERSE[way](f, inputs, DO.to(dtype))
        assert o.dtype == nn.functional.scaled_dot_product_attention(q, q, q.to(dtype)).dtype == dtype
    assert torch.equal(o, expected)
    if way == "compile func.vjp":
        pytest.xfail("PyTorch differentiates the composition there, and autocast casts what it derives")
    for x, actual, wanted in zip(inputs, autocast_gradients, gradients, strict=True):
        assert actual.dtype == x.dtype
        assert torch.equal(actual, wanted.to(x.dtype))


def test_attention_under_autocast_leaves_float64_alone() -> None:
    expected = sa_attention(Q, K, V)
    with torch.autocast("cpu"):
        assert torch.equal(sa_attention(Q, K, V), expected)


def test_attention_under_autocast_refuses_what_is_no_tensor() -> None:
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"q must be an array .* got builtins\.list"):
        sa_attention([1.0], [1.0], [1.0])


# Tracing.


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_row_compiles_through_dispatch(variant: str, dynamic: bool | None) -> None:
    f = compiled(partial(top_level.sa_softmax, variant=variant), backend="aot_eager", dynamic=dynamic)
    for x, g in ((ROWS, G), (ROWS[2:, :5].contiguous(), G[2:, :5].contiguous())):
        y, (dx,) = backward(f, (x,), g)
        assert_close(y, reference.sa_softmax(to_numpy(x), variant=variant))
        assert_close(dx, reference.sa_softmax_vjp(to_numpy(x), to_numpy(g), variant=variant))


def test_dispatch_compiles_where_nothing_has_imported_the_backend() -> None:
    code = """if True:
        import sys, torch, sa_softmax
        f = torch.compile(sa_softmax.sa_softmax, fullgraph=True, backend="eager")
        assert "sa_softmax.backends.torch" not in sys.modules
        assert torch.equal(f(torch.ones(4)), torch.full((4,), 0.25))
    """
    subprocess.run([sys.executable, "-c", code], check=True)


class _Decoder(nn.Module):
    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.scale = 0.3

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        offset = k.shape[-2] - q.shape[-2]
        return top_level.sa_attention(
            q, k, v, variant=self.variant, bias=bias, mask=mask, is_causal=True, q_offset=offset, scale=self.scale
        )


def _decoder_inputs(batch: int, tq: int, tk: int) -> Tensors:
    """q, k, v, bias and mask."""
    q, k, v = (randn(batch, heads, t, 5, seed=50 + i) for i, (heads, t) in enumerate(((4, tq), (2, tk), (2, tk))))
    return q, k, v, randn(4, 1, tk, seed=53), randn(batch, 1, tq, tk, seed=54) > 0


def _decoder_options(variant: str, tq: int, tk: int) -> dict[str, Any]:
    return {"variant": variant, "is_causal": True, "q_offset": tk - tq, "scale": 0.3}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_compilation_serves_every_length_and_offset(variant: str) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> Function:
        graphs.append(graph)
        return graph.forward

    f = torch.compile(_Decoder(variant), fullgraph=True, dynamic=True, backend=count)
    for batch, tq, tk in ((3, 7, 11), (6, 13, 12), (5, 8, 9)):
        *inputs, mask = _decoder_inputs(batch, tq, tk)
        do = randn(batch, 4, tq, 5, seed=55)
        o, gradients = backward(lambda *inputs, mask=mask: f(*inputs, mask), tuple(inputs), do)
        options = _decoder_options(variant, tq, tk) | {"mask": mask}
        expected, expected_gradients = reference_attention(tuple(inputs), options, do)
        # The gradient of normalized is a difference of terms of the size of 1 / R.
        _, _, _, x, on = reference._scores(*map(to_numpy, inputs), to_numpy(mask), True, tk - tq, 0.3)
        R = np.max(x, -1, where=on, initial=0) - np.min(x, -1, where=on, initial=0)
        ulps = 64 * (max(1, (1 / R[R > 0]).max()) if variant == "normalized" else 1)
        for actual, wanted in zip((o, *gradients), (expected, *expected_gradients), strict=True):
            assert_close(actual, wanted, ulps)
    assert len(graphs) == 1


def test_one_compilation_serves_every_window() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> Function:
        graphs.append(graph)
        return graph.forward

    f = torch.compile(
        lambda left, right: sa_attention(Q, K, V, window_size=(left, right), q_offset=2),
        fullgraph=True, dynamic=True, backend=count,
    )  # fmt: skip
    for window in ((2, 3), (4, 5), (3, 2)):
        expected, _ = reference_attention((Q, K, V), {"window_size": window, "q_offset": 2})
        assert_close(f(*window), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("window", [(2, -1), (2, 1), (-1, 1)])
def test_export_holds_the_left_side_of_a_window_as_a_mask(window: tuple[int, int]) -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            q_offset = k.shape[-2] - q.shape[-2] if window[1] >= 0 else 0
            return sa_attention(q, k, v, mask=mask, window_size=window, q_offset=q_offset)

    batch, tq, tk = (torch.export.Dim(name) for name in ("batch", "tq", "tk"))
    q, k, v, _, mask = _decoder_inputs(3, 7, 11)
    keys = {0: batch, 2: tk}
    shapes = {"q": {0: batch, 2: tq}, "k": keys, "v": keys, "mask": {0: batch, 2: tq, 3: tk}}
    program = torch.export.export(Model(), (q, k, v, mask), dynamic_shapes=shapes)
    calls = [node for node in program.graph.nodes if node.target == torch.ops.sa_softmax.sa_attention.default]
    assert len(calls) == 1
    assert (calls[0].args[4].op == "placeholder") == (window[0] < 0)
    q, k, v, _, mask = _decoder_inputs(6, 13, 12)
    options = {"mask": mask, "window_size": window, "q_offset": -1 if window[1] >= 0 else 0}
    expected, _ = reference_attention((q, k, v), options, randn(6, 4, 13, 5, seed=55))
    assert_close(program.module()(q, k, v, mask), expected)


EXPORTS = pytest.mark.parametrize(
    ("masked", "strict"), [(False, False), (True, False), (True, True)], ids=["all", "masked", "masked strict"]
)


@EXPORTS
@pytest.mark.parametrize("variant", VARIANTS)
def test_export_with_dynamic_batch_and_lengths(variant: str, masked: bool, strict: bool) -> None:
    batch, tq, tk = (torch.export.Dim(name) for name in ("batch", "tq", "tk"))
    shapes = {
        "q": {0: batch, 2: tq},
        "k": {0: batch, 2: tk},
        "v": {0: batch, 2: tk},
        "bias": {2: tk} if masked else None,
        "mask": {0: batch, 2: tq, 3: tk} if masked else None,
    }
    q, k, v, *extra = _decoder_inputs(3, 7, 11)
    program = torch.export.export(
        _Decoder(variant), (q, k, v, *(extra if masked else (None, None))), dynamic_shapes=shapes, strict=strict
    )
    q, k, v, *extra = _decoder_inputs(6, 13, 12)
    bias, mask = extra if masked else (None, None)
    o = program.module()(q, k, v, bias, mask)
    options = _decoder_options(variant, 13, 12) | {"bias": bias, "mask": mask}
    assert_close(o, reference.sa_attention(*map(to_numpy, (q, k, v)), **arrays(options)))


@EXPORTS
@pytest.mark.parametrize("variant", VARIANTS)
def test_export_of_the_module_with_dynamic_rows(variant: str, masked: bool, strict: bool) -> None:
    """As a model exports it: a parameter before it that requires a gradient, saved and loaded."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
            self.softmax = SASoftmax(variant=variant)

        def forward(self, x: Tensor, where: Tensor | None) -> Tensor:
            return self.softmax(self.weight * x, where)

    rows, length = torch.export.Dim("rows"), torch.export.Dim("length")
    dims = {0: rows, 1: length}
    example = ROWS[:4], KEPT[:4] if masked else None
    program = torch.export.export(Model(), example, dynamic_shapes=(dims, dims if masked else None), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x, where = ROWS[:, :5].contiguous(), KEPT[:, :5].contiguous() if masked else None
    y = torch.export.load(file).module()(x, where)
    assert_close(y, reference.sa_softmax(to_numpy(1.5 * x), **arrays({"variant": variant, "where": where})))


def test_meta_tensors_and_two_devices() -> None:
    x = torch.empty(2, 3, 4, 5, dtype=torch.bfloat16, device="meta")
    for y in (sa_softmax(x), sa_attention(x, x, x, is_causal=True)):
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    with pytest.raises(ValueError, match="x on cpu, where on meta"):
        sa_softmax(torch.ones(3), where=torch.ones(3, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="q on meta, k on meta, v on cpu"):
        sa_attention(x, x, torch.ones(2, 3, 4, 5, dtype=torch.bfloat16))


# The module and the adapter.


def test_module() -> None:
    module = SASoftmax(axis=0, variant="product")
    assert repr(module) == "SASoftmax(axis=0, variant='product')"
    assert not module.state_dict()
    assert torch.equal(module(ROWS, KEPT), sa_softmax(ROWS, axis=0, variant="product", where=KEPT))
    assert torch.equal(SASoftmax()(ROWS), sa_softmax(ROWS))
    assert torch.equal(compiled(nn.Sequential(nn.Identity(), SASoftmax()))(ROWS), sa_softmax(ROWS))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "bool"])
def test_adapter_hands_over_values_and_strides(dtype: str) -> None:
    a = np.arange(24).reshape(2, 3, 4).astype(numpy_dtype(dtype))
    read_only = a.copy()
    read_only.flags.writeable = False
    for array in (a, a.T, a[:, ::2, 1:], np.broadcast_to(a[:, None], (5, 2, 7, 3, 4)), read_only, a[0, 0, 0, ...]):
        tensor = _tensor(array, "cpu")
        assert tensor.stride() == tuple(stride // a.itemsize for stride in array.strides)
        np.testing.assert_array_equal(_array(tensor), array)
        assert _array(tensor).dtype == a.dtype
    np.testing.assert_array_equal(_array(_tensor(a[::-1, :, ::-2], "cpu")), a[::-1, :, ::-2])


def test_adapter_runs_where_it_says() -> None:
    assert Adapter.devices[0] == "cpu"
    with pytest.raises(RuntimeError, match="nowhere"):
        Adapter().sa_softmax(np.ones(3), axis=-1, variant="product", where=None, device="nowhere")
