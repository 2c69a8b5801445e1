"""SA attention in Triton, backward. Not run on a GPU yet; docs/triton-attention.md has the derivation.

With p, a, R, D, S of a row and g = dO V^T, the gradient of the scores is dx = p (g a - D) + g p / R, plus at one
minimal key (D - S) / R if the minimum is below 0, and at one maximal key -D / R if the maximum is above 0 (G2, A8).
``product``: dx = p (g x - D) + g p.

:func:`attention_dq` runs first and walks twice. The first walk sums D and S and finds the two extremal keys; D from
rowsum(dO * O), as plain flash attention has it, would carry the rounding of a 16-bit O into a term that A10 wants in
float32, and extremal terms that are added in the end would no longer cancel what they cancel once dx is rounded. The
second sums dQ. The kernel leaves D, the extremal terms and the keys' indices in ``terms`` and ``places``,
where :func:`attention_dkv` and :func:`attention_dbias` find the terms by comparing indices. Each sum has
one owner and a fixed order: no atomics, and the same bits in every run.
"""

# ruff: noqa: E741, SIM102 - l is the literature's name; conditions on constants stand alone
import triton
import triton.language as tl

from sa_softmax.backends.torch._triton.attention_tiles import (
    UNIT,
    accumulate,
    accumulated,
    bad_rows,
    exponents,
    factor,
    finite,
    infinite,
    key_ranges,
    load_tile,
    participating,
    place,
    product,
    query_range,
    store_tile,
)

__all__ = ["attention_dbias", "attention_dkv", "attention_dq"]

_INF = tl.constexpr(float("inf"))
_NOWHERE = tl.constexpr(2147483647)


@triton.jit
def _terms(terms, places, start, Tq, rows, VARIANT: tl.constexpr, BM: tl.constexpr):
    """Of BM rows what attention_dq left: m, shift, c, D, the terms at minimum and maximum, and their keys."""
    i = tl.arange(0, BM)
    each = i < Tq - start
    terms += start
    places += start
    m = tl.load(terms + i, mask=each, other=0.0)
    terms += rows
    shift = tl.load(terms + i, mask=each, other=0.0)
    terms += rows
    c = tl.load(terms + i, mask=each, other=0.0)
    terms += rows
    D_row = tl.load(terms + i, mask=each, other=0.0)
    if VARIANT == "product":
        return m, shift, c, D_row, D_row, D_row, i, i
    terms += rows
    to_lo = tl.load(terms + i, mask=each, other=0.0)
    terms += rows
    to_hi = tl.load(terms + i, mask=each, other=0.0)
    at_lo = tl.load(places + i, mask=each, other=-1)
    places += rows
    at_hi = tl.load(places + i, mask=each, other=-1)
    return m, shift, c, D_row, to_lo, to_hi, at_lo, at_hi


# p is exp(x - m), and what multiplies it has the factor 1 / l: c is that of the factor a, and D that of G2, over l.


@triton.jit
def _dx(x, gp, p, j, shift, c, D_row, to_lo, to_hi, at_lo, at_hi, VARIANT: tl.constexpr):
    """dx, with the extremal terms where ``j`` is the key that has them; the vectors of the rows are as wide as x."""
    dx = gp * ((x * UNIT - shift) * c + UNIT * c) - p * D_row
    if VARIANT == "normalized":
        dx += tl.where(j == at_lo, to_lo, 0.0)
        dx += tl.where(j == at_hi, to_hi, 0.0)
    return tl.where(x == -_INF, 0.0, dx)


@triton.jit
def _sums(
    sum_gpa, sum_gp, mn, mx, at_lo, at_hi, q, k, v, do, shift, c, m,
    begin, end, i, Tq, Tk, stride_k, stride_v, upper, lower, scale, bias, bias_i, bias_j, mask, mask_i, mask_j,
    VARIANT: tl.constexpr,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The first walk: sum g p a, sum g p, the extrema and the first of the keys that have them."""
    for start in range(begin, end, BN):
        kt = load_tile(k, start, stride_k, Tk, BN, D, DP, EDGE)
        vt = load_tile(v, start, stride_v, Tk, BN, DV, DVP, EDGE)
        j = start + tl.arange(0, BN)
        x = participating(
            product(q, tl.trans(kt)) * scale, i[:, None], j[None, :], Tq, Tk, upper, lower,
            bias, bias_i, bias_j, mask, mask_i, mask_j, EDGE, CAUSAL, WINDOW, BIAS, MASK,
        )  # fmt: skip
        gp = tl.where(x == -_INF, 0.0, product(do, tl.trans(vt)) * tl.exp(x - m[:, None]))
        sum_gpa += tl.sum(tl.where(x == -_INF, 0.0, gp * ((x * UNIT - shift[:, None]) * c[:, None])), 1)
        if VARIANT == "normalized":
            sum_gp += tl.sum(gp, 1)
            low = tl.where(x == -_INF, _INF, x)
            least = tl.min(low, 1)
            most = tl.max(x, 1)
            here = tl.min(tl.where(low == least[:, None], j[None, :], _NOWHERE), 1)
            at_lo = tl.where(least < mn, here, at_lo)
            here = tl.min(tl.where(x == most[:, None], j[None, :], _NOWHERE), 1)
            at_hi = tl.where(most > mx, here, at_hi)
            mn = tl.minimum(mn, least)
            mx = tl.maximum(mx, most)
    return sum_gpa, sum_gp, mn, mx, at_lo, at_hi


@triton.jit
def _dq(
    q, k, v, do, m, shift, c, D_row, to_lo, to_hi, at_lo, at_hi,
    begin, end, i, Tq, Tk, stride_k, stride_v, upper, lower, scale, bias, bias_i, bias_j, mask, mask_i, mask_j,
    VARIANT: tl.constexpr, CAREFUL: tl.constexpr,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The second walk: sum dx k."""
    acc = tl.zeros((BM, DP), tl.float32)
    e = exponents(BM)
    for start in range(begin, end, BN):
        kt = load_tile(k, start, stride_k, Tk, BN, D, DP, EDGE)
        vt = load_tile(v, start, stride_v, Tk, BN, DV, DVP, EDGE)
        j = start + tl.arange(0, BN)
        x = participating(
            product(q, tl.trans(kt)) * scale, i[:, None], j[None, :], Tq, Tk, upper, lower,
            bias, bias_i, bias_j, mask, mask_i, mask_j, EDGE, CAUSAL, WINDOW, BIAS, MASK,
        )  # fmt: skip
        p = tl.exp(x - m[:, None])
        dx = _dx(
            x, product(do, tl.trans(vt)) * p, p, j[None, :], shift[:, None], c[:, None], D_row[:, None],
            to_lo[:, None], to_hi[:, None], at_lo[:, None], at_hi[:, None], VARIANT,
        )  # fmt: skip
        acc, e = accumulate(acc, e, dx, finite(kt) if CAREFUL else kt)
    return accumulated(acc, e, q)


@triton.jit(do_not_specialize=["Tq", "Tk", "upper", "lower", "total_q", "tiles"])
def attention_dq(
    q, k, v, bias, mask, cu_q, cu_k, stats, do, dq, terms, places,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dq_b, dq_h, dq_t,
    bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j,
    Hq, Hkv, Tq, Tk, total_q, rows, tiles, upper, lower, scale, flags,
    VARIANT: tl.constexpr, CAREFUL: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, VARLEN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq of BM queries of one head; terms (6, rows) and places (2, rows) for the kernels that run after it."""
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
    do += b * do_b + tl.cast(h, tl.int64) * do_h + tl.cast(start_q, tl.int64) * do_t
    dq += b * dq_b + tl.cast(h, tl.int64) * dq_h + tl.cast(start_q, tl.int64) * dq_t
    first = (b * Hq + h) * total_q + start_q
    stats += first * 3
    terms += first
    places += first
    if BIAS:
        bias += b * bias_b + tl.cast(h, tl.int64) * bias_h
    if MASK:
        mask += b * mask_b + tl.cast(h, tl.int64) * mask_h

    i = row + tl.arange(0, BM)
    qt = load_tile(q, row, q_t, Tq, BM, D, DP, True)
    dot = load_tile(do, row, do_t, Tq, BM, DV, DVP, True)
    each = i < Tq
    begin, _, _, end = key_ranges(row, Tk, upper, lower, CAUSAL, WINDOW, BM, BN)
    if CAREFUL:
        m, shift, c, D_row, to_lo, to_hi, at_lo, at_hi = _terms(terms, places, row, Tq, rows, VARIANT, BM)
        acc = _dq(
            qt, k, v, dot, m, shift, c, D_row, to_lo, to_hi, at_lo, at_hi,
            begin, end, i, Tq, Tk, k_t, v_t, upper, lower, scale, bias, bias_i, bias_j, mask, mask_i, mask_j,
            VARIANT, True, True, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BM, BN,
        )  # fmt: skip
        each = bad_rows(load_tile(dq, row, dq_t, Tq, BM, D, DP, True).to(tl.float32))
        store_tile(dq, row, dq_t, Tq, acc * scale, each, BM, D, DP)
    else:
        mx = tl.load(stats + i * 3, mask=each, other=-_INF)
        l = tl.load(stats + i * 3 + 1, mask=each, other=0.0)
        shift, c = factor(tl.load(stats + i * 3 + 2, mask=each, other=_INF), mx, VARIANT)
        m = tl.where(mx == -_INF, 0.0, mx)
        norm = tl.where(l == 0, 0.0, 1 / tl.where(l == 0, 1.0, l))
        c *= norm
        D_row = tl.zeros((BM,), tl.float32)
        S_row = tl.zeros((BM,), tl.float32)
        mn = tl.full((BM,), _INF, tl.float32)
        mx = tl.full((BM,), -_INF, tl.float32)
        at_lo = tl.full((BM,), -1, tl.int32)
        at_hi = tl.full((BM,), -1, tl.int32)
        D_row, S_row, mn, mx, at_lo, at_hi = _sums(
            D_row, S_row, mn, mx, at_lo, at_hi, qt, k, v, dot, shift, c, m,
            begin, end, i, Tq, Tk, k_t, v_t, upper, lower, scale, bias, bias_i, bias_j, mask, mask_i, mask_j,
            VARIANT, True, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BN,
        )  # fmt: skip
        tl.store(terms + i, m, mask=each)
        tl.store(terms + rows + i, shift, mask=each)
        tl.store(terms + 2 * rows + i, c, mask=each)
        tl.store(terms + 3 * rows + i, D_row * norm, mask=each)
        _, inverse = factor(mn, mx, VARIANT)
        to_lo = tl.where(mn < 0, (D_row - S_row * norm) * (inverse * UNIT), 0.0)
        to_hi = tl.where(mx > 0, -D_row * (inverse * UNIT), 0.0)
        if VARIANT == "normalized":
            tl.store(terms + 4 * rows + i, to_lo, mask=each)
            tl.store(terms + 5 * rows + i, to_hi, mask=each)
            tl.store(places + i, at_lo, mask=each)
            tl.store(places + rows + i, at_hi, mask=each)
        acc = _dq(
            qt, k, v, dot, m, shift, c, D_row * norm, to_lo, to_hi, at_lo, at_hi,
            begin, end, i, Tq, Tk, k_t, v_t, upper, lower, scale, bias, bias_i, bias_j, mask, mask_i, mask_j,
            VARIANT, False, True, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BM, BN,
        )  # fmt: skip
        acc *= scale
        store_tile(dq, row, dq_t, Tq, acc, each, BM, D, DP)
        tl.store(flags, tl.max(bad_rows(acc).to(tl.int32), 0))


@triton.jit
def _dkv(
    dk, dv, e_dk, e_dv, q, k, v, do, terms, places, rows,
    begin, end, j, Tq, Tk, stride_q, stride_do, upper, lower, scale, bias, bias_i, bias_j, mask, mask_i, mask_j,
    VARIANT: tl.constexpr, CAREFUL: tl.constexpr,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Tiles are (keys, queries) here, so that dx and y need no transposition before they multiply."""
    for start in range(begin, end, BM):
        qt = load_tile(q, start, stride_q, Tq, BM, D, DP, EDGE)
        dot = load_tile(do, start, stride_do, Tq, BM, DV, DVP, EDGE)
        i = start + tl.arange(0, BM)
        m, shift, c, D_row, to_lo, to_hi, at_lo, at_hi = _terms(terms, places, start, Tq, rows, VARIANT, BM)
        x = participating(
            product(k, tl.trans(qt)) * scale, i[None, :], j[:, None], Tq, Tk, upper, lower,
            bias, bias_i, bias_j, mask, mask_i, mask_j, EDGE, CAUSAL, WINDOW, BIAS, MASK,
        )  # fmt: skip
        p = tl.exp(x - m[None, :])
        y = tl.where(x == -_INF, 0.0, (x * UNIT - shift[None, :]) * c[None, :] * p)
        dv, e_dv = accumulate(dv, e_dv, y, finite(dot) if CAREFUL else dot)
        dx = _dx(
            x, product(v, tl.trans(dot)) * p, p, j[:, None], shift[None, :], c[None, :], D_row[None, :],
            to_lo[None, :], to_hi[None, :], at_lo[None, :], at_hi[None, :], VARIANT,
        )  # fmt: skip
        dk, e_dk = accumulate(dk, e_dk, dx, finite(qt) if CAREFUL else qt)
    return dk, dv, e_dk, e_dv


@triton.jit
def _poison(
    acc, q, k, do, begin, end, j, Tq, Tk, stride_q, stride_do, upper, lower, scale,
    bias, bias_i, bias_j, mask, mask_i, mask_j,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """acc += the number of queries for which the key takes part and do is NaN or infinite."""
    for start in range(begin, end, BM):
        qt = load_tile(q, start, stride_q, Tq, BM, D, DP, True)
        dot = load_tile(do, start, stride_do, Tq, BM, DV, DVP, True)
        i = start + tl.arange(0, BM)
        x = participating(
            product(k, tl.trans(qt)) * scale, i[None, :], j[:, None], Tq, Tk, upper, lower,
            bias, bias_i, bias_j, mask, mask_i, mask_j, True, CAUSAL, WINDOW, BIAS, MASK,
        )  # fmt: skip
        acc += product((x != -_INF).to(dot.dtype), infinite(dot))
    return acc


@triton.jit
def _dkv_of_group(
    CAREFUL: tl.constexpr, q, kt, vt, bias, mask, do, terms, places,
    q_h, q_t, do_h, do_t, bias_h, bias_i, bias_j, mask_h, mask_i, mask_j,
    G, total_q, rows, begin, end, j, Tq, Tk, upper, lower, scale,
    VARIANT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv, summed over the query heads of the group, of which the pointers name the first."""
    dk = tl.zeros((BN, DP), tl.float32)
    dv = tl.zeros((BN, DVP), tl.float32)
    e_dk = exponents(BN)
    e_dv = exponents(BN)
    for _ in range(G):
        dk, dv, e_dk, e_dv = _dkv(
            dk, dv, e_dk, e_dv, q, kt, vt, do, terms, places, rows,
            begin, end, j, Tq, Tk, q_t, do_t, upper, lower, scale, bias, bias_i, bias_j, mask, mask_i, mask_j,
            VARIANT, CAREFUL, True, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BM,
        )  # fmt: skip
        q += q_h
        do += do_h
        terms += total_q
        places += total_q
        if BIAS:
            bias += bias_h
        if MASK:
            mask += mask_h
    return accumulated(dk, e_dk, kt) * scale, accumulated(dv, e_dv, kt)


@triton.jit(do_not_specialize=["Tq", "Tk", "upper", "lower", "total_q", "tiles"])
def attention_dkv(
    q, k, v, bias, mask, cu_q, cu_k, do, dk, dv, terms, places,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j,
    Hq, Hkv, Tq, Tk, total_q, rows, tiles, upper, lower, scale, flags,
    VARIANT: tl.constexpr, CAREFUL: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, VARLEN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys of one head, summed over the query heads of its group."""
    flags += tl.program_id(0)
    if CAREFUL:
        if tl.load(flags) == 0:
            return
    tile, b, hk, start_q, start_k, Tq, Tk, upper, lower = place(
        tl.program_id(0), cu_q, cu_k, Hq, Hkv, Tq, Tk, tiles, upper, lower, VARLEN, True
    )
    row = tile * BN
    if row >= Tk:
        return
    G = Hq // Hkv
    h = tl.cast(hk, tl.int64) * G
    q += b * q_b + h * q_h + tl.cast(start_q, tl.int64) * q_t
    do += b * do_b + h * do_h + tl.cast(start_q, tl.int64) * do_t
    k += b * k_b + tl.cast(hk, tl.int64) * k_h + tl.cast(start_k, tl.int64) * k_t
    v += b * v_b + tl.cast(hk, tl.int64) * v_h + tl.cast(start_k, tl.int64) * v_t
    dk += b * dk_b + tl.cast(hk, tl.int64) * dk_h + tl.cast(start_k, tl.int64) * dk_t
    dv += b * dv_b + tl.cast(hk, tl.int64) * dv_h + tl.cast(start_k, tl.int64) * dv_t
    first = (b * Hq + h) * total_q + start_q
    terms += first
    places += first
    if BIAS:
        bias += b * bias_b + h * bias_h
    if MASK:
        mask += b * mask_b + h * mask_h

    j = row + tl.arange(0, BN)
    each = j < Tk
    kt = load_tile(k, row, k_t, Tk, BN, D, DP, True)
    vt = load_tile(v, row, v_t, Tk, BN, DV, DVP, True)
    begin, end = query_range(row, Tq, upper, lower, CAUSAL, WINDOW, BM, BN)
    dkt, dvt = _dkv_of_group(
        CAREFUL, q, kt, vt, bias, mask, do, terms, places,
        q_h, q_t, do_h, do_t, bias_h, bias_i, bias_j, mask_h, mask_i, mask_j,
        G, total_q, rows, begin, end, j, Tq, Tk, upper, lower, scale,
        VARIANT, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BM, BN,
    )  # fmt: skip
    if CAREFUL:
        each = bad_rows(load_tile(dk, row, dk_t, Tk, BN, D, DP, True).to(tl.float32))
        each = each | bad_rows(load_tile(dv, row, dv_t, Tk, BN, DV, DVP, True).to(tl.float32))
        poison = tl.zeros((BN, DVP), tl.float32)
        for _ in range(G):
            poison = _poison(
                poison, q, kt, do, begin, end, j, Tq, Tk, q_t, do_t, upper, lower, scale,
                bias, bias_i, bias_j, mask, mask_i, mask_j, CAUSAL, WINDOW, BIAS, MASK, D, DP, DV, DVP, BM,
            )  # fmt: skip
            q += q_h
            do += do_h
            if BIAS:
                bias += bias_h
            if MASK:
                mask += mask_h
        dvt = tl.where(poison > 0, float("nan"), dvt)
    store_tile(dk, row, dk_t, Tk, dkt, each, BN, D, DP)
    store_tile(dv, row, dv_t, Tk, dvt, each, BN, DV, DVP)
    if not CAREFUL:
        tl.store(flags, tl.max((bad_rows(dkt) | bad_rows(dvt)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["Tq", "Tk", "upper", "lower"])
def attention_dbias(
    q, k, v, bias, mask, do, dbias, terms, places,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t,
    bias_b, bias_h, bias_i, bias_j, mask_b, mask_h, mask_i, mask_j, dbias_b, dbias_h, dbias_i, dbias_j,
    B, Hq, Hkv, Tq, Tk, rows, upper, lower, scale, tiles_i, tiles_j, heads,
    VARIANT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    OVER_B: tl.constexpr, OVER_H: tl.constexpr, OVER_I: tl.constexpr, OVER_J: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of dbias: dx, summed over batches, heads, queries and keys, in this order, where bias has one for all."""
    pid = tl.program_id(0)
    tj = pid % tiles_j
    ti = pid // tiles_j % tiles_i
    h0 = tl.cast(pid // tiles_j // tiles_i % heads, tl.int64)
    b0 = tl.cast(pid // tiles_j // tiles_i // heads, tl.int64)
    n_b = B if OVER_B else 1
    n_h = Hq if OVER_H else 1
    n_i = (Tq + BM - 1) // BM if OVER_I else 1
    n_j = (Tk + BN - 1) // BN if OVER_J else 1
    acc = tl.zeros((BM, BN), tl.float32)
    for db in range(n_b):
        b = b0 + db
        for dh in range(n_h):
            h = h0 + dh
            hk = h // (Hq // Hkv)
            first = (b * Hq + h) * Tq
            for di in range(n_i):
                row = (ti + di) * BM
                i = row + tl.arange(0, BM)
                qt = load_tile(q + b * q_b + h * q_h, row, q_t, Tq, BM, D, DP, True)
                dot = load_tile(do + b * do_b + h * do_h, row, do_t, Tq, BM, DV, DVP, True)
                m, shift, c, D_row, to_lo, to_hi, at_lo, at_hi = _terms(
                    terms + first, places + first, row, Tq, rows, VARIANT, BM
                )
                for dj in range(n_j):
                    start = (tj + dj) * BN
                    j = start + tl.arange(0, BN)
                    kt = load_tile(k + b * k_b + hk * k_h, start, k_t, Tk, BN, D, DP, True)
                    vt = load_tile(v + b * v_b + hk * v_h, start, v_t, Tk, BN, DV, DVP, True)
                    x = participating(
                        product(qt, tl.trans(kt)) * scale, i[:, None], j[None, :], Tq, Tk, upper, lower,
                        bias + b * bias_b + h * bias_h, bias_i, bias_j,
                        mask + b * mask_b + h * mask_h if MASK else mask, mask_i, mask_j,
                        True, CAUSAL, WINDOW, True, MASK,
                    )  # fmt: skip
                    p = tl.exp(x - m[:, None])
                    acc += _dx(
                        x, product(dot, tl.trans(vt)) * p, p, j[None, :], shift[:, None], c[:, None], D_row[:, None],
                        to_lo[:, None], to_hi[:, None], at_lo[:, None], at_hi[:, None], VARIANT,
                    )  # fmt: skip
    i = ti * BM + tl.arange(0, BM)
    j = tj * BN + tl.arange(0, BN)
    keep = (i < Tq)[:, None] & (j < Tk)[None, :]
    if OVER_I:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], (BM, BN))
        keep = keep & (i == 0)[:, None]
    if OVER_J:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], (BM, BN))
        keep = keep & (j == 0)[None, :]
    at = (
        dbias
        + b0 * dbias_b
        + h0 * dbias_h
        + tl.cast(i, tl.int64)[:, None] * dbias_i
        + tl.cast(j, tl.int64)[None, :] * dbias_j
    )
    tl.store(at, acc.to(dbias.dtype.element_ty), mask=keep)
