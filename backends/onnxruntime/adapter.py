"""onnxruntime under the conformance suite, with the kernels of our library and with the function bodies alone.

Each signature becomes a model of one node, and each session says which of the two it ran: the node, or what its body
consists of.
"""

from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper

from sa_softmax._validate import ArrayKind, check_attention, check_softmax
from sa_softmax.backends.onnxruntime import get_library_path
from sa_softmax.backends.onnxruntime._session import Session
from sa_softmax.backends.protocol import Array
from sa_softmax.onnx_export import complete
from sa_softmax.onnx_export.bodies import DOMAIN
from sa_softmax.onnx_export.operators import MIN_OPSET

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
    """The default opset of the models, and with it of the bodies."""
    _kernel = False

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

    def _run(self, operator: str, inputs: list[Array | None], like: Array, **attributes: Any) -> Array:
        signature = tuple(None if each is None else (each.dtype.name, each.ndim) for each in inputs)
        session = self._session(operator, signature, tuple(attributes.items()))
        output = session.run({f"input_{i}": each for i, each in enumerate(inputs) if each is not None})["output"]
        if (operator in session.ran) is not self._kernel:
            raise RuntimeError(f"{self.implementation} must run, and did not; onnxruntime ran {sorted(session.ran)}")
        return output.astype(like.dtype)

    @cache  # noqa: B019 - sessions live as long as the adapter
    def _session(
        self, operator: str, signature: tuple[tuple[str, int] | None, ...], attributes: tuple[tuple[str, Any], ...]
    ) -> Session:
        model = _model(operator, signature, dict(attributes), self.opset)
        return Session(model, kernel=self._kernel, threads=1)


class Adapter(BodyAdapter):
    """The kernels of our library, registered with every session."""

    name = "onnxruntime"
    _kernel = True

    def __init__(self) -> None:
        """Raises ImportError that names the distribution to install if the library is missing."""
        get_library_path()
        self.implementation = f"kernels of sa-softmax-native {metadata.version('sa-softmax-native')}"


def _model(
    operator: str, signature: tuple[tuple[str, int] | None, ...], attributes: dict[str, Any], opset: int
) -> ModelProto:
    """A model of one node, whose inputs have the given dtypes and ranks.

    A bias in the compute dtype makes the whole attention compute in it, and the caller rounds. A scale in double does
    not fit into the attribute, which is a float, so it multiplies q.
    """
    inputs = {f"input_{i}": each for i, each in enumerate(signature) if each is not None}
    dtype, rank = inputs["input_0"]
    if operator == "SAAttention" and "input_3" in inputs:
        dtype = inputs["input_3"][0]
    nodes, names = [], []
    for i in range(len(signature)):
        name = f"input_{i}" if f"input_{i}" in inputs else ""
        if name and inputs[name][0] not in ("bool", dtype):
            nodes.append(helper.make_node("Cast", [name], [f"{name}_cast"], to=_element_type(dtype)))
            name = f"{name}_cast"
        names.append(name)
    if dtype == "float64" and "scale" in attributes:
        scale = helper.make_tensor("", TensorProto.DOUBLE, [], [attributes["scale"]])
        nodes.append(helper.make_node("Constant", [], ["scale"], value=scale))
        nodes.append(helper.make_node("Mul", [names[0], "scale"], ["scaled_query"]))
        names[0], attributes = "scaled_query", attributes | {"scale": 1.0}
    nodes.append(helper.make_node(operator, names, ["output"], domain=DOMAIN, **attributes))
    graph = helper.make_graph(
        nodes,
        operator,
        [
            helper.make_tensor_value_info(name, _element_type(each), [f"{name}_axis_{i}" for i in range(n)])
            for name, (each, n) in inputs.items()
        ],
        [helper.make_tensor_value_info("output", _element_type(dtype), [None] * rank)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    complete(model)
    return model


def _element_type(dtype: str) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
