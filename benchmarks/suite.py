"""All figures, by group, and the machine that they were measured on."""

import importlib
import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata

from sa_softmax.benchmarks.measure import Figure, Progress

__all__ = ["GROUPS", "figures", "machine"]

GROUPS = {
    "rows": "the row operation: against torch.softmax, and as a custom op against onnxruntime's Softmax",
    "small": "one call on one short row: overhead",
    "attention": "against scaled_dot_product_attention",
    "memory": "peak of attention over a long sequence",
}


def figures(groups: Sequence[str], *, device: str, rounds: int, progress: Progress) -> Iterator[Figure]:
    """The figures of ``groups``, as they are measured.

    Args:
        groups: some of ``GROUPS``.
        device: "cpu" or "cuda".
        rounds: how many ratios each median is of.
        progress: from a title, a wrapper of the iteration over rounds.

    Raises:
        ValueError: an unknown group or device, fewer than one round, or CUDA where there is none.
    """
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"a group must be one of {', '.join(GROUPS)}; got {group!r}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    _check_device(device)
    for group in groups:
        module = importlib.import_module(f"sa_softmax.benchmarks.{group}")
        yield from getattr(module, group)(device, rounds, progress)


def _check_device(device: str) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda'; got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' needs a GPU that PyTorch can use; there is none. Leave it out for the CPU")


def machine(device: str) -> dict[str, str]:
    """What the figures depend on besides the code: processor, threads, what runs, versions."""
    import torch

    from sa_softmax.backends import torch as backend

    hardware = torch.cuda.get_device_name() if device == "cuda" else _processor()
    packages = ("sa-softmax", "sa-softmax-native", "numpy", "torch", "triton", "onnxruntime")
    return {
        "hardware": hardware,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "implementation": backend.implementation(device),
        "system": platform.platform(),
        "python": platform.python_version(),
    } | {name: _version(name) for name in packages}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
