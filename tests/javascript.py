"""The JavaScript clients of onnxruntime, as functions from arrays to arrays, through tests/clients/run.mjs.

Node.js and npm are not among the tools that the project needs: without them ``node()`` raises Missing.
"""

import base64
import functools
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from filelock import FileLock

FOLDER = Path(__file__).parent / "clients"
TYPES = ("float16", "float32", "float64", "int64", "bool")

Array = np.ndarray[Any, Any]


class Missing(Exception):
    """What a client needs is not installed."""


class ClientError(Exception):
    """The client could not load or run a file."""


@functools.cache
def node() -> str:
    """The path of Node.js, with the packages of tests/clients installed beside run.mjs."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise Missing("needs Node.js and npm")
    installed, wanted = FOLDER / "node_modules" / ".package-lock.json", FOLDER / "package-lock.json"
    with FileLock(Path(tempfile.gettempdir(), "sa-softmax-npm.lock")):  # test processes run side by side
        if not installed.exists() or installed.stat().st_mtime < wanted.stat().st_mtime:
            npm_ci = subprocess.run([npm, "ci", "--no-audit", "--no-fund"], cwd=FOLDER, capture_output=True, text=True)
            assert npm_ci.returncode == 0, f"npm ci failed in {FOLDER}:\n{npm_ci.stderr}"
    return node


def version(package: str) -> str:
    """The version of an installed package."""
    package_json = FOLDER / "node_modules" / package / "package.json"
    return json.loads(package_json.read_text(encoding="utf-8"))["version"]


class Client:
    """A running client: onnxruntime-node, or onnxruntime-web, in wasm. Each file is loaded once.

    Use it in a ``with`` statement.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [node(), "run.mjs", name], cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(self, model: Path, inputs: dict[str, Array]) -> dict[str, Array]:
        """The outputs of the .onnx file; raises ClientError with the client's message where it refuses."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"model": str(model.resolve()), "inputs": {name: _encoded(array) for name, array in inputs.items()}}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ClientError(f"{self.name} ended with status {self._process.wait()}")
        result = json.loads(line)
        if "error" in result:
            raise ClientError(result["error"])
        return {name: _decoded(tensor) for name, tensor in result["outputs"].items()}


def _encoded(array: Array) -> dict[str, Any]:
    if array.dtype.name not in TYPES:
        raise ClientError(f"JavaScript has no tensors of {array.dtype.name}")
    return {"type": array.dtype.name, "dims": array.shape, "data": base64.b64encode(array.tobytes()).decode()}


def _decoded(tensor: dict[str, Any]) -> Array:
    return np.frombuffer(base64.b64decode(tensor["data"]), tensor["type"]).reshape(tensor["dims"])
