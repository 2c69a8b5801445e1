"""Triton's interpreter runs the attention kernels on the CPU. ``test_triton_attention.py`` starts this file in a
process of its own, because Triton decides when it is imported whether it interprets.

Tiles are 16 x 16 here, so that short sequences have several, with tails. The oracle is the NumPy reference in float64.
"""

import math
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
import torch
from support import VARIANTS
from torch import Tensor

from sa_softmax import reference
from sa_softmax.backends.torch import (
    _kernels,
    _state,
    _varlen,
    attention_from_state,
    attention_state,
    implementation,
    merge_states,
    sa_attention,
    varlen_sa_attention,
)
from sa_softmax.backends.torch._triton import attention_launch, interpreted
from sa_softmax.conformance import execute

interpreted.install()

# Of what Triton's interpreter does with NumPy, and of PyTorch's own doings in forward mode.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]
variants = pytest.mark.parametrize("variant", VARIANTS)
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_launch, "tiles", lambda kernel, dtype, d: attention_launch.Tiles(16, 16, 4, 1))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor | None) -> Any:
    return None if x is None else x.detach().double().numpy()


def close(got: Tensor, right: Any, roundings: float = 64) -> None:
    """To ``roundings`` of the dtype, in units of the largest value; NaN where the reference has it."""
    np.testing.assert_array_equal(got.isnan().numpy(), np.isnan(right))
    size = max(1.0, np.abs(right[np.isfinite(right)]).max(initial=0))
    atol = roundings * ROUNDOFF[got.dtype] * size
    np.testing.assert_allclose(exact(got), right, rtol=0, atol=atol, equal_nan=True)


def check(
    variant: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None,
    offset: int | None = None, left: int = -1, roundings: float = 64,
) -> None:  # fmt: skip
    """Both directions of the kernels against the reference."""
    do = randn(*q.shape[:-1], v.shape[-1], seed=99, dtype=q.dtype)
    scale = 1 / math.sqrt(q.shape[-1])
    o, stats = attention_launch.attention(q, k, v, bias, mask, offset, left, scale, variant)
    gradients = attention_launch.attention_vjp(q, k, v, bias, mask, o, stats, do, offset, left, scale, variant)
    i, j = np.arange(q.shape[-2])[:, None], np.arange(k.shape[-2])
    seen = np.ones((q.shape[-2], k.shape[-2]), bool) if mask is None else mask.numpy()
    if offset is not None:
        seen = seen & (j <= i + offset)
    if left >= 0:
        seen = seen & (j >= i + (offset or 0) - left)
    options: dict[str, Any] = {"variant": variant, "bias": exact(bias), "mask": seen}
    tensors = exact(q), exact(k), exact(v)
    close(o, reference.sa_attention(*tensors, **options), roundings)
    right = reference.sa_attention_vjp(*tensors, exact(do), **options)
    for x, y, like in zip(gradients, right, (q, k, v, bias), strict=True):
        if like is not None:
            assert x.dtype == like.dtype
            close(x, y, 4 * roundings)


def qkv(
    Hq: int, Hkv: int, Tq: int, Tk: int, D: int, Dv: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (Hq, Tq, D), (Hkv, Tk, D), (Hkv, Tk, Dv)
    q, k, v = (randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    return q, k, v


@variants
@pytest.mark.parametrize(
    ("offset", "left"), [(None, -1), (0, -1), (17, -1), (-20, -1), (-(2**40), -1), (5, 11), (None, 9), (2**40, 0)]
)
def test_lengths_causality_and_windows(variant: str, offset: int | None, left: int) -> None:
    check(variant, *qkv(1, 1, 35, 50, 16, 16), offset=offset, left=left)


@variants
@pytest.mark.parametrize(("D", "Dv"), [(3, 20), (40, 16)])
def test_grouped_heads_and_dimensions_that_are_no_power_of_two(variant: str, D: int, Dv: int) -> None:
    check(variant, *qkv(4, 2, 17, 20, D, Dv), offset=3)


@variants
def test_half_precision(variant: str) -> None:
    check(variant, *qkv(2, 1, 20, 35, 32, 32, torch.float16), bias=randn(20, 35, seed=5), roundings=8)


@variants
@pytest.mark.parametrize("size", [1e-3, 3000.0])
def test_half_precision_of_scores_far_from_one(variant: str, size: float) -> None:
    """The weights of ``product`` would overflow float16, were they not divided."""
    q, k, v = qkv(1, 1, 16, 35, 16, 16, torch.float16)
    bias = size * randn(16, 35, seed=5) + 40 * size
    o, _ = attention_launch.attention(q, k, v * 1e-2, bias, None, None, -1, 0.25, variant)
    close(o, reference.sa_attention(exact(q), exact(k), exact(v * 1e-2), bias=exact(bias), variant=variant), 8)


@variants
@pytest.mark.parametrize("size", [2.0**-10, 2.0**10])
def test_half_precision_of_gradients_that_it_cannot_hold(variant: str, size: float) -> None:
    """dX is some size**2, subnormal or infinite in float16, but o, dq, dk and dv are not."""

    def results(size: float) -> tuple[Tensor, ...]:
        tensors = (*qkv(2, 1, 20, 35, 16, 16), randn(2, 20, 16, seed=9))
        q, k, v, do = ((size * (64 * x).round() / 64).half() for x in tensors)  # exact in float16
        scale = 0.25 / size**2
        o, stats = attention_launch.attention(q, k, v, None, None, None, -1, scale, variant)
        return o, *attention_launch.attention_vjp(q, k, v, None, None, o, stats, do, None, -1, scale, variant)[:3]

    for x, y in zip(results(size), results(1.0), strict=True):
        torch.testing.assert_close(x.float() / size, y.float(), rtol=2**-10, atol=2**-14)


@variants
def test_weights_that_half_precision_cannot_hold(variant: str) -> None:
    """One key has nearly all of the weight, but its value is 0: o and dv are what the others have of it."""
    q, k, v = qkv(1, 1, 16, 35, 16, 16, torch.float16)
    bias = torch.zeros(16, 35)
    bias[:, 3] = 16.0
    v *= 1000
    v[:, 3] = 0
    do = 1000 * randn(1, 16, 16, seed=9, dtype=torch.float16)
    o, stats = attention_launch.attention(q, k, v, bias, None, None, -1, 0.25, variant)
    dv = attention_launch.attention_vjp(q, k, v, bias, None, o, stats, do, None, -1, 0.25, variant)[2]
    options: dict[str, Any] = {"bias": exact(bias), "variant": variant}
    right = reference.sa_attention(exact(q), exact(k), exact(v), **options)
    np.testing.assert_allclose(exact(o), right, rtol=0, atol=2**-9 * np.abs(right).max())
    right = reference.sa_attention_vjp(exact(q), exact(k), exact(v), exact(do), **options)[2][:, 4:]
    np.testing.assert_allclose(exact(dv)[:, 4:], right, rtol=0, atol=2**-9 * np.abs(right).max())


@variants
@pytest.mark.parametrize("shape", [(2, 1, 2, 18, 20), (2, 1, 1, 1, 20), (2, 18, 1), (1,)], ids=str)
def test_bias_of_every_broadcast_and_its_gradient(variant: str, shape: tuple[int, ...]) -> None:
    q, k, v = (
        x.expand(2, 1, *x.shape) * torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1, 1) for x in qkv(2, 1, 18, 20, 4, 4)
    )
    check(variant, q, k, v, bias=randn(*shape, seed=7))


@variants
@pytest.mark.parametrize("shape", [(2, 18, 20), (18, 1), (20,)], ids=str)
def test_masks_of_every_broadcast(variant: str, shape: tuple[int, ...]) -> None:
    mask = randn(*shape, seed=11) > -0.5
    check(variant, *qkv(2, 1, 18, 20, 4, 4), mask=mask, offset=2)


@variants
@pytest.mark.parametrize("shift", [-6.0, 6.0])
def test_rows_of_one_sign(variant: str, shift: float) -> None:
    check(variant, *qkv(1, 1, 18, 20, 4, 4), bias=randn(18, 20, seed=3) + shift)


@variants
def test_excluded_values_leave_no_trace_and_participating_ones_do(variant: str) -> None:
    q, k, v = qkv(2, 1, 18, 36, 4, 4)
    mask = torch.ones(18, 36, dtype=torch.bool)
    mask[:, 20] = mask[3] = False  # a key that nobody sees, a query that sees none
    mask[:9, 21] = False
    k[:, 20], v[:, 20], q[:, 3] = math.nan, math.inf, math.nan
    v[:, 21, 2] = math.nan  # seen by half of the queries
    check(variant, q, k, v, mask=mask)
    q[0, 5] = math.nan
    check(variant, q, k, v, mask=mask, bias=torch.where(randn(18, 36, seed=8) > 1, -math.inf, 0.0))


@variants
def test_upstream_gradients_of_queries_without_keys(variant: str) -> None:
    q, k, v = qkv(1, 1, 18, 20, 4, 4)
    o, stats = attention_launch.attention(q, k, v, None, None, -2, -1, 0.5, variant)
    assert not o[:, :2].any()
    do = randn(1, 18, 4, seed=2)
    do[:, :2] = math.nan
    options: dict[str, Any] = {"variant": variant, "is_causal": True, "q_offset": -2}
    right = reference.sa_attention_vjp(exact(q), exact(k), exact(v), exact(do), **options)
    got = attention_launch.attention_vjp(q, k, v, None, None, o, stats, do, -2, -1, 0.5, variant)
    for x, y in zip(got[:3], right[:3], strict=True):
        assert x is not None
        close(x, y)


def test_zeros_and_lengths_of_zero() -> None:
    q, k, v = qkv(1, 1, 3, 5, 4, 4)
    bias = torch.zeros(3, 5)
    o, stats = attention_launch.attention(q * 0, k, v, bias, None, None, -1, 0.5, "normalized")
    assert not o.any()
    for x in attention_launch.attention_vjp(q * 0, k, v, bias, None, o, stats, o + 1, None, -1, 0.5, "normalized"):
        assert x is not None
        assert not x.any()
    for Tq, Tk in ((0, 5), (3, 0)):
        check("normalized", *qkv(1, 1, Tq, Tk, 4, 4))


@variants
def test_any_strides(variant: str) -> None:
    """(batch, length, heads, dimension) in memory, and dimensions that do not lie together."""
    q, k, v = (randn(1, n, h, 8, seed=n).transpose(1, 2) for n, h in ((18, 2), (20, 1), (21, 1)))
    check(variant, q, k, v[:, :, 1:], bias=randn(20, 18, seed=1).T, mask=(randn(20, 18, seed=2) > -1).T)
    check(variant, randn(2, 8, 18, seed=3).mT, k[0], v[0, :, 1:])


@variants
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (5, 2)])
def test_packed_sequences(variant: str, window: tuple[int, int]) -> None:
    """One longer than its keys, one without any, one shorter, and tokens that no sequence has."""
    leaves = [randn(n, h, d, seed=n + d).requires_grad_() for n, h, d in ((50, 2, 8), (60, 1, 8), (60, 1, 12))]
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 20, 22, 45], [0, 17, 17, 57]))
    do = randn(50, 2, 12, seed=1)
    o = varlen_sa_attention(*leaves, cu_q, cu_k, 23, 40, variant=variant, window_size=window)
    got = torch.autograd.grad(o, leaves, do)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    right = _varlen.compose(*doubles, cu_q, cu_k, 23, 40, *window, 8**-0.5, variant)
    close(o.detach(), exact(right))
    for x, y in zip(got, torch.autograd.grad(right, doubles, do.double()), strict=True):
        close(x, exact(y), 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_states_from_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_launch, "_pieces", lambda Tk, rows: 3)
    q, k, v = (x.unsqueeze(0) for x in qkv(4, 2, 3, 100, 24, 20, dtype))
    bias, mask = randn(4, 1, 100, seed=4) - 5, randn(1, 1, 3, 100, seed=5) > -1
    mask[0, 0, 1] = False
    mask[..., 5] = torch.tensor([False, False, True])
    v[:, 0, 5] = math.nan
    got = attention_state(q, k, v, bias=bias, mask=mask, is_causal=True, q_offset=60)
    right = _state.compose(q.double(), k.double(), v.double(), bias.double(), mask, 60, 24**-0.5)
    for x, y in zip(got, right, strict=True):
        np.testing.assert_allclose(exact(x), exact(y), rtol=0, atol=20 * ROUNDOFF[dtype] * 32, equal_nan=True)
    parts = [
        attention_state(
            q, k[:, :, a:b], v[:, :, a:b], bias=bias[..., a:b], mask=mask[..., a:b], is_causal=True, q_offset=60 - a
        )
        for a, b in ((0, 40), (40, 100))
    ]
    for variant in VARIANTS:
        whole, merged = (attention_from_state(s, variant=variant) for s in (got, merge_states(*parts)))
        torch.testing.assert_close(whole, merged, rtol=0, atol=64 * ROUNDOFF[dtype] * 8, equal_nan=True)


@variants
def test_decoding_takes_the_pieces(variant: str) -> None:
    q, k, v = qkv(2, 1, 1, 1100, 4, 4)
    assert attention_launch._pieces(1100, 2) == 3
    check(variant, q, k, v, offset=1050)


@variants
def test_derivatives_of_every_kind_through_the_operators(variant: str) -> None:
    assert implementation("cpu") == interpreted.NAME
    assert _kernels.supports("attention_vjp", torch.ones(1), torch.ones(1))
    assert not _kernels.supports("attention", torch.ones(257))
    assert not _kernels.supports("attention", torch.ones(1, dtype=torch.float64))
    q, k, v = qkv(2, 1, 5, 7, 3, 3)
    bias = randn(5, 7, seed=3)

    def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return sa_attention(q, k, v, bias=bias, variant=variant, is_causal=True, window_size=(2, 0)).pow(2).sum()

    def second(*inputs: Tensor) -> Tensor:
        return torch.stack([x.pow(2).sum() for x in torch.func.grad(loss, argnums=(0, 1, 2, 3))(*inputs)]).sum()

    fused, composed = (q, k, v, bias), tuple(x.double() for x in (q, k, v, bias))  # float64 has no kernel
    for f in (loss, second):
        gradients = zip(*(torch.func.grad(f, argnums=(0, 1, 2, 3))(*x) for x in (fused, composed)), strict=True)
        for x, y in gradients:
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
    batched = [torch.stack([x, -x]) for x in (q, k, v)]
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 3)), in_dims=(0, 0, 0, None))
    for x, y in zip(*(per_sample(*[b.to(d.dtype) for b in batched], d) for d in (bias, bias.double())), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
    tangents = [torch.func.jvp(lambda q, x=x: loss(q, *x[1:]), x[:1], x[:1])[1] for x in (fused, composed)]  # type: ignore[misc]
    torch.testing.assert_close(tangents[0].double(), tangents[1], rtol=1e-4, atol=1e-4)


CASES = (
    "attention.sign/*/float32*",
    "attention.ties/*/float32*",
    "attention.scale/*/float32*",
    "attention.scale/saturated/float16*",
)


def test_conformance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of the suite, with the tiles of a GPU; docs/triton-attention.md says how to run all of it."""
    monkeypatch.undo()

    def chosen(cases: list[Any]) -> list[Any]:
        return [case for case in cases if any(fnmatchcase(case.id, pattern) for pattern in CASES)]

    results = list(execute(interpreted.AttentionAdapter(), progress=chosen))
    failed = [f"{result.id}: {result.message}" for result in results if result.status != "passed"]
    assert not failed, "\n".join(failed[:20])
    assert len(results) > 10
