"""When does the ring's communication hide behind its compute?  python docs/figures/ring.py

Prints the tables of docs/distributed.md, whose picture is drawn here too. The model: N devices hold T / N queries and
keys each. In each of the N steps of a pass a device computes its queries against the keys at hand, of which a zig-zag
causal mask leaves half, while the next keys arrive:

    compute(step) = flops(step) / rate        flops(step) = Hq (T / N)^2 / 2 * (4 D forward, 10 D backward)
    link(step)    = bytes(step) / bandwidth + latency
    pass          = (N - 1) max(compute, link) + compute, and backward once more the link, which brings dK and dV home
    efficiency    = compute / (what forward and backward take)

Bytes of a step: K and V in 16 bits forward; backward the same, and dK and dV in float32. The model has no contention,
no overlap of passes with the rest of the layer, and no loss of rate in small tiles.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

__all__ = [
    "H100",
    "Device",
    "Pass",
    "efficiencies",
    "efficiency",
    "hidden_from",
    "one_pass",
    "ring",
    "step",
    "thresholds",
]


class Device(NamedTuple):
    """Rates of SA attention in FLOP/s, counted as FlashAttention does: 4 D a pair forward, 10 D backward."""

    name: str
    forward: float
    backward: float


# An assumption, not a measurement: FlashAttention-3's published rates at D = 128 and T = 16k, and a forward pass of the
# normalized variant that takes 1.33 times as long, for its third matrix product. Backward has the same five.
H100 = Device("H100, assumed", 648e12 / 1.33, 561e12)
# Measured by measure_ring.py, one device, float32, for one core of the machine that made the tables.
CPU = Device("one CPU core, measured", 24.9e9, 23.6e9)

# Bytes per second and direction, as published; nothing here was measured.
LINKS = {"NVLink 4": 450e9, "ICI (TPU v5p, one link)": 90e9, "PCIe 5 x16": 63e9, "InfiniBand NDR": 50e9}
ETHERNET = {"10 Gbit Ethernet": 1.25e9}
LATENCY = 10e-6  # seconds a step, assumed

HEADS, KV_HEADS, D = 32, 8, 128  # of one layer; batch 1
LENGTHS = [2**n for n in range(15, 21)]


class Pass(NamedTuple):
    """Seconds of a whole pass: of its compute alone, and with what it waits for the link."""

    compute: float
    taken: float


def one_pass(device: Device, bandwidth: float, length: int, n: int, *, backward: bool) -> Pass:
    """A pass over a sequence of ``length`` on ``n`` devices."""
    compute, link = step(device, bandwidth, length / n, backward=backward)
    homeward = link if backward else 0
    return Pass(n * compute, (n - 1) * max(compute, link) + compute + homeward)


def step(device: Device, bandwidth: float, part: float, *, backward: bool) -> tuple[float, float]:
    """Seconds of compute and of the link, for ``part`` queries and keys on each device."""
    rate, flops = (device.backward, 10 * D) if backward else (device.forward, 4 * D)
    size = 2 * 2 + (2 * 4 if backward else 0)
    compute = HEADS * part**2 / 2 * flops / rate
    return compute, KV_HEADS * part * D * size / bandwidth + LATENCY


def efficiency(device: Device, bandwidth: float, length: int, n: int) -> float:
    """The share of forward and backward together that is compute."""
    passes = [one_pass(device, bandwidth, length, n, backward=backward) for backward in (False, True)]
    return sum(p.compute for p in passes) / sum(p.taken for p in passes)


def hidden_from(device: Device, bandwidth: float, *, backward: bool) -> int:
    """The least tokens per device whose compute is as long as the link: a step's compute grows as their square."""
    part = 1
    while True:
        compute, link = step(device, bandwidth, part, backward=backward)
        if compute >= link:
            return part
        part += 1


def thresholds() -> Iterator[str]:
    """The lines of the table of links, and from which length each hides."""
    yield "| link | GB/s | compute | tokens per device, forward | backward | T on 64 devices | T on 1024 devices |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for device, links in ((H100, LINKS), (CPU, ETHERNET)):
        for name, bandwidth in links.items():
            forward, backward = (hidden_from(device, bandwidth, backward=b) for b in (False, True))
            most = max(forward, backward)
            row = [name, f"{bandwidth / 1e9:g}", device.name, str(forward), str(backward)]
            yield f"| {' | '.join([*row, *(f'{-(-n * most // 1024)}k' for n in (64, 1024))])} |"


def efficiencies() -> Iterator[str]:
    """The lines of the table of lengths and numbers of devices."""
    yield "| T | devices | tokens per device | compute, s | " + " | ".join(LINKS) + " |"
    yield "| --- | --- | --- | --- |" + " --- |" * len(LINKS)
    for length in (2**17, 2**20):
        for n in (8, 64, 1024):
            compute = sum(one_pass(H100, 1, length, n, backward=backward).compute for backward in (False, True))
            cells = [f"{100 * efficiency(H100, bandwidth, length, n):.0f} %" for bandwidth in LINKS.values()]
            yield f"| {length // 1024}k | {n} | {length // n} | {compute:.2g} | {' | '.join(cells)} |"


def ring(path: Path) -> None:
    """Draw the efficiency on 64 and on 1024 devices against the length."""
    figure = Figure(figsize=(9, 3.6), layout="constrained", facecolor="white")
    for axes, n in zip(figure.subplots(1, 2, sharey=True), (64, 1024), strict=True):
        for name, bandwidth in LINKS.items():
            axes.semilogx(LENGTHS, [efficiency(H100, bandwidth, t, n) for t in LENGTHS], marker="o", ms=3, label=name)
        axes.set_title(f"{n} devices", fontsize=10)
        axes.set_xlabel("sequence length, tokens")
        axes.set_xticks(LENGTHS, [f"{t // 1024}k" for t in LENGTHS], fontsize=8)
        axes.minorticks_off()
        axes.set_ylim(0, 1.05)
        axes.grid(color="0.88", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share of the time that is compute")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    for table in (thresholds(), efficiencies()):
        print(*table, sep="\n", end="\n\n")
