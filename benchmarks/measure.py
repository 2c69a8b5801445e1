"""Ratios of times: all candidates of a figure take turns, so that what disturbs one disturbs its peer, too."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Call", "Clock", "Figure", "Progress", "cuda", "interleave", "ratios", "wall"]

Call = Callable[[], object]
Clock = Callable[[Call, int], float]
"""Seconds that ``count`` calls take."""
Progress = Callable[[str], Callable[[Any], Any]]
"""From a title, a wrapper of an iteration that shows how far it is."""

_SAMPLE = 5e-3  # seconds: calls that are shorter are timed several at a time
_PAUSE = 0.08  # seconds: threads of a pool spin for up to 50 ms (onnxruntime), and would take cores from the next call


@dataclass(frozen=True)
class Figure:
    """The time (or memory) of a candidate over that of its peer: median and quartiles of the ratios of all rounds."""

    group: str
    name: str
    shape: str
    peer: str
    ratio: float
    low: float
    high: float
    value: float
    """Median of the candidate itself, in ``unit``."""
    unit: str = "ms"

    @classmethod
    def of(
        cls, group: str, candidate: str, shape: str, peer: str, times: Mapping[str, list[float]], part: str = ""
    ) -> "Figure":
        """The figure of ``candidate`` against ``peer`` from what :func:`interleave` measured; ``part`` says of what."""
        low, middle, high = ratios(times[candidate], times[peer])
        name = f"{candidate} {part}" if part else candidate
        return cls(group, name, shape, peer, middle, low, high, 1e3 * statistics.median(times[candidate]))


def wall(call: Call, count: int) -> float:
    """The clock of a CPU."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def cuda(call: Call, count: int) -> float:
    """The clock of a CUDA device: events around the calls."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleave(
    calls: Mapping[str, Call], rounds: int, clock: Clock = wall, progress: Callable[[Any], Any] = iter
) -> dict[str, list[float]]:
    """Seconds per call of each candidate in each of ``rounds`` rounds; ``progress`` wraps the iteration over rounds.

    Each candidate runs before the first round, so that compilation and first touches of memory are not counted, and
    before each sample as often as in it: by then its threads are awake, and on processors of their own. Each round
    begins with another candidate.
    """
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(1, round(_SAMPLE / max(clock(call, 3) / 3, 1e-7)))
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in progress(range(rounds)):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            time.sleep(_PAUSE)
            clock(calls[name], counts[name])
            times[name].append(clock(calls[name], counts[name]) / counts[name])
    return times


def ratios(times: list[float], peer: list[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios round by round: lower, median, upper."""
    each = [a / b for a, b in zip(times, peer, strict=True)]
    if len(each) == 1:
        return each[0], each[0], each[0]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return low, middle, high
