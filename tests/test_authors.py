"""The spec against the formula of the paper's authors, where the two agree and where they do not (docs/parity.md).

Their training code computes, for causal self-attention with scores x (T, T), in our notation and words: the softmax p
of the causally masked scores; x with its upper triangle set to 0, whose row minimum and maximum give
lo = min(min x, 0) and hi = max(max x + b, 0) + b; and y = p (x - lo + c) / (hi - lo), with the upper triangle set to 0
again. c = 0 and b = 1e-10 by default.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from sa_softmax import reference  # noqa: E402
from sa_softmax.backends.torch import sa_softmax  # noqa: E402

BIAS = 1e-10
T = 9


def authors(x: Tensor, variant: str, b: float = BIAS, c: float = 0.0, hidden: Tensor | None = None) -> Tensor:
    """Causal weights (..., T, T) by the authors' formula; in softmax, ``hidden`` keys, of padding, score -10000."""
    future = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)
    if hidden is not None:
        future = future | hidden
    p = x.masked_fill(future, -10000.0).softmax(-1)
    if variant == "product":
        return (p * x).tril()
    zero = torch.zeros((), dtype=x.dtype)
    low = torch.minimum(x.tril().min(-1, keepdim=True).values, zero)
    high = torch.maximum(x.tril().max(-1, keepdim=True).values + b, zero) + b
    return (p * (x - low + c) / (high - low)).tril()


def ours(x: Tensor, variant: str, keep: Tensor | None = None) -> Tensor:
    causal = torch.ones(x.shape[-2:], dtype=torch.bool).tril()
    return sa_softmax(x, variant=variant, where=causal if keep is None else causal & keep)


def scores(seed: int = 0, shift: float = 0.0) -> Tensor:
    return 2 * torch.randn(3, T, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


@pytest.mark.parametrize("variant", ["product", "normalized"])
@pytest.mark.parametrize("shift", [-7.0, 0.0, 7.0])
def test_causal_weights_agree_up_to_the_biases(variant: str, shift: float) -> None:
    """2 b of hi - lo is all that differs: y moves by 2 b / R of itself."""
    x = scores(shift=shift)
    R = x.tril().amax(-1, keepdim=True).clamp(min=0) - x.tril().amin(-1, keepdim=True).clamp(max=0)
    bound = (3 * BIAS / R if variant == "normalized" else 0) * ours(x, variant).abs() + 1e-14
    difference = (authors(x, variant) - ours(x, variant)).abs()
    assert (difference <= bound).all()
    if variant == "normalized":
        assert difference.max() > 1e-14  # the biases are there
        torch.testing.assert_close(authors(x, variant, b=0.0), ours(x, variant), atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("variant", ["product", "normalized"])
def test_gradients_agree_at_rows_without_ties_and_zeros(variant: str) -> None:
    x = scores(1).requires_grad_()
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (theirs,) = torch.autograd.grad(authors(x, variant, b=0.0), x, g)
    (own,) = torch.autograd.grad(ours(x, variant), x, g)
    torch.testing.assert_close(theirs, own, atol=1e-13, rtol=1e-12)
    x_, g_, causal = x.detach().numpy(), g.numpy(), np.tri(T, dtype=bool)
    expected = reference.sa_softmax_vjp(x_, g_, variant=variant, where=causal)
    np.testing.assert_allclose(theirs.numpy(), expected, atol=1e-13, rtol=1e-12)


def test_a_row_of_zeros_is_0_in_both() -> None:
    x = torch.zeros(1, T, T, dtype=torch.float64)
    assert authors(x, "normalized").abs().max() == 0
    assert ours(x, "normalized").abs().max() == 0


def test_a_row_within_the_bias_differs() -> None:
    """Scores of 1e-10 have a = 1 at the largest in the spec, and 1/3 in the authors' code: their 2 b are part of R."""
    x = torch.full((1, T, T), BIAS, dtype=torch.float64)
    last = torch.full((T,), 1 / T, dtype=torch.float64)
    torch.testing.assert_close(ours(x, "normalized")[0, -1], last)
    torch.testing.assert_close(authors(x, "normalized")[0, -1], last / 3)


def test_padded_keys_set_the_range_there_and_not_here() -> None:
    x = scores(3)
    x[..., 0] = -50.0  # a key of padding
    padding = torch.zeros(T, dtype=torch.bool)
    padding[0] = True
    theirs, own = authors(x, "normalized", hidden=padding), ours(x, "normalized", ~padding)
    alone = ours(x[..., 1:, 1:].contiguous(), "normalized")
    torch.testing.assert_close(own[..., 1:, 1:], alone)
    assert (theirs - own)[..., 1:, 1:].abs().max() > 0.1


def test_the_gradient_of_an_extremum_of_0_is_halved_there() -> None:
    """torch.minimum passes on half of the gradient at equality; the spec, whose clamp is strict, none (G4)."""
    x = torch.tensor([[[0.0, 0.0], [0.0, 3.0]]], dtype=torch.float64).requires_grad_()
    g = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    (theirs,) = torch.autograd.grad(authors(x, "normalized", b=0.0)[:, 1:], x, g[:, 1:])
    (own,) = torch.autograd.grad(ours(x, "normalized"), x, g)
    p = float(torch.tensor([0.0, 3.0], dtype=torch.float64).softmax(-1)[1])
    D, S = p, p
    torch.testing.assert_close(own[0, 1, 0].item(), -p * (1 - p))
    torch.testing.assert_close((theirs - own)[0, 1, 0].item(), 0.5 * (D - S) / 3)


def test_ties_go_to_one_key_there_and_are_shared_here() -> None:
    x = torch.tensor([[[0.5, 0.0, 0.0], [0.5, 0.5, 0.0], [-1.0, -1.0, 2.0]]], dtype=torch.float64).requires_grad_()
    g = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    (theirs,) = torch.autograd.grad(authors(x, "normalized", b=0.0)[0, 2], x, g)
    (own,) = torch.autograd.grad(ours(x, "normalized")[0, 2], x, g)
    shares = (theirs - own)[0, 2, :2]
    assert shares.abs().min() > 1e-3
    torch.testing.assert_close(shares.sum().item(), 0.0, atol=1e-15, rtol=0)  # as much in all
