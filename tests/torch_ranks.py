"""Tests that need several ranks, run by ``test_distributed_torch.py``:  python tests/torch_ranks.py FOLDER

The ranks are forked from one process, which has imported PyTorch for all of them, and meet through files in FOLDER. Each
writes what it found to FOLDER/SCENARIO-RANK.json.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from distributed_cases import CASES, Case, distance_bias, problem
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sa_softmax import reference
from sa_softmax.backends.torch import distributed
from sa_softmax.backends.torch.distributed import decode, from_zigzag, ring_attention, to_zigzag, zigzag

TIMEOUT = 5  # seconds, of the groups whose ranks fail


def tensor(x: Any) -> Tensor:
    x = np.asarray(x)
    return torch.tensor(x.astype(np.float32)).bfloat16() if x.dtype.name == "bfloat16" else torch.tensor(x)


def array(x: Tensor) -> Any:
    x = x.detach()
    return x.float().numpy().astype("bfloat16") if x.dtype == torch.bfloat16 else x.numpy()


def run_case(case: Case, group: dist.ProcessGroup) -> None:
    distributed.BLOCK = case.block
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    p = problem(case, n)
    i, j = p.q_positions[rank], p.k_positions[rank]
    mine_q, mine_k = (
        slice(sum(map(len, parts[:rank])), sum(map(len, parts[: rank + 1]))) for parts in (p.q_positions, p.k_positions)
    )
    q, k, v = (tensor(x[:, :, s]).requires_grad_() for x, s in ((p.q, mine_q), (p.k, mine_k), (p.v, mine_k)))
    rows = lambda x: x[..., mine_q, :] if x.shape[-2] > 1 else x  # noqa: E731
    bias = None if p.bias is None else tensor(rows(p.bias)).requires_grad_()
    mask = None if p.mask is None else tensor(rows(p.mask))
    slopes = torch.tensor(distributed_slopes(), dtype=torch.float64)
    given = (lambda i, j: distance_bias(i, j, slopes)) if case.bias == "function" else bias
    o = ring_attention(
        q, k, v, group=group, bias=given, mask=mask, positions=(tensor(i), tensor(j)), **p.options
    )
    o.backward(tensor(p.do[:, :, mine_q]))
    p.at(mine_q, mine_k).check(o=array(o), dq=array(q.grad), dk=array(k.grad), dv=array(v.grad))
    if bias is not None:
        dbias = bias.grad
        if bias.shape[-2] == 1:  # each rank has the part of its queries
            dist.all_reduce(dbias, group=group)
        p.at(mine_q, mine_k).check(dbias=array(dbias))
