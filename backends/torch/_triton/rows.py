"""The row operation and its gradient in Triton (spec clauses R, C, D and G). Not run on a GPU yet.

A program holds a tile of ROWS whole rows while a row has at most ``WHOLE`` columns. Longer rows are cut into chunks of
that many columns, and two kernels see each: the first leaves the chunk's statistics in a small workspace, the second
merges those of its row and writes. Bytes that cross memory, with B those of x:

    ==================  =====================  ======================
    columns             forward                gradient
    ==================  =====================  ======================
    up to ``WHOLE``     read B, write B        read 2 B, write B
    more                read 2 B, write B      read 4 B, write B
    ==================  =====================  ======================

One read is the floor. A second is needed where a row does not fit in registers, since an entry of the result depends
on the row's extrema and sum; a third is not, because what a chunk says of itself merges: with m, total, lo, S and A the
chunk's maximum, sum of exponentials, minimum, sum(g p) and sum(g y), each of the chunk taken as a row of its own.

A row gives the same bits wherever it stands (R1): sums are trees whose shape depends on the number of columns alone,
not on how the compiler spreads a tile over threads, which follows strides and alignment; the rest is exact or
elementwise, without contraction to fused operations other than those written here.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sa_softmax.backends.torch._triton.target import target_of

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

    from sa_softmax.backends.torch._triton.compile_check import Instance

__all__ = ["WHOLE", "row", "row_vjp"]

WHOLE = {"forward": 32768, "vjp": 8192}
"""Columns up to which a row is read once, in 16 and 32 bits; a quarter as many in float64."""

_LOG2E = tl.constexpr(1.4426950408889634)
_INF = tl.constexpr(float("inf"))


def row(x: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    """y = sa_softmax(x) along ``axis``, for any strides of ``x`` and ``where``, which broadcasts to ``x``."""
    return _run("forward", (x,), where, axis, variant)


def row_vjp(x: Tensor, g: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    """The gradient dx of sum(g * sa_softmax(x)), in closed form; ``g`` has the shape and dtype of ``x``."""
    return _run("vjp", (x, g), where, axis, variant)


def _run(direction: str, inputs: tuple[Tensor, ...], where: Tensor | None, axis: int, variant: str) -> Tensor:
    x = inputs[0]
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    n = x.shape[axis]
    if where is not None:
        where = where.expand(x.shape)
    tensors = (*inputs, out) if where is None else (*inputs, out, where)
    plan = _plan(direction, x.dtype, tuple(x.shape), axis, *(t.stride() for t in tensors))
    strides = plan.strides if where is not None else (*plan.strides, None)
    rows = x.numel() // n
    arguments = (*inputs, out, where, *strides, plan.sizes, rows, n)
    chunks = triton.cdiv(n, plan.columns)
    constants = _constants(plan, variant, chunks)
    options = {"num_warps": plan.threads // target_of(x.device).warp_size, "enable_fp_fusion": False}
    grid = (triton.cdiv(rows, plan.rows), chunks)
    statistics, write = _KERNELS[direction]
    partials = None
    if chunks > 1:
        partials = x.new_empty(7, chunks, rows, dtype=torch.promote_types(x.dtype, torch.float32))
    with torch.cuda.device_of(x):  # Triton launches on the current device; no-op on the CPU
        if chunks > 1:
            statistics[grid](partials, *arguments, **constants, **options)
        write[grid](partials, *arguments, **constants, **options)
    return out


def _constants(plan: "_Plan", variant: str, chunks: int) -> dict[str, Any]:
    return {
        "NORMALIZED": variant == "normalized", "ROWS": plan.rows, "COLS": plan.columns, "WIDE": plan.wide,
        "CHUNKS": 1 if chunks == 1 else max(4, triton.next_power_of_2(chunks)),
    }  # fmt: skip


class _Plan(NamedTuple):
    """How rows are found and cut. ``sizes`` are those of the axes beside ``axis``, the fastest first and without the
    last; ``strides`` holds, for each tensor, theirs and, last, that of ``axis``."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    rows: int
    columns: int
    threads: int
    wide: bool


@lru_cache(maxsize=1024)
def _plan(direction: str, dtype: torch.dtype, shape: tuple[int, ...], axis: int, *strides: tuple[int, ...]) -> _Plan:
    n = shape[axis]
    # The axes beside it, the fastest in x first; neighbours that are one axis to every tensor become one.
    others = sorted((i for i in range(len(shape)) if i != axis and shape[i] > 1), key=lambda i: strides[0][i])
    axes: list[tuple[int, list[int]]] = []
    for i in others:
        steps = [s[i] for s in strides]
        if axes and steps == [step * axes[-1][0] for step in axes[-1][1]]:
            axes[-1] = (axes[-1][0] * shape[i], axes[-1][1])
        else:
            axes.append((shape[i], steps))
    axes = axes or [(1, [n * s[axis] for s in strides])]
    whole = WHOLE[direction] // (4 if dtype == torch.float64 else 1)
    columns = min(max(triton.next_power_of_2(n), 16), whole)
    if axes[0][1][0] < strides[0][axis]:  # neighbouring rows, not neighbouring columns, lie together in memory
        rows = max(1, min(32, 2048 // columns))
        threads = rows * columns // 4  # few entries for each, since addresses take registers, too
    else:
        rows = max(1, 2048 // columns)
        threads = rows * columns // 16
    most = 1024 if columns == WHOLE["forward"] and dtype.itemsize == 2 else 512
    return _Plan(
        sizes=tuple(size for size, _ in axes[:-1]),
        strides=tuple((*(steps[t] for _, steps in axes), strides[t][axis]) for t in range(len(strides))),
        rows=rows,
        columns=columns,
        threads=min(threads, most),
        wide=max((n + columns) * s[axis] for s in strides) >= 2**31,
    )


# Below, a tile is (ROWS, COLS) and what belongs to a row (ROWS, 1). z is x in the compute dtype, -inf where an entry
# does not participate. m is the maximum, or 0 if nothing participates; total is sum(exp(z - m)); lo = min(0, minimum).


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def _sum(x):
    """The sum of each row as a tree of pairs, whose order does not depend on the layout of the tile in threads."""
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    # Four neighbours first, which a thread usually holds; then column i and column i + half.
    x = tl.sum(tl.reshape(x, (ROWS, COLS // 2, 2)), 2)
    x = tl.sum(tl.reshape(x, (ROWS, COLS // 4, 2)), 2)
    for i in tl.static_range(_log2(COLS) - 2):
        x = tl.sum(tl.reshape(x, (ROWS, 2, COLS >> (i + 3))), 1)
    return tl.reshape(x, (ROWS, 1))


@triton.jit
def _tile(rows, n, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """The rows and columns of this program's tile, and which of its entries exist."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLS)[None, :]
    if WIDE:
        c = c.to(tl.int64)
    c += tl.program_id(1) * COLS
    return r, c, (r < rows) & (c < n)


@triton.jit
def _at(pointer, r, c, sizes, strides):
    """The addresses of a tile. ``sizes`` and ``strides`` are those of :class:`_Plan`."""
    axes: tl.constexpr = len(strides) - 1
    offset = tl.zeros_like(r)
    for i in tl.static_range(axes - 1):
        offset += r % sizes[i] * strides[i]
        r = r // sizes[i]
    return pointer + (offset + r * strides[axes - 1]) + c * strides[axes]


@triton.jit
def _participating(x, where, x_strides, where_strides, sizes, r, c, exists):
    z = tl.load(_at(x, r, c, sizes, x_strides), exists, other=-_INF)
    if where is not None:
        z = tl.where(tl.load(_at(where, r, c, sizes, where_strides), exists, other=0) != 0, z, -_INF)
    return z if z.dtype == tl.float64 else z.to(tl.float32)


@triton.jit
def _exp(z, m, AGAIN: tl.constexpr = 0):
    """exp(z - m). The bits do not depend on AGAIN, which keeps the compiler from recognising what it computed before,
    and from holding a tile of it in registers until now."""
    scale: tl.constexpr = 2.0**-AGAIN
    return tl.exp2((z * scale - m * scale) * (_LOG2E / scale))


@triton.jit
def _extrema(z, NORMALIZED: tl.constexpr):
    m = tl.max(z, 1, keep_dims=True)
    m = tl.where(m == -_INF, 0.0, m)
    if NORMALIZED:
        lo = tl.min(tl.where(z > -_INF, z, 0.0), 1, keep_dims=True)
        return m, tl.where(lo < 0, lo, 0.0)
    return m, m


@triton.jit
def _unit(m, lo):
    """unit, and 1 / (unit R) as a sum of two numbers.

    The power of two ``unit`` brings the larger of hi and -lo into [2, 4), where hi - lo does not overflow (C7). The
    second part of the inverse makes what is R in the numerator exactly 1. Both parts are 0 if R = 0 (C1, G5).
    """
    hi = tl.where(m > 0, m, 0.0)
    largest = tl.maximum(hi, -lo)
    if largest.dtype == tl.float64:
        exponent = tl.maximum(largest.to(tl.int64, bitcast=True) >> 52, 1)
        unit = ((2047 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1)
        unit = ((255 - exponent) << 23).to(tl.float32, bitcast=True)
    R = hi * unit - lo * unit
    inverse = tl.where(R == 0, 0.0, 1.0 / R)
    return unit, inverse, tl.where(R == 0, 0.0, tl.fma(-R, inverse, 1.0) * inverse)


@triton.jit
def _factor(z, lo, unit, inverse, rest, AGAIN: tl.constexpr = 0):
    """a = (z - lo) / R. AGAIN as in :func:`_exp`."""
    scale: tl.constexpr = 2.0**-AGAIN
    a = tl.fma(z, unit * scale, -(lo * unit) * scale)
    return tl.fma(a, inverse / scale, a * (rest / scale))


@triton.jit
def _inverse(total):
    return tl.where(total == 0, 0.0, 1.0 / total)


@triton.jit
def _partials(partials, quantity: tl.constexpr, chunk, r, rows):
    """Where the workspace (quantity, chunk, row) holds a statistic: m, total, lo, A, S, and the ties at lo and at m."""
    return partials + ((quantity * tl.num_programs(1) + chunk) * rows + r)


@triton.jit
def _chunks(partials, r, rows, CHUNKS: tl.constexpr):
    chunk = tl.arange(0, CHUNKS)[None, :]
    return chunk, (r < rows) & (chunk < tl.num_programs(1))


@triton.jit
def _merged(partials, r, rows, NORMALIZED: tl.constexpr, CHUNKS: tl.constexpr):
    """m, total and lo of whole rows."""
    chunk, exists = _chunks(partials, r, rows, CHUNKS)
    total = tl.load(_partials(partials, 1, chunk, r, rows), exists, other=0.0)
    m_ = tl.load(_partials(partials, 0, chunk, r, rows), exists, other=-_INF)
    m_ = tl.where(total == 0, -_INF, m_)
    m = tl.max(m_, 1, keep_dims=True)
    m = tl.where(m == -_INF, 0.0, m)
    lo = m
    if NORMALIZED:
        lo = tl.min(tl.load(_partials(partials, 2, chunk, r, rows), exists, other=0.0), 1, keep_dims=True)
    return m, _sum(_exp(m_, m) * total), lo


@triton.jit
def forward_statistics(
    partials, x, y, where, x_strides, y_strides, where_strides, sizes, rows, n,
    NORMALIZED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Reads a chunk of x, and writes its m, total and lo."""
    r, c, exists = _tile(rows, n, ROWS, COLS, WIDE)
    z = _participating(x, where, x_strides, where_strides, sizes, r, c, exists)
    m, lo = _extrema(z, NORMALIZED)
    chunk = tl.program_id(1)
    tl.store(_partials(partials, 0, chunk, r, rows), m, r < rows)
    tl.store(_partials(partials, 1, chunk, r, rows), _sum(_exp(z, m)), r < rows)
    tl.store(_partials(partials, 2, chunk, r, rows), lo, r < rows)


@triton.jit
def forward(
    partials, x, y, where, x_strides, y_strides, where_strides, sizes, rows, n,
    NORMALIZED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Reads x and writes y, with the statistics of its own tile or, given more CHUNKS than one, the merged ones."""
    r, c, exists = _tile(rows, n, ROWS, COLS, WIDE)
    z = _participating(x, where, x_strides, where_strides, sizes, r, c, exists)
    if CHUNKS == 1:
        m, lo = _extrema(z, NORMALIZED)
        total = _sum(_exp(z, m))
    else:
        m, total, lo = _merged(partials, r, rows, NORMALIZED, CHUNKS)
    p = _exp(z, m, AGAIN=1) * _inverse(total)
    if NORMALIZED:
        unit, inverse, rest = _unit(m, lo)
        value = _factor(z, lo, unit, inverse, rest) * p
    else:
        value = z * p
    value = tl.where(z == -_INF, 0.0, value)
    tl.store(_at(y, r, c, sizes, y_strides), value.to(y.dtype.element_ty), exists)


@triton.jit
def _sums(z, g, m, total, lo, NORMALIZED: tl.constexpr):
    """A = sum(g y) and S = sum(g p) over a tile of whole rows, or of chunks taken as rows."""
    p = _exp(z, m, AGAIN=1) * _inverse(total)
    if NORMALIZED:
        unit, inverse, rest = _unit(m, lo)
        gp = g * p
        return _sum(gp * _factor(tl.maximum(z, lo), lo, unit, inverse, rest)), _sum(gp)
    return _sum(g * (tl.where(z > -_INF, z, 0.0) * p)), m


@triton.jit
def _ties(z, extremum):
    return tl.sum((z == extremum).to(tl.int32), 1, keep_dims=True)


@triton.jit
def vjp_statistics(
    partials, x, g, dx, where, x_strides, g_strides, dx_strides, where_strides, sizes, rows, n,
    NORMALIZED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Reads a chunk of x and g, and writes its m, total, lo, A, S and ties."""
    r, c, exists = _tile(rows, n, ROWS, COLS, WIDE)
    z = _participating(x, where, x_strides, where_strides, sizes, r, c, exists)
    g = _upstream(z, g, r, c, sizes, g_strides, exists)
    m, lo = _extrema(z, NORMALIZED)
    total = _sum(_exp(z, m))
    A, S = _sums(z, g, m, total, lo, NORMALIZED)
    chunk = tl.program_id(1)
    tl.store(_partials(partials, 0, chunk, r, rows), m, r < rows)
    tl.store(_partials(partials, 1, chunk, r, rows), total, r < rows)
    tl.store(_partials(partials, 3, chunk, r, rows), A, r < rows)
    if NORMALIZED:
        tl.store(_partials(partials, 2, chunk, r, rows), lo, r < rows)
        tl.store(_partials(partials, 4, chunk, r, rows), S, r < rows)
        tl.store(_partials(partials, 5, chunk, r, rows), _ties(z, lo).to(m.dtype), r < rows)
        tl.store(_partials(partials, 6, chunk, r, rows), _ties(z, m).to(m.dtype), r < rows)


@triton.jit
def _upstream(z, g, r, c, sizes, strides, exists):
    return tl.where(z > -_INF, tl.load(_at(g, r, c, sizes, strides), exists, other=0.0).to(z.dtype), 0.0)


@triton.jit
def _merged_sums(partials, r, rows, m, total, lo, NORMALIZED: tl.constexpr, CHUNKS: tl.constexpr):
    """A, S and the ties of whole rows.

    A chunk's p counts in the row with weight w = exp(m_chunk - m) total_chunk / total, and its factor a becomes
    (a R_chunk + lo_chunk - lo) / R. No term changes sign, so nothing cancels that did not in the chunk.
    """
    chunk, exists = _chunks(partials, r, rows, CHUNKS)
    m_ = tl.load(_partials(partials, 0, chunk, r, rows), exists, other=0.0)
    total_ = tl.load(_partials(partials, 1, chunk, r, rows), exists, other=0.0)
    A = tl.load(_partials(partials, 3, chunk, r, rows), exists, other=0.0)
    w = _exp(tl.where(total_ == 0, -_INF, m_), m) * (total_ * _inverse(total))
    if NORMALIZED:
        unit, inverse, _ = _unit(m, lo)
        lo_ = tl.load(_partials(partials, 2, chunk, r, rows), exists, other=0.0)
        S = tl.load(_partials(partials, 4, chunk, r, rows), exists, other=0.0)
        at_lo = tl.load(_partials(partials, 5, chunk, r, rows), exists, other=0.0)
        at_m = tl.load(_partials(partials, 6, chunk, r, rows), exists, other=0.0)
        R = tl.where(m_ > 0, m_, 0.0) * unit - lo_ * unit
        A = tl.fma(A, R, (lo_ * unit - lo * unit) * S)
        at_lo = tl.sum(tl.where(lo_ == lo, at_lo, 0.0), 1, keep_dims=True)
        at_m = tl.sum(tl.where(m_ == m, at_m, 0.0), 1, keep_dims=True)
        return _sum(w * (A * inverse)), _sum(w * S), at_lo, at_m
    return _sum(w * A), m, m, m


@triton.jit
def vjp(
    partials, x, g, dx, where, x_strides, g_strides, dx_strides, where_strides, sizes, rows, n,
    NORMALIZED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Reads x and g and writes dx, with the statistics of its tile or, given more CHUNKS than one, the merged ones."""
    r, c, exists = _tile(rows, n, ROWS, COLS, WIDE)
    z = _participating(x, where, x_strides, where_strides, sizes, r, c, exists)
    g = _upstream(z, g, r, c, sizes, g_strides, exists)
    if CHUNKS == 1:
        m, lo = _extrema(z, NORMALIZED)
        total = _sum(_exp(z, m))
        D, S = _sums(z, g, m, total, lo, NORMALIZED)
        if NORMALIZED:
            at_lo = _ties(z, lo).to(m.dtype)
            at_m = _ties(z, m).to(m.dtype)
    else:
        m, total, lo = _merged(partials, r, rows, NORMALIZED, CHUNKS)
        D, S, at_lo, at_m = _merged_sums(partials, r, rows, m, total, lo, NORMALIZED, CHUNKS)
    p = _exp(z, m, AGAIN=2) * _inverse(total)
    gp = g * p
    if NORMALIZED:
        unit, inverse, rest = _unit(m, lo)
        # The clamps are strict (G4), and ties share (G3).
        to_lo = tl.where(lo < 0, (D - S) / tl.maximum(at_lo, 1.0), 0.0)
        to_hi = tl.where(m > 0, -D / tl.maximum(at_m, 1.0), 0.0)
        dz = gp + tl.where(z <= lo, to_lo, tl.where(z >= m, to_hi, 0.0))
        value = p * (g * _factor(z, lo, unit, inverse, rest, AGAIN=1) - D) + dz * inverse * unit
    else:
        value = g * (z * p) - p * D + gp
    value = tl.where(z == -_INF, 0.0, value)
    tl.store(_at(dx, r, c, sizes, dx_strides), value.to(dx.dtype.element_ty), exists)


_KERNELS = {"forward": (forward_statistics, forward), "vjp": (vjp_statistics, vjp)}
_TENSORS = {"forward": ["x", "y"], "vjp": ["x", "g", "dx"]}


def instances(target: "GPUTarget") -> "Iterator[Instance]":
    """What :mod:`~sa_softmax.backends.torch._triton.compile_check` compiles: both ends of the widths that one program
    takes, what takes the most registers, and each kernel."""
    cases = [
        ("normalized", torch.float32, (4096, 128), 1, False),
        ("normalized", torch.bfloat16, (4096, 4096), 1, False),
        ("normalized", torch.float32, (4096, 8192), 1, True),
        ("product", torch.float32, (4096, 8192), 1, True),
        ("normalized", torch.bfloat16, (4096, 32768), 1, True),
        ("normalized", torch.float32, (4096, 32768), 1, False),
        ("normalized", torch.float32, (4096, 262144), 1, True),
        ("normalized", torch.float64, (4096, 2048), 1, True),
        ("normalized", torch.float32, (4, 100, 300), 1, True),
    ]
    for direction in _KERNELS:
        for case in cases:
            yield from _instances(target, direction, *case)


def _instances(
    target: "GPUTarget", direction: str, variant: str, dtype: torch.dtype, shape: tuple[int, ...], axis: int,
    masked: bool,
) -> "Iterator[Instance]":  # fmt: skip
    from sa_softmax.backends.torch._triton.compile_check import Instance

    names = [*_TENSORS[direction], *(["where"] if masked else [])]
    plan = _plan(direction, dtype, shape, axis, *[torch.empty(shape, device="meta").stride()] * len(names))
    chunks = triton.cdiv(shape[axis], plan.columns)
    arguments: dict[str, Any] = {"where": None, "where_strides": None}
    arguments |= dict.fromkeys(_TENSORS[direction], dtype) | ({"where": torch.bool} if masked else {})
    arguments |= {f"{name}_strides": strides for name, strides in zip(names, plan.strides, strict=True)}
    arguments |= {"partials": None if chunks == 1 else torch.promote_types(dtype, torch.float32)}
    arguments |= {"sizes": plan.sizes, "rows": math.prod(shape) // shape[axis], "n": shape[axis]}
    arguments |= _constants(plan, variant, chunks)
    of = f"{variant}, {str(dtype).removeprefix('torch.')} {' x '.join(map(str, shape))}"
    if axis != len(shape) - 1:
        of += f" along axis {axis}"
    for kernel in _KERNELS[direction][chunks == 1 :]:
        yield Instance(
            f"{kernel.__name__} {of}{', where' if masked else ''}",
            kernel,
            arguments,
            {"num_warps": plan.threads // target.warp_size, "enable_fp_fusion": False},
            # 1024 threads that hold a row lack 6 registers on an A100; half as many threads lack more.
            spills=24 if target.arch == 80 and plan.columns == WHOLE["forward"] else 0,
        )
