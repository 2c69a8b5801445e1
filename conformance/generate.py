"""Make the golden data: ``python -m sa_softmax.conformance.generate [DIRECTORY]``.

Deterministic: the same bytes on every machine. The format is described in docs/golden-format.md.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.progress import track
from safetensors.numpy import save

from sa_softmax._validate import COMPUTE_DTYPE, VARIANTS
from sa_softmax.conformance import golden, oracle
from sa_softmax.conformance.inputs import AttentionInput, RowInput, attention_inputs, numpy_dtype, row_inputs

__all__ = ["inputs", "record", "write"]

Array = np.ndarray[Any, Any]
mp = oracle.mp


def inputs() -> Iterator[RowInput | AttentionInput]:
    """What the golden records are made of, in their order."""
    yield from row_inputs()
    yield from attention_inputs()


def record(case: RowInput | AttentionInput) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
    """The manifest entry, the input tensors and the expected tensors of one record."""
    return _row(case) if isinstance(case, RowInput) else _attention(case)


def write(directory: Path) -> None:
    """Write every golden file and the manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, dict[str, Array]] = {name: {} for name in golden.FILES}
    entries = []
    for case in track(list(inputs()), description="golden records"):
        entry, given, expected = record(case)
        entries.append(entry)
        for name, array in given.items():
            owner = case.name if name == "index" else entry["id"]
            tensors[golden.input_file(array.dtype)][f"{owner}/{name}"] = array
        for name, array in expected.items():
            tensors["expected.safetensors"][f"{entry['id']}/{name}"] = array
    files = {}
    for name, content in tensors.items():
        path = directory / name
        path.write_bytes(save({key: np.ascontiguousarray(array) for key, array in content.items()}))
        files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    head = json.dumps({"format": golden.FORMAT, "files": files}, indent=1)
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    (directory / "manifest.json").write_text(f'{head[:-2]},\n "records": [\n{lines}\n ]\n}}\n')


def _compute(dtype: str) -> dict[str, Any]:
    """The smallest normal number and the roundoff of the compute dtype, as the oracle takes them."""
    info = ml_dtypes.finfo(COMPUTE_DTYPE[dtype])
    return {"tiny": mp.mpf(float(info.tiny)), "u": mp.mpf(float(info.eps)) / 2}


def _row(case: RowInput) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
    compute = _compute(case.dtype)
    shape = case.x.shape if case.index is None else case.index.shape
    expected = {name: np.full((2, *case.x.shape), mp.mpf(0)) for name in ("y", "y_scale", "dx", "dx_scale")}
    x, g = oracle.exact(case.x), oracle.exact(case.g)
    on = np.isnan(case.x.astype(float)) | (case.x != -np.inf)
    if case.where is not None:
        on = on & np.broadcast_to(case.where, shape)
    for at, count in _rows(case):
        for v, variant in enumerate(VARIANTS):
            truth = oracle.row(x[at], g[at], on[at], variant, **compute, count=count)
            for name, values in truth._asdict().items():
                expected[name][(v, *at)] = values
    entry = {"id": f"{case.name}/{case.dtype}", "clauses": case.clauses, "options": {"axis": case.axis}}
    given = {"x": case.x, "g": case.g}
    if case.where is not None:
        given["where"] = case.where
    if case.index is not None:
        given["index"] = case.index
    return entry, given, _encoded(expected, {"y": case.dtype, "dx": case.dtype})


def _rows(case: RowInput) -> Iterator[tuple[tuple[Any, ...], Array | None]]:
    """Index of each row in x, with the multiplicities of its entries where x is a dictionary."""
    if case.index is not None:
        for row in case.index:
            used, count = np.unique(row, return_counts=True)
            yield (used,), count
        return
    axis = case.axis % case.x.ndim
    for place in np.ndindex(*case.x.shape[:axis], 1, *case.x.shape[axis + 1 :]):
        yield (*place[:axis], slice(None), *place[axis + 1 :]), None


def _attention(case: AttentionInput) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
    compute = _compute(case.dtype)
    rounding = mp.mpf(float(ml_dtypes.finfo(numpy_dtype(case.dtype)).eps)) / 2 / compute["u"]
    scores = (*case.q.shape[:-1], case.k.shape[-2])
    keep = np.ones(scores, bool) if case.mask is None else np.broadcast_to(case.mask, scores)
    if case.options.get("is_causal"):
        keep = keep & np.tri(scores[-2], scores[-1], case.options.get("q_offset", 0), dtype=bool)
    scale = case.options.get("scale")
    scale = 1 / mp.sqrt(case.q.shape[-1]) if scale is None else mp.mpf(scale)
    arrays = {"q": case.q, "k": case.k, "v": case.v, "do": case.do}
    bias = None if case.bias is None else oracle.exact(case.bias)
    outputs = [name for name in case.compare if name != "dbias" or bias is not None]
    stacked: dict[str, list[Array]] = {f"{name}{end}": [] for name in outputs for end in ("", "_scale")}
    for variant in VARIANTS:
        truth = oracle.attention(
            *(oracle.exact(array) for array in arrays.values()),
            variant=variant, bias=bias, keep=keep, scale=scale, **compute, weight_roundings=rounding,
        )._asdict()  # fmt: skip
        truth["dk_sum"] = tuple(part.sum(-2, keepdims=True) for part in truth["dk"])
        for name in outputs:
            stacked[name].append(truth[name][0])
            stacked[f"{name}_scale"].append(truth[name][1])
    dtypes = dict.fromkeys(outputs, case.dtype)
    if case.bias is not None:
        dtypes["dbias"] = str(case.bias.dtype)
    entry = {"id": f"{case.name}/{case.dtype}", "clauses": case.clauses, "options": case.options}
    given = arrays | {name: a for name, a in (("bias", case.bias), ("mask", case.mask)) if a is not None}
    return entry, given, _encoded({name: np.stack(parts) for name, parts in stacked.items()}, dtypes)


def _encoded(expected: dict[str, Array], dtypes: dict[str, str]) -> dict[str, Array]:
    """Values as float64, scales as sixteenths of a binade rounded up; the arrays have a leading axis of variants."""
    encoded: dict[str, Array] = {}
    for name, dtype in dtypes.items():
        values, scales = expected[name], expected[f"{name}_scale"]
        limit = float(ml_dtypes.finfo(numpy_dtype(dtype)).max)
        if any(mp.isfinite(value) and abs(value) > limit for value in values.flat):
            raise ValueError(f"{name} does not fit {dtype}: choose inputs whose result is representable")
        encoded[name] = np.array([float(value) for value in values.flat]).reshape(values.shape)
        encoded[f"{name}_scale"] = np.array([_log2(scale) for scale in scales.flat], np.int16).reshape(scales.shape)
    return encoded


def _log2(scale: Any) -> int:
    if mp.isnan(scale) or scale == 0:
        return golden.NO_ROUNDING
    if scale < 0:
        return golden.EXACT
    return max(golden.NO_ROUNDING, int(mp.ceil(golden.PER_BINADE * mp.log(scale, 2))))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else golden.DIRECTORY)
