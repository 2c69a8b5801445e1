"""Reading the golden data. The format is described, for any language, in docs/golden-format.md."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from sa_softmax._validate import COMPUTE_DTYPE, VARIANTS
from sa_softmax.conformance.inputs import numpy_dtype

__all__ = ["DIRECTORY", "Expected", "GoldenDataError", "Record", "digest", "input_file", "records"]

FORMAT = 1
DIRECTORY = Path(__file__).parent / "golden"
# float64 has a file of its own: some readers of safetensors refuse it.
FILES = ("inputs.safetensors", "inputs_float64.safetensors", "expected.safetensors")

PER_BINADE = 16
NO_ROUNDING = -32767
"""Code of the scale 0: the value may differ by the underflow threshold only."""
EXACT = -32768
"""Code of an entry that the spec fixes exactly."""

SAFETY = 4
"""How many times the first-order error of oracle.py a backend may be off: the one constant of every tolerance."""

Array = np.ndarray[Any, Any]

# safetensors.numpy writes bfloat16 and does not read it.
_SAFETENSORS = {
    "BOOL": "bool", "U8": "uint8", "I16": "int16",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip


class GoldenDataError(Exception):
    """The golden data is missing, truncated or not what its manifest describes."""


@dataclass(frozen=True)
class Expected:
    """What an output must be: its value in float64, its dtype, and how far it may be off (0: exactly equal)."""

    value: Array
    bound: Array
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Record:
    """One golden record: inputs in the record's dtype, and the expected outputs of both variants."""

    id: str
    dtype: str
    clauses: tuple[str, ...]
    inputs: dict[str, Array]
    options: dict[str, Any]
    _expected: dict[str, Array]

    @property
    def is_attention(self) -> bool:
        """Whether this is a record of attention, not of the row operation."""
        return "q" in self.inputs

    def outputs(self) -> tuple[str, ...]:
        """The names that :meth:`expected` knows."""
        return tuple(name for name in self._expected if not name.endswith("_scale"))

    def expected(self, output: str, variant: str) -> Expected:
        """The expected ``output`` (y, dx; o, dq, dk, dv, dbias) of ``variant``, with its bound.

        bound = u |value| + SAFETY u_c scale + floor, with u the roundoff of the output's dtype (one rounding at the
        end), u_c that of the compute dtype, and floor the spacing below which the dtype may flush or round to 0.
        """
        v = VARIANTS.index(variant)
        value, code = self._expected[output][v], self._expected[f"{output}_scale"][v]
        dtype = self.inputs["bias"].dtype if output == "dbias" else numpy_dtype(self.dtype)
        info, compute = ml_dtypes.finfo(dtype), ml_dtypes.finfo(COMPUTE_DTYPE[self.dtype])
        # Multiplied in the exponent: beside the largest float64 values a scale alone overflows, its bound does not.
        computing = np.exp2(code.astype(np.float64) / PER_BINADE + np.log2(SAFETY * float(compute.eps) / 2))
        floor = float(info.smallest_subnormal if dtype == np.float16 else info.tiny)
        bound = float(info.eps) / 2 * abs(value) + np.where(code <= NO_ROUNDING, 0.0, computing) + floor
        bound = np.where(code == EXACT, 0.0, bound)
        index = self.inputs.get("index")
        return Expected(value, bound, dtype) if index is None else Expected(value[index], bound[index], dtype)


@cache
def records(directory: Path = DIRECTORY) -> tuple[Record, ...]:
    """Every record, in the manifest's order; GoldenDataError if a file does not have the hash it must have."""
    manifest = json.loads(_read(directory / "manifest.json"))
    if manifest["format"] != FORMAT:
        raise GoldenDataError(f"this suite reads golden format {FORMAT}; {directory} has {manifest['format']}")
    tensors: dict[str, dict[str, Array]] = {}
    for name, sha256 in manifest["files"].items():
        content = _read(directory / name)
        actual = hashlib.sha256(content).hexdigest()
        if actual != sha256:
            raise GoldenDataError(
                f"{directory / name} must have the SHA-256 {sha256} of its manifest; got {actual}. "
                "The file is damaged or was changed: reinstall sa-softmax, or generate the golden data again"
            )
        for key, tensor in safetensors.deserialize(content):
            owner, _, part = key.rpartition("/")
            dtype = numpy_dtype(_SAFETENSORS[tensor["dtype"]])
            array = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
            array.setflags(write=False)
            tensors.setdefault(owner, {})[part] = array
    return tuple(_record(entry, tensors) for entry in manifest["records"])


@cache
def digest(directory: Path = DIRECTORY) -> str:
    """The SHA-256 of the manifest, which holds those of the files: it names the golden data of a report."""
    return hashlib.sha256(_read(directory / "manifest.json")).hexdigest()


def input_file(dtype: np.dtype[Any]) -> str:
    """Which of FILES holds input tensors of ``dtype``."""
    return "inputs_float64.safetensors" if dtype == np.float64 else "inputs.safetensors"


def _record(entry: dict[str, Any], tensors: dict[str, dict[str, Array]]) -> Record:
    name, _, dtype = entry["id"].rpartition("/")
    own = tensors.get(name, {}) | tensors[entry["id"]]  # the index stands under the name, without the dtype
    given = {"x", "g", "where", "index", "q", "k", "v", "do", "bias", "mask"}
    return Record(
        id=entry["id"],
        dtype=dtype,
        clauses=tuple(entry["clauses"]),
        inputs={key: array for key, array in own.items() if key in given},
        options=entry["options"],
        _expected={key: array for key, array in own.items() if key not in given},
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise GoldenDataError(f"golden data cannot be read: {error}. Reinstall sa-softmax") from error
