"""JAX attention by blocks, in kernels, under jax.nn's signature: values, memory, sharding, what runs where."""

import functools
import itertools
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import randn, variants

jax = pytest.importorskip("jax", exc_type=ImportError)

import jax.numpy as jnp  # noqa: E402
from jax.extend.core import jaxprs_in_params  # noqa: E402

from sa_softmax import conformance, reference  # noqa: E402
from sa_softmax.backends.jax import dot_product_attention, implementation, sa_attention, sa_softmax  # noqa: E402
from sa_softmax.backends.jax.adapter import QUICK_COMPILATION, BlockwiseAdapter, PallasAdapter  # noqa: E402

Array = np.ndarray[Any, Any]

quick_jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILATION)


def value_and_gradients(f: Callable[..., Any], do: Any, *primals: Any) -> Any:
    o, pullback = jax.vjp(f, *primals)
    return o, *pullback(do)


# What runs.


def test_the_choice_can_be_asked_for_and_is_kept() -> None:
    assert implementation(512, 512) == "xla, at once"
    assert implementation(128, 2**20) == "xla, at once"
    assert implementation(513, 512) == "xla, blocks of 128 queries"
    assert implementation(8, 8, "pallas") == "pallas"
    q = jnp.asarray(randn(1, 520, 4))

    def jaxpr(q: Any, choice: str | None) -> str:
        return str(jax.make_jaxpr(lambda q: sa_attention(q, q, q, implementation=choice))(q))

    for choice in (None, "xla"):
        assert "scan[" in jaxpr(q, choice)
        assert "scan[" not in jaxpr(q[:, :512], choice)
        assert "pallas_call" not in jaxpr(q, choice)
    assert "pallas_call" in jaxpr(q, "pallas")
    for call in (
        lambda: implementation(8, 8, "cudnn"),
        lambda: sa_attention(q, q, q, implementation="cudnn"),
        lambda: dot_product_attention(q, q, q, implementation="cudnn"),
    ):
        with pytest.raises(ValueError, match="implementation must be None or one of 'xla', 'pallas'; got 'cudnn'"):
            call()


def test_kernels_refuse_the_derivatives_that_they_do_not_have() -> None:
    q = jnp.asarray(randn(1, 4, 4))
    f = lambda q: sa_attention(q, q, q, implementation="pallas").sum()  # noqa: E731
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(f, (q,), (q,))
    for second in (jax.hessian(f), jax.grad(lambda q: jax.grad(f)(q).sum())):
        with pytest.raises((NotImplementedError, TypeError), match=r"first derivative only|forward-mode"):
            second(q)


# Values: what conformance asks, in part, and at lengths that need several blocks.


def subset(adapter: Any, every: int, *always: str) -> list[Any]:
    """Each group of attention cases, thinned out, and those whose id has one of the words ``always``.

    tests/test_conformance.py runs all of the default.
    """
    wide = ("/float32/", "/float64/")
    cases = [
        case for case in conformance.cases() if case.id.startswith("attention.") and any(d in case.id for d in wide)
    ]
    groups = itertools.groupby(cases, key=lambda case: case.id.split("/")[0])
    return [
        pytest.param(adapter, case, id=f"{adapter.name} {case.id}")
        for _, group in groups
        for number, case in enumerate(group)
        if number % every == 0 or any(word in case.id for word in always)
    ]


@pytest.mark.parametrize(("adapter", "case"), subset(BlockwiseAdapter(), 33) + subset(PallasAdapter(), 49, "nan-value"))
def test_conformance_in_part(adapter: Any, case: Any) -> None:
    case.check(adapter, "cpu")


def test_scores_whose_gradients_float16_does_not_hold() -> None:
    (case,) = [c for c in conformance.cases() if c.id == "attention.scale/saturated/float16/normalized/vjp"]
    case.check(PallasAdapter(), "cpu")


@variants
@pytest.mark.parametrize("choice", ["xla", "pallas"])
def test_lengths_of_several_blocks(choice: str, variant: str) -> None:
    """520 x 510: five blocks of queries (nine in kernels), four of keys, the last of either incomplete."""
    q, k, v, do = (
        randn(1, 2, 520, 8),
        randn(1, 1, 510, 8, seed=1),
        randn(1, 1, 510, 5, seed=2),
        randn(1, 2, 520, 5, seed=3),
    )
    bias, mask = randn(2, 1, 510, seed=4), randn(1, 1, 520, 510, seed=5) > -1
    mask[..., :3, :] = False
    assert implementation(520, 510, choice) in ("xla, blocks of 128 queries", "pallas")
    options = {"is_causal": True, "q_offset": 7, "variant": variant}

    def f(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return sa_attention(q, k, v, bias=bias, mask=jnp.asarray(mask), implementation=choice, **options)

    actual = quick_jit(functools.partial(value_and_gradients, f))(*map(jnp.asarray, (do, q, k, v, bias)))
    wide = [array.astype(np.float64) for array in (q, k, v, do)]
    exact = {"bias": bias.astype(np.float64), "mask": mask} | options
    expected = (reference.sa_attention(*wide[:3], **exact), *reference.sa_attention_vjp(*wide, **exact))
    for got, value in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, value, rtol=0, atol=2e-6 * max(1, abs(value).max()))


@pytest.mark.parametrize("adapter", [BlockwiseAdapter(), PallasAdapter()], ids=lambda adapter: adapter.name)
def test_what_fills_up_the_last_block_takes_no_part(adapter: Any) -> None:
    """A value that is infinite, at a key that the bias excludes from all queries."""
    q, k, v, do, bias = randn(1, 4, 3), randn(1, 5, 3), randn(1, 5, 2), randn(1, 4, 2), randn(1, 4, 5)
    v[:, 2], bias[..., 2] = np.inf, -np.inf
    options = {"variant": "product", "mask": None, "is_causal": False, "q_offset": 0, "scale": None}
    gradients = adapter.sa_attention_vjp(q, k, v, do, bias=bias, device="cpu", **options)
    for got, expected in zip(gradients, reference.sa_attention_vjp(q, k, v, do, bias=bias, **options), strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@variants
def test_tangents_and_second_derivatives_by_blocks(variant: str) -> None:
    """Against the implementation that materialises, which tests/test_jax.py holds against the reference."""
    from sa_softmax.backends.jax._attention import _at_once, by_blocks

    q, k, v, t = (jnp.asarray(randn(1, n, 3, seed=seed)) for seed, n in enumerate((5, 4, 4, 5)))  # spans of 2, 2 and 1

    def all_of(f: Any) -> Any:
        loss = lambda q: (f(q) ** 2).sum()  # noqa: E731
        return jax.jvp(f, (q,), (t,)), jax.jvp(jax.grad(loss), (q,), (t,)), jax.vmap(f)(jnp.stack([q, t]))

    arguments = (k, v, None, None, 0.5, 1, variant)
    blocked = quick_jit(lambda: all_of(lambda q: by_blocks(q, *arguments, 1)))()
    for got, value in zip(
        *map(jax.tree.leaves, (blocked, quick_jit(lambda: all_of(lambda q: _at_once(q, *arguments)))())), strict=True
    ):
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_kernels_under_vmap_in_16_bits(dtype: str) -> None:
    q = randn(2, 1, 20, 4, dtype=dtype)
    f = jax.vmap(lambda q: sa_attention(q, q, q, implementation="pallas", is_causal=True))
    o = f(jnp.asarray(q))
    assert o.dtype == dtype
    exact = reference.sa_attention(*[q.astype(np.float64)] * 3, is_causal=True)
    np.testing.assert_allclose(o.astype(jnp.float32), exact, rtol=0, atol=2.0 ** (-9 if dtype == "float16" else -6))


# Work, memory, platforms, sharding.


def products(jaxpr: Any) -> int:
    """Multiplications in the matrix products of a program, those of a loop as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(map(products, jaxprs_in_params(equation.params)))
    return total


@pytest.mark.parametrize(("q_offset", "part"), [(0, 10 / 16), (512, 15 / 16), (1024, 1), (-512, 3 / 16), (-1024, 0)])
def test_blocks_leave_out_keys_after_the_diagonal(q_offset: int, part: float) -> None:
    """1024 x 1024, in four spans of 256 queries: the work in either mode, as a part of what all keys would cost."""
    x = jax.ShapeDtypeStruct((1, 1024, 4), jnp.float32)

    def work(**options: Any) -> list[int]:
        f = lambda q, k, v: sa_attention(q, k, v, **options).sum()  # noqa: E731
        forward_mode = lambda *qkv: jax.jvp(f, qkv, qkv)  # noqa: E731
        return [products(jax.make_jaxpr(g)(x, x, x)) for g in (f, jax.grad(f, (0, 1, 2)), forward_mode)]

    assert work(is_causal=True, q_offset=q_offset) == [part * n for n in work()]


def test_kernels_leave_out_blocks_beyond_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 x 256, blocks of 64 queries and 128 keys: the last keys are seen by half of the queries, either way round."""
    from sa_softmax.backends.jax import _pallas

    run, scores = [], _pallas._scores

    def noted(static: Any, inputs: Any, q: Any, k: Any, i: Any, j: Any, h: Any, compute: Any) -> Any:
        jax.debug.callback(lambda i, j: run.append((int(i), int(j))), i, j)
        return scores(static, inputs, q, k, i, j, h, compute)

    monkeypatch.setattr(_pallas, "_scores", noted)
    q = jnp.asarray(randn(1, 256, 4))
    for options, seen in (
        ({"is_causal": True}, [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]),
        ({"is_causal": True, "q_offset": -64}, [(1, 0), (2, 0), (3, 0), (3, 1)]),
        ({}, list(itertools.product(range(4), range(2)))),
    ):
        run.clear()
        f = lambda q, k, v: sa_attention(q, k, v, implementation="pallas", **options).sum()  # noqa: E731, B023
        jax.grad(f, (0, 1, 2))(q, q, q)
        jax.effects_barrier()
        # Twice for the output, twice for dq, once for dk and dv.
        assert sorted(run) == sorted(5 * seen)


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    """By XLA's own account of what lives beside arguments and results, forward and backward."""

    def temporaries(length: int) -> int:
        q = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)
        f = lambda do, *qkv: value_and_gradients(functools.partial(sa_attention, is_causal=True), do, *qkv)  # noqa: E731
        return jax.jit(f).lower(q, q, q, q).compile().memory_analysis().temp_size_in_bytes

    at_2k, at_8k = temporaries(2048), temporaries(8192)
    assert 2 < at_8k / at_2k < 4.4
    assert at_8k < 8192 * 8192 * 4 * 2 / 4  # a quarter of one array of all scores


@pytest.mark.parametrize("shape", [(), (150,), (1, 150), (130, 1), (2, 1, 150), (2, 1, 1, 1), (130, 150)])
def test_gradient_of_a_bias_in_kernels(shape: tuple[int, ...]) -> None:
    """Its values, and that no array of all scores is written where queries or keys share an entry."""
    q, k, v, do = (randn(2, 2, n, 4, seed=seed) for seed, n in enumerate((130, 150, 150, 130)))
    bias = randn(*shape, seed=4)

    def gradient(bias: Any) -> Any:
        f = lambda bias: sa_attention(*map(jnp.asarray, (q, k, v)), bias=bias, implementation="pallas")  # noqa: E731
        return jax.vjp(f, bias)[1](jnp.asarray(do))[0]

    wide = [x.astype(np.float64) for x in (q, k, v, do)]
    expected = reference.sa_attention_vjp(*wide, bias=bias.astype(np.float64))[3]
    got = quick_jit(gradient)(jnp.asarray(bias))
    np.testing.assert_allclose(got, expected, rtol=0, atol=4e-6 * max(1, abs(expected).max()))
    largest = max(written_by_kernels(jax.make_jaxpr(gradient)(jnp.asarray(bias)).jaxpr))
    assert (largest >= q[..., 0].size * 150) == (shape == (130, 150))


def written_by_kernels(jaxpr: Any) -> list[int]:
    """The sizes of all arrays that Pallas kernels write."""
    sizes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            sizes += [variable.aval.size for variable in equation.outvars]
        else:
            sizes += [size for inner in jaxprs_in_params(equation.params) for size in written_by_kernels(inner)]
    return sizes


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize("bias_shape", [(4, 200, 200), (1, 200), (200, 1)])
def test_kernels_lower_without_a_device(platform: str, bias_shape: tuple[int, ...]) -> None:
    """Through Triton and Mosaic, by jax.export. Lowering is all that this shows: no device has run them."""
    q, k = (jax.ShapeDtypeStruct((2, heads, 200, 64), jnp.bfloat16) for heads in (4, 2))
    bias, mask = jax.ShapeDtypeStruct(bias_shape, jnp.float32), jax.ShapeDtypeStruct((2, 1, 1, 200), bool)

    def gradients(q: Any, k: Any, v: Any, bias: Any, mask: Any) -> Any:
        f = lambda q, k, v, bias: sa_attention(  # noqa: E731
            q, k, v, bias=bias, mask=mask, is_causal=True, implementation="pallas"
        )
        return value_and_gradients(f, jnp.ones(q.shape, q.dtype), q, k, v, bias)

    checks = [
        jax.export.DisabledSafetyCheck.custom_call(name) for name in ("__gpu$xla.gpu.triton", "triton_kernel_call")
    ]
    exported = jax.export.export(jax.jit(gradients), platforms=[platform], disabled_checks=checks)(q, k, k, bias, mask)
    target = "tpu_custom_call" if platform == "tpu" else "triton"
    assert exported.mlir_module().count("custom_call") >= 3
    assert target in exported.mlir_module()


def test_sharded_batch_and_heads_are_not_gathered() -> None:
    """Eight devices, which XLA makes of one host; in a process of its own, since that is decided when JAX starts."""
    code = """
        import functools, re
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from sa_softmax import reference
        from sa_softmax.backends.jax import implementation, sa_attention, sa_softmax

        assert len(jax.devices()) == 8
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        rng = np.random.default_rng(0)

        def compiled(f, spec, *shapes):
            sharding = NamedSharding(mesh, spec)
            arrays = [jax.device_put(rng.standard_normal(s).astype(np.float32), sharding) for s in shapes]
            program = jax.jit(f).lower(*arrays).compile()
            moved = re.findall(r"all-gather|all-to-all|collective-permute|all-reduce", program.as_text())
            return program(*arrays), arrays, moved

        def both(f, g, *x):
            y, pullback = jax.vjp(f, *x)
            return y, *pullback(g)

        for variant in ("normalized", "product"):
            row = functools.partial(sa_softmax, variant=variant)
            (y, dx), (g, x), moved = compiled(functools.partial(both, row), P("data", "model"), *[(4, 2, 6, 16)] * 2)
            assert not moved, moved
            np.testing.assert_allclose(y, reference.sa_softmax(np.asarray(x), variant=variant), rtol=1e-5, atol=1e-6)
            for results in (y, dx):
                assert results.sharding.spec[:2] == ("data", "model")

        for length in (16, 600):
            shape = (4, 2, length, 4)
            attention = functools.partial(sa_attention, is_causal=True)
            f = functools.partial(both, attention)
            results, (do, q, k, v), moved = compiled(f, P("data", "model"), *[shape] * 4)
            assert not moved, (implementation(length, length), moved)
            exact = reference.sa_attention(*map(np.asarray, (q, k, v)), is_causal=True)
            np.testing.assert_allclose(results[0], exact, rtol=1e-4, atol=1e-5)

        # The check can fail: rows in pieces need their extrema from everywhere.
        assert compiled(sa_softmax, P(None, None, None, ("data", "model")), (4, 2, 6, 16))[2]
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


# jax.nn's signature.


def test_dot_product_attention_is_attention_in_btnh() -> None:
    q, k, v = randn(2, 5, 4, 3), randn(2, 6, 2, 3, seed=1), randn(2, 6, 2, 3, seed=2)
    bias, mask = randn(1, 4, 5, 6, seed=3), randn(2, 1, 5, 6, seed=4) > -1
    lengths, key_lengths = np.array([5, 2], np.int32), np.array([4, 6], np.int32)
    rows, columns = np.arange(5)[:, None], np.arange(6)[None]
    seen = {
        "query_seq_lengths": rows < lengths[:, None, None, None],
        "key_value_seq_lengths": columns < key_lengths[:, None, None, None],
        "local_window_size": (columns >= rows - 2) & (columns <= rows + 1),
    }
    given = {"query_seq_lengths": lengths, "key_value_seq_lengths": key_lengths, "local_window_size": (2, 1)}
    for names in ((), ("query_seq_lengths",), ("key_value_seq_lengths", "local_window_size"), tuple(seen)):
        together = functools.reduce(np.logical_and, [seen[name] for name in names], mask)
        options = {name: given[name] if isinstance(given[name], tuple) else jnp.asarray(given[name]) for name in names}
        for is_causal in (False, True):
            got = dot_product_attention(
                *map(jnp.asarray, (q, k, v, bias, mask)), is_causal=is_causal, scale=0.7, variant="product", **options
            )
            expected = reference.sa_attention(
                *(x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v)),
                bias=bias.astype(np.float64), mask=together, is_causal=is_causal, scale=0.7, variant="product",
            )  # fmt: skip
            np.testing.assert_allclose(got, expected.swapaxes(1, 2), rtol=1e-5, atol=1e-5)
    # One number is a symmetric window; a batch axis may be missing, with lengths and a 4-d mask as JAX has them.
    one = dot_product_attention(*map(jnp.asarray, (q, k, v)), local_window_size=1)
    np.testing.assert_array_equal(one, dot_product_attention(*map(jnp.asarray, (q, k, v)), local_window_size=(1, 1)))
    options = {"mask": jnp.asarray(mask[:1]), "key_value_seq_lengths": jnp.asarray(key_lengths[:1])}
    without = dot_product_attention(*(jnp.asarray(x[0]) for x in (q, k, v)), **options)
    whole = dot_product_attention(*(jnp.asarray(x[:1]) for x in (q, k, v)), **options)
    np.testing.assert_allclose(without, whole[0], rtol=1e-6, atol=1e-6)


def test_dot_product_attention_takes_what_jax_takes() -> None:
    """The same calls, the same shapes; every parameter of jax.nn's signature that names an input is here."""
    import inspect

    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(dot_product_attention).parameters
    assert set(theirs) - set(ours) == {"return_residual"}  # there is no logsumexp to return
    for name in set(theirs) & set(ours):
        assert (ours[name].kind, ours[name].default) == (theirs[name].kind, theirs[name].default)
    q, k = jnp.asarray(randn(2, 5, 4, 3)), jnp.asarray(randn(2, 6, 2, 3))
    for f in (jax.nn.dot_product_attention, dot_product_attention):
        assert f(q, k, k, is_causal=True, local_window_size=2).shape == (2, 5, 4, 3)


def test_dot_product_attention_refuses() -> None:
    x = jnp.ones((2, 3, 4, 5))
    for error, match, call in (
        (ValueError, r"all be \(B, T, N, H\)", lambda: dot_product_attention(x, x[0], x[0])),
        (ValueError, "multiple of the number of key", lambda: dot_product_attention(x[:, :, :3], *[x[:, :, :2]] * 2)),
        (ValueError, "same last axis D", lambda: dot_product_attention(x, x[..., :3], x)),
        (ValueError, "bias must broadcast", lambda: dot_product_attention(x, x, x, bias=x)),
        (TypeError, "mask must be boolean", lambda: dot_product_attention(x, x, x, mask=x)),
        (TypeError, "key_value_seq_lengths must have an integer dtype",
         lambda: dot_product_attention(x, x, x, key_value_seq_lengths=jnp.ones(2))),
        (ValueError, r"shape \(2,\); got \(3,\)",
         lambda: dot_product_attention(x, x, x, query_seq_lengths=jnp.ones(3, jnp.int32))),
        (ValueError, "local_window_size must be", lambda: dot_product_attention(x, x, x, local_window_size=(1, -1))),
        (ValueError, "variant must be", lambda: dot_product_attention(x, x, x, variant="softmax")),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()


# Passes over the rows.


def test_the_row_operation_is_compiled_to_few_passes() -> None:
    """These bounds are the counts of docs/jax.md."""
    from jax_passes import both, passes

    x = jnp.ones((256, 128))
    assert passes(sa_softmax, x) <= (6, 3, 0)
    forward_backward = passes(both(sa_softmax), x, x)
    assert forward_backward.passes <= 15
    assert forward_backward.writes <= 8
    assert forward_backward.temporaries <= 2.5
    # The counter can fail: a product with its transpose needs a pass of its own.
    assert passes(lambda x: sa_softmax(x + x[::-1]).cumsum(0), x).passes > 6
