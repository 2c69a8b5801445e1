"""Sharded tensors (DTensor): each process computes the rows it holds, and what would cut a row is gathered first.

The operations run on local tensors between two differentiable conversions, so whatever implementation the device has
runs, and derivatives of any order hold. Tensors that are not sharded count as replicated.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from sa_softmax.backends.torch import _attention, _row

__all__ = ["sa_attention", "sa_softmax"]


def sa_softmax(x: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    """Sharded as ``x`` is, and replicated where that shards ``axis`` or holds partial sums."""
    x = _sharded(x, where)
    placements = [_kept(p) if _dim(p, x) != axis else Replicate() for p in x.placements]
    y = _row.sa_softmax(_local(x, x, placements), _local(where, x, placements), axis, variant)
    return _global(y, x, placements, x.shape, x.stride())


def sa_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, *options: Any
) -> Tensor:  # fmt: skip
    """Sharded over batch and heads as ``q`` is, and replicated otherwise.

    Heads stay sharded where every process then holds whole groups of them (A3).
    """
    q = _sharded(q, k, v, bias, mask)
    heads, placements, processes = q.ndim - 3, [], 1
    for i, p in enumerate(q.placements):
        if _dim(p, q) == heads and k.shape[-3] % (processes * q.device_mesh.size(i)) == 0:
            processes *= q.device_mesh.size(i)
            placements.append(p)
        else:
            placements.append(_kept(p) if _dim(p, q) < heads else Replicate())
    o = _attention.sa_attention(*(_local(x, q, placements) for x in (q, k, v, bias, mask)), *options)
    shape = (*q.shape[:-1], v.shape[-1])
    return _global(o.contiguous(), q, placements, shape, _contiguous(shape))


def _sharded(*tensors: Tensor | None) -> DTensor:
    """The first tensor on the mesh of whichever has one."""
    first = tensors[0]
    assert first is not None
    if isinstance(first, DTensor):
        return first
    mesh = next(x.device_mesh for x in tensors if isinstance(x, DTensor))
    return DTensor.from_local(first, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _kept(placement: Placement) -> Placement:
    # Exactly Shard: what derives from it interleaves shards, and Partial is not linear here.
    return placement if type(placement) is Shard else Replicate()


def _dim(placement: Placement, x: Tensor) -> int:
    """The axis that ``placement`` shards, or -1."""
    return placement.dim % x.ndim if type(placement) is Shard else -1


def _local(x: Tensor | None, like: DTensor, placements: Sequence[Placement]) -> Any:
    """This process's part of ``x``, whose axes are the last of ``like`` or broadcast to them."""
    if x is None:
        return None
    own: list[Placement] = []
    gradient: list[Placement] = []
    for p in placements:
        axis = _dim(p, like) - like.ndim + x.ndim
        if type(p) is Shard and axis >= 0 and (x.shape[axis] != 1 or like.shape[p.dim] == 1):
            own.append(Shard(axis))
            gradient.append(Shard(axis))
        else:
            own.append(Replicate())
            gradient.append(Partial() if type(p) is Shard else Replicate())  # each process has seen its part only
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, like.device_mesh, [Replicate()] * len(own), run_check=False)
    return x.redistribute(placements=own).to_local(grad_placements=gradient)


def _global(
    x: Tensor, like: DTensor, placements: Sequence[Placement], shape: Sequence[int], stride: Sequence[int]
) -> Tensor:
    mesh = like.device_mesh
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=tuple(shape), stride=tuple(stride))


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))
