"""The same .onnx files in every client, held against the NumPy reference in float64.

    python tests/client_table.py     # writes docs/clients.md

A file's tolerance follows from its dtype: 8 times the error that the reference itself makes in the compute dtype, for
which its error in float32 is measured and scaled, and one rounding to the output's dtype; in attention one of Y to
bfloat16 besides, before it multiplies V (clause A10).
"""

import copy
import datetime
import importlib.util
import platform
import string
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import javascript
import numpy as np
import onnx
import onnxruntime
import torch
from javascript import Missing
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from support import FLOATS, VARIANTS, finfo, numpy_dtype, weights_rounding

from sa_softmax import reference
from sa_softmax.backends.onnxruntime._session import Session
from sa_softmax.backends.onnxruntime.adapter import BodyAdapter, _model
from sa_softmax.onnx_export import complete
from sa_softmax.onnx_export.operators import nodes_of

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))
from char_model import CharModel, save_onnx  # noqa: E402

DOCUMENT = ROOT / "docs" / "clients.md"
CLIENTS = ("onnxruntime, kernel", "onnxruntime", "onnx.reference", "onnxruntime-node", "onnxruntime-web")
OPSET = 18
MARGIN = 8

Array = np.ndarray[Any, Any]
Run = Callable[[Path, dict[str, Array]], dict[str, Array]]


@dataclass(frozen=True)
class File:
    """An .onnx file, inputs for it, and the outputs that it should have."""

    name: str
    path: Path
    inputs: dict[str, Array]
    expected: dict[str, Array]  # in float64
    tolerance: float

    def difference(self, outputs: dict[str, Array]) -> float:
        """The largest one from what is expected; infinite where shapes differ or there is a NaN."""
        assert outputs.keys() == self.expected.keys()
        largest = 0.0
        for name, expected in self.expected.items():
            if outputs[name].shape != expected.shape:
                return np.inf
            error = np.abs(outputs[name].astype(np.float64) - expected).max()
            largest = max(largest, np.inf if np.isnan(error) else float(error))
        return largest


# The files


def _row_inputs() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal((4, 5, 40))
    x[0, 0] = 0  # C1
    x[0, 1, 3] = x[0, 1].max()  # a tie
    where = rng.random(x.shape) < 0.7
    where[0, 2] = False  # C2
    return {"X": x, "G": rng.standard_normal(x.shape), "where": where}


def _softmax(X: Array, where: Array, variant: str) -> Array:
    return reference.sa_softmax(X, variant=variant, where=where)


def _gradient(X: Array, G: Array, where: Array, variant: str) -> Array:
    return reference.sa_softmax_vjp(X, G, variant=variant, where=where)


def _attention_inputs() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {"Q": (2, 4, 5, 16), "K": (2, 2, 7, 16), "V": (2, 2, 7, 6), "bias": (4, 5, 7)}
    mask = rng.random((2, 1, 1, 7)) < 0.7
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()} | {"mask": mask}


_ATTENTION: dict[str, Any] = {"is_causal": True, "q_offset": 2, "scale": 0.25}


def _attention(Q: Array, K: Array, V: Array, bias: Array, mask: Array, variant: str) -> Array:
    return reference.sa_attention(Q, K, V, bias=bias, mask=mask, variant=variant, **_ATTENTION)


def _weights_rounding(Q: Array, K: Array, V: Array, bias: Array, mask: Array, variant: str) -> float:
    return float(weights_rounding(Q, K, V, bias=bias, mask=mask, variant=variant, **_ATTENTION).max())


def _operator_file(operator: str, dtype: str, compute: Callable[..., Array], folder: Path) -> File:
    inputs = _attention_inputs() if operator == "SAAttention" else _row_inputs()
    if operator == "SASoftmax":
        del inputs["G"]
    inputs = {name: each if each.dtype == bool else each.astype(numpy_dtype(dtype)) for name, each in inputs.items()}

    def run(compute_dtype: str) -> dict[str, Array]:
        cast = {name: each if each.dtype == bool else each.astype(compute_dtype) for name, each in inputs.items()}
        return {variant: compute(**cast, variant=variant) for variant in VARIANTS}

    path = folder / f"{operator}-{dtype}.onnx"
    onnx.save(_operator_model(operator, dtype, inputs), path)
    expected = run("float64")
    compute_dtype = "float64" if dtype == "float64" else "float32"  # D1, D2
    allowed = tolerance(dtype, compute_dtype, expected, run("float32"))
    if operator == "SAAttention" and dtype == "bfloat16":
        allowed += max(_weights_rounding(**inputs, variant=variant) for variant in VARIANTS)
    return File(f"{operator}, {dtype}", path, _fed(inputs), expected, allowed)


def tolerance(dtype: str, compute: str, expected: dict[str, Array], in_float32: dict[str, Array]) -> float:
    """What a result in ``dtype`` that was computed in ``compute`` may differ from ``expected``."""
    error = max(np.abs(in_float32[name].astype(np.float64) - each).max() for name, each in expected.items())
    size = max(np.abs(each).max() for each in expected.values())
    epsilon = {name: float(finfo(numpy_dtype(name)).eps) for name in (dtype, compute, "float32")}
    return float(MARGIN * error * epsilon[compute] / epsilon["float32"] + epsilon[dtype] / 2 * size)


def _operator_model(operator: str, dtype: str, inputs: dict[str, Array]) -> onnx.ModelProto:
    """Both variants of one operator. No client feeds bfloat16, so such values are cast at the border."""
    at_border, inside = _element_type("float32" if dtype == "bfloat16" else dtype), _element_type(dtype)
    nodes, names, infos = [], [], []
    for name, each in inputs.items():
        is_mask = each.dtype == bool
        shape = [f"{name}_{i}" for i in range(each.ndim)]
        infos.append(helper.make_tensor_value_info(name, TensorProto.BOOL if is_mask else at_border, shape))
        if is_mask or at_border == inside:
            names.append(name)
        else:
            names.append(f"{name}_inside")
            nodes.append(helper.make_node("Cast", [name], [names[-1]], to=inside))
    options = _ATTENTION | {"is_causal": 1} if operator == "SAAttention" else {}
    for variant in VARIANTS:
        node = helper.make_node(operator, names, [f"{variant}_inside"], domain="sa_softmax", variant=variant, **options)
        nodes += [node, helper.make_node("Cast", [f"{variant}_inside"], [variant], to=at_border)]
    rank = next(iter(inputs.values())).ndim
    outputs = [helper.make_tensor_value_info(variant, at_border, [None] * rank) for variant in VARIANTS]
    graph = helper.make_graph(nodes, operator, infos, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    complete(model)
    return model


def _element_type(dtype: str) -> int:
    return TensorProto.BFLOAT16 if dtype == "bfloat16" else helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _fed(inputs: dict[str, Array]) -> dict[str, Array]:
    return {name: each.astype(np.float32) if each.dtype.name == "bfloat16" else each for name, each in inputs.items()}


ALPHABET = string.ascii_letters + string.digits + string.punctuation + " \n"


def char_model() -> Any:
    """The demo's model as it is initialised: its text is noise, and so more varied than that of a little training."""
    torch.manual_seed(0)
    return CharModel(len(ALPHABET), "normalized").eval()


def _char_model_file(dtype: str, folder: Path) -> File:
    model = char_model().to(getattr(torch, dtype))
    path = folder / f"char_model-{dtype}.onnx"
    save_onnx(model, ALPHABET, path)
    graph = onnx.load(path).graph
    indices = np.random.default_rng(0).integers(len(ALPHABET), size=(1, 100))
    expected, in_float32 = (
        {graph.output[0].name: _logits(model, compute, indices)} for compute in ("float64", "float32")
    )
    allowed = tolerance(dtype, dtype, expected, in_float32)
    return File(f"character model, {dtype}", path, {graph.input[0].name: indices}, expected, allowed)


@torch.no_grad()
def _logits(model: Any, compute: str, indices: Array) -> Array:
    return copy.deepcopy(model).to(getattr(torch, compute))(torch.from_numpy(indices)).numpy()


_OPERATORS = {"SASoftmax": _softmax, "SASoftmaxGrad": _gradient, "SAAttention": _attention}
FILES = {
    f"{operator}, {dtype}": partial(_operator_file, operator, dtype, compute)
    for operator, compute in _OPERATORS.items()
    for dtype in FLOATS
}
FILES |= {f"character model, {dtype}": partial(_char_model_file, dtype) for dtype in ("float16", "float32")}
"""What makes each file in a folder."""


# The clients


@contextmanager
def opened(client: str) -> Iterator[Run]:
    """The client as a function of a file's path and inputs; raises Missing where it is not installed."""
    match client:
        case "onnxruntime":
            yield partial(_run_onnxruntime, False)
        case "onnxruntime, kernel":
            if importlib.util.find_spec("sa_softmax_native") is None:
                raise Missing("needs sa-softmax-native")
            yield partial(_run_onnxruntime, True)
        case "onnx.reference":
            yield _run_reference
        case _:
            with javascript.Client(client) as running:
                yield running.run


def _run_onnxruntime(kernel: bool, path: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    model = onnx.load(path)
    session = Session(model, kernel=kernel, threads=1)
    outputs = session.run(inputs)
    ours = {node.op_type for node in nodes_of(model)}
    assert session.ran is not None
    assert ours & session.ran == (ours if kernel else set())
    return outputs


def _run_reference(path: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    session = ReferenceEvaluator(onnx.load(path))
    with np.errstate(all="ignore"):
        return dict(zip(session.output_names, session.run(None, inputs), strict=True))


# The conformance suite


class ClientAdapter(BodyAdapter):
    """The function bodies under the conformance suite, in the client that ``run`` runs; files go to ``folder``."""

    dtypes = ("float16", "float32", "float64")  # JavaScript has no tensors of bfloat16

    def __init__(self, client: str, run: Run, folder: Path) -> None:
        self.name, self.run, self.folder = client, run, folder
        self.version = f"{client} {javascript.version(client)}"

    def _session(self, *signature: Any) -> Any:
        path = self.folder / f"{zlib.crc32(repr(signature).encode()):08x}.onnx"
        if not path.exists():
            operator, types, attributes = signature
            onnx.save(_model(operator, types, dict(attributes), self.opset), path)
        return _Session(partial(self.run, path))


class _Session(NamedTuple):
    """What the adapter asks of a session."""

    run: Callable[[dict[str, Array]], dict[str, Array]]
    ran: frozenset[str] = frozenset()


# The document


def document() -> str:
    """docs/clients.md."""
    with tempfile.TemporaryDirectory() as folder:
        made = [make(Path(folder)) for make in FILES.values()]
        columns = {client: _column(client, made) for client in CLIENTS}
    rows = [
        [file.name, *(columns[client][i] for client in CLIENTS), f"{file.tolerance:.1e}"] for i, file in enumerate(made)
    ]
    head = ["file", *CLIENTS, "tolerance"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    return _TEXT.format(table=table, versions=", ".join(_versions()), date=datetime.date.today())


def _column(client: str, made: list[File]) -> list[str]:
    try:
        with opened(client) as run:
            return [f"{file.difference(run(file.path, file.inputs)):.1e}" for file in made]
    except Missing:
        return ["not installed"] * len(made)


def _versions() -> Iterator[str]:
    yield f"onnx {onnx.__version__}"
    yield f"onnxruntime {onnxruntime.__version__}"
    for package in ("onnxruntime-node", "onnxruntime-web"):
        yield f"{package} {javascript.version(package)}"
    yield f"{platform.system()} {platform.machine()}"


_TEXT = """\
# The same files in every client

Largest absolute differences from the NumPy reference in float64, over all outputs of a file, which is one and the same
in every column. The files of the operators hold both variants and a mask; SAAttention has grouped heads and a bias
besides. The character model is the demo's, exported from PyTorch, and held against PyTorch in float64.

"onnxruntime, kernel" has the library of sa-softmax-native registered; all others run the function bodies that the files
carry; onnxruntime-web runs in wasm. Written by `python tests/client_table.py`, where the tolerances are explained;
`tests/test_clients.py` holds every client to them, and onnxruntime-node and onnxruntime-web to the conformance suite.

{table}

{versions}; {date}.
"""


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
