"""onnxruntime under the conformance suite, with the kernels of our library and with the function bodies alone.

Each signature becomes a model of one node, and each session is asked, through its optimised graph, which of the two it
runs: with a kernel the node is still there, without one it has been replaced by its body.
"""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper

from sa_softmax._validate import ArrayKind, check_attention, check_softmax
from sa_softmax.backends.protocol import Array
from sa_softmax.onnx_export import complete
from sa_softmax.onnx_export.operators import DOMAIN, MIN_OPSET, nodes_of

__all__ = ["Adapter", "BodyAdapter"]

_ARRAYS = ArrayKind(np.ndarray, "numpy.asarray")


class BodyAdapter:
    """The function bodies, as any client runs them that has not loaded our library."""

    name = "onnxruntime-body"
    version = f"onnxruntime {onnxruntime.__version__}"
    implementation = "function bodies"
    operations = ("sa_softmax", "sa_softmax_vjp", "sa_attention")
    dtypes = ("float16", "bfloat16", "float32", "float64")
    devices = ("cpu",)
    opset = MIN_OPSET

    def sa_softmax(self, x: Array, *, axis: int, variant: str, where: Array | None, device: str) -> Array:
        check_softmax(_ARRAYS, x, axis=axis, variant=variant, where=where)
        return self._run("SASoftmax", [x, where], x, axis=axis, variant=variant)

    def sa_softmax_vjp(self, x: Array, g: Array, *, axis: int, variant: str, where: Array | None, device: str) -> Array:
        check_softmax(_ARRAYS, x, axis=axis, variant=variant, where=where, g=g)
        return self._run("SASoftmaxGrad", [x, g, where], x, axis=axis, variant=variant)

    def sa_attention(
        self, q: Array, k: Array, v: Array, *,
        variant: str, bias: Array | None, mask: Array | None,
        is_causal: bool, q_offset: int, scale: float | None, device: str,
    ) -> Array:  # fmt: skip
        check_attention(
            _ARRAYS, q, k, v,
            variant=variant, bias=bias, mask=mask, is_causal=is_causal, q_offset=q_offset, scale=scale,
        )  # fmt: skip
        options: dict[str, Any] = {"variant": variant, "is_causal": int(is_causal), "q_offset": q_offset}
        if scale is not None:
            options["scale"] = scale
        return self._run("SAAttention", [q, k, v, bias, mask], q, **options)

    def register(self, options: onnxruntime.SessionOptions) -> None:
        """Nothing: the bodies come with the model."""

    def _run(self, operator: str, inputs: list[Array | None], like: Array, **attributes: Any) -> Array:
        signature = tuple(None if each is None else (each.dtype.name, each.ndim) for each in inputs)
        session = self._session(operator, signature, tuple(attributes.items()))
        feeds = {
            f"input_{i}": each.astype(np.float32) if each.dtype.name == "bfloat16" else np.ascontiguousarray(each)
            for i, each in enumerate(inputs)
            if each is not None
        }
        return session.run(None, feeds)[0].astype(like.dtype)

    @cache  # noqa: B019 - sessions live as long as the adapter
    def _session(
        self, operator: str, signature: tuple[tuple[str, int] | None, ...], attributes: tuple[tuple[str, Any], ...]
    ) -> onnxruntime.InferenceSession:
        model = _model(operator, signature, dict(attributes), self.opset)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.register(options)
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            kept = [node.op_type for node in nodes_of(onnx.load(options.optimized_model_filepath))]
        expected = [] if type(self) is BodyAdapter else [operator]
        if kept != expected:
            raise RuntimeError(f"{self.implementation} must run; the session's graph holds {kept} of {DOMAIN}")
        return session


class Adapter(BodyAdapter):
    """The kernels of our library, registered with every session."""

    name = "onnxruntime"

    def __init__(self) -> None:
        from sa_softmax.backends import onnxruntime as backend

        self.register = backend.register
        self.implementation = f"kernels of {backend.get_library_path()}"


def _model(
    operator: str, signature: tuple[tuple[str, int] | None, ...], attributes: dict[str, Any], opset: int
) -> ModelProto:
    """A model of one node, whose inputs have the given dtypes and ranks.

    onnxruntime has no bfloat16 in Python, so such arrays come and go as float32, which holds them exactly. A bias in the
    compute dtype makes the whole attention compute in it. A scale in double does not fit into the attribute, which is a
    float, so it multiplies q.
    """
    dtypes = [None if each is None else each[0] for each in signature]
    is_mixed = operator == "SAAttention" and dtypes[3] not in (None, dtypes[0])
    dtype = dtypes[3] if is_mixed else dtypes[0]
    inputs, nodes, names = [], [], []
    for i, each in enumerate(signature):
        names.append("" if each is None else f"input_{i}")
        if each is not None:
            outer, inner = _outer(each[0]), each[0] if each[0] == "bool" else dtype
            inputs.append(helper.make_tensor_value_info(names[i], _element_type(outer), [None] * each[1]))
            if inner != outer:
                nodes.append(helper.make_node("Cast", [names[i]], [f"{names[i]}_cast"], to=_element_type(inner)))
                names[i] = f"{names[i]}_cast"
    if dtype == "float64" and "scale" in attributes:
        scale = helper.make_tensor("", TensorProto.DOUBLE, [], [attributes["scale"]])
        nodes.append(helper.make_node("Constant", [], ["scale"], value=scale))
        nodes.append(helper.make_node("Mul", [names[0], "scale"], ["scaled_query"]))
        names[0], attributes = "scaled_query", attributes | {"scale": 1.0}
    nodes.append(helper.make_node(operator, names, ["result"], domain=DOMAIN, **attributes))
    nodes.append(helper.make_node("Cast", ["result"], ["output"], to=_element_type(_outer(dtype))))
    rank = signature[0][1]
    output = helper.make_tensor_value_info("output", _element_type(_outer(dtype)), [None] * rank)
    model = helper.make_model(
        helper.make_graph(nodes, operator, inputs, [output]),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    complete(model)
    return model


def _outer(dtype: str) -> str:
    """The dtype in which arrays of ``dtype`` cross the border to onnxruntime."""
    return "float32" if dtype == "bfloat16" else dtype


def _element_type(dtype: str) -> int:
    return TensorProto.BFLOAT16 if dtype == "bfloat16" else helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
