"""SA attention in the attention layers of Flax (Linen and NNX) and Equinox, with masks of their own making."""

import functools
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", exc_type=ImportError)
pytest.importorskip("flax")
pytest.importorskip("equinox")

import equinox as eqx  # noqa: E402
import flax.linen as nn  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from sa_softmax import reference  # noqa: E402
from sa_softmax.backends.jax.equinox import SAMultiheadAttention  # noqa: E402
from sa_softmax.backends.jax.flax import attention_fn  # noqa: E402

BATCH, LENGTH, WIDTH, HEADS = 2, 5, 8, 2
X = np.random.default_rng(0).standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)
PADDED = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.float32)
SEEN = np.tri(LENGTH, dtype=bool) & (PADDED[:, None, None] > 0) & (PADDED[:, None, :, None] > 0)

Array = np.ndarray[Any, Any]


def attention(q: Array, k: Array, v: Array, mask: Array | None, **options: Any) -> Array:
    """The reference on (..., T, heads, dim)."""
    arrays = (np.asarray(x, np.float64).swapaxes(-3, -2) for x in (q, k, v))
    return reference.sa_attention(*arrays, mask=mask, **options).swapaxes(-3, -2)


def linen_mask() -> Any:
    mask = nn.combine_masks(nn.make_causal_mask(X[..., 0]), nn.make_attention_mask(PADDED > 0, PADDED > 0))
    assert mask.dtype == jnp.float32
    return mask


@pytest.mark.parametrize("variant", ["normalized", "product"])
def test_linen(variant: str) -> None:
    layer = nn.MultiHeadDotProductAttention(HEADS, attention_fn=functools.partial(attention_fn, variant=variant))
    parameters = layer.init(jax.random.key(0), X)
    o = jax.jit(lambda p: layer.apply(p, X, mask=linen_mask()))(parameters)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters["params"])
    q, k, v = (np.einsum("btw,whd->bthd", X, p[name]["kernel"]) + p[name]["bias"] for name in ("query", "key", "value"))
    heads = attention(q, k, v, SEEN, variant=variant)
    np.testing.assert_allclose(o, np.einsum("bthd,hdw->btw", heads, p["out"]["kernel"]) + p["out"]["bias"], atol=1e-5)


def test_linen_decodes_from_its_cache() -> None:
    layer = nn.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn)
    decoder = layer.clone(decode=True)
    variables = decoder.init(jax.random.key(0), X)
    whole = layer.apply({"params": variables["params"]}, X, mask=nn.make_causal_mask(X[..., 0]))
    step = jax.jit(lambda variables, x: decoder.apply(variables, x, mutable=["cache"]))
    for t in range(LENGTH):
        o, changed = step(variables, X[:, t : t + 1])
        variables = variables | changed
        np.testing.assert_allclose(o[:, 0], whole[:, t], rtol=1e-5, atol=1e-5)


def test_nnx() -> None:
    def layer(**options: Any) -> Any:
        return nnx.MultiHeadAttention(
            HEADS,
            in_features=WIDTH,
            qkv_features=WIDTH,
            decode=False,
            attention_fn=attention_fn,
            rngs=nnx.Rngs(0),
            **options,
        )

    one = layer()
    mask = nnx.combine_masks(nnx.make_causal_mask(X[..., 0]), nnx.make_attention_mask(PADDED > 0, PADDED > 0))
    assert mask.dtype == jnp.float32
    heads = attention(*(np.asarray(project(jnp.asarray(X))) for project in (one.query, one.key, one.value)), SEEN)
    np.testing.assert_allclose(one(X, mask=mask), one.out(jnp.asarray(heads, jnp.float32)), rtol=1e-5, atol=1e-5)
    causal = one(X, mask=nnx.make_causal_mask(X[..., 0]))
    np.testing.assert_allclose(one(X, is_causal=True), causal, rtol=1e-5, atol=1e-5)
    half = layer(dtype=jnp.bfloat16)(X, mask=mask)
    assert half.dtype == jnp.bfloat16
    assert nnx.grad(lambda layer: layer(X, mask=mask).sum())(one).query.kernel[...].any()


def test_bias_and_promotion() -> None:
    q = jnp.asarray(X.reshape(BATCH, LENGTH, HEADS, -1))
    bias = np.random.default_rng(1).standard_normal((1, HEADS, LENGTH, LENGTH)).astype(np.float32)
    expected = attention(q, q, q, None, bias=bias.astype(np.float64))
    np.testing.assert_allclose(attention_fn(q, q, q, bias=jnp.asarray(bias)), expected, rtol=1e-5, atol=1e-5)
    o = attention_fn(q.astype(jnp.bfloat16), q, q, bias=jnp.asarray(bias, jnp.bfloat16))
    assert o.dtype == jnp.float32
    assert attention_fn(q, q, q, jnp.asarray(bias), dtype=jnp.float16).dtype == jnp.float16


def test_every_argument_of_both_layers_is_named() -> None:
    ours = inspect.signature(attention_fn).parameters
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours.values())
    for theirs in (nn.dot_product_attention, nnx.dot_product_attention):
        assert set(inspect.signature(theirs).parameters) <= set(ours)


def test_what_needs_weights_is_refused() -> None:
    layer = nn.MultiHeadDotProductAttention(HEADS, dropout_rate=0.1, attention_fn=attention_fn)
    parameters = layer.init(jax.random.key(0), X, deterministic=True)
    assert layer.apply(parameters, X, deterministic=True).shape == X.shape
    with pytest.raises(NotImplementedError, match="no weights that dropout could act on"):
        layer.apply(parameters, X, deterministic=False, rngs={"dropout": jax.random.key(1)})
    with pytest.raises(NotImplementedError, match="sow_weights=False"):
        layer.apply(parameters, X, deterministic=True, sow_weights=True)
    q = jnp.asarray(X.reshape(BATCH, LENGTH, HEADS, -1))
    with pytest.raises(NotImplementedError, match="products of other libraries"):
        attention_fn(q, q, q, qk_attn_weights_einsum=jnp.einsum)


def test_equinox() -> None:
    options = {"use_query_bias": True, "qk_size": 3, "vo_size": 5, "output_size": 7, "key": jax.random.key(0)}
    layer = SAMultiheadAttention(HEADS, WIDTH, variant="product", **options)
    theirs = eqx.nn.MultiheadAttention(HEADS, WIDTH, **options)
    for mine, other in zip(jax.tree.leaves(layer), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert (
        inspect.signature(type(layer).__call__).parameters.keys()
        == inspect.signature(type(theirs).__call__).parameters.keys()
    )
    x = jnp.asarray(X[0])
    q, k, v = (
        np.asarray(jax.vmap(project)(x)).reshape(LENGTH, HEADS, -1)
        for project in (layer.query_proj, layer.key_proj, layer.value_proj)
    )
    mask = np.tri(LENGTH, dtype=bool)
    for given in (None, mask, np.stack([mask, mask.T])):
        heads = attention(q, k, v, given, variant="product").reshape(LENGTH, -1)
        expected = jax.vmap(layer.output_proj)(jnp.asarray(heads, jnp.float32))
        got = eqx.filter_jit(layer)(x, x, x, None if given is None else jnp.asarray(given))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    twice = layer(x, x, x, process_heads=lambda q, k, v: (q, k, 2 * v))
    np.testing.assert_allclose(twice, 2 * layer(x, x, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="process_heads must keep the shapes"):
        layer(x, x, x, process_heads=lambda q, k, v: (q, k, v[..., :1]))
    assert eqx.filter_grad(lambda layer: layer(x, x, x).sum())(layer).query_proj.weight.any()


def test_equinox_refuses_dropout() -> None:
    layer = SAMultiheadAttention(HEADS, WIDTH, dropout_p=0.1, key=jax.random.key(0))
    x = jnp.asarray(X[0])
    with pytest.raises(NotImplementedError, match="no weights that dropout could act on"):
        layer(x, x, x, key=jax.random.key(1))
    np.testing.assert_array_equal(layer(x, x, x, inference=True), eqx.nn.inference_mode(layer)(x, x, x))


def test_the_flax_example_learns_with_both_attentions(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optax")
    path = Path(__file__).parent.parent / "examples" / "flax_char_model.py"
    spec = importlib.util.spec_from_file_location("flax_char_model", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = example.main(["--steps", "12", "--width", "16", "--context", "16"])
    assert set(losses) == {"softmax", "SA, normalized"}
    for first, last in losses.values():
        assert last < first - 0.1
    assert capsys.readouterr().out.count("loss") >= 2


def test_the_guide_runs() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "jax.md").read_text()
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL):
        exec(code, names)
    assert names["o"].shape == (2, 10, 4, 8)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(names["gradients"]))
