"""Random inputs for a model: what its graph says of their types, lengths and ranges."""

import ast
import operator
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

__all__ = ["draw"]

LONGEST = 12  # of a dynamic axis

_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def draw(model: ModelProto, rng: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    """An array for each input of ``model``.

    Dynamic axes get lengths from 1 to 12, those of one name the same; an axis whose name is a sum of others, their sum.
    Floats are normal, integers index what they are used for (else 0 or 1), and two in three booleans are true.

    Raises ValueError for an input of another kind, and for a name of an axis that is no sum or product of names.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    lengths: dict[str, int] = {}
    for value in inputs:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param.isidentifier():
                lengths.setdefault(dim.dim_param, int(rng.integers(1, LONGEST + 1)))
    return {value.name: _array(model, value, lengths, rng) for value in inputs}


def _array(
    model: ModelProto, value: ValueInfoProto, lengths: dict[str, int], rng: np.random.Generator
) -> npt.NDArray[Any]:
    tensor = value.type.tensor_type
    shape = [
        dim.dim_value
        if dim.HasField("dim_value")
        else _length(ast.parse(dim.dim_param, mode="eval").body, lengths)
        if dim.dim_param
        else int(rng.integers(1, LONGEST + 1))
        for dim in tensor.shape.dim
    ]
    if tensor.elem_type == TensorProto.STRING or not tensor.elem_type:
        raise ValueError(f"cannot draw the input {value.name!r}, which is no tensor of numbers. Pass inputs=")
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if tensor.elem_type == TensorProto.BOOL:
        return rng.random(shape) < 2 / 3
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, _count(model, value.name), shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _length(expression: ast.expr, lengths: dict[str, int]) -> int:
    match expression:
        case ast.Name(id=name) if name in lengths:
            return lengths[name]
        case ast.Constant(value=int(value)):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_length(left, lengths), _length(right, lengths))
    raise ValueError(f"cannot tell the length of an axis called {ast.unparse(expression)!r}. Pass inputs=")


def _count(model: ModelProto, name: str) -> int:
    """How many different integers the input ``name`` may hold: it may index a table of weights."""
    tables = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    counts = [
        tables[node.input[0]][next((a.i for a in node.attribute if a.name == "axis"), 0)]
        for node in model.graph.node
        if node.op_type == "Gather" and node.input[1] == name and node.input[0] in tables
    ]
    return min(counts, default=2)
