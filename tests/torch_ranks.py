"""Tests that need several ranks, run by ``test_distributed_torch.py``:  python tests/torch_ranks.py FOLDER

The ranks are forked from one process, which has imported PyTorch for all of them, and meet through files in FOLDER.
Each rank writes FOLDER/NAME-RANK.json: for each test, what went wrong, or nothing.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed_cases import CASES, SLOPES, Case, distance_bias, example, problem
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sa_softmax import reference
from sa_softmax.backends.torch import distributed
from sa_softmax.backends.torch.distributed import decode, from_zigzag, ring_attention, to_zigzag
from sa_softmax.backends.zigzag import zigzag

BLOCK = distributed.BLOCK
TIMEOUT = 4  # seconds, of the groups whose ranks fail

# Tests of values.


def tensor(x: Any, **options: Any) -> Tensor:
    x = np.asarray(x)
    return torch.tensor(x.astype(np.float32), **options).bfloat16() if x.dtype.name == "bfloat16" else torch.tensor(x)


def array(x: Tensor) -> Any:
    x = x.detach()
    return x.float().numpy().astype("bfloat16") if x.dtype == torch.bfloat16 else x.numpy()


def values_and_gradients(case: Case, group: dist.ProcessGroup) -> None:
    distributed.BLOCK = case.block
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    p = problem(case, n).of_rank(rank)
    q, k, v = (tensor(x).requires_grad_() for x in (p.q, p.k, p.v))
    bias, mask = (None if x is None else tensor(x) for x in (p.bias, p.mask))
    given: Any = bias
    if case.bias == "function":
        given = partial(distance_bias, slopes=tensor(SLOPES.astype(np.float32)))
    elif bias is not None:
        given = bias.requires_grad_()
    positions = (tensor(p.q_positions[rank]), tensor(p.k_positions[rank])) if case.zigzag else None
    o = ring_attention(q, k, v, group=group, bias=given, mask=mask, positions=positions, **p.options)
    o.backward(tensor(p.do))
    p.check(o=array(o), dq=array(q.grad), dk=array(k.grad), dv=array(v.grad))
    if bias is not None and case.bias != "function":
        dbias = bias.grad
        if case.bias == "keys":  # each rank has the part of its queries
            dist.all_reduce(dbias, group=group)
        p.check(dbias=array(dbias))


def randn(*shape: int, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def decoding(variant: str, group: dist.ProcessGroup) -> None:
    """Slices of 1, 2, ... keys, the first empty, and in the second row some of them without a filled key."""
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    cuts = np.cumsum([0, *range(n)])
    mine, tk = slice(cuts[rank], cuts[rank + 1]), cuts[-1]
    q, k, v, bias = (
        randn(2, 4, 3, 8, seed=0),
        randn(2, 2, tk, 8, seed=1),
        randn(2, 2, tk, 6, seed=2),
        randn(4, 1, tk, seed=3),
    )
    filled = np.arange(tk) < np.array([tk, 1]).reshape(2, 1, 1, 1)
    k[1, :, 1:] = np.nan
    expected = reference.sa_attention(q, k, v, bias=bias, mask=filled, variant=variant)
    o = decode(
        tensor(q), tensor(k[:, :, mine]), tensor(v[:, :, mine]), group=group, variant=variant,
        bias=tensor(bias[..., mine]), mask=tensor(filled[..., mine]),
    )  # fmt: skip
    np.testing.assert_allclose(o, expected, rtol=0, atol=1e-14)


def dtensors(group: dist.ProcessGroup) -> None:
    """Over one dimension of a mesh of two, with batch sharded or repeated over the other; two do not divide 5 keys."""
    mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2), mesh_dim_names=("data", "sequence"))
    full = [tensor(randn(2, h, 5, 4, seed=seed)) for seed, h in enumerate((4, 2, 2))]
    expected = reference.sa_attention(*(x.numpy() for x in full), is_causal=True)
    do = tensor(randn(*expected.shape, seed=4))
    gradients = reference.sa_attention_vjp(*(x.numpy() for x in full), do.numpy(), is_causal=True)
    for data in (Shard(0), Replicate()):
        placements = (data, Shard(2))
        qkv = [distribute_tensor(x, mesh, placements).requires_grad_() for x in full]
        o = ring_attention(*qkv, is_causal=True)
        assert isinstance(o, DTensor)
        assert o.placements == placements
        assert o.shape == expected.shape
        np.testing.assert_allclose(o.full_tensor().detach(), expected, rtol=0, atol=1e-14)
        o.backward(distribute_tensor(do, mesh, placements))
        for x, gradient in zip(qkv, gradients, strict=False):
            assert x.grad.placements == placements
            np.testing.assert_allclose(x.grad.full_tensor(), gradient, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="q must be sharded along its sequence"):
        ring_attention(*(distribute_tensor(x, mesh, (Shard(0), Replicate())) for x in full))
    with pytest.raises(ValueError, match="k is a Tensor"):
        ring_attention(qkv[0], full[1], full[2])
    with pytest.raises(ValueError, match="mask must be this rank's part"):
        ring_attention(
            *qkv, mask=distribute_tensor(torch.ones(5, 5, dtype=torch.bool), mesh, (Replicate(), Replicate()))
        )


class Largest(TorchDispatchMode):
    """Notes the largest memory of a tensor that anything computes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


def memory(group: dist.ProcessGroup) -> None:
    """Nothing is larger than this rank's queries: neither the keys of all nor their scores are ever in one place."""
    distributed.BLOCK = 64
    q, k = (torch.randn(1, h, 256, 16, requires_grad=True) for h in (4, 2))
    with Largest() as largest:
        ring_attention(q, k, k, group=group, is_causal=True).sum().backward()
    assert largest.nbytes == 4 * q.numel(), largest.nbytes


# Tests of errors that all ranks can see.


def disagreement(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    q = torch.ones(1, 4, 8)
    with pytest.raises(ValueError, match="all ranks must agree"):
        ring_attention(q, q, q, group=group, variant=("normalized", "product")[rank % 2])
    with pytest.raises(ValueError, match=" has Dv "):
        ring_attention(q, q, torch.ones(1, 4, 3 + rank), group=group)


def refusals(group: dist.ProcessGroup) -> None:
    q = torch.ones(1, 4, 8)
    slopes = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient flows to what a bias function reads"):
        ring_attention(q, q, q, group=group, bias=lambda i, j: -slopes * abs(i - j))
    with pytest.raises(ValueError, match="positions must be one for each of the 4 queries"):
        ring_attention(q, q, q, group=group, positions=torch.arange(5))
    with pytest.raises(ValueError, match="bias must broadcast"):
        ring_attention(q, q, q, group=group, bias=torch.ones(4, 4))
    with pytest.raises(ValueError, match="decode has no gradient"):
        decode(q, q, q.clone().requires_grad_(), group=group)


def guide(group: dist.ProcessGroup) -> None:
    names: dict[str, Any] = {}
    exec(example("PyTorch"), names)
    x, positions = names["x"].double().numpy(), names["positions"]
    expected = reference.sa_attention(x, x, x, is_causal=True)[:, :, positions]
    np.testing.assert_allclose(array(names["o"]), expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(array(names["last"]), reference.sa_attention(x[..., -1:, :], x, x), rtol=0, atol=2e-6)


def order(group: dist.ProcessGroup) -> None:
    x = tensor(randn(2, 13, 3, seed=0))
    assert torch.equal(from_zigzag(to_zigzag(x, 4), 4), x)
    assert [part.tolist() for part in zigzag(8, 2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]


TESTS: dict[str, Callable[[dist.ProcessGroup], None]] = {
    **{case.name: partial(values_and_gradients, case) for case in CASES},
    "decode-normalized": partial(decoding, "normalized"),
    "decode-product": partial(decoding, "product"),
    "disagreement": disagreement,
    "refusals": refusals,
    "order": order,
    "memory": memory,
}


def run_all(rank: int) -> dict[str, str | None]:
    """All tests among four ranks, and, in two groups at a time, among two."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    groups = {"4": dist.group.WORLD, "2": pairs[rank // 2]}
    runs = {f"{name}-{n}": partial(test, group) for n, group in groups.items() for name, test in TESTS.items()}
    runs |= {"dtensors": partial(dtensors, dist.group.WORLD), "guide": partial(guide, dist.group.WORLD)}
    found: dict[str, str | None] = {}
    for name, test in runs.items():
        distributed.BLOCK = BLOCK
        try:
            test()
            dist.barrier()
        except Exception:
            found[name] = traceback.format_exc()
            break  # the ranks are out of step
        found[name] = None
    return found


# Ranks that fail.


def killed(rank: int) -> dict[str, Any]:
    """The second rank dies when it should send its keys."""
    if rank == 1:
        distributed.dist.batch_isend_irecv = lambda *_: os._exit(1)  # type: ignore[assignment]
    return _failure()


def hanging(rank: int) -> dict[str, Any]:
    """The second rank never starts the backward pass."""
    q = torch.ones(1, 4, 8, requires_grad=True)
    o = ring_attention(q, q, q)
    if rank == 1:
        time.sleep(4 * TIMEOUT)
        os._exit(1)
    return _failure(lambda: o.sum().backward())


def absent(rank: int) -> dict[str, Any]:
    """The second rank does not make the call at all."""
    if rank == 1:
        time.sleep(4 * TIMEOUT)
        os._exit(1)
    return _failure()


def _failure(call: Callable[[], Any] | None = None) -> dict[str, Any]:
    q = torch.ones(1, 4, 8)
    start = time.monotonic()
    try:
        call() if call is not None else ring_attention(q, q, q)
    except RuntimeError as error:
        return {"error": str(error), "seconds": time.monotonic() - start}
    return {"error": None, "seconds": time.monotonic() - start}


def main(folder: Path) -> None:
    scenarios: list[tuple[Callable[[int], Any], int, int]] = [
        (run_all, 4, 60), (killed, 2, TIMEOUT), (hanging, 2, TIMEOUT), (absent, 2, TIMEOUT)
    ]  # fmt: skip
    fork = multiprocessing.get_context("fork")
    for together in (scenarios[:1], scenarios[1:]):
        processes = [
            fork.Process(target=_rank, args=(folder, scenario, rank, n, seconds))
            for scenario, n, seconds in together
            for rank in range(n)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


def _rank(folder: Path, scenario: Callable[[int], Any], rank: int, n: int, seconds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{scenario.__name__}", rank=rank, world_size=n,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    found = scenario(rank)
    (folder / f"{scenario.__name__}-{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # a group whose ranks have died cannot be destroyed


if __name__ == "__main__":
    main(Path(sys.argv[1]))
