"""Peak memory of attention over long sequences, each candidate in a process of its own.

``python -m sa_softmax.benchmarks.memory CANDIDATE PASS DEVICE LENGTH`` prints what :func:`mebibytes` reads.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sa_softmax.backends.torch import sa_attention
from sa_softmax.benchmarks.attention import inputs
from sa_softmax.benchmarks.measure import Call, Figure, Progress
from sa_softmax.benchmarks.shapes import MEMORY, AttentionShape

__all__ = ["mebibytes", "memory"]

_PASSES = ("forward", "forward + backward")


def memory(device: str, rounds: int, progress: Progress) -> Iterator[Figure]:
    """Both passes of the normalized variant against SDPA; one run each, since memory is not noisy."""
    if device == "cpu" and sys.platform != "linux":
        raise ValueError(f"the peak of the resident set can be measured on Linux only; this is {sys.platform}")
    for name in _PASSES:
        peaks = {
            candidate: mebibytes(candidate, name, device, MEMORY.length)
            for candidate in progress(f"memory {MEMORY}, {name}")(("SDPA", "normalized"))
        }
        ratio = peaks["normalized"] / peaks["SDPA"]
        label = f"normalized {name}, full, float32"
        yield Figure("memory", label, str(MEMORY), "SDPA", ratio, ratio, ratio, peaks["normalized"], "MiB")


def mebibytes(candidate: str, part: str, device: str, length: int, **environment: str) -> float:
    """The MiB by which memory grows at its peak during one call, in a process with these variables.

    Counted are the resident set on Linux, allocations on CUDA; not the inputs, nor all that a short call loads.
    ``candidate`` is "SDPA" or "normalized", ``part`` "forward" or "forward + backward".
    """
    command = [sys.executable, "-m", "sa_softmax.benchmarks.memory", candidate, part, device, str(length)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    return float(ran.stdout)


def _run(candidate: str, part: str, shape: AttentionShape, device: str) -> Call:
    q, k, v, do = inputs(shape, torch.float32, device)

    def attend() -> Tensor:
        return scaled_dot_product_attention(q, k, v) if candidate == "SDPA" else sa_attention(q, k, v)

    if part == "forward":
        return torch.no_grad()(attend)
    return lambda: torch.autograd.grad(attend(), (q, k, v), do)


def _reset_peak(device: str) -> float:
    """MiB in use now, from which the peak starts again."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated()) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> float:
    return float(torch.cuda.max_memory_allocated()) / 2**20 if device == "cuda" else _status("VmHWM")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _main(candidate: str, part: str, device: str, length: str) -> None:
    shape = replace(MEMORY, length=int(length))
    _run(candidate, part, replace(shape, length=256), device)()
    call = _run(candidate, part, shape, device)
    before = _reset_peak(device)
    result = call()
    print(_peak(device) - before)
    del result


if __name__ == "__main__":
    _main(*sys.argv[1:])
