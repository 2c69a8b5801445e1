"""The operators of the ONNX domain ``sa_softmax``, version 1: their schemas, and the bodies that a model carries along.

docs/operators.md is their reference. Importing this module registers the schemas with onnx, so that its checker and its
shape inference know the operators.
"""

import atexit
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, defs, helper
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceContext, InferenceError

from sa_softmax.onnx_export.bodies import DOMAIN, OPTIONAL, VERSION, function

__all__ = ["MIN_OPSET", "SCHEMAS", "check_opset", "complete", "functions", "nodes_of"]

MIN_OPSET = 18
"""The oldest default opset that the bodies can be written in: from there on ReduceMin takes its axes as an input."""

TYPES = tuple(f"tensor({each})" for each in ("float", "double", "float16", "bfloat16"))
_T = [("T", TYPES, "16-bit types are computed in float and rounded once, in SAAttention Y besides.")]
_VARIANT = OpSchema.Attribute(
    "variant", helper.make_attribute("variant", "normalized"), '"normalized" or "product"; any other is an error.'
)
_AXIS = OpSchema.Attribute("axis", helper.make_attribute("axis", -1), "The axis whose slices are the rows.")


def _input(name: str, doc: str, type: str = "T", *, optional: bool = False) -> OpSchema.FormalParameter:
    option = OpSchema.FormalParameterOption.Optional if optional else OpSchema.FormalParameterOption.Single
    return OpSchema.FormalParameter(name, type, doc, param_option=option)


_WHERE = _input("where", "True where an entry participates; broadcasts to X.", "tensor(bool)", optional=True)


def _infer_row(context: InferenceContext) -> None:
    """The output is like X."""
    x: TypeProto | None = context.get_input_type(0)
    if x is None:
        return
    if x.tensor_type.HasField("shape") and not x.tensor_type.shape.dim:
        raise InferenceError("X must have at least one axis; got a 0-d tensor")
    context.set_output_type(0, x)


def _infer_attention(context: InferenceContext) -> None:
    """(..., Hq, Tq, Dv), of Q and V."""
    q: TypeProto | None = context.get_input_type(0)
    v: TypeProto | None = context.get_input_type(2)
    if q is None or v is None:
        return
    o = TypeProto()
    o.tensor_type.elem_type = q.tensor_type.elem_type
    if q.tensor_type.HasField("shape"):
        dims = list(q.tensor_type.shape.dim)
        if len(dims) < 3:
            raise InferenceError(f"Q must be (..., Hq, Tq, D), of rank 3 or more; got rank {len(dims)}")
        o.tensor_type.shape.dim.extend(dims[:-1])
        last = o.tensor_type.shape.dim.add()
        if v.tensor_type.HasField("shape"):
            last.CopyFrom(v.tensor_type.shape.dim[-1])
    context.set_output_type(0, o)


def _schema(name: str, doc: str, infer: Any, **parts: Any) -> OpSchema:
    schema = OpSchema(name, DOMAIN, VERSION, doc, type_constraints=_T, **parts)
    schema.set_type_and_shape_inference_function(infer)
    return schema


SCHEMAS = {
    schema.name: schema
    for schema in (
        _schema(
            "SASoftmax",
            "Self-Adjust Softmax of every row of X.",
            _infer_row,
            inputs=[_input("X", "Rank 1 or more."), _WHERE],
            outputs=[_input("Y", "Has the shape of X.")],
            attributes=[_AXIS, _VARIANT],
        ),
        _schema(
            "SASoftmaxGrad",
            "The gradient of sum(G * SASoftmax(X, where)) with respect to X.",
            _infer_row,
            inputs=[_input("X", "Rank 1 or more."), _input("G", "Upstream gradient, of the shape of X."), _WHERE],
            outputs=[_input("dX", "Has the shape of X.")],
            attributes=[_AXIS, _VARIANT],
        ),
        _schema(
            "SAAttention",
            "Y V, with Y = SASoftmax(scale * Q K^T + bias, mask) along the keys.",
            _infer_attention,
            inputs=[
                _input("Q", "(..., Hq, Tq, D)"),
                _input("K", "(..., Hkv, Tk, D); Hq is a multiple of Hkv."),
                _input("V", "(..., Hkv, Tk, Dv)"),
                _input("bias", "Added to the scores; broadcasts to (..., Hq, Tq, Tk).", optional=True),
                _input(
                    "mask",
                    "True where a key participates; broadcasts to (..., Hq, Tq, Tk).",
                    "tensor(bool)",
                    optional=True,
                ),
            ],
            outputs=[_input("O", "(..., Hq, Tq, Dv)")],
            attributes=[
                _VARIANT,
                OpSchema.Attribute(
                    "is_causal",
                    helper.make_attribute("is_causal", 0),
                    "1: query i sees keys j <= i + q_offset only.",
                ),
                OpSchema.Attribute("q_offset", helper.make_attribute("q_offset", 0), "Shifts the causal mask."),
                OpSchema.Attribute(
                    "scale", OpSchema.AttrType.FLOAT, "Factor of the scores; 1/sqrt(D) if absent.", required=False
                ),
            ],
        ),
    )
}
for _each in SCHEMAS.values():
    defs.register_schema(_each)
    # onnx 1.21 would let go of the Python functions after the interpreter has gone, and crash.
    atexit.register(defs.deregister_schema, _each.name, VERSION, DOMAIN)


def functions(
    *, opset: int, double: bool = False, optional: Collection[str] = ("where", "bias", "mask")
) -> list[FunctionProto]:
    """The bodies of all operators, for a model whose default opset is ``opset``.

    :func:`complete` chooses the arguments by what a model's nodes need, and is what most will want.

    Args:
        opset: 18 to the newest that the installed onnx knows.
        double: compute in double, as nodes of type double demand, rather than in float.
        optional: the optional inputs that the nodes give. A body cannot ask whether an input was given.

    Raises:
        ValueError: an opset that the bodies cannot be written in.
    """
    check_opset(opset)
    return [function(name, opset=opset, double=double, optional=optional) for name in SCHEMAS]


def complete(model: ModelProto) -> None:
    """Make ``model``, which holds nodes of our domain, run in every client; changes it in place.

    Adds the opset import of the domain, the bodies of the operators in use, and the types and shapes that inference
    finds. Attributes that nodes leave out are written out, since onnx.reference does not know a body's defaults, and if
    only some nodes of an operator give an optional input the others get one without effect.

    Raises:
        ValueError: the default opset is older than 18, a node of ours is in another function, or its type is unknown.
    """
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 1)
    check_opset(opset)
    if any(node.domain == DOMAIN for each in model.functions for node in each.node if each.domain != DOMAIN):
        raise ValueError(
            "a function of the model holds a node of the domain sa_softmax. "
            "Inline it first: model = onnx.inliner.inline_local_functions(model)"
        )
    for imported in [each for each in model.opset_import if each.domain == DOMAIN]:
        model.opset_import.remove(imported)
    model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    model.ir_version = max(model.ir_version, 8)  # the first with functions
    for stale in [each for each in model.functions if each.domain == DOMAIN]:
        model.functions.remove(stale)

    graphs = list(_graphs(model.graph))
    for name in SCHEMAS:
        _fill_in(name, graphs)
    inferred = onnx.shape_inference.infer_shapes(model)
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.graph.value_info)

    types = _types(_graphs(inferred.graph))
    ours = list(nodes_of(model))
    for node in ours:
        first = types.get(node.input[0], TypeProto()).tensor_type
        if not first.elem_type:
            raise ValueError(
                f"the type of {node.input[0]!r}, input of the {node.op_type} node {node.name!r}, is not known. "
                "Add it to the graph's value_info"
            )
        if first.HasField("shape"):
            _count_axis_from_the_back(node, len(first.shape.dim))
    double = any(types[node.input[0]].tensor_type.elem_type == TensorProto.DOUBLE for node in ours)
    for name in sorted({node.op_type for node in ours}):
        given = {each for node in ours if node.op_type == name for each in _given(node)}
        model.functions.append(function(name, opset=opset, double=double, optional=given))


def nodes_of(model: ModelProto) -> Iterator[NodeProto]:
    """The nodes of our domain, those in subgraphs included."""
    return (node for graph in _graphs(model.graph) for node in graph.node if node.domain == DOMAIN)


def check_opset(opset: int) -> None:
    """ValueError unless the bodies can be written in this default opset."""
    newest = defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise ValueError(
            f"the default opset must be {MIN_OPSET} to {newest}, the newest that onnx {onnx.__version__} knows; "
            f"got {opset}. Export with another opset=, or convert the model with onnx.version_converter"
        )


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for each in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(each)


def _types(graphs: Iterable[GraphProto]) -> dict[str, TypeProto]:
    types = {}
    for graph in graphs:
        for value in (*graph.input, *graph.value_info, *graph.output):
            types[value.name] = value.type
        for tensor in graph.initializer:
            types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
    return types


def _count_axis_from_the_back(node: NodeProto, rank: int) -> None:
    """onnxruntime before 1.21 reduces an axis of length 0 only if it is counted from the back."""
    for attribute in node.attribute:
        if attribute.name == "axis" and attribute.i >= 0:
            attribute.i -= rank


def _required(name: str) -> int:
    return len(SCHEMAS[name].inputs) - len(OPTIONAL[name])


def _given(node: NodeProto) -> list[str]:
    """The names of the optional inputs that ``node`` has."""
    actual = node.input[_required(node.op_type) :]
    return [each for each, value in zip(OPTIONAL[node.op_type], actual, strict=False) if value]


def _fill_in(name: str, graphs: list[GraphProto]) -> None:
    """Write out the attributes of the nodes of one operator, and give all of them the same optional inputs."""
    ours = [(graph, node) for graph in graphs for node in graph.node if (node.domain, node.op_type) == (DOMAIN, name)]
    used = {each for _, node in ours for each in _given(node)}
    for graph, node in ours:
        present = {attribute.name for attribute in node.attribute}
        node.attribute.extend(
            attribute.default_value
            for attribute in SCHEMAS[name].attributes.values()
            if attribute.name not in present and attribute.default_value.name
        )
        for i, each in enumerate(OPTIONAL[name], _required(name)):
            if each in used and each not in _given(node):
                while len(node.input) <= i:
                    node.input.append("")
                node.input[i] = _neutral(graph, node, each)
        while not node.input[-1]:
            node.input.pop()  # the body has no input there


def _neutral(graph: GraphProto, node: NodeProto, name: str) -> str:
    """The name of a new value that has no effect as the optional input ``name`` of ``node``."""
    value = f"{node.output[0]}_no_{name}"
    is_bias = name == "bias"
    constant = helper.make_tensor(
        "", TensorProto.FLOAT if is_bias else TensorProto.BOOL, [], [0.0 if is_bias else True]
    )
    new = [helper.make_node("Constant", [], [value], value=constant)]
    if is_bias:
        new[0].output[0] = f"{value}_float"
        new.append(helper.make_node("CastLike", [new[0].output[0], node.input[0]], [value]))
    at = next(i for i, each in enumerate(graph.node) if each is node or each == node)
    for each in reversed(new):
        graph.node.insert(at, each)
    return value
