"""SA attention over a process group. The ranks, and what they test, are in ``torch_ranks.py``."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

FILE = Path(__file__).with_name("torch_ranks.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each rank of each scenario found."""
    folder = tmp_path_factory.mktemp("ranks")
    run = subprocess.run([sys.executable, str(FILE), str(folder)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_among_two_and_four_ranks(found: dict[str, Any]) -> None:
    for rank in range(4):
        tests = found[f"run_all-{rank}"]
        assert len(tests) >= 39
        for name, error in tests.items():
            assert error is None, f"rank {rank}, {name}:\n{error}"


@pytest.mark.parametrize(
    ("scenario", "what"),
    [
        ("killed", "rank 0 of 2 waited in step 1 of 2 for keys from rank 1 in vain"),
        ("hanging", "rank 0 of 2 waited in step 1 of 2 for keys from rank 1 in vain"),
        ("absent", "rank 0 of 2 waited for the shapes of all ranks in vain"),
    ],
)
def test_a_rank_that_fails_is_an_error_in_bounded_time(scenario: str, what: str, found: dict[str, Any]) -> None:
    result = found[f"{scenario}-0"]
    assert result["error"] is not None
    assert result["error"].startswith(what)
    assert result["seconds"] < 15
    assert f"{scenario}-1" not in found
