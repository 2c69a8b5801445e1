"""The row operation on PyTorch tensors, with its gradient in closed form (spec clauses G1 to G5).

``compose`` is composed so that PyTorch's own derivatives of it, of any order and in either mode, follow the same
clauses. They serve forward mode. The closed form serves the rest: it keeps ``x`` alone for the backward pass, and
stays finite up to the largest scores (G8). Where a device has kernels, they take the place of both.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

from sa_softmax.backends.torch import _kernels

__all__ = ["apply", "compose", "participating", "sa_softmax", "short", "softmax", "value", "vjp"]

_LAST = -1  # compared by identity: -1.0 equals it, and is no axis


def short(x: Tensor, axis: int, variant: str) -> Tensor | None:
    """The result where nothing is to be checked or differentiated: a short row computes faster than that is done."""
    kernel = _kernels.short_row
    if kernel is None or axis is not _LAST or torch.compiler.is_dynamo_compiling():  # other tracers it meets by itself
        return None
    return kernel(variant, x)


def sa_softmax(x: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    if (kernel := _kernels.direct("row", x, where)) is not None:
        return kernel(x, where, axis, variant)
    return apply(_Softmax, compose, x, where, axis, variant)


def apply(function: type[Function], compose: Any, *args: Any) -> Any:
    """``function``, or ``compose``, which computes the same, where PyTorch would miss the Function's derivatives."""
    # A jvp of the Function's own would lose the outer tangent where forward mode is nested, and Dynamo refuses it.
    if forward_ad._current_level >= 0:
        return compose(*args)
    compiling, transformed = torch.compiler.is_compiling(), torch._C._are_functorch_transforms_active()
    # Under torch.func, Dynamo traces the forward of a Function and forgets its backward.
    if compiling and transformed:
        return compose(*args)
    if compiling or transformed:
        return function.apply(*args)  # type: ignore[no-untyped-call]
    # As Function.apply goes on from here, but that it looks for arguments left out, which takes most of its time.
    return super(Function, function).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]


def compose(x: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    z, on = participating(x, where)
    return value(z, on, softmax(z, on, axis), axis, variant).to(x.dtype)


def compose_vjp(x: Tensor, g: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
    z, on = participating(x, where)
    return vjp(z, on, softmax(z, on, axis), g.to(z.dtype), axis, variant).to(x.dtype)


class _Softmax(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
        if _kernels.supports("row", x):
            return _kernels.operator("row", x, where)(x, where, axis, variant)
        return compose(x, where, axis, variant)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, where, ctx.axis, ctx.variant = inputs
        ctx.save_for_backward(x, where)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        x, where = ctx.saved_tensors
        if _kernels.supports("row_vjp", x):
            dx = apply(_SoftmaxVjp, compose_vjp, x, g, where, ctx.axis, ctx.variant)
        else:
            dx = compose_vjp(x, g, where, ctx.axis, ctx.variant)
        return dx, None, None, None


class _SoftmaxVjp(Function):
    """The gradient by a kernel; its own derivatives are those of the closed form."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, g: Tensor, where: Tensor | None, axis: int, variant: str) -> Tensor:
        return _kernels.operator("row_vjp", x, g, where)(x, g, where, axis, variant)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, g, where, ctx.axis, ctx.variant = inputs
        ctx.save_for_backward(x, g, where)

    @staticmethod
    def backward(ctx: Any, t: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, g, where = ctx.saved_tensors
        pull_back = torch.func.vjp(lambda x, g: compose_vjp(x, g, where, ctx.axis, ctx.variant), x, g)[1]
        return *pull_back(t), None, None, None


# Below, ``z`` has the compute dtype and holds 0 where ``on`` is false; ``p`` is the softmax over ``on``.


def participating(x: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """z and on. Select, never multiply: whatever an excluded entry holds is replaced before it is used (C5)."""
    on = x != -math.inf
    if where is not None:
        on = on & where
    return torch.where(on, x, 0).to(torch.promote_types(x.dtype, torch.float32)), on


def softmax(z: Tensor, on: Tensor, axis: int) -> Tensor:
    # NaN in a row without entries, where all that follows, derivatives too, selects by ``on``.
    return torch.softmax(torch.where(on, z, -math.inf), axis)


def value(z: Tensor, on: Tensor, p: Tensor, axis: int, variant: str) -> Tensor:
    f = z if variant == "product" else _factor(z, axis).a
    return torch.where(on, f * p, 0)


def vjp(z: Tensor, on: Tensor, p: Tensor, g: Tensor, axis: int, variant: str) -> Tensor:
    g = torch.where(on, g, 0)
    gp = g * p
    if variant == "product":
        gy = g * (z * p)  # g * z may overflow where p, and with it the gradient, is 0
        return torch.where(on, gy - p * gy.sum(axis, keepdim=True) + gp, 0)
    a, lo, hi, unit, R = _factor(z, axis)
    ga = g * a
    D = (ga * p).sum(axis, keepdim=True)
    S = gp.sum(axis, keepdim=True)
    low, high = z == lo, z == hi
    to_lo = torch.where(lo < 0, (D - S) / _count(low, axis), 0)
    to_hi = torch.where(hi > 0, -D / _count(high, axis), 0)
    dz = gp + torch.where(low, to_lo, torch.where(high, to_hi, 0))
    return torch.where(on, p * (ga - D) + dz / R * unit, 0)


def _count(tied: Tensor, axis: int) -> Tensor:
    return tied.sum(axis, keepdim=True).clamp(min=1)


class _Factor(NamedTuple):
    """a = (z - lo) / (hi - lo) and R = unit * (hi - lo)."""

    a: Tensor
    lo: Tensor
    hi: Tensor
    unit: Tensor
    R: Tensor


def _factor(z: Tensor, axis: int) -> _Factor:
    """The zeros of excluded entries move neither lo nor hi."""
    if z.shape[axis] == 0:
        x_min = x_max = z.sum(axis, keepdim=True)
    else:
        x_min, x_max = torch.aminmax(z, dim=axis, keepdim=True)
    lo, hi, unit, R = _range(x_min, x_max)
    return _Factor((z * unit - lo * unit) / R, lo, hi, unit, R)


def _range(x_min: Tensor, x_max: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lo, hi, unit and R = unit * (hi - lo), where ``unit`` is the power of two that keeps hi - lo finite (C7).

    R = 0 becomes inf, which makes a, and every gradient that divides by R, the 0 that clauses C1 and G5 ask for.
    """
    # By selection: clamp and minimum pass a gradient on to an extremum of exactly 0 (G4).
    lo = torch.where(x_min < 0, x_min, 0)
    hi = torch.where(x_max > 0, x_max, 0)
    unit = torch.where(torch.maximum(hi, -lo) > 1, 0.5, torch.ones_like(lo))
    R = hi * unit - lo * unit
    return lo, hi, unit, torch.where(R == 0, math.inf, R)
