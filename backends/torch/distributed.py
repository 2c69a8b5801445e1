"""SA attention whose sequence is sharded over a process group, exact to the reference, forward and backward.

Each rank keeps its queries, and the keys and values go around the ring, point to point; what a rank knows of the keys
it has seen is the partial state of spec clause A11. The backward pass goes around once more, with the gradients of keys
and values travelling behind them: what it needs of a whole row is D = dO O and S = dO (O0 / l), since S = sum_j p_j dO
v_j = dO sum_j p_j v_j, and the keys at the extrema, all of them known from the forward pass.

No rank ever holds more keys than its own, the ones at hand and the ones that arrive, nor more scores than one tile:
memory per rank falls as 1 / N. The process group's timeout bounds how long a rank waits for one that has failed; the
error says for whom it waited, and when.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from sa_softmax._validate import DTYPES, VARIANTS, ArrayKind, check_attention, check_positions, dtype_name
from sa_softmax.backends.torch import _attention, _row
from sa_softmax.backends.torch._state import (
    AttentionState,
    attention_from_state,
    attention_state,
    merge_states,
    state_of,
)
from sa_softmax.backends.zigzag import zigzag

__all__ = ["decode", "from_zigzag", "ring_attention", "to_zigzag"]

BLOCK = 512  # queries and keys of a tile, at most
BiasFunction = Callable[[Tensor, Tensor], Tensor]
Positions = Tensor | tuple[Tensor | None, Tensor | None] | None

_TORCH = ArrayKind(Tensor, "torch.as_tensor", device=lambda x: x.device)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    variant: str = "normalized",
    bias: Tensor | BiasFunction | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    positions: Positions = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`sa_attention` over a sequence of which each rank of ``group`` holds a part, called by all of them.

    The parts may differ in length, and may be empty. Tk below is the length of all parts together, in the order of
    ranks. Alternatively q, k and v are DTensors, sharded along the sequence over one dimension of their mesh, which
    then is the group, and over batch or heads along others; so is the result.

    Args:
        q: (..., Hq, Tq_local, D). Hq is a multiple of Hkv.
        k: (..., Hkv, Tk_local, D).
        v: (..., Hkv, Tk_local, Dv).
        group: the process group; the default group if not given.
        variant: "normalized" or "product".
        bias: a tensor that broadcasts to (..., Hq, Tq_local, Tk), the columns of all keys for this rank's queries; or a
            function of positions i (Tq', 1) and j (1, Tk') whose value broadcasts to (..., Hq, Tq', Tk'), called for
            one tile at a time. Gradients flow to the tensor, not to what the function reads.
        mask: boolean, broadcasts to (..., Hq, Tq_local, Tk); True where a key participates. A mask of padding keys is
            (..., 1, 1, Tk).
        is_causal: a query sees the keys whose position is not after its own.
        positions: (T_local,) integers, the place in the sequence of each of this rank's queries and keys, or a pair (of
            queries, of keys). By default they follow on from rank to rank. Give ``zigzag(T, N)[rank]`` of
            ``sa_softmax.backends.zigzag`` to balance a causal mask.
        scale: factor of the scores, 1/sqrt(D) by default.

    Returns:
        (..., Hq, Tq_local, Dv) in the dtype of ``q``. A query without participating keys gets 0.

    Raises:
        TypeError, ValueError: as :func:`sa_attention`; ranks that disagree about shapes, dtypes or options; a bias
            function that needs a gradient.
        RuntimeError: another rank failed, or did not answer within the timeout of the group.

    Differentiable once, in reverse mode. At tied extremal scores one of the tied keys gets the whole term (clause A8).

    Source: spec clauses A, A11 in particular.
    """
    if isinstance(q, DTensor):
        mesh, dim = _sequence_dimension(q, k, v)
        for name, x in (("bias", bias), ("mask", mask)):
            if isinstance(x, DTensor):
                raise ValueError(f"{name} must be this rank's part, a plain tensor; got a DTensor. Call its to_local()")
        parts: list[Any] = [q, k, v]
        o = ring_attention(
            *(x.to_local() for x in parts), group=mesh.get_group(dim), variant=variant, bias=bias, mask=mask,
            is_causal=is_causal, positions=positions, scale=scale,
        )  # fmt: skip
        shape = torch.Size((*q.shape[:-1], v.shape[-1]))
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(o, mesh, q.placements, shape=shape, stride=stride)
    q, k, v = (_attention.autocast(x) for x in (q, k, v))
    scale = _check(q, k, v, k.shape[-2], variant, None, None, is_causal, scale)
    check_positions(_TORCH, positions, q.shape[-2], k.shape[-2])
    function = bias if callable(bias) else None
    bias = None if callable(bias) else bias
    if function is not None:  # refuse before the others wait
        _value(function, *torch.zeros(2, 1, 1, dtype=torch.long, device=q.device))
    ring = _Ring.meet(q, k, v, group, variant, is_causal, positions, scale, function)
    _check(q, k, v, ring.starts[-1], variant, bias, mask, is_causal, scale)
    bias, mask = (None if x is None else x.reshape((1,) * (q.ndim - x.ndim) + x.shape) for x in (bias, mask))
    return _RingAttention.apply(q, k, v, bias, mask, ring)  # type: ignore[no-untyped-call]


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    variant: str = "normalized",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of a few queries, which every rank has, over a cache of keys of which each rank holds a slice.

    Each rank reduces its slice to the state of clause A11, and the states, 3 + 2 Dv numbers for each query, are
    gathered and merged in the order of ranks: every rank gets the same result. For inference, under ``torch.no_grad``.

    Args:
        q: (..., Hq, Tq, D), the same on every rank.
        k: (..., Hkv, Tk_local, D); slices may differ in length, and may be empty.
        v: (..., Hkv, Tk_local, Dv).
        group: the process group; the default group if not given.
        variant: "normalized" or "product".
        bias: broadcasts to (..., Hq, Tq, Tk_local).
        mask: boolean, broadcasts to (..., Hq, Tq, Tk_local); False where the cache is not filled yet, or where
            causality forbids it.
        scale: factor of the scores, 1/sqrt(D) by default.

    Returns:
        (..., Hq, Tq, Dv) in the dtype of ``q``.

    Raises:
        TypeError, ValueError: as :func:`sa_attention`; a tensor that requires a gradient.
        RuntimeError: another rank failed, or did not answer within the timeout of the group.
    """
    q, k, v = (_attention.autocast(x) for x in (q, k, v))
    scale = _check(q, k, v, k.shape[-2], variant, bias, mask, False, scale)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias)):
        raise ValueError("decode has no gradient. Call it under torch.no_grad(), or train with ring_attention")
    state = torch.cat(attention_state(q, k, v, bias, mask, None, scale), -1)
    states = _all_gather(state, group, "for the states of all ranks")
    dv = v.shape[-1]
    merged, *rest = (AttentionState(*torch.split(x, [1, 1, 1, dv, dv], -1)) for x in states)
    for other in rest:
        merged = merge_states(merged, other)
    return attention_from_state(merged, variant=variant).to(q.dtype)


def to_zigzag(x: Tensor, ranks: int, axis: int = -2) -> Tensor:
    """``x``, the whole sequence, in zig-zag order: the first ``len(zigzag(T, N)[0])`` are rank 0's."""
    return x.index_select(axis, torch.as_tensor(np.concatenate(zigzag(x.shape[axis], ranks)), device=x.device))


def from_zigzag(x: Tensor, ranks: int, axis: int = -2) -> Tensor:
    """The inverse of :func:`to_zigzag`."""
    order = np.argsort(np.concatenate(zigzag(x.shape[axis], ranks)))
    return x.index_select(axis, torch.as_tensor(order, device=x.device))


def _check(
    q: Tensor, k: Tensor, v: Tensor, tk: int, variant: str, bias: Tensor | None, mask: Tensor | None, is_causal: bool,
    scale: float | None,
) -> float:  # fmt: skip
    """The checks of attention, as if this rank had ``tk`` keys."""
    if isinstance(k, Tensor) and isinstance(v, Tensor) and min(k.ndim, v.ndim) >= 3 and k.shape[-2] == v.shape[-2]:
        k, v = (x.new_empty(()).expand(*x.shape[:-2], tk, x.shape[-1]) for x in (k, v))
    return check_attention(
        _TORCH, q, k, v, variant=variant, bias=bias, mask=mask, is_causal=is_causal, q_offset=0, scale=scale
    )


def _sequence_dimension(q: DTensor, k: Any, v: Any) -> tuple[Any, int]:
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, DTensor) or x.device_mesh != q.device_mesh or x.placements != q.placements:
            what = f"{x.placements} over {x.device_mesh}" if isinstance(x, DTensor) else f"a {type(x).__name__}"
            raise ValueError(f"q, k and v must be DTensors of one mesh and placement, {q.placements}; {name} is {what}")
    dims = [dim for dim, placement in enumerate(q.placements) if placement == Shard(q.ndim - 2)]
    others = [p for dim, p in enumerate(q.placements) if dim not in dims]
    if len(dims) != 1 or any(p.is_partial() or p == Shard(q.ndim - 1) for p in others):
        raise ValueError(
            f"q must be sharded along its sequence, Shard({q.ndim - 2}), over one dimension of the mesh, and over "
            f"batch or heads along others; got {q.placements}. Redistribute it"
        )
    return q.device_mesh, dims[0]


@contextmanager
def _waiting(group: dist.ProcessGroup | None, what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} waited {what} in vain: a rank has failed, or "
            "has not made the same call within the group's timeout. Look at its own error first; the process group is "
            "not usable any more"
        ) from error


class _Blocks:
    """A local length in blocks of at most BLOCK, an even number, so that the two chunks of a zig-zag fall apart."""

    def __init__(self, positions: Tensor, device: torch.device) -> None:
        length = len(positions)
        size = max(1, -(-length // max(2, 2 * -(-length // (2 * BLOCK)))))
        edges = [*range(0, length, size), length]
        self.slices = [slice(a, b) for a, b in pairwise(edges)]
        self.range = [(int(positions[s].min()), int(positions[s].max())) for s in self.slices]
        self.positions = positions.to(device)


@dataclass
class _Ring:
    """What a rank knows of the others, agreed upon before the first step."""

    group: dist.ProcessGroup | None
    rank: int
    n: int
    variant: str
    is_causal: bool
    scale: float
    bias: BiasFunction | None
    starts: list[int]  # of each rank's keys among all, and their number
    queries: _Blocks
    keys: list[_Blocks]

    @classmethod
    def meet(
        cls, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None, variant: str, is_causal: bool,
        positions: Positions, scale: float, bias: BiasFunction | None,
    ) -> "_Ring":  # fmt: skip
        """Exchange lengths and positions, and see that all ranks ask for the same."""
        rank, n = dist.get_rank(group), dist.get_world_size(group)
        mine = positions if isinstance(positions, tuple) else (positions, positions)
        agreed = {
            "batch axes": q.shape[:-3].numel(), "axes": q.ndim, "Hq": q.shape[-3], "Hkv": k.shape[-3],
            "D": q.shape[-1], "Dv": v.shape[-1], "dtype": DTYPES.index(dtype_name(q)),
            "variant": VARIANTS.index(variant), "is_causal": is_causal, "bias function": bias is not None,
            "positions of queries": mine[0] is not None, "positions of keys": mine[1] is not None,
            "scale": int(np.float64(scale).view(np.int64)),
        }  # fmt: skip
        header = torch.tensor([q.shape[-2], k.shape[-2], *map(int, agreed.values())], device=q.device)
        headers = [x.tolist() for x in _all_gather(header, group, "for the shapes of all ranks")]
        for other, values in enumerate(headers):
            for name, own, its in zip(agreed, headers[rank][2:], values[2:], strict=True):
                if own != its:
                    raise ValueError(f"all ranks must agree; rank {rank} has {name} {own}, rank {other} has {its}")
        tq, tk = zip(*(values[:2] for values in headers), strict=True)
        starts = [sum(tk[:r]) for r in range(n + 1)]
        first = sum(tq[:rank])
        i = torch.arange(first, first + tq[rank]) if mine[0] is None else mine[0].long().cpu()
        if mine[1] is None:
            js: Sequence[Tensor] = [torch.arange(a, b) for a, b in pairwise(starts)]
        else:
            padded = mine[1].new_zeros(max(tk), dtype=torch.long)
            padded[: tk[rank]] = mine[1]
            gathered = _all_gather(padded, group, "for the positions of all ranks")
            js = [x[:length].cpu() for x, length in zip(gathered, tk, strict=True)]
        keys = [_Blocks(j, q.device) for j in js]
        return cls(group, rank, n, variant, is_causal, scale, bias, starts, _Blocks(i, q.device), keys)

    def exchange(self, tensors: Sequence[Tensor], step: int, what: str, tag: int) -> "_Arrival":
        """Start to send ``tensors`` to the next rank, and to receive what the previous one has at the same time."""
        source = (self.rank - step - 1) % self.n
        length = self.starts[source + 1] - self.starts[source]
        arriving = [x.new_empty((*x.shape[:-2], length, x.shape[-1])) for x in tensors]
        previous, following = ((self.rank + by) % self.n for by in (-1, 1))
        operations = []
        for i, (x, y) in enumerate(zip(tensors, arriving, strict=True), start=tag):
            if x.numel() > 0:
                operations.append(dist.P2POp(dist.isend, x, group=self.group, tag=i, group_peer=following))
            if y.numel() > 0:
                operations.append(dist.P2POp(dist.irecv, y, group=self.group, tag=i, group_peer=previous))
        what = f"in step {step + 1} of {self.n} for {what} from rank {previous}"
        with _waiting(self.group, what):
            works = dist.batch_isend_irecv(operations) if operations else []
        return _Arrival(self.group, what, works, arriving)

    def steps(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Each rank's keys and values as they come by: (step, source, k, v). The next ones travel meanwhile."""
        held = [k.contiguous(), v.contiguous()]
        for step in range(self.n):
            arrival = self.exchange(held, step, "keys", 0) if step + 1 < self.n else None
            yield step, (self.rank - step) % self.n, held[0], held[1]
            if arrival is not None:
                held = arrival.wait()

    def tiles(self, source: int) -> Iterator["_Tile"]:
        """The tiles of this rank's queries and ``source``'s keys, but for those that causality excludes whole."""
        queries, keys = self.queries, self.keys[source]
        for rows, (first_i, last_i) in zip(queries.slices, queries.range, strict=True):
            for columns, (first_j, last_j) in zip(keys.slices, keys.range, strict=True):
                if self.is_causal and first_j > last_i:
                    continue
                i, j = queries.positions[rows].unsqueeze(-1), keys.positions[columns].unsqueeze(0)
                seen = j <= i if self.is_causal and last_j > first_i else None
                first = self.starts[source]
                yield _Tile(rows, columns, slice(first + columns.start, first + columns.stop), i, j, seen)


@dataclass
class _Arrival:
    group: dist.ProcessGroup | None
    what: str
    works: list[Any]
    tensors: list[Tensor]

    def wait(self) -> list[Tensor]:
        with _waiting(self.group, self.what):
            for work in self.works:
                work.wait()
        return self.tensors


class _Tile(NamedTuple):
    rows: slice  # of this rank's queries
    columns: slice  # of the keys at hand
    of_all: slice  # the same among all keys
    i: Tensor
    j: Tensor
    seen: Tensor | None

    def of(self, x: Tensor | None) -> Tensor | None:
        """The tile of a bias or mask; axes along which it repeats stay 1."""
        if x is None:
            return None
        x = x[..., self.rows, :] if x.shape[-2] > 1 else x
        return x[..., self.of_all] if x.shape[-1] > 1 else x

    def scores(
        self, ring: _Ring, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> _attention._Scores:
        added = self.of(bias) if ring.bias is None else _value(ring.bias, self.i, self.j)
        keep = self.of(mask)
        if self.seen is not None:
            keep = self.seen if keep is None else self.seen & keep
        return _attention._scores(q, k, v, added, keep, None, -1, ring.scale)


class _RingAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, ring: _Ring
    ) -> Tensor:
        with _attention._no_autocast(q.device):
            state, at_lo, at_hi = _fold(ring, q, k, v, bias, mask)
            o = attention_from_state(state, variant=ring.variant)
            mean = state.o0 / torch.where(state.l == 0, 1, state.l)
        ctx.ring = ring
        # o before it is rounded, for D.
        ctx.save_for_backward(q, k, v, bias, mask, state.m, state.l, state.lo, at_lo, at_hi, o, mean)
        return o.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        ring, needs_dbias = ctx.ring, ctx.needs_input_grad[3]
        q, k, v, bias, mask, m, l, lo, at_lo, at_hi, o, mean = ctx.saved_tensors  # noqa: E741
        with _attention._no_autocast(q.device):
            # A query without keys sends nothing, whatever it is sent (A6).
            do = torch.where(l == 0, 0, do.to(o.dtype))
            D, S = ((do * x).sum(-1, keepdim=True) for x in (o, mean))
            whole = _Rows(m, l, lo, at_lo, at_hi, D, S)
            dq = torch.zeros_like(q, dtype=o.dtype)
            dbias = torch.zeros_like(bias, dtype=o.dtype) if needs_dbias else None
            arrival = None
            for step, source, k_, v_ in ring.steps(k, v):
                dkv = [torch.zeros_like(x, dtype=o.dtype) for x in (k_, v_)]
                for tile in ring.tiles(source):
                    _backward_of_tile(ring, tile, q, k_, v_, bias, mask, do, whole, dq, dkv[0], dkv[1], dbias)
                if arrival is not None:  # what the ranks before have added to the gradients of these keys
                    dkv = [x + y for x, y in zip(arrival.wait(), dkv, strict=True)]
                if ring.n > 1:
                    arrival = ring.exchange(dkv, step, "gradients of keys", 2)
            dk, dv = dkv if arrival is None else arrival.wait()
        if dbias is not None:
            dbias = dbias.to(bias.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, None, None


class _Rows(NamedTuple):
    """What the backward pass must know of each query's row of scores, (..., Hq, Tq, 1)."""

    m: Tensor
    l: Tensor  # noqa: E741
    lo: Tensor
    at_lo: Tensor  # the key of the minimum and that of the maximum, among all
    at_hi: Tensor
    D: Tensor
    S: Tensor


def _fold(
    ring: _Ring, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None
) -> tuple[AttentionState, Tensor, Tensor]:
    """The state over all keys, and which of them are at the extrema."""
    c = torch.promote_types(q.dtype, torch.float32)
    one, out = (*q.shape[:-1], 1), (*q.shape[:-1], v.shape[-1])
    m, l, lo = (q.new_full(one, value, dtype=c) for value in (-math.inf, 0, math.inf))  # noqa: E741
    state = AttentionState(m, l, lo, q.new_zeros(out, dtype=c), q.new_zeros(out, dtype=c))
    at_lo, at_hi = (torch.zeros(one, dtype=torch.long, device=q.device) for _ in range(2))
    for _, source, k_, v_ in ring.steps(k, v):
        for tile in ring.tiles(source):
            q_b, k_b, v_b = q[..., tile.rows, :], k_[..., tile.columns, :], v_[..., tile.columns, :]
            s = tile.scores(ring, q_b, k_b, v_b, bias, mask)
            before = AttentionState(*(x[..., tile.rows, :] for x in state))
            new_keys = state_of(s, q_b, k_b)
            for at, fill, argument, is_new in (
                (at_lo, math.inf, torch.argmin, new_keys.lo < before.lo),
                (at_hi, -math.inf, torch.argmax, new_keys.m > before.m),
            ):
                key = tile.of_all.start + argument(torch.where(s.on, s.z, fill), -1, keepdim=True)
                at[..., tile.rows, :] = torch.where(is_new, key, at[..., tile.rows, :])
            for x, merged in zip(state, merge_states(before, new_keys), strict=True):
                x[..., tile.rows, :] = merged
    return state, at_lo, at_hi


def _backward_of_tile(
    ring: _Ring, tile: _Tile, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, do: Tensor,
    whole: _Rows, dq: Tensor, dk: Tensor, dv: Tensor, dbias: Tensor | None,
) -> None:  # fmt: skip
    """Add a tile's part to dq, dk, dv and dbias."""
    q, do = q[..., tile.rows, :], do[..., tile.rows, :]
    k, v = k[..., tile.columns, :], v[..., tile.columns, :]
    s = tile.scores(ring, q, k, v, bias, mask)
    do_ = _attention._fold(do, k)
    g = _attention._unfold(do_ @ s.v.mT, q)
    rows = _Rows(*(x[..., tile.rows, :] for x in whole))
    y, dx = _vjp(ring.variant, s.z, s.on, g, tile.of_all.start, rows)
    dx_ = _attention._fold(dx, k)
    # dx carries the NaN of participating entries, so what multiplies it may drop the non-finite of the others.
    dq[..., tile.rows, :] += _attention._unfold(ring.scale * (dx_ @ _attention._finite(s.k)), q)
    dk[..., tile.columns, :] += ring.scale * (dx_.mT @ _attention._finite(s.q))
    dv[..., tile.columns, :] += _attention._weigh(_attention._fold(y, k).mT, _attention._fold(s.on, k).mT, do_)
    target = tile.of(dbias)
    if target is not None:
        target += dx.sum_to_size(target.shape)


def _vjp(variant: str, z: Tensor, on: Tensor, g: Tensor, first: int, rows: _Rows) -> tuple[Tensor, Tensor]:
    """y, and the gradient of the scores, by clauses G1 and G2, for rows of which a tile is the part from key ``first``.

    The extremal terms go to the keys that the forward pass noted: scores that are computed again need not be equal to
    the last bit.
    """
    m, l, lo, at_lo, at_hi, D, S = rows  # noqa: E741
    p = torch.where(on, torch.exp(z - m) / torch.where(l == 0, 1, l), 0)
    if variant == "product":
        y = z * p  # first, because g * z may overflow where p, and with it the gradient, is 0
        return y, torch.where(on, (g * y - p * D) + g * p, 0)
    clamped, _, unit, R = _row._range(lo, m)
    a = (z * unit - clamped * unit) / R
    key = torch.arange(first, first + z.shape[-1], device=z.device)
    extremal = torch.where((key == at_lo) & (lo < 0), D - S, 0) - torch.where((key == at_hi) & (m > 0), D, 0)
    return torch.where(on, a * p, 0), torch.where(on, p * (g * a - D) + (g * p + extremal) / R * unit, 0)


def _value(bias: BiasFunction, i: Tensor, j: Tensor) -> Tensor:
    with torch.enable_grad():
        value = bias(i, j)
    if value.requires_grad:
        raise ValueError("no gradient flows to what a bias function reads. Detach it, or pass the bias as a tensor")
    return value


def _all_gather(x: Tensor, group: dist.ProcessGroup | None, what: str) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    with _waiting(group, what):
        dist.all_gather(parts, x, group=group)
    return parts
