"""SA attention on a GPU: the kernels' tensors, tiles and launches (spec clauses A). Not run on a GPU yet."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from sa_softmax.backends.torch import _state
from sa_softmax.backends.torch._triton.attention_backward import attention_dbias, attention_dkv, attention_dq
from sa_softmax.backends.torch._triton.attention_forward import attention_forward
from sa_softmax.backends.torch._triton.attention_pieces import merge_pieces, state_of_piece
from sa_softmax.backends.torch._triton.target import target_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from triton.backends.compiler import GPUTarget

    from sa_softmax.backends.torch._triton.compile_check import Instance

__all__ = ["Tiles", "attention", "attention_state", "attention_vjp", "instances", "tiles", "varlen", "varlen_vjp"]


class Tiles(NamedTuple):
    """Queries and keys of a tile, and how Triton compiles the kernel."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# By kernel and padded head dimension, for 16-bit inputs; chosen by registers and spills of the compiled kernels
# (docs/triton-attention.md), so still to be timed.
_TILES = {
    "forward": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 4, 2)},
    "dq": {64: Tiles(128, 32, 8, 2), 128: Tiles(128, 32, 8, 2), 256: Tiles(32, 32, 4, 1)},
    "dkv": {64: Tiles(32, 128, 8, 3), 128: Tiles(16, 128, 8, 2), 256: Tiles(16, 32, 4, 1)},
    "state": {64: Tiles(16, 64, 4, 2), 128: Tiles(16, 64, 4, 2), 256: Tiles(16, 32, 4, 2)},
    "dbias": {64: Tiles(64, 64, 4, 1), 128: Tiles(64, 64, 4, 1), 256: Tiles(32, 32, 4, 1)},
}
_TILES_FLOAT32 = {64: Tiles(32, 32, 4, 1), 128: Tiles(16, 32, 4, 1), 256: Tiles(16, 16, 4, 1)}


def tiles(kernel: str, dtype: torch.dtype, d: int) -> Tiles:
    """``d`` is the larger one of the padded head dimensions of keys and values."""
    table = _TILES_FLOAT32 if dtype == torch.float32 else _TILES[kernel]
    return table[max(d, min(table))]


def _fitted(of: Tiles, kernel: str, target: "GPUTarget") -> Tiles:
    """``of``, which is for Hopper, on ``target``."""
    if kernel == "forward" and (target.backend == "hip" or target.arch < 90):
        of = of._replace(BN=min(of.BN, 32))  # 64 keys spill, without Hopper's operands in shared memory
    if target.backend == "hip":  # warps of 64 threads, with 64 KiB of shared memory
        of = of._replace(num_warps=max(of.num_warps // 2, 1), num_stages=min(of.num_stages, 2))
    return of


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None,
    offset: int | None, left: int, scale: float, variant: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and stats (..., Hq, Tq, 3): maximum of the scores, sum exp(x - maximum) and, for ``normalized``, minimum."""
    if left < 0 and _pieces(k.shape[-2], q.shape[-3] // k.shape[-3] * q.shape[-2]) > 1:  # decoding
        state = _state.AttentionState(*attention_state(q, k, v, bias, mask, offset, scale))
        o = _state.attention_from_state(state, variant=variant).to(q.dtype)
        return o, torch.cat([state.m, state.l, state.lo], -1)
    upper, lower = _bounds(offset, left, q.shape[-2], k.shape[-2])
    o, stats = _forward(_Shape(q, k, v, bias, mask), upper, lower, scale, variant)
    return o.reshape(*q.shape[:-1], v.shape[-1]), stats.reshape(*q.shape[:-1], 3)


def attention_vjp(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, o: Tensor, stats: Tensor, do: Tensor,
    offset: int | None, left: int, scale: float, variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    upper, lower = _bounds(offset, left, q.shape[-2], k.shape[-2])
    dq, dk, dv, dbias = _backward(_Shape(q, k, v, bias, mask), stats, do, upper, lower, scale, variant)
    if bias is None or dbias is None:
        dbias = q.new_empty(0)
    else:
        if dbias.shape[0] > 1:  # the kernel sums over a batch axis that bias lacks, but not over one of several
            dbias = dbias.reshape(*q.shape[:-3], *dbias.shape[1:])
            dbias = dbias.sum_to_size(*[1] * (dbias.ndim - bias.ndim), *bias.shape)
        dbias = dbias.reshape(bias.shape).to(bias.dtype)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dbias


def attention_state(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, offset: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The partial state m, l, lo, o0, o1 of all keys; of few queries, merged from pieces of the keys."""
    s = _Shape(q, k, v, bias, mask)
    upper, _ = _bounds(offset, -1, s.Tq, s.Tk)
    options = s.options("state", upper, None, "normalized")
    for name in ("VARIANT", "WINDOW", "VARLEN"):
        del options[name]
    G = s.Hq // s.Hkv
    across = triton.cdiv(G * s.Tq, options["BM"]), s.B * s.Hkv
    pieces = _pieces(s.Tk, G * s.Tq)
    piece = triton.cdiv(triton.cdiv(s.Tk, pieces), options["BN"]) * options["BN"]
    rows = s.B * s.Hq * s.Tq

    def empty(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    extrema, o0, o1 = empty(pieces, rows, 3), empty(pieces, rows, s.DV), empty(pieces, rows, s.DV)
    lead = q.shape[:-1]
    state = empty(*lead, 1), empty(*lead, 1), empty(*lead, 1), empty(*lead, s.DV), empty(*lead, s.DV)
    if rows:
        state_of_piece[(*across, pieces)](
            s.q, s.k, s.v, s.bias, s.mask, extrema, o0, o1,
            *s.q.stride()[:3], *s.k.stride()[:3], *s.v.stride()[:3], *_strides(s.bias), *_strides(s.mask),
            s.Hkv, G, s.Tq, s.Tk, upper or 0, piece, scale, **options,
        )  # fmt: skip
        merge_pieces[(rows,)](
            extrema, o0, o1, *state, rows, pieces,
            DV=s.DV, DVP=options["DVP"], num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return state


def _pieces(Tk: int, rows: int) -> int:
    """How many pieces the keys are cut into: by shapes of one head, so that bits do not depend on the batch (R1)."""
    return 1 if rows > 64 else triton.cdiv(max(Tk, 1), 512)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    left: int, right: int, scale: float, variant: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (total_q, Hq, Dv) and stats (Hq, total_q, 3) of packed sequences; -1 leaves a side of the window open."""
    shape = _packed(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k)
    o, stats = _forward(shape, *_window(left, right, max_q, max_k), scale, variant)
    return o[0].transpose(0, 1), stats[0]


def varlen_vjp(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, o: Tensor, stats: Tensor, do: Tensor,
    max_q: int, max_k: int, left: int, right: int, scale: float, variant: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = _packed(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k)
    do = do.transpose(0, 1).unsqueeze(0)
    dq, dk, dv, _ = _backward(shape, stats, do, *_window(left, right, max_q, max_k), scale, variant)
    dq, dk, dv = (x[0].transpose(0, 1).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv


def _bounds(offset: int | None, left: int, Tq: int, Tk: int) -> tuple[int | None, int | None]:
    """Query i sees keys j <= i + upper and j >= i + lower, brought into 32 bits."""
    upper = None if offset is None else min(max(offset, -Tq), Tk)
    lower = None if left < 0 else min(max((offset or 0) - left, -Tq), Tk)
    return upper, lower


def _window(left: int, right: int, max_q: int, max_k: int) -> tuple[int | None, int | None]:
    """The same relative to the last query and key of a sequence."""
    most = max_q + max_k
    return None if right < 0 else min(right, most), None if left < 0 else -min(left, most)


class _Shape:
    """The tensors with one batch axis and contiguous rows, as the kernels take them, and what follows from them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> None:
        self.q, self.k, self.v = (_rows(x.reshape(x.shape[:-3].numel(), *x.shape[-3:])) for x in (q, k, v))
        self.bias, self.mask = (None if x is None else _option(x, q.shape[:-3]) for x in (bias, mask))
        if self.mask is not None:
            self.mask = self.mask.view(torch.uint8)
        self.B, self.Hq, self.Tq, self.D = self.q.shape
        self.Hkv, self.Tk, self.DV = k.shape[-3], k.shape[-2], v.shape[-1]
        self.cu: tuple[Tensor | None, Tensor | None] = (None, None)
        self.sequences = self.B

    @property
    def packed(self) -> bool:
        return self.cu[0] is not None

    @property
    def rows(self) -> int:
        """Queries in a head of the tensor q."""
        return self.q.shape[2]

    def options(
        self, kernel: str, upper: int | None, lower: int | None, variant: str, target: "GPUTarget | None" = None
    ) -> dict[str, Any]:
        """Constants and options of a launch on the tensors' device, or on ``target``."""
        target = target or target_of(self.q.device)
        DP, DVP = (max(16, triton.next_power_of_2(d)) for d in (self.D, self.DV))
        BM, BN, warps, stages = _fitted(tiles(kernel, self.q.dtype, max(DP, DVP)), kernel, target)
        return {
            "VARIANT": variant, "CAUSAL": upper is not None, "WINDOW": lower is not None,
            "BIAS": self.bias is not None, "MASK": self.mask is not None, "VARLEN": self.cu[0] is not None,
            "D": self.D, "DP": DP, "DV": self.DV, "DVP": DVP, "BM": BM, "BN": BN,
            "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
        }  # fmt: skip


def _packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int
) -> _Shape:  # fmt: skip
    shape = _Shape(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)))
    shape.cu = (cu_seq_q, cu_seq_k)
    shape.sequences, shape.Tq, shape.Tk = cu_seq_q.shape[0] - 1, max_q, max_k
    return shape


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _option(x: Tensor, batch: torch.Size) -> Tensor:
    """bias or mask as (1 or B, 1 or Hq, 1 or Tq, 1 or Tk)."""
    x = x.reshape(*[1] * (len(batch) + 3 - x.ndim), *x.shape)
    if x.shape[:-3].numel() > 1:
        x = x.expand(*batch, *x.shape[-3:])
    return x.reshape(x.shape[:-3].numel(), *x.shape[-3:])


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Those of an option, 0 along axes that repeat."""
    return (0, 0, 0, 0) if x is None else tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))


def _launch(
    kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any], careful: dict[str, Any]
) -> None:  # fmt: skip
    """The kernel, and once more, CAREFUL, for the programs whose results are not finite."""
    if programs:
        flags = arguments[0].new_empty(programs, dtype=torch.int32)
        kernel[(programs,)](*arguments, flags, CAREFUL=False, **options)
        kernel[(programs,)](*arguments, flags, CAREFUL=True, **(options | careful | {"num_stages": 1}))


def _forward(
    s: _Shape, upper: int | None, lower: int | None, scale: float, variant: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if s.packed:  # tokens that no sequence has stay 0
        o = s.q.new_zeros((s.B, s.rows, s.Hq, s.DV)).transpose(1, 2)
    else:
        o = s.q.new_empty((s.B, s.Hq, s.rows, s.DV))
    stats = s.q.new_empty((s.B, s.Hq, s.rows, 3), dtype=torch.float32)
    options = s.options("forward", upper, lower, variant)
    n = triton.cdiv(s.Tq, options["BM"])
    _launch(
        attention_forward, n * s.sequences * s.Hq,
        (
            s.q, s.k, s.v, s.bias, s.mask, *s.cu, o, stats,
            *s.q.stride()[:3], *s.k.stride()[:3], *s.v.stride()[:3], *o.stride()[:3],
            *_strides(s.bias), *_strides(s.mask),
            s.Hq, s.Hkv, s.Tq, s.Tk, s.rows, n, upper or 0, lower or 0, scale,
        ), options, {"BN": min(32, options["BN"])},
    )  # fmt: skip
    return o, stats


def _backward(
    s: _Shape, stats: Tensor, do: Tensor, upper: int | None, lower: int | None, scale: float, variant: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    do = _rows(do.reshape(s.B, s.Hq, s.rows, s.DV))
    dq, dk, dv = ((torch.zeros_like if s.packed else torch.empty_like)(x) for x in (s.q, s.k, s.v))
    dbias = None if s.bias is None else s.bias.new_zeros(s.bias.shape, dtype=torch.float32)
    stats = stats.contiguous()
    rows = s.B * s.Hq * s.rows
    terms = s.q.new_empty((6, rows), dtype=torch.float32)
    places = s.q.new_empty((2, rows), dtype=torch.int32)
    options = s.options("dq", upper, lower, variant)
    inputs = (s.q, s.k, s.v, s.bias, s.mask)
    strides = (*s.q.stride()[:3], *s.k.stride()[:3], *s.v.stride()[:3])
    optional = (*_strides(s.bias), *_strides(s.mask))
    bounds = (upper or 0, lower or 0, scale)
    n = triton.cdiv(s.Tq, options["BM"])
    _launch(
        attention_dq, n * s.sequences * s.Hq,
        (
            *inputs, *s.cu, stats, do, dq, terms, places,
            *strides, *do.stride()[:3], *dq.stride()[:3], *optional,
            s.Hq, s.Hkv, s.Tq, s.Tk, s.rows, rows, n, *bounds,
        ), options, {"BN": min(32, options["BN"])},
    )  # fmt: skip
    options = s.options("dkv", upper, lower, variant)
    n = triton.cdiv(s.Tk, options["BN"])
    _launch(
        attention_dkv, n * s.sequences * s.Hkv,
        (
            *inputs, *s.cu, do, dk, dv, terms, places,
            *strides, *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *optional,
            s.Hq, s.Hkv, s.Tq, s.Tk, s.rows, rows, n, *bounds,
        ), options, {"BM": min(32, options["BM"])},
    )  # fmt: skip
    if s.bias is not None and dbias is not None and s.B * s.Hq * s.Tq * s.Tk:
        options = s.options("dbias", upper, lower, variant)
        over = [a == 1 and b > 1 for a, b in zip(s.bias.shape, (s.B, s.Hq, s.Tq, s.Tk), strict=True)]
        b, h, i, j = s.bias.shape
        ti, tj = triton.cdiv(i, options["BM"]), triton.cdiv(j, options["BN"])
        del options["BIAS"], options["VARLEN"]
        attention_dbias[(b * h * ti * tj,)](
            *inputs, do, dbias, terms, places, *strides, *do.stride()[:3], *optional, *_strides(dbias),
            s.B, s.Hq, s.Hkv, s.Tq, s.Tk, rows, *bounds, ti, tj, h, **options,
            **dict(zip(("OVER_B", "OVER_H", "OVER_I", "OVER_J"), over, strict=True)),
        )  # fmt: skip
    return dq, dk, dv, dbias


def instances(target: "GPUTarget") -> "Iterator[Instance]":
    """What :mod:`~sa_softmax.backends.torch._triton.compile_check` compiles: what takes the most registers."""
    for name in ("forward", "dq", "dkv"):
        for dtype in (torch.bfloat16, torch.float16):
            yield _instance(name, dtype, 128, "normalized", target)
    yield _instance("forward", torch.bfloat16, 128, "product", target)
    yield _instance("state", torch.bfloat16, 128, "both variants", target)


_KERNELS = {
    "forward": attention_forward, "dq": attention_dq, "dkv": attention_dkv, "dbias": attention_dbias,
    "state": state_of_piece,
}  # fmt: skip


def _instance(name: str, dtype: torch.dtype, d: int, variant: str, target: "GPUTarget") -> "Instance":
    from sa_softmax.backends.torch._triton.compile_check import Instance

    kernel = _KERNELS[name]
    x = torch.empty(2, 16, 4096, d, dtype=dtype, device="meta")
    options = _Shape(x, x, x).options(name, 0, None, variant, target) | {"CAREFUL": False}
    options |= {"OVER_B": True, "OVER_H": False, "OVER_I": False, "OVER_J": False}
    values = dict.fromkeys(("bias", "mask", "cu_q", "cu_k")) | {"flags": torch.int32, "places": torch.int32}
    values |= dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), dtype)
    values |= dict.fromkeys(("stats", "terms", "dbias", "extrema", "o0", "o1"), torch.float32)
    if name == "dbias":
        values["bias"] = torch.float32
    compiler = {key: options.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    values |= {"scale": 0.125} | options
    # Whatever is left is a stride or a size, of which multiples of 16 are compiled alike.
    arguments = {p.name: values.get(p.name, 4096) for p in kernel.params}
    label = f"{kernel.__name__} {variant}, {str(dtype).removeprefix('torch.')}, D = {d}, causal"
    return Instance(label, kernel, arguments, compiler)
