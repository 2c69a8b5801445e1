"""The tables of docs/distributed.md are what docs/figures/ring.py computes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def ring() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ring", DOCS / "figures" / "ring.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_guide_has_the_tables(ring: ModuleType) -> None:
    guide = (DOCS / "distributed.md").read_text()
    for table in (ring.thresholds(), ring.efficiencies()):
        assert "\n".join(table) in guide


def test_the_model_adds_up(ring: ModuleType) -> None:
    device, bandwidth = ring.H100, 50e9
    part = ring.hidden_from(device, bandwidth, backward=False)
    compute, link = ring.step(device, bandwidth, part, backward=False)
    assert compute >= link
    # All pairs under the causal mask, 4 D operations each, whatever the number of devices.
    pairs = ring.HEADS * 2**20 * 2**20 / 2
    for n in (1, 64):
        total = n * ring.one_pass(device, bandwidth, 2**20, n, backward=False).compute
        assert total == pytest.approx(4 * ring.D * pairs / device.forward)
    # Where it hides, a forward pass takes its compute; on one device there is nothing to hide.
    assert ring.one_pass(device, bandwidth, 64 * part, 64, backward=False) == pytest.approx([64 * compute] * 2)
    assert ring.efficiency(device, bandwidth, 2**20, 1024) < ring.efficiency(device, bandwidth, 2**20, 64)
