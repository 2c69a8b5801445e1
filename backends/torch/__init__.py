"""PyTorch tensors on any device: eager, under torch.compile and torch.export, and under torch.func."""

import torch
from torch import Tensor, nn

from sa_softmax._validate import ArrayKind, check_attention, check_softmax
from sa_softmax.backends.torch import _attention, _export, _row, _state
from sa_softmax.backends.torch._state import AttentionState, attention_from_state, merge_states

__all__ = [
    "AttentionState",
    "SASoftmax",
    "attention_from_state",
    "attention_state",
    "merge_states",
    "sa_attention",
    "sa_softmax",
]

_TORCH = ArrayKind(Tensor, "torch.as_tensor", device=lambda x: x.device, integers=(int, torch.SymInt))


def sa_softmax(x: Tensor, *, axis: int = -1, variant: str = "normalized", where: Tensor | None = None) -> Tensor:
    """Self-Adjust Softmax of every row of ``x`` along ``axis``.

    ``normalized``: y = (x - lo) / (hi - lo) * p with lo = min(0, min x), hi = max(0, max x); 0 where hi = lo.
    ``product``: y = x * p. Extrema and softmax p run over the participating entries: ``where`` is true and x is not
    -inf; others get exactly 0.

    Gradients, tangents and higher derivatives follow the spec rather than what differentiating min, max and clamp
    would give: tied extrema share equally, and an extremum of exactly 0 passes nothing on. Autocast does not change
    the dtype.

    Args:
        x: tensor of any shape with at least one axis; float16 and bfloat16 (computed in float32), float32 or float64.
        axis: the axis whose slices are the rows.
        variant: "normalized" or "product".
        where: boolean tensor that broadcasts to the shape of ``x``; True where an entry participates.

    Returns:
        A tensor with the shape, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is not a floating tensor, or ``where`` is not a boolean one.
        ValueError: unknown variant, 0-d ``x``, axis out of range, ``where`` that does not broadcast, two devices.

    Source: paper, SA-Softmax and its normalized variant; docs/spec.md, clauses R, C, D and G.
    """
    axis = check_softmax(_TORCH, x, axis=axis, variant=variant, where=where)
    sa_softmax = (_export if torch.compiler.is_exporting() else _row).sa_softmax
    return sa_softmax(x, where, axis, variant)


def sa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    variant: str = "normalized",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    q_offset: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Attention O = Y V, with Y = sa_softmax(scale * Q K^T + bias) row by row.

    Float16 and bfloat16 are computed in float32. Autocast does to q, k and v what it does to those of
    ``scaled_dot_product_attention``: they, and with them the result, take its dtype. It does not touch ``bias``, nor
    what is computed in float32.

    Args:
        q: (..., Hq, Tq, D). Hq is a multiple of Hkv; query head h reads key/value head h // (Hq // Hkv).
        k: (..., Hkv, Tk, D).
        v: (..., Hkv, Tk, Dv).
        variant: "normalized" or "product".
        bias: broadcasts to (..., Hq, Tq, Tk), in the dtype of q or the one it is computed in; part of the scores, so
            it changes the self-adjusting factor too.
        mask: boolean, broadcasts to (..., Hq, Tq, Tk); True where a key participates.
        is_causal: query i sees keys j <= i + q_offset only.
        q_offset: 0 aligns the causal mask at the upper left, Tk - Tq at the lower right::

            Tq=2, Tk=4, q_offset=0    q_offset=2
                  1 0 0 0              1 1 1 0
                  1 1 0 0              1 1 1 1

        scale: factor of the scores, 1/sqrt(D) by default.

    Returns:
        (..., Hq, Tq, Dv) in the dtype and on the device of ``q``. A query without participating keys gets 0.

    Raises:
        TypeError: not floating tensors of one dtype, or a mask that is not boolean.
        ValueError: shapes, heads, mask or bias that do not fit, q_offset without is_causal, unknown variant, two
            devices.

    Source: paper, SA-Softmax in attention; docs/spec.md, clauses A.
    """
    q, k, v = _attention.autocast(q), _attention.autocast(k), _attention.autocast(v)
    scale = check_attention(
        _TORCH,
        q,
        k,
        v,
        variant=variant,
        bias=bias,
        mask=mask,
        is_causal=is_causal,
        q_offset=q_offset,
        scale=scale,
    )
    sa_attention = (_export if torch.compiler.is_exporting() else _attention).sa_attention
    return sa_attention(q, k, v, bias, mask, q_offset if is_causal else None, scale, variant)


def attention_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    q_offset: int = 0,
    scale: float | None = None,
) -> AttentionState:
    """The partial state of attention over the keys at hand; arguments, autocast and errors as in :func:`sa_attention`.

    m = max x, l = sum exp(x - m), lo = min x, o0 = sum exp(x - m) v, o1 = sum exp(x - m) (x - m) v, in the compute
    dtype. :func:`merge_states` joins those of disjoint sets of keys, such as the pieces of a cache or the shards of a
    sequence on several devices; :func:`attention_from_state` makes the output. The state serves both variants.

    For keys that begin at position s of the whole sequence, pass q_offset - s.

    Source: docs/spec.md, clause A11.
    """
    q, k, v = _attention.autocast(q), _attention.autocast(k), _attention.autocast(v)
    scale = check_attention(
        _TORCH, q, k, v,
        variant="normalized", bias=bias, mask=mask, is_causal=is_causal, q_offset=q_offset, scale=scale,
    )  # fmt: skip
    return _state.attention_state(q, k, v, bias, mask, q_offset if is_causal else None, scale)


class SASoftmax(nn.Module):
    """:func:`sa_softmax` as a module, in the place of ``nn.Softmax``.

    The gradient of a row of zeros is 0 by convention under ``normalized`` (G5), because it grows like 1/R as the row
    approaches zero and has no finite limit. A model whose query or key projection starts at exactly zero, as some
    initialisation schemes have it, therefore stays dead: start it elsewhere, or use ``product``. The module does not
    warn of such rows: it would have to read values, which stalls a device and cannot be traced.

    Args:
        axis: the axis whose slices are the rows.
        variant: "normalized" or "product".

    Source: paper, SA-Softmax and its normalized variant; docs/spec.md, clauses R, C, D and G.
    """

    def __init__(self, axis: int = -1, variant: str = "normalized") -> None:
        super().__init__()
        self.axis = axis
        self.variant = variant

    def forward(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        """Arguments, result and errors as in :func:`sa_softmax`."""
        return sa_softmax(x, axis=self.axis, variant=self.variant, where=where)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, variant={self.variant!r}"
