"""Tries the installed wheel, outside of the checkout: ``python wheel_check.py minimal|conformance|native``."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np

import sa_softmax


def main(stage: str) -> None:
    package = Path(sa_softmax.__file__).parent
    assert Path.cwd() / "venv" in package.parents, f"imported from {package}, not from the wheel"
    for generic in ("backends", "conformance", "onnx_export", "tests"):
        assert importlib.util.find_spec(generic) is None, f"the wheel put a package {generic} into site-packages"
    y = sa_softmax.sa_softmax(np.array([1.0, -2.0, 3.0]))
    assert np.allclose(y, [0.0710998, 0.0, 0.8756006], atol=1e-7), y
    command = [str(Path(sys.executable).parent / "sa-softmax")]
    if stage == "minimal":
        done = subprocess.run([*command, "backends"], capture_output=True, text=True)
        assert done.returncode == 1, done
        assert "pip install 'sa-softmax[conformance]'" in done.stderr, done
    elif stage == "conformance":
        subprocess.run([*command, "backends"], check=True)
        subprocess.run([*command, "conformance", "--backend", "numpy"], check=True)
    else:
        assert sa_softmax.backends.numpy.implementation().startswith("native "), "the kernels must run"
        for backend in ("numpy", "onnxruntime"):
            subprocess.run([*command, "conformance", "--backend", backend], check=True)
    print(f"wheel, {stage}: 1 passed, 0 failed")


main(*sys.argv[1:])
