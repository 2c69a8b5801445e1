"""PyTorch tensors on any device: eager, under torch.compile and torch.export, and under torch.func."""

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sa_softmax._validate import ArrayKind, check_attention, check_softmax, check_varlen
from sa_softmax.backends._native import native
from sa_softmax.backends.torch import _attention, _export, _kernels, _row, _state, _triton, _varlen
from sa_softmax.backends.torch._state import AttentionState, attention_from_state, merge_states
from sa_softmax.backends.torch.modules import SAMultiheadAttention, SASoftmax, convert_module

__all__ = [
    "AttentionState",
    "SAMultiheadAttention",
    "SASoftmax",
    "attention_from_state",
    "attention_state",
    "convert_module",
    "implementation",
    "merge_states",
    "sa_attention",
    "sa_softmax",
    "varlen_sa_attention",
]

_TORCH = ArrayKind(Tensor, "torch.as_tensor", device=lambda x: x.device, integers=(int, torch.SymInt))

if (_c_api := native()) is not None:
    from sa_softmax.backends.torch import _native

    _kernels.register("cpu", f"native {_c_api.instruction_set()}", _native)

if (
    (torch.version.cuda or torch.version.hip)
    and os.environ.get("SA_SOFTMAX_IMPLEMENTATION") != "composition"
    and find_spec("triton") is not None
):
    _kernels.register("cuda", _triton.NAME, _triton)


def implementation(device: torch.device | str) -> str:
    """What runs on ``device``: "native" and an instruction set, "triton", or "composition" (PyTorch's own operators).

    The kernels of sa-softmax-native run on CPU tensors where it is installed, and Triton's on CUDA and ROCm tensors
    where Triton is (compiled and interpreted, but not run on a GPU yet, as the name says), unless the environment
    variable ``SA_SOFTMAX_IMPLEMENTATION`` says ``composition`` when this module is imported; with ``native`` it is an
    error if those of the CPU cannot. Forward-mode derivatives, derivatives of gradients and exported programs are the
    composition's.
    """
    return _kernels.implementation(torch.device(device).type)


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
    if where is None and (short := _row.short(x, axis, variant)) is not None:
        return short
    axis = check_softmax(_TORCH, x, axis=axis, variant=variant, where=where)
    return _way(_row, x, where).sa_softmax(x, where, axis, variant)


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
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Attention O = Y V, with Y = sa_softmax(scale * Q K^T + bias) row by row.

    Float16 and bfloat16 are computed in float32, but that bfloat16 weights Y may be rounded to bfloat16 before they
    multiply V on processors with AVX512_BF16 (clause A10). Autocast does to q, k and v what it does to those of
    ``scaled_dot_product_attention``: they, and with them the result, take its dtype. It does not touch ``bias``, nor
    what is computed in float32; but in a compiled graph it casts matrix products in gradients by ``torch.func``.

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

        window_size: (left, right). Query i sees keys i + q_offset - left to i + q_offset + right only, as in
            ``torch.nn.attention.varlen.varlen_attn``; -1 leaves a side open, and ``is_causal`` closes the right one
            at 0. Kernels leave out what is outside, where a mask of the same meaning would be read. Exported programs
            hold the left side as a mask.
        scale: factor of the scores, 1/sqrt(D) by default.

    Returns:
        (..., Hq, Tq, Dv) in the dtype and on the device of ``q``. A query without participating keys gets 0.

    Raises:
        TypeError: not floating tensors of one dtype, or a mask that is not boolean.
        ValueError: shapes, heads, mask or bias that do not fit, q_offset without is_causal or a window closed on the
            right, a window that is_causal contradicts, unknown variant, two devices.

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
        window_size=window_size,
    )
    left, right = window_size
    offset, left = _attention.window(q_offset, left, 0 if is_causal else right)
    return _way(_attention, q, k, v, bias, mask).sa_attention(q, k, v, bias, mask, offset, left, scale, variant)


def _way(own: Any, *tensors: Tensor | None) -> Any:
    """The module that computes: ``own``, or the one for exported programs or sharded tensors."""
    if torch.compiler.is_exporting():
        return _export
    # By name, because the class lives in a module that takes long to import.
    if any(type(x).__name__ == "DTensor" for x in tensors):
        from sa_softmax.backends.torch import _sharding

        return _sharding
    return own


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


def varlen_sa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    variant: str = "normalized",
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """SA attention within each of N packed sequences; arguments as in ``torch.nn.attention.varlen.varlen_attn``.

    Sequence n has the queries cu_seq_q[n] to cu_seq_q[n + 1] and the keys cu_seq_k[n] to cu_seq_k[n + 1]. No score
    crosses from one to another, so extrema, and with them the self-adjusting factor, are those of the sequence.
    Gradients flow to q, k and v. Autocast is as in :func:`sa_attention`.

    Where the device has no kernel, the sequences run one by one, which reads their lengths on the host.

    Args:
        q: (total_q, Hq, D). Hq is a multiple of Hkv.
        k: (total_k, Hkv, D).
        v: (total_k, Hkv, Dv).
        cu_seq_q: (N + 1,) int32, 0 and the lengths of the queries, added up.
        cu_seq_k: (N + 1,) int32, the same of the keys.
        max_q: the largest number of queries of a sequence, or more.
        max_k: the largest number of keys, or more.
        variant: "normalized" or "product".
        scale: factor of the scores, 1/sqrt(D) by default.
        window_size: (left, right). Query i of Tq sees keys i + Tk - Tq - left to i + Tk - Tq + right; -1 leaves a side
            open, so (-1, 0) is the causal mask, aligned at the lower right.

    Returns:
        (total_q, Hq, Dv) in the dtype of ``q``; 0 for a query without keys, and for one that no sequence has.

    Raises:
        TypeError: not floating tensors of one dtype, cumulative lengths that are not int32, max_q or max_k that are no
            integers.
        ValueError: shapes, heads, numbers of sequences or a window that do not fit, unknown variant, two devices.

    Source: docs/spec.md, clauses A1, A3, A4 and A5, for each sequence.
    """
    q, k, v = _attention.autocast(q), _attention.autocast(k), _attention.autocast(v)
    scale = check_varlen(
        _TORCH, q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, variant=variant, scale=scale, window_size=window_size
    )
    return _varlen.varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *window_size, scale, variant)
