"""The Triton kernels without a GPU: in Triton's interpreter, and compiled for GPUs that are not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
triton = pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/triton-registers.md"


def test_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "SA_SOFTMAX_IMPLEMENTATION": "composition"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/interpreted_triton.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    counts = re.search(r"(\d+) passed", run.stdout)
    assert counts is not None
    assert int(counts[1]) >= 24  # and CUDA graphs, which are skipped without CUDA


def test_registers_and_spills_keep_their_bounds(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sa_softmax.backends.torch._triton.compile_check", "--write", str(page)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
    if f"Triton\n{triton.__version__}," in PAGE.read_text():  # other versions count otherwise
        assert page.read_text() == PAGE.read_text()


def test_the_interpreted_adapter_refuses_other_kernels() -> None:
    code = "from sa_softmax.backends.torch._triton.interpreted import Adapter; Adapter()"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": ""}
    )
    assert run.returncode != 0
    assert "need TRITON_INTERPRET=1" in run.stderr
