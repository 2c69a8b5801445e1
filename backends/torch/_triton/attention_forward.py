"""SA attention in Triton, forward. Not run on a GPU yet; docs/triton-attention.md has the derivation.

A program holds BM queries of one head and walks over the keys in tiles of BN.

- ``product`` walks once, flash style, with weights x * p in place of p. They are divided by a power of the maximum's
  size, so that they fit float16 and their sum stays finite; that of the running maximum, like p itself.
- ``normalized`` walks twice. The first walk finds minimum and maximum from Q K^T alone, without an exponential; the
  second knows them, forms a * p in float32, and never rescales what it has summed.

In both the weights are rounded to the dtype of v once, before they multiply it (A10).

0 * NaN is NaN, but an excluded v must not count (A6). Products therefore run as if every v were finite. A second
launch, CAREFUL, returns at once except where a result is not finite: those rows it computes again, with the v's that
are not finite replaced by 0 and counted apart. It is not a branch, because the registers of a branch are those of all.
"""

# ruff: noqa: E741, SIM102 - l is the literature's name; conditions on constants stand alone
import triton
import triton.language as tl

from sa_softmax.backends.torch._triton.attention_tiles import (
    UNIT,
    bad_rows,
    factor,
    finite,
    infinite,
    key_ranges,
    lift,
    load_tile,
    participating,
    place,
    product,
    store_tile,
)

__all__ = ["attention_forward"]

_INF = tl.constexpr(float("inf"))


@triton.jit
def _extrema(
    mn, mx, q, k, begin, end, i, Tq, Tk, stride_k, upper, lower, scale, bias, bias_i, bias_j, mask, mask_i, mask_j,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The first walk of ``normalized``, over the keys from ``begin`` to ``end``."""
    for start in range(begin, end, BN):
        kt = load_tile(k, start, stride_k, Tk, BN, D, DP, EDGE)
        j = start + tl.arange(0, BN)
        x = participating(
            product(q, tl.trans(kt)) * scale, i[:, None], j[None, :], Tq, Tk, upper, lower,
            bias, bias_i, bias_j, mask, mask_i, mask_j, EDGE, CAUSAL, WINDOW, BIAS, MASK,
        )  # fmt: skip
        mx = tl.maximum(mx, tl.max(x, 1))
        mn = tl.minimum(mn, tl.min(tl.where(x == -_INF, _INF, x), 1))
    return mn, mx


@triton.jit
def _weigh(
    acc, l, mn, mx, q, k, v, begin, end, i, Tq, Tk, stride_k, stride_v, upper, lower, scale,
    bias, bias_i, bias_j, mask, mask_i, mask_j,
    VARIANT: tl.constexpr, CAREFUL: tl.constexpr,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """acc += sum a p v and l += sum p for the rows' extrema. CAREFUL: of those v that are finite."""
    shift, c = factor(mn, mx, VARIANT)
    c /= _size(mx, q, VARIANT)
    m = tl.where(mx == -_INF, 0.0, mx)
    for start in range(begin, end, BN):
        kt = load_tile(k, start, stride_k, Tk, BN, D, DP, EDGE)
        vt = load_tile(v, start, stride_v, Tk, BN, DV, DVP, EDGE)
        j = start + tl.arange(0, BN)
        x = participating(
            product(q, tl.trans(kt)) * scale, i[:, None], j[None, :], Tq, Tk, upper, lower,
            bias, bias_i, bias_j, mask, mask_i, mask_j, EDGE, CAUSAL, WINDOW, BIAS, MASK,
        )  # fmt: skip
        p = tl.exp(x - m[:, None])
        l += tl.sum(p, 1)
        w = tl.where(x == -_INF, 0.0, (x * UNIT - shift[:, None]) * c[:, None] * p).to(vt.dtype)
        if CAREFUL:
            vt = finite(vt)
        acc += product(w, vt)
    return acc, l


@triton.jit
def _poison(
    acc, q, k, v, begin, end, i, Tq, Tk, stride_k, stride_v, upper, lower, scale,
    bias, bias_i, bias_j, mask, mask_i, mask_j,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """acc += the number of participating v that are NaN or infinite."""
    for start in range(begin, end, BN):
        kt = load_tile(k, start, stride_k, Tk, BN, D, DP, True)
        vt = load_tile(v, start, stride_v, Tk, BN, DV, DVP, True)
        j = start + tl.arange(0, BN)
        x = participating(
            product(q, tl.trans(kt)) * scale, i[:, None], j[None, :], Tq, Tk, upper, lower,
            bias, bias_i, bias_j, mask, mask_i, mask_j, True, CAUSAL, WINDOW, BIAS, MASK,
        )  # fmt: skip
        acc += product((x != -_INF).to(vt.dtype), infinite(vt))
    return acc


@triton.jit
def _size(mx, q, VARIANT: tl.constexpr):
    """What the weights are divided by: those of ``product``, x * p, are then at most 24, which the dtype of q can lift,
    and its inverse is normal."""
    if VARIANT == "product":
        return tl.maximum(tl.abs(tl.where(mx == -_INF, 0.0, mx)) * 0.0625, 1.0) * (1 / lift(q))
    else:  # noqa: RET505 - Triton compiles what stands after an if
        return 1 / lift(q)


@triton.jit
def _online(
    acc, l, mn, mx, q, k, v, begin, end, i, Tq, Tk, stride_k, stride_v, upper, lower, scale,
    bias, bias_i, bias_j, mask, mask_i, mask_j,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """acc += sum x p v / size(mx) and l += sum p, rescaled as the maximum grows."""
    for start in range(begin, end, BN):
        kt = load_tile(k, start, stride_k, Tk, BN, D, DP, EDGE)
        j = start + tl.arange(0, BN)
        x = participating(
            product(q, tl.trans(kt)) * scale, i[:, None], j[None, :], Tq, Tk, upper, lower,
            bias, bias_i, bias_j, mask, mask_i, mask_j, EDGE, CAUSAL, WINDOW, BIAS, MASK,
        )  # fmt: skip
        top = tl.maximum(mx, tl.max(x, 1))
        m = tl.where(top == -_INF, 0.0, top)
        c = 1 / _size(top, q, "product")
        p = tl.exp(x - m[:, None])
        w = tl.where(x == -_INF, 0.0, x * c[:, None] * p)
        shrink = tl.exp(mx - m)
        l = l * shrink + tl.sum(p, 1)
        vt = load_tile(v, start, stride_v, Tk, BN, DV, DVP, EDGE)
        acc = acc * (shrink * (_size(mx, q, "product") * c))[:, None] + product(w.to(vt.dtype), vt)
        mx = top
    return acc, l, mn, mx


@triton.jit
def _norm(l, mx, q, VARIANT: tl.constexpr):
    return _size(mx, q, VARIANT) / tl.where(l == 0, 1.0, l)


@triton.jit(do_not_specialize=["Tq", "Tk", "upper", "lower", "total_q", "tiles"])
def attention_forward(
    q, k, v, bias, mask, cu_q, cu_k, o, stats,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j,
    Hq, Hkv, Tq, Tk, total_q, tiles, upper, lower, scale, flags,
    VARIANT: tl.constexpr, CAREFUL: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, VARLEN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """o and stats (rows, 3: maximum, sum, minimum) of BM queries of one head; flags where results are not finite."""
    flags += tl.program_id(0)
    if CAREFUL:
        if tl.load(flags) == 0:
            return
    tile, b, h, start_q, start_k, Tq, Tk, upper, lower = place(
        tl.program_id(0), cu_q, cu_k, Hq, Hkv, Tq, Tk, tiles, upper, lower, VARLEN, False
    )
    row = (tiles - 1 - tile) * BM  # causal: the longest first
    if row >= Tq:
        return
    hk = h // (Hq // Hkv)
    q += b * q_b + tl.cast(h, tl.int64) * q_h + tl.cast(start_q, tl.int64) * q_t
    k += b * k_b + tl.cast(hk, tl.int64) * k_h + tl.cast(start_k, tl.int64) * k_t
    v += b * v_b + tl.cast(hk, tl.int64) * v_h + tl.cast(start_k, tl.int64) * v_t
    o += b * o_b + tl.cast(h, tl.int64) * o_h + tl.cast(start_q, tl.int64) * o_t
    stats += ((b * Hq + h) * total_q + start_q) * 3
    if BIAS:
        bias += b * bias_b + tl.cast(h, tl.int64) * bias_h
    if MASK:
        mask += b * mask_b + tl.cast(h, tl.int64) * mask_h

    i = row + tl.arange(0, BM)
    each = i < Tq
    at = stats + i * 3
    qt = load_tile(q, row, q_t, Tq, BM, D, DP, True)
    begin, whole, cut, end = key_ranges(row, Tk, upper, lower, CAUSAL, WINDOW, BM, BN)
    acc = tl.zeros((BM, DVP), tl.float32)
    if CAREFUL:
        bad = bad_rows(load_tile(o, row, o_t, Tq, BM, DV, DVP, True).to(tl.float32))
        mx = tl.load(at, mask=each, other=-_INF)
        l = tl.load(at + 1, mask=each, other=0.0)
        mn = tl.load(at + 2, mask=each, other=_INF)
        poison = _poison(
            acc, qt, k, v, begin, end, i, Tq, Tk, k_t, v_t, upper, lower, scale,
            bias, bias_i, bias_j, mask, mask_i, mask_j, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BN,
        )  # fmt: skip
        acc, _ = _weigh(
            acc, l, mn, mx, qt, k, v, begin, end, i, Tq, Tk, k_t, v_t, upper, lower, scale,
            bias, bias_i, bias_j, mask, mask_i, mask_j,
            VARIANT, True, True, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BN,
        )  # fmt: skip
        acc = tl.where(poison > 0, float("nan"), acc * _norm(l, mx, qt, VARIANT)[:, None])
        store_tile(o, row, o_t, Tq, acc, bad, BM, DV, DVP)
    else:
        mn = tl.full((BM,), _INF, tl.float32)
        mx = tl.full((BM,), -_INF, tl.float32)
        l = tl.zeros((BM,), tl.float32)
        if VARIANT == "product":
            if WINDOW:
                acc, l, mn, mx = _online(
                    acc, l, mn, mx, qt, k, v, begin, whole, i, Tq, Tk, k_t, v_t, upper, lower, scale,
                    bias, bias_i, bias_j, mask, mask_i, mask_j, True, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BN,
                )  # fmt: skip
            acc, l, mn, mx = _online(
                acc, l, mn, mx, qt, k, v, whole, cut, i, Tq, Tk, k_t, v_t, upper, lower, scale,
                bias, bias_i, bias_j, mask, mask_i, mask_j, False, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BN,
            )  # fmt: skip
            acc, l, mn, mx = _online(
                acc, l, mn, mx, qt, k, v, cut, end, i, Tq, Tk, k_t, v_t, upper, lower, scale,
                bias, bias_i, bias_j, mask, mask_i, mask_j, True, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BN,
            )  # fmt: skip
        else:
            if WINDOW:
                mn, mx = _extrema(
                    mn, mx, qt, k, begin, whole, i, Tq, Tk, k_t, upper, lower, scale,
                    bias, bias_i, bias_j, mask, mask_i, mask_j, True, CAUSAL, WINDOW, BIAS, MASK, D, DP, BN,
                )  # fmt: skip
            mn, mx = _extrema(
                mn, mx, qt, k, whole, cut, i, Tq, Tk, k_t, upper, lower, scale,
                bias, bias_i, bias_j, mask, mask_i, mask_j, False, CAUSAL, WINDOW, BIAS, MASK, D, DP, BN,
            )  # fmt: skip
            mn, mx = _extrema(
                mn, mx, qt, k, cut, end, i, Tq, Tk, k_t, upper, lower, scale,
                bias, bias_i, bias_j, mask, mask_i, mask_j, True, CAUSAL, WINDOW, BIAS, MASK, D, DP, BN,
            )  # fmt: skip
            if WINDOW:
                acc, l = _weigh(
                    acc, l, mn, mx, qt, k, v, begin, whole, i, Tq, Tk, k_t, v_t, upper, lower, scale,
                    bias, bias_i, bias_j, mask, mask_i, mask_j,
                    VARIANT, False, True, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BN,
                )  # fmt: skip
            acc, l = _weigh(
                acc, l, mn, mx, qt, k, v, whole, cut, i, Tq, Tk, k_t, v_t, upper, lower, scale,
                bias, bias_i, bias_j, mask, mask_i, mask_j,
                VARIANT, False, False, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BN,
            )  # fmt: skip
            acc, l = _weigh(
                acc, l, mn, mx, qt, k, v, cut, end, i, Tq, Tk, k_t, v_t, upper, lower, scale,
                bias, bias_i, bias_j, mask, mask_i, mask_j,
                VARIANT, False, True, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BN,
            )  # fmt: skip

        tl.store(at, mx, mask=each)
        tl.store(at + 1, l, mask=each)
        tl.store(at + 2, mn, mask=each)
        acc *= _norm(l, mx, qt, VARIANT)[:, None]
        store_tile(o, row, o_t, Tq, acc, each, BM, DV, DVP)
        tl.store(flags, tl.max(bad_rows(acc).to(tl.int32), 0))
