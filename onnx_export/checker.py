"""Does a file with SA-Softmax in it compute what it should, wherever it runs?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data
from onnx.reference import ReferenceEvaluator

from sa_softmax.onnx_export.bodies import DOMAIN
from sa_softmax.onnx_export.bounds import expected
from sa_softmax.onnx_export.draw import draw
from sa_softmax.onnx_export.operators import SCHEMAS, nodes_of

__all__ = ["CheckError", "Finding", "Report", "check"]

Array = npt.NDArray[Any]
Values = dict[str, Array]
Run = Callable[[Mapping[str, Array]], Values]

DRAWS = 3


@dataclass(frozen=True)
class Finding:
    """One comparison. ``error`` is in units of what is allowed: above 1 is wrong, None if nothing was measured."""

    client: str
    subject: str
    error: float | None
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within what is allowed, or nothing was measured."""
        return self.error is None or self.error <= 1

    def __str__(self) -> str:
        measured = [] if self.error is None else [f"error {self.error:.2g} of what is allowed"]
        said = "; ".join([*measured, *([self.message] if self.message else [])])
        verdict = "--" if self.error is None else "ok" if self.ok else "FAIL"
        return f"{verdict:4}  {self.client}: {self.subject}: {said}"


@dataclass(frozen=True)
class Report:
    """What :func:`check` found. Its text has one line for each client and subject, with the worst of all inputs."""

    path: Path
    inputs: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether every finding is."""
        return all(finding.ok for finding in self.findings)

    def __str__(self) -> str:
        worst: dict[tuple[str, str], Finding] = {}
        for finding in self.findings:
            known = worst.setdefault((finding.client, finding.subject), finding)
            if (finding.error or 0) > (known.error or 0):
                worst[finding.client, finding.subject] = finding
        verdict = "computes what it should" if self.ok else "DOES NOT COMPUTE WHAT IT SHOULD"
        return "\n".join(
            [f"{self.path} {verdict}", *(f"  on {each}" for each in self.inputs), *map(str, worst.values())]
        )


class CheckError(RuntimeError):
    """The file computes something else than it should. ``report`` says what; so does the text."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


def check(
    path: str | PathLike[str], *, inputs: Mapping[str, Array] | None = None, outputs: Sequence[Array] | None = None
) -> Report:
    """Run a file in every client at hand, and hold each node of ours against the reference.

    The clients are onnxruntime with the function bodies alone, onnxruntime with the kernels of sa-softmax-native if
    that is installed, and onnx.reference. What a node of the domain gave in a run is compared with the reference, in
    float64, of what the node was given in that run, within the bounds of docs/spec.md, section 7. The outputs of the
    whole model must agree between the clients within 1024 roundoffs of the largest value, or 32 of a 16-bit type that
    they or one of our nodes have: the errors of what stands between our nodes are not known.

    Args:
        path: the .onnx file. If it has external data, its folder must be writable.
        inputs: inputs by name that come first, before three random sets in which dynamic axes are 1 to 12 long.
        outputs: what the model gave for ``inputs`` before it was exported, in the order of the file's outputs.

    Returns:
        What was found; print it.

    Raises:
        CheckError: something is out of tolerance, or does not run.
        ValueError: no ONNX file, none of our nodes in it, or an input that cannot be drawn: pass ``inputs``.
        OSError: the file cannot be read.
    """
    path = Path(path)
    model = _load(path)
    rng = np.random.default_rng(0)
    sets: list[Mapping[str, Array]] = [*([] if inputs is None else [inputs]), *(draw(model, rng) for _ in range(DRAWS))]
    clients, findings = _clients(model, path.parent)
    running: dict[str, Run] = {}
    subject = _Subject(model, path.parent)
    for each in sets:
        agreed = None if outputs is None or each is not inputs else _Agreed("its source", list(outputs))
        for client, make in clients.items():
            try:
                running[client] = running.get(client) or make()
                values = {**each, **running[client](each)}
            except Exception as error:  # a runtime may raise anything, and all of it is a finding
                findings.append(Finding(client, "the model", np.inf, f"{type(error).__name__}: {error}"))
                continue
            findings += subject.nodes(client, values)
            if agreed is not None:
                findings += subject.outputs(client, values, agreed)
            agreed = agreed or _Agreed(client, [values[output.name] for output in model.graph.output])
    shapes = (", ".join(f"{name} {list(array.shape)}" for name, array in each.items()) for each in sets)
    report = Report(path, tuple(shapes), tuple(findings))
    if not report.ok:
        raise CheckError(report)
    return report


def _load(path: Path) -> ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path} is not an ONNX file: {error}. Name the .onnx file of a model") from error
    if not any(nodes_of(model)):
        raise ValueError(
            f"{path} has no node of the domain {DOMAIN}, so there is nothing to check. Export it with "
            "sa_softmax.onnx_export.export, from a model that calls sa_softmax, SASoftmax or sa_attention"
        )
    return model


def _clients(model: ModelProto, folder: Path) -> tuple[dict[str, Callable[[], Run]], list[Finding]]:
    """What can run the model with the values around our nodes as outputs, and what there is to say of what cannot."""
    import onnxruntime

    from sa_softmax.backends import onnxruntime as backend

    open_model = _with_inner_outputs(model)
    runtime = f"onnxruntime {onnxruntime.__version__}"
    clients: dict[str, Callable[[], Run]] = {
        f"{runtime}, bodies": partial(_onnxruntime, open_model, folder, kernel=False)
    }
    findings = []
    try:
        backend.get_library_path()
    except ImportError as error:
        findings.append(Finding(f"{runtime}, kernels", "not run", None, str(error)))
    else:
        clients[f"{runtime}, kernels"] = partial(_onnxruntime, open_model, folder, kernel=True)
    foreign = {node.domain for node in model.graph.node} - {"", "ai.onnx", "ai.onnx.ml", DOMAIN}
    reference = f"onnx.reference {onnx.__version__}"
    if foreign:
        findings.append(Finding(reference, "not run", None, f"it lacks the domain {', '.join(sorted(foreign))}"))
    else:
        clients[reference] = partial(_reference, open_model, folder)
    return clients, findings


def _with_inner_outputs(model: ModelProto) -> ModelProto:
    open_model = ModelProto()
    open_model.CopyFrom(model)
    known = {value.name: value for value in model.graph.value_info}
    have = {value.name for value in (*model.graph.input, *model.graph.output)}
    have |= {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            for name in (*node.input, *node.output):
                if name and name not in have:
                    have.add(name)
                    open_model.graph.output.append(known.get(name, ValueInfoProto(name=name)))
    return open_model


def _onnxruntime(model: ModelProto, folder: Path, *, kernel: bool) -> Run:
    from sa_softmax.backends.onnxruntime._session import Session

    has_external_data = any(uses_external_data(tensor) for tensor in model.graph.initializer)
    session = Session(model, kernel=kernel, folder=folder if has_external_data else None)
    ours = {node.op_type for node in model.graph.node if node.domain == DOMAIN}

    def run(inputs: Mapping[str, Array]) -> Values:
        values = session.run(inputs)
        if ours & session.ran != (ours if kernel else set()):
            raise RuntimeError(f"{'the kernels' if kernel else 'the bodies'} must run, and did not")
        return values

    return run


def _reference(model: ModelProto, folder: Path) -> Run:
    whole = ModelProto()
    whole.CopyFrom(model)
    onnx.load_external_data_for_model(whole, str(folder))
    evaluator = ReferenceEvaluator(whole)
    names = [output.name for output in model.graph.output]

    def run(inputs: Mapping[str, Array]) -> Values:
        with np.errstate(all="ignore"):
            return dict(zip(names, evaluator.run(None, dict(inputs)), strict=True))

    return run


class _Agreed(NamedTuple):
    client: str
    results: list[Array]


class _Subject:
    """What is compared: our nodes, and the outputs of the model."""

    def __init__(self, model: ModelProto, folder: Path) -> None:
        self._nodes = [node for node in model.graph.node if node.domain == DOMAIN]
        self._names = [output.name for output in model.graph.output]
        given = {name for node in self._nodes for name in node.input}
        self._weights = {
            tensor.name: numpy_helper.to_array(tensor, str(folder))
            for tensor in model.graph.initializer
            if tensor.name in given
        }

    def nodes(self, client: str, values: Values) -> Iterator[Finding]:
        values = self._weights | values
        for i, node in enumerate(self._nodes):
            schema = SCHEMAS[node.op_type]
            names = [parameter.name for parameter in schema.inputs]
            inputs = {name: values[value] for name, value in zip(names, node.input, strict=False) if value}
            attributes = {attribute.name: _plain(helper.get_attribute_value(attribute)) for attribute in node.attribute}
            subject = f"{node.op_type} {i + 1} of {len(self._nodes)}, {attributes['variant']}"
            # Where onnxruntime lacks float16 kernels it computes in float32, and does not round what goes from there
            # into a body, which computes in float32 too.
            rounded = not (client.endswith(", bodies") and next(iter(inputs.values())).dtype == np.float16)
            yield Finding(client, subject, _error(node, inputs, attributes, values[node.output[0]], rounded))

    def outputs(self, client: str, values: Values, agreed: _Agreed) -> Iterator[Finding]:
        share = max((_share(values[node.output[0]].dtype) for node in self._nodes), default=0.0)
        for name, wanted in zip(self._names, agreed.results, strict=True):
            yield Finding(client, f"output {name!r} against {agreed.client}", _difference(values[name], wanted, share))


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _error(node: NodeProto, inputs: Values, attributes: dict[str, Any], got: Array, rounded: bool) -> float:
    wanted = expected(node.op_type, inputs, attributes, inputs_were_rounded=rounded)
    return np.inf if got.dtype != next(iter(inputs.values())).dtype else wanted.error(got)


def _share(dtype: np.dtype[Any]) -> float:
    """1024 roundoffs, or 32 in 16 bits: what two clients may differ by, relative to the largest magnitude."""
    return (32 if dtype.itemsize == 2 else 1024) * float(ml_dtypes.finfo(dtype).eps) / 2


def _difference(got: Array, wanted: Array, share: float) -> float:
    """In units of the larger share of the largest magnitude, ``share`` or that of the dtype; integers must be equal."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return np.inf
    if got.dtype.kind in "biu":
        return 0.0 if np.array_equal(got, wanted) else np.inf
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)) or not np.array_equal(np.isnan(a), np.isnan(b)):
        return np.inf
    a, b = (np.nan_to_num(each, posinf=0, neginf=0) for each in (a, b))
    allowed = max(share, _share(got.dtype)) * max(abs(b).max(initial=0), 1e-30)
    return float(abs(a - b).max(initial=0) / allowed)
