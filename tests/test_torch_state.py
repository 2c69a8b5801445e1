"""Partial states of attention in PyTorch: any split gives the attention, and its gradient (spec clause A11)."""

# ruff: noqa: E402
import itertools
from functools import reduce
from typing import Any

import numpy as np
import pytest
from support import VARIANTS

torch = pytest.importorskip("torch")

from torch import Tensor

from sa_softmax import reference
from sa_softmax.backends.torch import AttentionState, attention_from_state, attention_state, merge_states

variants = pytest.mark.parametrize("variant", VARIANTS)
CUTS = ([0, 7], [0, 0, 3, 7], [0, 1, 2, 7, 7])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(size: float = 1.0) -> tuple[list[Tensor], Tensor]:
    """q, k, v, bias and a mask: two heads of one, five queries, of which the second sees no key, and seven keys."""
    q, k, v = (randn(2, h, n, 3, seed=i) for i, (h, n) in enumerate(((2, 5), (1, 7), (1, 7))))
    bias = size * randn(2, 1, 5, 7, seed=4)
    mask = randn(2, 2, 5, 7, seed=5) > -1
    mask[:, :, 1] = False
    mask[..., 6] = False
    return [q, k, v, bias], mask


def split(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, cuts: list[int]) -> list[AttentionState]:
    """The offset of a part is the whole one, here 1, less the part's start."""
    return [
        attention_state(
            q, k[..., a:b, :], v[..., a:b, :],
            bias=bias[..., a:b], mask=mask[..., a:b], is_causal=True, q_offset=1 - a,
        )
        for a, b in itertools.pairwise(cuts)
    ]  # fmt: skip


def whole(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, cuts: list[int], variant: str) -> Tensor:
    return attention_from_state(reduce(merge_states, split(q, k, v, bias, mask, cuts)), variant=variant)


@variants
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("size", [1.0, 800.0])
def test_any_split_gives_the_attention_and_its_gradient(variant: str, cuts: list[int], size: float) -> None:
    tensors, mask = problem(size)
    do = randn(2, 2, 5, 3, seed=9)
    options: dict[str, Any] = {"variant": variant, "mask": mask.numpy(), "is_causal": True, "q_offset": 1}
    *qkv, bias = (x.numpy() for x in tensors)
    o = reference.sa_attention(*qkv, bias=bias, **options)
    expected = reference.sa_attention_vjp(*qkv, do.numpy(), bias=bias, **options)
    leaves = [x.requires_grad_() for x in tensors]
    got = whole(*leaves, mask, cuts, variant)
    # A relative error of the scores is an absolute one of the exponents, and product weighs it with the score.
    atol = 32 * 2.0**-53 * (1 + size) ** 2
    np.testing.assert_allclose(got.detach().numpy(), o, rtol=0, atol=atol)
    for gradient, exact in zip(torch.autograd.grad(got, leaves, do), expected, strict=True):
        np.testing.assert_allclose(gradient.numpy(), exact, rtol=0, atol=8 * atol)


@variants
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_derivatives_of_both_modes_and_orders(variant: str) -> None:
    tensors, mask = problem()
    leaves = [x[:1, :, :3].clone().requires_grad_() if i in (0, 3) else x[:1].clone() for i, x in enumerate(tensors)]

    def f(q: Tensor, bias: Tensor) -> Tensor:
        return whole(q, leaves[1], leaves[2], bias, mask[:1, :, :3], [0, 3, 7], variant)

    assert torch.autograd.gradcheck(f, (leaves[0], leaves[3]), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (leaves[0], leaves[3]))


@variants
def test_excluded_keys_leave_no_trace_and_nan_stays_in_its_row(variant: str) -> None:
    (q, k, v, bias), mask = problem()
    clean = whole(q, k, v, bias, mask, [0, 3, 7], variant)
    k[..., 6, :], v[..., 6, :] = torch.nan, torch.inf
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    got = whole(*leaves, mask, [0, 3, 7], variant)
    assert torch.equal(got, clean)
    assert (got[:, :, 1] == 0).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(got.sum(), leaves))
    with torch.no_grad():
        q[0, 0, 2] = torch.nan
    assert torch.equal(
        whole(q, k, v, bias, mask, [0, 3, 7], variant).isnan().all(-1).nonzero(), torch.tensor([[0, 0, 2]])
    )


def test_the_empty_set_is_the_identity() -> None:
    (q, k, v, bias), mask = problem()
    empty, a = split(q, k, v, bias, mask, [0, 0, 7])
    assert (empty.m == -torch.inf).all()
    assert (empty.lo == torch.inf).all()
    assert not any(x.any() for x in (empty.l, empty.o0, empty.o1))
    for merged in (merge_states(a, empty), merge_states(empty, a)):
        assert all(map(torch.equal, merged, a))


def test_states_have_the_compute_dtype() -> None:
    (q, k, v, _), _ = problem()
    assert {x.dtype for x in attention_state(q.half(), k.half(), v.half())} == {torch.float32}


def test_errors() -> None:
    (q, k, v, _), _ = problem()
    state = attention_state(q, k, v)
    with pytest.raises(ValueError, match="variant must be one of"):
        attention_from_state(state, variant="softmax")
    with pytest.raises(ValueError, match="q_offset shifts the causal mask"):
        attention_state(q, k, v, q_offset=1)
