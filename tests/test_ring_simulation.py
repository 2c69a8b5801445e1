"""The tables of docs/distributed.md are what docs/simulate_ring.py computes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate_ring", DOCS / "simulate_ring.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_guide_has_the_tables(simulation: ModuleType) -> None:
    guide = (DOCS / "distributed.md").read_text()
    for table in (simulation.thresholds(), simulation.efficiencies()):
        assert "\n".join(table) in guide


def test_the_model_adds_up(simulation: ModuleType) -> None:
    device, bandwidth = simulation.H100, 50e9
    part = simulation.hidden_from(device, bandwidth, backward=False)
    compute, link = simulation.step(device, bandwidth, part, backward=False)
    assert compute >= link
    # All pairs under the causal mask, 4 D operations each, whatever the number of devices.
    pairs = simulation.HEADS * 2**20 * 2**20 / 2
    for n in (1, 64):
        total = n * simulation.one_pass(device, bandwidth, 2**20, n, backward=False).compute
        assert total == pytest.approx(4 * simulation.D * pairs / device.forward)
    # Where it hides, a forward pass takes its compute; on one device there is nothing to hide.
    assert simulation.one_pass(device, bandwidth, 64 * part, 64, backward=False) == pytest.approx([64 * compute] * 2)
    assert simulation.efficiency(device, bandwidth, 2**20, 1024) < simulation.efficiency(device, bandwidth, 2**20, 64)
