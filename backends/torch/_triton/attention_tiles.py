"""What the attention kernels share: where tiles lie, which keys take part in them, and the factor of a row.

Rows of a tile are numbered by i (queries) and j (keys), in whichever order the tile has them: ``i[:, None]`` and
``j[None, :]``, or the reverse. Pointers are advanced in 64 bits to a tile, and in 32 bits within it.
"""

import triton
import triton.language as tl

_INF = tl.constexpr(float("inf"))
UNIT = tl.constexpr(2.0**-10)


@triton.jit
def load_tile(base, row, stride, n, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHECK: tl.constexpr):
    """Rows ``row`` to ``row + ROWS`` of a matrix of n rows of D numbers, padded with 0 to DP columns."""
    r = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, DP)[None, :]
    p = base + tl.cast(row, tl.int64) * stride + r * stride + d
    if CHECK:
        return tl.load(p, mask=(row + r < n) & (d < D), other=0)
    if D != DP:
        return tl.load(p, mask=d < D, other=0)
    return tl.load(p)


@triton.jit
def store_tile(base, row, stride, n, x, keep, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """The rows of ``x`` for which ``keep`` (ROWS,) is true."""
    r = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, DP)[None, :]
    p = base + tl.cast(row, tl.int64) * stride + r * stride + d
    tl.store(p, x.to(base.dtype.element_ty), mask=(row + r < n) & (d < D) & keep[:, None])


@triton.jit
def product(a, b):
    """a @ b, accumulated in float32; operands in float32 are not rounded to TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def lift(b):
    """What weights of at most 24 are multiplied by before they are rounded to the dtype of b: normal down to 2^-25."""
    return 2048.0 if b.dtype == tl.float16 else 1.0


@triton.jit
def _power(e):
    """The power of two whose biased exponent is e, from 1 to 254."""
    return (e << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponents(ROWS: tl.constexpr):
    """The e that :func:`accumulate` starts with: the smallest for which the factor and its inverse are normal."""
    return tl.full((ROWS,), 15, tl.int32)


@triton.jit
def accumulate(acc, e, w, b):
    """acc + w @ b and e. ``w`` is float32, and rounded to the dtype of b once.

    For a b in float16, a row of ``w`` is multiplied by a power of two first, with which the largest |w| so far is from
    2^14 to 2^15: so it does not overflow, and only what is 2^28 times smaller is rounded to a subnormal number.
    ``e`` is the exponent, biased, of that largest |w|, and acc the sum with this factor until :func:`accumulated`.
    """
    if b.dtype == tl.float16:
        grown = tl.max(tl.abs(w), 1).to(tl.int32, bitcast=True) >> 23
        grown = tl.minimum(tl.maximum(grown, e), 254)
        acc *= _power(tl.maximum(127 + e - grown, 1))[:, None]
        w *= _power(127 + 141 - grown)[:, None]
        e = grown
    return acc + product(w.to(b.dtype), b), e


@triton.jit
def accumulated(acc, e, b):
    """The sum itself, for the ``acc`` and ``e`` of :func:`accumulate` and any b of that dtype."""
    if b.dtype == tl.float16:
        acc *= _power(127 + e - 141)[:, None]
    return acc


@triton.jit
def finite(x):
    """x, with 0 where it is NaN or infinite."""
    return tl.where(tl.abs(x.to(tl.float32)) < _INF, x, tl.zeros_like(x))


@triton.jit
def infinite(x):
    """1 where x is NaN or infinite, in the dtype of x."""
    return tl.where(tl.abs(x.to(tl.float32)) < _INF, 0.0, 1.0).to(x.dtype)


@triton.jit
def bad_rows(x):
    """The rows of x in which a number is NaN or infinite."""
    return tl.max(tl.where(tl.abs(x) < _INF, 0, 1), 1) > 0


@triton.jit
def participating(
    x, i, j, Tq, Tk, upper, lower, bias, bias_i, bias_j, mask, mask_i, mask_j,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """x with its bias, -inf where an entry does not take part. Without EDGE, causality and lengths exclude none.

    The scores themselves say who takes part: a tile of flags would cost as many registers as they.
    """
    inside = (i < Tq) & (j < Tk)
    if BIAS:
        at = bias + tl.cast(i, tl.int64) * bias_i + tl.cast(j, tl.int64) * bias_j
        x += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if EDGE:
        on = inside
        if CAUSAL:
            on = on & (j <= i + upper)
        if WINDOW:
            on = on & (j >= i + lower)
        x = tl.where(on, x, -_INF)
    if MASK:
        at = mask + tl.cast(i, tl.int64) * mask_i + tl.cast(j, tl.int64) * mask_j
        x = tl.where(tl.load(at, mask=inside, other=0) != 0, x, -_INF)
    return x


@triton.jit
def key_ranges(
    i, Tk, upper, lower, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Of the queries i to i + BM: the first key of the first tile, of the tiles that none of them cuts, of the tiles
    after those, and the end."""
    begin = 0
    whole = 0
    end = Tk
    stop = Tk
    if CAUSAL:
        end = tl.minimum(Tk, tl.maximum(i + BM + upper, 0))
        stop = tl.minimum(Tk, tl.maximum(i + 1 + upper, 0))
    if WINDOW:
        begin = tl.minimum(tl.maximum(i + lower, 0) // BN * BN, end)
        whole = tl.minimum((tl.maximum(i + BM - 1 + lower, 0) + BN - 1) // BN * BN, (end + BN - 1) // BN * BN)
    return begin, whole, tl.maximum(stop // BN * BN, whole), end


@triton.jit
def query_range(j, Tq, upper, lower, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The first query of the first tile of BM that sees one of the keys j to j + BN, and the end."""
    begin = 0
    end = Tq
    if WINDOW:
        end = tl.minimum(Tq, tl.maximum(j + BN - lower, 0))
    if CAUSAL:
        begin = tl.minimum(tl.maximum(j - upper, 0) // BM * BM, end)
    return begin, end


@triton.jit
def factor(mn, mx, VARIANT: tl.constexpr):
    """shift and c with a(x) = (x * UNIT - shift) * c and 1 / R = UNIT * c, from a row's extrema.

    ``normalized``: lo = min(0, mn), hi = max(0, mx), shift = UNIT * lo, c = 1 / (UNIT * (hi - lo)), or 0 where that is
    0 (C1). ``product`` is the same with lo = 0 and R = 1. UNIT keeps hi - lo finite and 1 / R normal (C7).
    """
    if VARIANT == "product":
        return tl.zeros_like(mx), tl.full(mx.shape, 1 / UNIT, tl.float32)
    lo = tl.where(mn < 0, mn, 0.0)
    hi = tl.where(mx > 0, mx, 0.0)
    R = hi * UNIT - lo * UNIT
    return lo * UNIT, tl.where(R == 0, 0.0, 1 / tl.where(R == 0, 1.0, R))


@triton.jit
def place(
    pid, cu_q, cu_k, Hq, Hkv, Tq, Tk, tiles, upper, lower, VARLEN: tl.constexpr, HEADS_OF_KEYS: tl.constexpr
):  # fmt: skip
    """This program's tile, batch, head, first query and key of its sequence, their numbers, and the offsets of causal
    mask and window."""
    tile = pid % tiles
    heads = Hkv if HEADS_OF_KEYS else Hq
    h = pid // tiles % heads
    b = pid // tiles // heads
    start_q = 0
    start_k = 0
    batch = b
    if VARLEN:
        start_q = tl.load(cu_q + b)
        start_k = tl.load(cu_k + b)
        Tq = tl.load(cu_q + b + 1) - start_q
        Tk = tl.load(cu_k + b + 1) - start_k
        upper += Tk - Tq
        lower += Tk - Tq
        batch = 0
    return tile, tl.cast(batch, tl.int64), h, start_q, start_k, Tq, Tk, upper, lower
