"""The kernels as operators of PyTorch: what a compiled graph shows, and what the Functions of this backend call.

A module that has kernels for a device defines ``row``, ``row_vjp``, ``attention`` and perhaps ``attention_vjp`` with
the arguments of the schemas below, and is registered for its dispatch key. If it does not take all dtypes and sizes, it
defines ``supports``, too. The operators have no derivatives of their own: those are the business of the Functions.

In attention ``offset`` is that of the causal mask, None without one; with ``left`` >= 0, query i sees keys
j >= i + offset - left only (offset 0 if None). ``stats`` (..., Hq, Tq, 3), in the compute dtype, is what the device's
own backward pass needs. ``dbias`` is empty without a bias: PyTorch batches operators that return tensors alone.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["direct", "implementation", "operator", "reads_output", "register", "supports"]

SCHEMAS = {
    "row": "(Tensor x, Tensor? where, int axis, str variant) -> Tensor",
    "row_vjp": "(Tensor x, Tensor g, Tensor? where, int axis, str variant) -> Tensor",
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, SymInt? offset, SymInt left, float scale,"
        " str variant) -> (Tensor o, Tensor stats)"
    ),
    "attention_vjp": (
        "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor o, Tensor stats, Tensor do, SymInt? offset,"
        " SymInt left, float scale, str variant) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
    ),
    "attention_state": (
        "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, SymInt? offset, float scale)"
        " -> (Tensor m, Tensor l, Tensor lo, Tensor o0, Tensor o1)"
    ),
    "varlen": (
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seq_q, Tensor cu_seq_k, SymInt max_q, SymInt max_k,"
        " SymInt left, SymInt right, float scale, str variant) -> (Tensor o, Tensor stats)"
    ),
    "varlen_vjp": (
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seq_q, Tensor cu_seq_k, Tensor o, Tensor stats, Tensor do,"
        " SymInt max_q, SymInt max_k, SymInt left, SymInt right, float scale, str variant)"
        " -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_LIBRARY: Any = torch.library.Library("sa_softmax", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema)

_IMPLEMENTATIONS: dict[str, tuple[str, dict[str, Any]]] = {}
_READ_OUTPUT: set[str] = set()
_FUNCTIONS: dict[str, Callable[..., Any]] = {}
short_row: Callable[[str, Tensor], Tensor | None] | None = None
"""What ``direct`` finds out and ``row`` computes, for contiguous rows of CPU tensors, in one call; None where no
kernels offer it."""


def register(device: str, name: str, kernels: ModuleType) -> None:
    """Make the functions of ``kernels`` the operators on devices of type ``device``; ``name`` is what users read."""
    operators = [operator for operator in SCHEMAS if hasattr(kernels, operator)]
    for operator in operators:
        _LIBRARY.impl(operator, getattr(kernels, operator), device.upper())
        if device == "cpu":
            _FUNCTIONS[operator] = getattr(kernels, operator)
    if device == "cpu":
        global short_row
        followed = _QUESTIONS, torch.is_grad_enabled, forward_ad
        short_row = kernels.short_row(*followed) if hasattr(kernels, "short_row") else None
    supports = getattr(kernels, "supports", _any_tensors)
    _IMPLEMENTATIONS[device] = name, dict.fromkeys(operators, supports)
    if kernels.READS_OUTPUT:
        _READ_OUTPUT.add(device)


def _any_tensors(operator: str, *tensors: Tensor) -> bool:
    return True


def implementation(device: str) -> str:
    """The name of what runs on the devices of type ``device``."""
    return _IMPLEMENTATIONS.get(device, ("composition", {}))[0]


def supports(operator: str, x: Tensor, *others: Tensor) -> bool:
    """Whether ``operator`` runs on tensors like ``x``, and v in the case of attention."""
    running = _IMPLEMENTATIONS.get(x.device.type, ("composition", {}))[1].get(operator)
    return running is not None and x.dtype in DTYPES and running(operator, x, *others)


def reads_output(q: Tensor, v: Tensor) -> bool:
    """Whether the gradient of attention on tensors like these is a kernel's that reads ``o`` and ``stats``."""
    return q.device.type in _READ_OUTPUT and supports("attention_vjp", q, v)


def _plain_keys() -> frozenset[int]:
    """What the dispatcher knows of CPU tensors that are nothing else: no wrapper, no view that is negated lazily."""
    keys = [torch._C._dispatch_keys(torch.empty(0)).raw_repr()]
    with torch.inference_mode():
        keys.append(torch._C._dispatch_keys(torch.empty(0)).raw_repr())
    return frozenset(keys)


_PLAIN = _plain_keys()
# By names of their own: to look one up takes as long as to call it.
_dispatch_keys = torch._C._dispatch_keys
_QUESTIONS = (  # all say no, 0 or None, where nothing follows a tensor
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._is_tracing,
    torch._C._autograd._profiler_enabled,
)


def direct(operator: str, x: Tensor, *others: Tensor | None) -> Callable[..., Any] | None:
    """The function behind ``operator``, for eager calls on plain CPU tensors that nothing follows: no derivative, no
    transformation, no tracer, no profiler. Through Function and dispatcher a short row takes several times as long."""
    if torch.compiler.is_compiling() or operator not in _FUNCTIONS or x.dtype not in DTYPES:
        return None
    for each in (x, *others):
        if each is not None and not (
            _dispatch_keys(each).raw_repr() in _PLAIN and not (each.requires_grad and torch.is_grad_enabled())
        ):
            return None
    if any(follows() for follows in _QUESTIONS) or forward_ad._current_level >= 0:
        return None
    return _FUNCTIONS[operator]


def operator(name: str, x: Tensor, *others: Tensor | None) -> Callable[..., Any]:
    """``direct``, or the operator itself where the dispatcher must see the call."""
    return direct(name, x, *others) or getattr(torch.ops.sa_softmax, name)


# Shapes, for tracing.


def _fake_row(x: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    return torch.empty_like(x)


def _fake_row_vjp(x: Tensor, g: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    return torch.empty_like(x)


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None,
    offset: int | None, left: int, scale: float, variant: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_attention(q, v)


def _fake_attention_vjp(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, o: Tensor, stats: Tensor, do: Tensor,
    offset: int | None, left: int, scale: float, variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _fake_attention_state(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, offset: int | None, scale: float
) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return tuple(q.new_empty((*q.shape[:-1], n), dtype=dtype) for n in (1, 1, 1, v.shape[-1], v.shape[-1]))


def _fake_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total, heads, _ = q.shape
    return q.new_empty((total, heads, v.shape[-1])), q.new_empty((heads, total, 3), dtype=torch.float32)


def _fake_varlen_vjp(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def empty_attention(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for ``o`` and ``stats``."""
    stats = q.new_empty((*q.shape[:-1], 3), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((*q.shape[:-1], v.shape[-1])), stats


# Batching: a further axis in front.


def _batched(size: int, x: Tensor, dim: int | None) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _batched_option(x: Tensor | None, dim: int | None, rank: int) -> Tensor | None:
    """An optional argument that broadcasts to ``rank`` axes, batched or not."""
    if x is None or dim is None:
        return x
    x = x.movedim(dim, 0)
    return x.reshape(x.shape[0], *[1] * (rank + 1 - x.ndim), *x.shape[1:])


def _rank(x: Tensor, dim: int | None) -> int:
    return x.ndim - (dim is not None)


def _vmap_row(info: Any, dims: Any, x: Tensor, where: Tensor | None, axis: int, variant: str) -> Any:
    where = _batched_option(where, dims[1], _rank(x, dims[0]))
    x = _batched(info.batch_size, x, dims[0])
    return torch.ops.sa_softmax.row(x, where, axis + 1, variant), 0


def _vmap_row_vjp(info: Any, dims: Any, x: Tensor, g: Tensor, where: Tensor | None, axis: int, variant: str) -> Any:
    where = _batched_option(where, dims[2], _rank(x, dims[0]))
    x, g = _batched(info.batch_size, x, dims[0]), _batched(info.batch_size, g, dims[1])
    return torch.ops.sa_softmax.row_vjp(x, g, where, axis + 1, variant), 0


def _vmap_attention(
    info: Any, dims: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None,
    offset: int | None, left: int, scale: float, variant: str,
) -> Any:  # fmt: skip
    bias, mask = (_batched_option(x, dim, _rank(q, dims[0])) for x, dim in ((bias, dims[3]), (mask, dims[4])))
    q, k, v = (_batched(info.batch_size, x, dim) for x, dim in zip((q, k, v), dims, strict=False))
    return torch.ops.sa_softmax.attention(q, k, v, bias, mask, offset, left, scale, variant), (0, 0)


def _vmap_attention_state(
    info: Any, dims: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None,
    offset: int | None, scale: float,
) -> Any:  # fmt: skip
    bias, mask = (_batched_option(x, dim, _rank(q, dims[0])) for x, dim in ((bias, dims[3]), (mask, dims[4])))
    q, k, v = (_batched(info.batch_size, x, dim) for x, dim in zip((q, k, v), dims, strict=False))
    return torch.ops.sa_softmax.attention_state(q, k, v, bias, mask, offset, scale), (0,) * 5


def _vmap_attention_vjp(
    info: Any, dims: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None,
    o: Tensor, stats: Tensor, do: Tensor, offset: int | None, left: int, scale: float, variant: str,
) -> Any:  # fmt: skip
    rank = _rank(q, dims[0])
    if bias is not None:
        bias = _batched(info.batch_size, bias, dims[3])  # a gradient for each, whether the bias is batched or not
    shape = None if bias is None else bias.shape
    bias, mask = _batched_option(bias, 0, rank), _batched_option(mask, dims[4], rank)
    q, k, v = (_batched(info.batch_size, x, dim) for x, dim in zip((q, k, v), dims, strict=False))
    o, stats, do = (_batched(info.batch_size, x, dim) for x, dim in zip((o, stats, do), dims[5:], strict=False))
    dq, dk, dv, dbias = torch.ops.sa_softmax.attention_vjp(
        q, k, v, bias, mask, o, stats, do, offset, left, scale, variant
    )
    if shape is None:
        return (dq, dk, dv, dbias), (0, 0, 0, None)
    return (dq, dk, dv, dbias.reshape(shape)), (0, 0, 0, 0)


for _name in SCHEMAS:
    torch.library.register_fake(f"sa_softmax::{_name}", globals()[f"_fake_{_name}"], lib=_LIBRARY)
for _name in ("row", "row_vjp", "attention", "attention_vjp", "attention_state"):
    torch.library.register_vmap(f"sa_softmax::{_name}", globals()[f"_vmap_{_name}"], lib=_LIBRARY)
