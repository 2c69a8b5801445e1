"""Export from PyTorch: torch.onnx finds our operators whole (backends/torch/_export.py), and here they become nodes."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from onnxscript import ir, opset18, values
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sa_softmax.backends.torch import _export  # noqa: F401 - defines torch.ops.sa_softmax
from sa_softmax.onnx_export.bodies import DOMAIN, VERSION
from sa_softmax.onnx_export.operators import SCHEMAS

__all__ = ["export_torch"]

Array = npt.NDArray[Any]

op: Any = opset18
_OURS = {name: values.Op(values.Opset(DOMAIN, VERSION), name, schema) for name, schema in SCHEMAS.items()}


def export_torch(
    model: nn.Module | Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Path, *,
    dynamic: Any, opset: int,
) -> tuple[dict[str, Array], list[Array]]:  # fmt: skip
    """Write the file, whose nodes still lack their bodies; gives the inputs, and what ``model`` makes of them."""
    module = model if isinstance(model, nn.Module) else _Function(model)
    input_names, output_names = (getattr(module, name, None) for name in ("input_names", "output_names"))
    with _evaluating(module), _without_remarks(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own code and about axes that share a name
        program = torch.onnx.export(
            module,
            args,
            kwargs=dict(kwargs),
            dynamo=True,
            verbose=False,
            dynamic_shapes=dynamic,
            opset_version=opset,
            input_names=input_names,
            custom_translation_table={
                torch.ops.sa_softmax.sa_softmax.default: _softmax,
                torch.ops.sa_softmax.sa_attention.default: _attention,
            },
        )
        expected = module(*args, **kwargs)
    assert program is not None
    outputs = program.model.graph.outputs
    if output_names is None:
        output_names = ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
    for output, name in zip(outputs, output_names, strict=True):
        output.name = name
    program.save(path)
    names = [str(each.name) for each in program.model.graph.inputs]
    return dict(zip(names, _arrays((args, dict(kwargs))), strict=True)), _arrays(expected)


@contextmanager
def _without_remarks() -> Iterator[None]:
    """torch.onnx would tell everyone without torchvision that it skips the operators of that."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Function(nn.Module):
    """A function as a module; its own parameters name the inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, training in modes.items():
            each.training = training


def _arrays(tree: Any) -> list[Array]:
    return [_array(leaf.detach().cpu()) for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _array(x: Tensor) -> Array:
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


# What the exporter calls for our operators; tensors are values of the ONNX graph.


def _softmax(x: Any, where: Any, axis: int, variant: str) -> Any:
    return _OURS["SASoftmax"](x, where, axis=axis, variant=variant)


def _attention(q: Any, k: Any, v: Any, bias: Any, mask: Any, offset: Any, scale: float, variant: str) -> Any:
    if not isinstance(scale, float):
        raise ValueError("the head dimension D is dynamic, and with it the default scale. Give D a fixed length")
    like = q
    if bias is not None and bias.dtype != q.dtype:  # a 16-bit attention with a bias in float32
        q, k, v = (op.CastLike(each, bias) for each in (q, k, v))
    if like.dtype == ir.DataType.DOUBLE and float(np.float32(scale)) != scale:  # the attribute is a float
        q, scale = op.Mul(q, op.Constant(value=ir.tensor(scale, ir.DataType.DOUBLE))), 1.0
    if offset is not None and not isinstance(offset, int):  # a value of the graph, which no attribute can hold
        i, j = (op.Range(0, op.Squeeze(op.Shape(each, start=-2, end=-1)), 1) for each in (q, k))
        seen = op.LessOrEqual(op.Sub(j, op.Unsqueeze(i, [-1])), offset)
        mask, offset = seen if mask is None else op.And(seen, mask), None
    o = _OURS["SAAttention"](
        q, k, v, bias, mask,
        variant=variant, is_causal=int(offset is not None), q_offset=offset or 0, scale=scale,
    )  # fmt: skip
    return o if q is like or like.dtype == ir.DataType.DOUBLE else op.CastLike(o, like)
