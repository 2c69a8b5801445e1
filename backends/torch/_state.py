"""Partial states of attention on PyTorch tensors (spec clause A11), composed so that PyTorch's derivatives are right.

Their gradient, extremal terms included, is what PyTorch derives: ``m`` and ``lo`` come from amax and amin, which share
ties as G3 asks, and the clamps at zero select (G4). Between two states whose extrema are equal, each gets half (A8).
Where a device has a kernel for the state, its gradient is that of the composition, computed again.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from sa_softmax._validate import check_variant
from sa_softmax.backends.torch import _attention, _kernels, _row

__all__ = ["AttentionState", "attention_from_state", "attention_state", "compose", "merge_states"]


class AttentionState(NamedTuple):
    """What attention over a set of keys must remember so that disjoint sets can be merged (spec clause A11).

    m: (..., Hq, Tq, 1) maximum score; l: sum exp(x - m); lo: minimum score;
    o0: (..., Hq, Tq, Dv) sum exp(x - m) v; o1: sum exp(x - m) (x - m) v. All in the compute dtype.
    An empty set of keys has the state (-inf, 0, +inf, 0, 0), the identity of the merge.
    """

    m: Tensor
    l: Tensor  # noqa: E741 - the literature's name
    lo: Tensor
    o0: Tensor
    o1: Tensor


def attention_state(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, offset: int | None, scale: float
) -> AttentionState:
    """``offset`` is that of the causal mask, None without one."""
    return AttentionState(*_row.apply(_State, compose, q, k, v, bias, mask, offset, scale))


class _State(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, offset: int | None, scale: float
    ) -> tuple[Tensor, ...]:
        if _kernels.supports("attention_state", q, v):
            return torch.ops.sa_softmax.attention_state(q, k, v, bias, mask, offset, scale)
        return tuple(compose(q, k, v, bias, mask, offset, scale))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.offset, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, mask = ctx.saved_tensors

        def state(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
            return tuple(compose(q, k, v, bias[0] if bias else None, mask, ctx.offset, ctx.scale))

        inputs = (q, k, v) if bias is None else (q, k, v, bias)
        dq, dk, dv, *dbias = torch.func.vjp(state, *inputs)[1](gradients)
        return dq, dk, dv, dbias[0] if dbias else None, None, None, None


def compose(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, offset: int | None, scale: float
) -> AttentionState:
    with _attention._no_autocast(q.device):
        return state_of(_attention._scores(q, k, v, bias, mask, offset, -1, scale), q, k)


def state_of(s: _attention._Scores, q: Tensor, k: Tensor) -> AttentionState:
    """The state of the scores of ``q`` and ``k``."""
    if k.shape[-2] == 0:
        m, lo = (s.z.new_full((*s.z.shape[:-1], 1), x) for x in (-math.inf, math.inf))
    else:
        m = torch.where(s.on, s.z, -math.inf).amax(-1, keepdim=True)
        lo = torch.where(s.on, s.z, math.inf).amin(-1, keepdim=True)
    # Selected before exp, because the derivative of what is not selected must be finite, too.
    shift = torch.where(s.on, s.z - m, 0)
    e = torch.where(s.on, torch.exp(shift), 0)
    es = e * torch.where(e == 0, 0, shift)
    on = _attention._fold(s.on, k)
    o0, o1 = (_attention._unfold(_attention._weigh(_attention._fold(w, k), on, s.v), q) for w in (e, es))
    return AttentionState(m, e.sum(-1, keepdim=True), lo, o0, o1)


def merge_states(a: AttentionState, b: AttentionState) -> AttentionState:
    """The state over the union of two disjoint sets of keys. Associative and commutative (spec clause A11).

    m = max(m_a, m_b), w_i = exp(m_i - m): l = sum w_i l_i, o0 = sum w_i o0_i, o1 = sum w_i (o1_i + (m_i - m) o0_i),
    lo = min(lo_a, lo_b). The shapes of ``a`` and ``b`` broadcast.
    """
    m = torch.maximum(a.m, b.m)
    la, oa0, oa1 = _rescaled(a, m)
    lb, ob0, ob1 = _rescaled(b, m)
    return AttentionState(m, la + lb, torch.minimum(a.lo, b.lo), oa0 + ob0, oa1 + ob1)


def _rescaled(s: AttentionState, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    empty = s.m == -math.inf
    shift = torch.where(empty, 0, s.m - m)
    w = torch.where(empty, 0, torch.exp(shift))
    shift = torch.where(w == 0, 0, shift)  # -inf where s.m - m overflows
    return w * s.l, w * s.o0, w * (s.o1 + shift * s.o0)


def attention_from_state(state: AttentionState, *, variant: str = "normalized") -> Tensor:
    """The attention output (..., Hq, Tq, Dv), in the compute dtype, of a state over all keys.

    ``product``: (o1 + m o0) / l. ``normalized``: (o1 + (m - lo) o0) / (R l) with lo = min(0, lo), hi = max(0, m) and
    R = hi - lo. Rows without keys, or with R = 0, give 0.

    Raises:
        ValueError: unknown variant.

    Source: docs/spec.md, clause A11.
    """
    check_variant(variant)
    empty = state.l == 0
    l = torch.where(empty, 1, state.l)  # noqa: E741
    m = torch.where(empty, 0, state.m)
    o0, o1 = state.o0 / l, state.o1 / l
    if variant == "product":
        return o1 + m * o0
    lo, _, unit, R = _row._range(torch.where(empty, 0, state.lo), m)
    return o1 / R * unit + (m * unit - lo * unit) / R * o0
