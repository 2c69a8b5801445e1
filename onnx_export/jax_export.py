"""Export from JAX: while jax2onnx traces a model, the computations of the JAX backend are primitives, one node each.

They stand in for what follows the validation, so every way to call the operations is covered. They are made for
tracing, under ``vmap`` too; a derivative of the operations cannot be exported.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax2onnx
import numpy as np
import numpy.typing as npt
from jax.extend.core import Primitive
from jax.interpreters import batching
from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

from sa_softmax.backends.jax import _attention, _softmax
from sa_softmax.onnx_export.bodies import DOMAIN, VERSION

__all__ = ["export_jax"]

Array = npt.NDArray[Any]
Operands = Sequence[Any]
Dims = Sequence[Any]
Given = tuple[bool, ...]
Attributes = tuple[tuple[str, Any], ...]

_SOFTMAX = Primitive("SASoftmax")
_ATTENTION = Primitive("SAAttention")


def export_jax(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Path, *,
    dynamic: Any, opset: int,
) -> tuple[dict[str, Array], list[Array]]:  # fmt: skip
    """Write the file, whose nodes still lack their bodies; gives the inputs, and what ``model`` makes of them."""
    call = inspect.signature(model).bind(*args, **kwargs)
    names, arrays, axes = _leaves(call.arguments, dynamic)
    structure = jax.tree.structure(tuple(call.arguments.values()))
    expected = jax.tree.leaves(model(*args, **kwargs))

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        call.arguments.update(zip(call.arguments, jax.tree.unflatten(structure, arrays), strict=True))
        return jax.tree.leaves(model(*call.args, **call.kwargs))

    with _as_primitives():
        jax2onnx.to_onnx(
            flat,
            [_spec(array, dims) for array, dims in zip(arrays, axes, strict=True)],
            opset=opset,
            enable_double_precision=any(array.dtype == jnp.float64 for array in arrays),
            return_mode="file",
            output_path=path,
            input_names=names,
            output_names=["output"] if len(expected) == 1 else [f"output_{i}" for i in range(len(expected))],
        )
    inputs = {name: np.asarray(array) for name, array in zip(names, arrays, strict=True)}
    return inputs, [np.asarray(each) for each in expected]


def _leaves(arguments: Mapping[str, Any], dynamic: Any) -> tuple[list[str], list[jax.Array], list[Any]]:
    """Of each array among the arguments: a name, the array, and the entry of ``dynamic``."""
    if not isinstance(dynamic, Mapping):
        dynamic = dict(zip(arguments, dynamic or (), strict=False))
    names: list[str] = []
    arrays: list[jax.Array] = []
    axes: list[Any] = []
    for name, tree in arguments.items():
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        names += [
            "_".join(filter(None, (name, jax.tree_util.keystr(key, simple=True, separator="_")))) for key, _ in leaves
        ]
        arrays += [jnp.asarray(leaf) for _, leaf in leaves]
        given = dynamic.get(name)
        axes += [None] * len(leaves) if given is None else structure.flatten_up_to(given)  # type: ignore[attr-defined]
    return names, arrays, axes


def _spec(array: jax.Array, dims: Mapping[int, str] | None) -> Any:
    """What jax2onnx takes for an array: lengths, or names of dynamic axes, and the dtype."""
    shape: list[int | str] = list(array.shape)
    for axis, name in (dims or {}).items():
        shape[axis] = name
    return jax.ShapeDtypeStruct(tuple(shape), array.dtype)


@contextmanager
def _as_primitives() -> Iterator[None]:
    """Nothing that JAX remembers from before, or after, may hold the other form of the computations."""
    softmax, attention = _softmax._sa_softmax, _attention._sa_attention
    jax.clear_caches()
    setattr(_softmax, "_sa_softmax", _bind_softmax)  # noqa: B010 - its type is another
    setattr(_attention, "_sa_attention", _bind_attention)  # noqa: B010
    try:
        yield
    finally:
        _softmax._sa_softmax, _attention._sa_attention = softmax, attention
        jax.clear_caches()


# Optional operands follow the others; ``given`` tells which of them there are.


def _bind_softmax(x: jax.Array, where: jax.Array | None, axis: int, variant: str) -> jax.Array:
    return _bind(_SOFTMAX, (x,), (where,), axis=axis, variant=variant)


def _bind_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, mask: jax.Array | None,
    scale: float, q_offset: int | None, variant: str,
) -> jax.Array:  # fmt: skip
    dtype = q.dtype
    if bias is not None:  # it may have the compute dtype, and then all of it is computed in that
        q, k, v = (array.astype(bias.dtype) for array in (q, k, v))
    if q.dtype == jnp.float64 and float(np.float32(scale)) != scale:  # the attribute is a float
        q, scale = q * scale, 1.0
    options = {"is_causal": int(q_offset is not None), "q_offset": q_offset or 0, "scale": scale, "variant": variant}
    return _bind(_ATTENTION, (q, k, v), (bias, mask), **options).astype(dtype)


def _bind(primitive: Primitive, required: Operands, optional: Operands, **attributes: Any) -> jax.Array:
    given = tuple(each is not None for each in optional)
    operands = (*required, *(each for each in optional if each is not None))
    return primitive.bind(*operands, given=given, attributes=tuple(attributes.items()))


def _batch_softmax(operands: Operands, dims: Dims, *, given: Given, attributes: Attributes) -> tuple[jax.Array, int]:
    """Rows are counted from the back, so that a batch axis in front changes nothing."""
    x, *where = _batched(operands, dims, required=1)
    options = dict(attributes)
    options["axis"] -= (x.ndim - 1) if options["axis"] >= 0 else 0
    return _SOFTMAX.bind(x, *where, given=given, attributes=tuple(options.items())), 0


def _batch_attention(operands: Operands, dims: Dims, *, given: Given, attributes: Attributes) -> tuple[jax.Array, int]:
    return _ATTENTION.bind(*_batched(operands, dims, required=3), given=given, attributes=attributes), 0


def _batched(operands: Operands, dims: Dims, *, required: int) -> list[jax.Array]:
    """Operands with the batch axis in front: all required ones, and of the others those that differ along it."""
    length = next(array.shape[dim] for array, dim in zip(operands, dims, strict=True) if dim is not None)
    moved = [array if dim is None else jnp.moveaxis(array, dim, 0) for array, dim in zip(operands, dims, strict=True)]
    is_mapped = [dim is not None for dim in dims]
    first = [
        array if mapped else jnp.broadcast_to(array, (length, *array.shape))
        for array, mapped in zip(moved[:required], is_mapped[:required], strict=True)
    ]
    rank = first[0].ndim
    rest = [
        array.reshape(array.shape[0], *(1,) * (rank - array.ndim), *array.shape[1:]) if mapped else array
        for array, mapped in zip(moved[required:], is_mapped[required:], strict=True)
    ]
    return first + rest


batching.primitive_batchers[_SOFTMAX] = _batch_softmax
batching.primitive_batchers[_ATTENTION] = _batch_attention


def _abstract_softmax(x: Any, *_: Any, given: Given, attributes: Attributes) -> Any:
    return jax.core.ShapedArray(x.shape, x.dtype)


def _abstract_attention(q: Any, k: Any, v: Any, *_: Any, given: Given, attributes: Attributes) -> Any:
    return jax.core.ShapedArray((*q.shape[:-1], v.shape[-1]), q.dtype)


_SOFTMAX.def_abstract_eval(_abstract_softmax)
_ATTENTION.def_abstract_eval(_abstract_attention)


class _Plugin(PrimitiveLeafPlugin):  # type: ignore[misc]
    """How jax2onnx writes one of the primitives: a node of the same name and attributes."""

    def lower(self, ctx: Any, eqn: Any, *_: Any, **__: Any) -> None:
        given = iter(eqn.invars)
        required = [next(given) for _ in range(len(eqn.invars) - sum(eqn.params["given"]))]
        operands = [*required, *(next(given) if is_given else None for is_given in eqn.params["given"])]
        inputs = [None if each is None else ctx.get_value_for_var(each) for each in operands]
        (out,) = eqn.outvars
        value = ctx.get_value_for_var(out)
        node = getattr(ctx.builder, self.primitive)
        result = node(
            *inputs, _domain=DOMAIN, _version=VERSION, _outputs=[value.name], **dict(eqn.params["attributes"])
        )
        result.type, result.shape = value.type, value.shape
        ctx.bind_value_for_var(out, result)


for _primitive in (_SOFTMAX, _ATTENTION):
    register_primitive(jaxpr_primitive=_primitive.name)(type(_primitive.name, (_Plugin,), {}))
