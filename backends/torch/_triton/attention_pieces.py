"""Partial states of attention in Triton: few queries against many keys, cut among programs (spec clause A11).

Not run on a GPU yet. Each program walks over one piece of the keys, which it reads once, with two accumulators: o0 sums
p v and o1 sums p (x - m) v. The shifted weights are what 16 bits can hold: sums of p x v would cancel in (o1 - lo o0)
where scores are far from 0 and close together. A second kernel merges the pieces, in their order.

The queries of a group share their keys, so a tile has the rows of all its heads: row r is query r % Tq of head r // Tq.
"""

# ruff: noqa: E741 - l is the literature's name
import triton
import triton.language as tl

from sa_softmax.backends.torch._triton.attention_tiles import finite, infinite, lift, participating, product

__all__ = ["merge_pieces", "state_of_piece"]

_INF = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["Tq", "Tk", "upper", "piece"])
def state_of_piece(
    q, k, v, bias, mask, extrema, o0, o1,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j,
    Hkv, G, Tq, Tk, upper, piece, scale,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """extrema: (pieces, rows, 3) for m, l and lo; o0, o1: (pieces, rows, DV); a row is (batch, query head, query)."""
    at = tl.program_id(1)
    b = tl.cast(at // Hkv, tl.int64)
    hk = tl.cast(at % Hkv, tl.int64)
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    each = r < G * Tq
    i = r % Tq
    h = hk * G + r // Tq
    d = tl.arange(0, DP)
    e = tl.arange(0, DVP)
    at = q + b * q_b + (h * q_h + tl.cast(i, tl.int64) * q_t)[:, None] + d[None, :]
    qt = tl.load(at, mask=each[:, None] & (d < D)[None, :], other=0.0)
    k += b * k_b + hk * k_h
    v += b * v_b + hk * v_h
    bias_h_ = bias
    mask_h_ = mask
    if BIAS:
        bias_h_ = (bias + b * bias_b + h * bias_h)[:, None]
    if MASK:
        mask_h_ = (mask + b * mask_b + h * mask_h)[:, None]
    begin = tl.program_id(2) * piece
    end = tl.minimum(begin + piece, Tk)
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(Tq + upper, 0))
    m = tl.full((BM,), -_INF, tl.float32)
    lo = tl.full((BM,), _INF, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc0 = tl.zeros((BM, DVP), tl.float32)
    acc1 = tl.zeros((BM, DVP), tl.float32)
    poison = tl.zeros((BM, DVP), tl.float32)
    for start in range(begin, end, BN):
        j = start + tl.arange(0, BN)
        far = tl.cast(j, tl.int64)[:, None]
        kt = tl.load(k + far * k_t + d[None, :], mask=(j < end)[:, None] & (d < D)[None, :], other=0.0)
        vt = tl.load(v + far * v_t + e[None, :], mask=(j < end)[:, None] & (e < DV)[None, :], other=0.0)
        x = participating(
            product(qt, tl.trans(kt)) * scale, i[:, None], j[None, :], Tq, end, upper, 0,
            bias_h_, bias_i, bias_j, mask_h_, mask_i, mask_j, True, CAUSAL, False, BIAS, MASK,
        )  # fmt: skip
        top = tl.maximum(m, tl.max(x, 1))
        lo = tl.minimum(lo, tl.min(tl.where(x == -_INF, _INF, x), 1))
        safe = tl.where(top == -_INF, 0.0, top)
        p = tl.exp(x - safe[:, None])
        shifted = tl.where(p == 0, 0.0, p * (x - safe[:, None]))
        shrink = tl.exp(m - safe)
        step = tl.where(shrink == 0, 0.0, m - safe)
        l = l * shrink + tl.sum(p, 1)
        poison += product((x != -_INF).to(vt.dtype), infinite(vt))
        vt = finite(vt)
        acc1 = (acc1 + step[:, None] * acc0) * shrink[:, None] + product((shifted * lift(vt)).to(vt.dtype), vt)
        acc0 = acc0 * shrink[:, None] + product((p * lift(vt)).to(vt.dtype), vt)
        m = top
    acc0 = tl.where(poison > 0, float("nan"), acc0 * (1 / lift(qt)))
    acc1 = tl.where(poison > 0, float("nan"), acc1 * (1 / lift(qt)))
    rows = tl.num_programs(1) * G * Tq
    row = tl.cast(tl.program_id(2), tl.int64) * rows + tl.program_id(1) * G * Tq + r
    tl.store(extrema + row * 3, m, mask=each)
    tl.store(extrema + row * 3 + 1, l, mask=each)
    tl.store(extrema + row * 3 + 2, lo, mask=each)
    keep = each[:, None] & (e < DV)[None, :]
    tl.store(o0 + row[:, None] * DV + e[None, :], acc0, mask=keep)
    tl.store(o1 + row[:, None] * DV + e[None, :], acc1, mask=keep)


@triton.jit(do_not_specialize=["rows", "pieces"])
def merge_pieces(
    extrema, o0, o1, m_out, l_out, lo_out, o0_out, o1_out, rows, pieces, DV: tl.constexpr, DVP: tl.constexpr
):  # fmt: skip
    """One row: the states of its pieces, merged from the first to the last."""
    row = tl.cast(tl.program_id(0), tl.int64)
    e = tl.arange(0, DVP)
    m = tl.load(extrema + row * 3)
    for s in range(1, pieces):
        m = tl.maximum(m, tl.load(extrema + (tl.cast(s, tl.int64) * rows + row) * 3))
    safe = tl.where(m == -_INF, 0.0, m)
    l = 0.0
    lo = _INF
    acc0 = tl.zeros((DVP,), tl.float32)
    acc1 = tl.zeros((DVP,), tl.float32)
    for s in range(pieces):
        at = tl.cast(s, tl.int64) * rows + row
        m_s = tl.load(extrema + at * 3)
        w = tl.exp(m_s - safe)
        shift = tl.where(w == 0, 0.0, m_s - safe)
        l += w * tl.load(extrema + at * 3 + 1)
        lo = tl.minimum(lo, tl.load(extrema + at * 3 + 2))
        a0 = tl.load(o0 + at * DV + e, mask=e < DV, other=0.0)
        a1 = tl.load(o1 + at * DV + e, mask=e < DV, other=0.0)
        acc0 += w * a0
        acc1 += w * (a1 + shift * a0)
    tl.store(m_out + row, m)
    tl.store(l_out + row, l)
    tl.store(lo_out + row, lo)
    tl.store(o0_out + row * DV + e, acc0, mask=e < DV)
    tl.store(o1_out + row * DV + e, acc1, mask=e < DV)
