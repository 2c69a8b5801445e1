"""Tests that need eight JAX devices: ``test_distributed_jax.py`` runs them in a process that has them."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributed_cases import CASES, SLOPES, Case, Problem, distance_bias, example, problem
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import VARIANTS

from sa_softmax import reference
from sa_softmax.backends.jax import (
    AttentionState,
    attention_from_state,
    attention_state,
    distributed,
    merge_states,
)
from sa_softmax.backends.jax.distributed import decode, from_zigzag, ring_attention, to_zigzag

assert "xla_force_host_platform_device_count=8" in os.environ["XLA_FLAGS"]
jax.config.update("jax_enable_x64", True)

DEVICES = {"zigzag": (2, 4, 8), "plain": (1, 8), "masked-shard": (8,), "cross": (2, 4)}  # of other cases, 4
RUNS = [(case, n) for case in CASES for n in DEVICES.get(case.name, (4,))]


def mesh_of(n: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:n]), ("sequence",))


@pytest.mark.parametrize(("case", "n"), RUNS, ids=[f"{case.name}-{n}" for case, n in RUNS])
def test_values_and_gradients(case: Case, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "BLOCK", case.block)
    p = problem(case, n)
    positions = tuple(jnp.asarray(np.concatenate(x)) for x in (p.q_positions, p.k_positions))
    mask = None if p.mask is None else jnp.asarray(p.mask)
    slopes = jnp.asarray(SLOPES, p.q.dtype)

    def loss(q: Any, k: Any, v: Any, bias: Any) -> tuple[Any, Any]:
        given = (lambda i, j: distance_bias(i, j, bias)) if case.bias == "function" else bias
        o = ring_attention(
            q, k, v, mesh=mesh_of(n), axis_name="sequence", bias=given, mask=mask, positions=positions, **p.options
        )
        # As in any program, what is done to an empty row's output stays without effect.
        return (o * p.do).sum(where=~np.isinf(p.do)), o

    bias = slopes if case.bias == "function" else None if p.bias is None else jnp.asarray(p.bias)
    arrays = (*map(jnp.asarray, (p.q, p.k, p.v)), bias)
    (dq, dk, dv, dbias), o = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays)
    p.check(o=o, dq=dq, dk=dk, dv=dv)
    if case.bias == "function":  # the chain rule from the scores to the slopes
        distance = abs(np.concatenate(p.q_positions)[:, None] - np.concatenate(p.k_positions))
        dslopes = -(p.answers["dbias"] * distance).sum((-1, -2), keepdims=True)
        np.testing.assert_allclose(np.asarray(dbias, np.float64), dslopes, rtol=0, atol=_tolerance(dbias, dslopes))
    elif p.bias is not None:
        p.check(dbias=dbias)


def _tolerance(got: Any, expected: Any) -> float:
    return 8 * float(jnp.finfo(got.dtype).eps) * float(abs(expected).max())


def randn(*shape: int, seed: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def test_ties_give_the_extremal_term_to_one_of_the_tied_keys() -> None:
    q = np.ones((1, 2, 1))
    k = np.array([-1.0, 2, -1, 0.5, 2, -1, 1, 2]).reshape(1, 8, 1)
    v, do = randn(1, 8, 3, seed=0, dtype=float), randn(1, 2, 3, seed=1, dtype=float)
    f = lambda k: ring_attention(*map(jnp.asarray, (q, k, v)), mesh=mesh_of(4), axis_name="sequence")  # noqa: E731
    (dk,) = jax.vjp(f, jnp.asarray(k))[1](jnp.asarray(do))
    expected = reference.sa_attention_vjp(q, k, v, do)[1]
    others = [3, 6]
    np.testing.assert_allclose(dk[:, others], expected[:, others], rtol=1e-14)
    for tied in ([0, 2, 5], [1, 4, 7]):
        # What they differ in is a multiple of the term: one key has all of it where the reference shares it by three.
        excess = np.asarray(dk - expected)[0, tied, 0]
        np.testing.assert_allclose(excess.sum(), 0, atol=1e-14)
        np.testing.assert_allclose(np.sort(abs(excess))[:2] * 2, np.sort(abs(excess))[2], rtol=1e-12)


def test_nan_that_participates_reaches_its_queries_and_no_others() -> None:
    q, k, v = (randn(1, 8, 4, seed=i) for i in range(3))
    k[:, 5], v[:, 6, 1] = np.nan, np.inf
    o = ring_attention(*map(jnp.asarray, (q, k, v)), mesh=mesh_of(4), axis_name="sequence", is_causal=True)
    expected = np.zeros((1, 8, 4), bool)
    expected[:, 5:] = True
    np.testing.assert_array_equal(np.isnan(o), expected)


def test_keys_and_scores_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """No collective but the ring's, forward and backward, though batch is sharded too; memory falls with devices."""
    monkeypatch.setattr(distributed, "BLOCK", 64)  # a tile is what does not fall
    q = jax.ShapeDtypeStruct((2, 4, 4096, 16), np.float32)
    k = jax.ShapeDtypeStruct((2, 2, 4096, 16), np.float32)
    temporary = []
    for n in (2, 4, 8):
        mesh = Mesh(np.array(jax.devices()[:n]).reshape(2, n // 2), ("data", "sequence"))
        sharding = NamedSharding(mesh, PartitionSpec("data", None, "sequence", None))

        def step(q: Any, k: Any, v: Any, mesh: Mesh = mesh) -> Any:
            f = lambda *qkv: ring_attention(*qkv, mesh=mesh, axis_name="sequence", is_causal=True)  # noqa: E731
            o, vjp = jax.vjp(f, q, k, v)
            return vjp(o)

        compiled = jax.jit(step, in_shardings=(sharding,) * 3, out_shardings=(sharding,) * 3).lower(q, k, k).compile()
        text = compiled.as_text()
        assert "collective-permute" in text
        for other in ("all-gather", "all-to-all", "reduce-scatter"):
            assert other not in text, other
        # Whether all values are finite is asked over the batch: one truth value.
        assert all("pred[]" in line for line in text.splitlines() if " all-reduce(" in line)
        memory = compiled.memory_analysis()
        temporary.append(memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes)
    assert temporary[1] < 0.6 * temporary[0], temporary
    assert temporary[2] < 0.6 * temporary[1], temporary


def test_batch_and_heads_sharded_over_other_axes_of_the_mesh() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "model", "sequence"))
    place = NamedSharding(mesh, PartitionSpec("data", "model", "sequence", None))
    q, k, v, do = (randn(2, h, 8, 4, seed=h + i) for i, h in enumerate((4, 2, 2, 4)))
    bias = randn(4, 8, 8, seed=9)

    @jax.jit
    def f(*qkvb: jax.Array) -> jax.Array:
        return ring_attention(*qkvb[:3], bias=qkvb[3], mesh=mesh, axis_name="sequence", is_causal=True)

    o, vjp = jax.vjp(f, *(jax.device_put(x, place) for x in (q, k, v)), jnp.asarray(bias))
    assert o.sharding.is_equivalent_to(place, 4)
    wide = [x.astype(float) for x in (q, k, v)]
    options: dict[str, Any] = {"bias": bias.astype(float), "is_causal": True}
    np.testing.assert_allclose(o, reference.sa_attention(*wide, **options), rtol=0, atol=2e-6)
    expected = reference.sa_attention_vjp(*wide, do.astype(float), **options)
    for got, due in zip(vjp(jnp.asarray(do)), expected, strict=True):
        np.testing.assert_allclose(got, due, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "tk"), [(8, 21), (2, 16)])
def test_decode(variant: str, n: int, tk: int) -> None:
    q, k, v = randn(2, 4, 3, 8, seed=0), randn(2, 2, tk, 8, seed=1), randn(2, 2, tk, 6, seed=2)
    filled = np.arange(tk) < np.array([tk - 3, tk // 3]).reshape(2, 1, 1, 1)  # in the second row, some shards are empty
    k[1, :, tk // 3 :] = np.nan
    bias = randn(4, 1, tk, seed=3)
    o = decode(
        *map(jnp.asarray, (q, k, v)), mesh=mesh_of(n), axis_name="sequence", variant=variant, bias=jnp.asarray(bias),
        mask=jnp.asarray(filled),
    )  # fmt: skip
    wide = [x.astype(float) for x in (q, k, v)]
    expected = reference.sa_attention(*wide, bias=bias.astype(float), mask=filled, variant=variant)
    np.testing.assert_allclose(o, expected, rtol=0, atol=32 * np.finfo(np.float32).eps * abs(expected).max())


def test_decode_gathers_no_keys_and_has_no_derivative() -> None:
    q, k = jnp.ones((1, 1, 4)), jnp.ones((1, 64, 4))
    text = jax.jit(lambda q, k: decode(q, k, k, mesh=mesh_of(4), axis_name="sequence")).lower(q, k).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    with pytest.raises(NotImplementedError, match="ring_attention"):
        jax.grad(lambda q: decode(q, k, k, mesh=mesh_of(4), axis_name="sequence").sum())(q)


def test_zigzag_order_is_undone() -> None:
    x = jnp.asarray(randn(2, 13, 3, seed=0))
    np.testing.assert_array_equal(from_zigzag(to_zigzag(x, 4), 4), x)
    np.testing.assert_array_equal(to_zigzag(jnp.arange(8), 2, 0), [0, 1, 6, 7, 2, 3, 4, 5])


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_merge_to_the_attention(variant: str) -> None:
    q, k, v = (
        randn(2, 5, 3, seed=0, dtype=float),
        randn(1, 7, 3, seed=1, dtype=float),
        randn(1, 7, 4, seed=2, dtype=float),
    )
    arrays = [jnp.asarray(x) for x in (q, k, v)]
    states = [
        attention_state(arrays[0], arrays[1][:, a:b], arrays[2][:, a:b], is_causal=True, q_offset=1 - a)
        for a, b in ((0, 3), (3, 3), (3, 7))
    ]
    total = merge_states(merge_states(states[0], states[1]), states[2])
    for x, y in zip(total, merge_states(states[2], merge_states(states[1], states[0])), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-14)
    assert isinstance(total, AttentionState)
    expected = reference.sa_attention(q, k, v, variant=variant, is_causal=True, q_offset=1)
    np.testing.assert_allclose(attention_from_state(total, variant=variant), expected, rtol=0, atol=1e-14)


def test_the_block_of_the_guide() -> None:
    names: dict[str, Any] = {}
    exec(example("JAX"), names)
    q, k, v = (np.asarray(names[name], float) for name in "qkv")
    np.testing.assert_allclose(names["o"], reference.sa_attention(q, k, v, is_causal=True), rtol=0, atol=2e-6)
    np.testing.assert_allclose(names["last"], reference.sa_attention(q[..., -1:, :], k, v), rtol=0, atol=2e-6)


def test_errors() -> None:
    q = jnp.ones((1, 8, 4))
    mesh = mesh_of(2)
    with pytest.raises(ValueError, match="axis_name must be an axis of the mesh, 'sequence'; got 'model'"):
        ring_attention(q, q, q, mesh=mesh, axis_name="model")
    with pytest.raises(ValueError, match="positions must be one for each of the 8 queries"):
        ring_attention(q, q, q, mesh=mesh, axis_name="sequence", positions=jnp.arange(4))
    with pytest.raises(TypeError, match="positions must have an integer dtype"):
        ring_attention(q, q, q, mesh=mesh, axis_name="sequence", positions=jnp.ones(8))
    with pytest.raises(ValueError, match="bias must broadcast"):
        ring_attention(q, q, q, mesh=mesh, axis_name="sequence", bias=jnp.ones((1, 3, 8)))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: ring_attention(q, q, q, mesh=mesh, axis_name="sequence"), (q,), (q,))


def test_problem_of_wrong_values_is_found() -> None:
    p: Problem = problem(CASES[0], 4)
    with pytest.raises(AssertionError, match="o is off"):
        p.check(o=p.answers["o"].astype(np.float32) * 1.0001)
