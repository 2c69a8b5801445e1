"""Wrong backends, each with one plausible mistake. The suite is judged by rejecting every one of them.

A mutant is the reference with one of its parts replaced, or an adapter that mishandles what goes in or comes out.
Those of :mod:`sa_softmax.conformance.kernel_mutants` are wrong for some sizes and layouts only.
``python -m sa_softmax.conformance.mutants`` runs the suite against all of them and prints what rejects each.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np

from sa_softmax import reference
from sa_softmax.backends.numpy.adapter import ReferenceAdapter
from sa_softmax.backends.protocol import Array, Backend, Gradients

__all__ = ["Mutant", "main", "mutants"]


class Mutant(ReferenceAdapter):
    """The reference with some of its private functions replaced by ``parts``, behind a front that may change what
    goes in or comes out: ``before(operation, arrays, options)`` returns what is passed on,
    ``after(operation, result, arrays)`` what comes back.
    """

    def __init__(
        self,
        name: str,
        before: Callable[..., Any] | None = None,
        after: Callable[..., Any] | None = None,
        **parts: Any,
    ) -> None:
        self.name = name
        self._before, self._after, self._parts = before, after, parts

    def _run(self, operation: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
        given = arrays
        if self._before is not None:
            arrays, options = self._before(operation, arrays, options)
        with mock.patch.multiple(reference, **self._parts) if self._parts else nullcontext():
            result = getattr(ReferenceAdapter, operation)(self, *arrays, **options)
        return result if self._after is None else self._after(operation, result, given)

    def sa_softmax(self, x: Array, **options: Any) -> Any:
        return self._run("sa_softmax", (x,), options)

    def sa_softmax_vjp(self, x: Array, g: Array, **options: Any) -> Any:
        return self._run("sa_softmax_vjp", (x, g), options)

    def sa_attention(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        return self._run("sa_attention", (q, k, v), options)

    def sa_attention_vjp(self, q: Array, k: Array, v: Array, do: Array, **options: Any) -> Any:
        return self._run("sa_attention_vjp", (q, k, v, do), options)


def mutants() -> dict[str, Backend]:
    """A fresh set, by name, of the mutants that are wrong everywhere."""
    families = (_forward, _corners, _dtypes, _plumbing, _tails, _gradients, _attention, _attention_gradients)
    found = [mutant for family in families for mutant in family()]
    return {mutant.name: mutant for mutant in found}


# What the originals do, for the replacements to build on.
_original = {name: part for name, part in vars(reference).items() if callable(part)}
_extrema, _range, _softmax = _original["_extrema"], _original["_range"], _original["_softmax"]
_participating, _shares, _scores = _original["_participating"], _original["_shares"], _original["_scores"]
_row_forward, _row_vjp, _rounded = _original["_forward"], _original["_vjp"], _original["_rounded"]
_weigh, _sum_groups, _sum_to = _original["_weigh"], _original["_sum_groups"], _original["_sum_to"]


def _range_between(lo: Array, hi: Array) -> tuple[Array, Array, Array]:
    """The result of reference._range for other choices of lo and hi."""
    unit = np.where(np.maximum(abs(hi), abs(lo)) > 1, 0.5, 1).astype(lo.dtype)
    R = hi * unit - lo * unit
    return lo, unit, np.where(R == 0, np.inf, R)


def _quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    return np.errstate(all="ignore")(function)


def _forward() -> Iterator[Backend]:
    """Mistakes about the definition."""

    yield Mutant("plain-softmax", _forward=_quietly(lambda z, on, axis, variant: _softmax(z, on, axis)[0] * on))
    yield Mutant("zeros", _forward=_quietly(lambda z, on, axis, variant: np.zeros_like(z)))
    yield Mutant(
        "factor-without-softmax",
        _forward=_quietly(
            lambda z, on, axis, variant: np.where(
                on,
                _row_forward(z, on, axis, variant)
                / np.where(_softmax(z, on, axis)[0] == 0, 1, _softmax(z, on, axis)[0]),
                0,
            )
        ),
    )
    yield Mutant("always-normalized", _forward=lambda z, on, axis, variant: _row_forward(z, on, axis, "normalized"))
    yield Mutant("always-product", _forward=lambda z, on, axis, variant: _row_forward(z, on, axis, "product"))
    yield Mutant("product-of-magnitude", _forward=lambda z, on, axis, variant: abs(_row_forward(z, on, axis, variant)))
    yield Mutant("lo-not-clamped", _range=lambda a, b: _range_between(a, np.maximum(b, 0)))
    yield Mutant("hi-not-clamped", _range=lambda a, b: _range_between(np.minimum(a, 0), b))
    yield Mutant("neither-clamped", _range=lambda a, b: _range_between(a, b))
    yield Mutant("clamps-swapped", _range=lambda a, b: _range_between(np.maximum(a, 0), np.minimum(b, 0)))
    yield Mutant("lo-always-zero", _range=lambda a, b: _range_between(0 * a, np.maximum(b, 0)))
    yield Mutant(
        "range-symmetric", _range=lambda a, b: _range_between(-np.maximum(abs(a), abs(b)), np.maximum(abs(a), abs(b)))
    )

    def epsilon(size: float) -> Callable[..., Any]:
        def factor(x_min: Array, x_max: Array) -> tuple[Array, Array, Array]:
            lo, unit, R = _range(x_min, x_max)
            return lo, unit, np.where(np.isinf(R), R, R + np.asarray(size, R.dtype))

        return factor

    yield Mutant("epsilon-1e-3-in-the-denominator", _range=epsilon(1e-3))
    yield Mutant("epsilon-1e-6-in-the-denominator", _range=epsilon(1e-6))
    yield Mutant("epsilon-1e-12-in-the-denominator", _range=epsilon(1e-12))
    yield Mutant("no-maximum-subtracted", _softmax=_quietly(_softmax_unshifted))
    yield Mutant("exponential-stops-at-the-smallest-normal", _softmax=_quietly(_softmax_of_clamped_exponentials))
    yield Mutant(
        "temperature-of-log2",
        _softmax=lambda z, on, axis: (
            _softmax(z * np.asarray(np.log(2), z.dtype), on, axis)[0],
            *_extrema(z, on, axis),
        ),
    )
    yield Mutant("softmax-sums-excluded-entries-too", _softmax=_quietly(_softmax_over_everything))
    yield Mutant(
        "extrema-over-the-whole-batch",
        _extrema=lambda z, on, axis: (
            np.broadcast_to(np.min(z, where=on, initial=np.inf), _extrema(z, on, axis)[0].shape),
            _extrema(z, on, axis)[1],
        ),
    )
    yield Mutant("one-maximum-for-the-whole-batch", _softmax=_quietly(_softmax_shifted_by_batch))
    yield Mutant(
        "minimum-of-magnitude",
        _extrema=lambda z, on, axis: (
            -np.max(abs(z), axis, keepdims=True, where=on, initial=0),
            _extrema(z, on, axis)[1],
        ),
    )


def _softmax_unshifted(z: Array, on: Array, axis: int) -> tuple[Array, Array, Array]:
    e = np.where(on, np.exp(z), 0)
    total = e.sum(axis, keepdims=True)
    return e / np.where(total == 0, 1, total), *_extrema(z, on, axis)


def _softmax_of_clamped_exponentials(z: Array, on: Array, axis: int) -> tuple[Array, Array, Array]:
    x_min, x_max = _extrema(z, on, axis)
    e = np.where(on, np.maximum(np.exp(z - x_max), np.finfo(z.dtype).tiny), 0)
    total = e.sum(axis, keepdims=True)
    return e / np.where(total == 0, 1, total), x_min, x_max


def _softmax_over_everything(z: Array, on: Array, axis: int) -> tuple[Array, Array, Array]:
    return _softmax(z, np.ones_like(on), axis)[0] * on, *_extrema(z, on, axis)


def _softmax_shifted_by_batch(z: Array, on: Array, axis: int) -> tuple[Array, Array, Array]:
    e = np.where(on, np.exp(z - np.max(z, where=on, initial=-np.inf)), 0)
    total = e.sum(axis, keepdims=True)
    return e / np.where(total == 0, 1, total), *_extrema(z, on, axis)


def _corners() -> Iterator[Backend]:
    """Mistakes about corner rows and participation."""

    def zero_range(value: float) -> Callable[..., Any]:
        def forward(z: Array, on: Array, axis: int, variant: str) -> Array:
            y = _row_forward(z, on, axis, variant)
            p, x_min, x_max = _softmax(z, on, axis)
            flat = (x_min == 0) & (x_max == 0) & on
            return np.where(flat & (variant == "normalized"), p * value, y)

        return _quietly(forward)

    def fully_masked(value: float) -> Callable[..., Any]:
        def forward(z: Array, on: Array, axis: int, variant: str) -> Array:
            y = _row_forward(z, on, axis, variant)
            return np.where(on.any(axis, keepdims=True), y, value / max(z.shape[axis], 1)).astype(z.dtype)

        return forward

    def participating(rule: Callable[..., Array]) -> Callable[..., Any]:
        def replaced(x: Array, axis: int, where: Array | None) -> tuple[Array, Array]:
            z, on = _participating(x, axis, where)
            return z, rule(x, z, on)

        return _quietly(replaced)

    yield Mutant("zero-range-gives-softmax", _forward=zero_range(1.0))
    yield Mutant("zero-range-gives-nan", _forward=zero_range(np.nan))
    yield Mutant("fully-masked-row-is-uniform", _forward=fully_masked(1.0))
    yield Mutant("fully-masked-row-is-nan", _forward=fully_masked(np.nan))
    yield Mutant("mask-multiplies", _participating=_quietly(_multiply_mask))
    yield Mutant("mask-adds-the-lowest-finite", _participating=_quietly(_additive_mask))
    yield Mutant("mask-ignored", _participating=lambda x, axis, where: _participating(x, axis, None))
    yield Mutant(
        "mask-inverted",
        _participating=lambda x, axis, where: _participating(x, axis, None if where is None else ~where),
    )
    yield Mutant("minus-inf-participates", _participating=_quietly(_minus_inf_participates))
    yield Mutant(
        "minus-inf-is-the-minimum",
        _extrema=_quietly(
            lambda z, on, axis: (
                np.where(on.all(axis, keepdims=True), _extrema(z, on, axis)[0], -np.inf).astype(z.dtype),
                _extrema(z, on, axis)[1],
            )
        ),
    )
    yield Mutant(
        "lowest-finite-is-excluded",
        _participating=participating(lambda x, z, on: on & ~(z < np.finfo(z.dtype).min / 4)),
    )
    yield Mutant("nan-is-excluded", _participating=participating(lambda x, z, on: on & ~np.isnan(z)))
    yield Mutant("non-finite-is-excluded", _participating=participating(lambda x, z, on: on & np.isfinite(z)))
    yield Mutant("extrema-skip-nan-rows", _forward=_quietly(_nan_stays_in_its_entry))
    yield Mutant(
        "nan-spreads-to-excluded-entries",
        _forward=_quietly(
            lambda z, on, axis, variant: np.where(
                np.isnan(_row_forward(z, on, axis, variant)).any(axis, keepdims=True),
                np.nan,
                _row_forward(z, on, axis, variant),
            )
        ),
    )
    yield Mutant(
        "nan-spreads-to-other-rows",
        _forward=_quietly(lambda z, on, axis, variant: _row_forward(z, on, axis, variant) + 0 * np.sum(z)),
    )
    yield Mutant("plus-inf-is-one-hot", _forward=_quietly(_plus_inf_wins))
    yield Mutant("range-overflows", _range=_quietly(_overflowing_factor))
    yield Mutant("inverse-of-the-range-overflows", _forward=_quietly(_multiplied_by_the_inverse))
    yield Mutant(
        "extrema-of-excluded-entries-count",
        _participating=_quietly(_keep_excluded_values),
        _extrema=lambda z, on, axis: _extrema(z, np.ones_like(on), axis),
    )
    yield Mutant(
        "excluded-entries-are-tiny-not-zero",
        _forward=lambda z, on, axis, variant: np.where(
            on, _row_forward(z, on, axis, variant), np.asarray(1e-30, z.dtype)
        ),
    )
    yield Mutant(
        "one-entry-rows-give-one",
        _forward=lambda z, on, axis, variant: np.where(
            on & (on.sum(axis, keepdims=True) == 1), 1, _row_forward(z, on, axis, variant)
        ).astype(z.dtype),
    )
    yield Mutant(
        "constant-rows-are-zero",
        _forward=_quietly(
            lambda z, on, axis, variant: np.where(
                _extrema(z, on, axis)[0] == _extrema(z, on, axis)[1], 0, _row_forward(z, on, axis, variant)
            )
        ),
    )
    yield Mutant("smallest-entry-is-nearly-zero", _forward=_quietly(_distributed_division))


def _multiply_mask(x: Array, axis: int, where: Array | None) -> tuple[Array, Array]:
    _, on = _participating(x, axis, where)
    return x.astype(_participating(x, axis, where)[0].dtype) * on, on


def _additive_mask(x: Array, axis: int, where: Array | None) -> tuple[Array, Array]:
    z, on = _participating(x, axis, where)
    return np.where(on, z, np.finfo(z.dtype).min), np.ones_like(on)


def _minus_inf_participates(x: Array, axis: int, where: Array | None) -> tuple[Array, Array]:
    z, on = _participating(x, axis, where)
    inside = np.ones_like(on) if where is None else np.broadcast_to(where, on.shape)
    return np.where(inside, x.astype(z.dtype), 0), inside


def _keep_excluded_values(x: Array, axis: int, where: Array | None) -> tuple[Array, Array]:
    z, on = _participating(x, axis, where)
    return np.where(np.isfinite(x), x, 0).astype(z.dtype), on


def _nan_stays_in_its_entry(z: Array, on: Array, axis: int, variant: str) -> Array:
    clean = on & ~np.isnan(z)
    return np.where(on & np.isnan(z), np.nan, _row_forward(np.where(clean, z, 0), clean, axis, variant))


def _plus_inf_wins(z: Array, on: Array, axis: int, variant: str) -> Array:
    top = on & (z == np.inf)
    hot = top / np.maximum(top.sum(axis, keepdims=True), 1)
    return np.where(top.any(axis, keepdims=True), hot, _row_forward(z, on, axis, variant)).astype(z.dtype)


def _overflowing_factor(x_min: Array, x_max: Array) -> tuple[Array, Array, Array]:
    lo, hi = np.minimum(x_min, 0), np.maximum(x_max, 0)
    R = hi - lo
    return lo, np.ones_like(lo), np.where(R == 0, np.inf, R)


def _multiplied_by_the_inverse(z: Array, on: Array, axis: int, variant: str) -> Array:
    if variant == "product":
        return _row_forward(z, on, axis, variant)
    p, x_min, x_max = _softmax(z, on, axis)
    lo, unit, R = _range(x_min, x_max)
    return np.where(on, (z * unit - lo * unit) * (1 / R) * p, 0)


def _distributed_division(z: Array, on: Array, axis: int, variant: str) -> Array:
    """x * (1/R) - lo * (1/R) with one of the products kept exact, as a fused multiply-add does."""
    if variant == "product":
        return _row_forward(z, on, axis, variant)
    p, x_min, x_max = _softmax(z, on, axis)
    lo, unit, R = _range(x_min, x_max)
    inverse = 1 / R
    exact = (z * unit).astype(np.longdouble) * inverse - (lo * unit * inverse).astype(np.longdouble)
    return np.where(on, exact.astype(z.dtype) * p, 0)


def _dtypes() -> Iterator[Backend]:
    """Mistakes about precision and types."""

    def computed_in(name: str, dtype: str, only: str) -> Backend:
        def before(operation: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
            if str(arrays[0].dtype) != only:
                return arrays, options
            bias = options.get("bias")
            changed = options if bias is None else options | {"bias": bias.astype(dtype)}
            with np.errstate(over="ignore"):
                return tuple(array.astype(dtype) for array in arrays), changed

        def after(operation: str, result: Any, arrays: tuple[Array, ...]) -> Any:
            def back(y: Array | None) -> Array | None:
                return None if y is None else y.astype(arrays[0].dtype)

            with np.errstate(over="ignore"):
                return tuple(map(back, result)) if isinstance(result, tuple) else back(result)

        return Mutant(name, before, after)

    yield computed_in("float64-computed-in-float32", "float32", "float64")
    yield computed_in("float32-computed-in-float16", "float16", "float32")
    yield Mutant(
        "weights-rounded-to-bfloat16",
        _softmax=lambda z, on, axis: (_round_to_bfloat16(_softmax(z, on, axis)[0]), *_extrema(z, on, axis)),
    )
    yield Mutant(
        "half-precision-weights",
        _softmax=lambda z, on, axis: (
            _softmax(z, on, axis)[0].astype(np.float16).astype(z.dtype),
            *_extrema(z, on, axis),
        ),
    )
    yield Mutant("sum-in-float16", _softmax=_quietly(_softmax_summed_in_float16))
    yield Mutant(
        "exp-to-five-digits",
        _softmax=lambda z, on, axis: (_softmax(z * np.asarray(1 + 1e-5, z.dtype), on, axis)[0], *_extrema(z, on, axis)),
    )
    yield Mutant(
        "float32-comes-back",
        after=lambda operation, result, arrays: (
            tuple(None if r is None else r.astype(np.float32) for r in result)
            if isinstance(result, tuple)
            else result.astype(np.float32)
        ),
    )
    yield Mutant("bfloat16-truncated", _rounded=_truncated)
    yield Mutant(
        "float16-flushes-subnormals",
        _rounded=lambda y, like: (
            np.where(
                abs(_rounded(y, like)) < np.asarray(6.1e-5, like.dtype), np.asarray(0, like.dtype), _rounded(y, like)
            )
            if like.dtype == np.float16
            else _rounded(y, like)
        ),
    )
    yield Mutant(
        "integers-are-cast",
        before=lambda operation, arrays, options: (
            tuple(a.astype(np.float32) if a.dtype.kind in "iub" and a.dtype.itemsize != 2 else a for a in arrays),
            options,
        ),
    )
    yield Mutant(
        "complex-loses-its-imaginary-part",
        before=lambda operation, arrays, options: (
            tuple(a.real if a.dtype.kind == "c" else a for a in arrays),
            options,
        ),
    )
    yield Mutant("integers-refused-namelessly", before=_refuse_namelessly)
    yield Mutant(
        "list-comes-back",
        after=lambda operation, result, arrays: result if isinstance(result, tuple) else result.tolist(),
    )


def _round_to_bfloat16(p: Array) -> Array:
    bits = p.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32).astype(p.dtype)


def _truncated(y: Array, like: Array) -> Array:
    if str(like.dtype) != "bfloat16":
        return _rounded(y, like)
    return (np.ascontiguousarray(y).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(like.dtype)


def _softmax_summed_in_float16(z: Array, on: Array, axis: int) -> tuple[Array, Array, Array]:
    x_min, x_max = _extrema(z, on, axis)
    e = np.where(on, np.exp(z - x_max), 0)
    total = e.astype(np.float16).sum(axis, keepdims=True).astype(z.dtype)
    return e / np.where(total == 0, 1, total), x_min, x_max


def _refuse_namelessly(operation: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
    if arrays[0].dtype.kind in "iubc":
        raise TypeError("unsupported input")
    return arrays, options


def _plumbing() -> Iterator[Backend]:
    """Mistakes about axes, layouts, buffers and errors."""
    row = ("sa_softmax", "sa_softmax_vjp")

    def options_of(change: Callable[[tuple[Array, ...], dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
        def before(operation: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
            return arrays, options | change(arrays, options) if operation in row else options

        return before

    yield Mutant("axis-ignored", options_of(lambda arrays, options: {"axis": -1}))
    yield Mutant(
        "negative-axis-misread",
        options_of(
            lambda arrays, options: {
                "axis": abs(options["axis"]) % max(arrays[0].ndim, 1) if options["axis"] < -1 else options["axis"]
            }
        ),
    )
    yield Mutant(
        "positive-axis-from-the-back",
        options_of(
            lambda arrays, options: {
                "axis": arrays[0].ndim - 1 - options["axis"]
                if 0 <= options["axis"] < arrays[0].ndim
                else options["axis"]
            }
        ),
    )
    yield Mutant(
        "axis-wraps-around", options_of(lambda arrays, options: {"axis": options["axis"] % max(arrays[0].ndim, 1)})
    )
    yield Mutant(
        "scalars-accepted",
        lambda operation, arrays, options: (tuple(a.reshape(1) if a.ndim == 0 else a for a in arrays), options),
    )
    yield Mutant(
        "unknown-variant-is-the-default",
        lambda operation, arrays, options: (
            arrays,
            options | {"variant": "product" if options["variant"] == "product" else "normalized"},
        ),
    )
    yield Mutant(
        "where-cast-to-bool",
        options_of(
            lambda arrays, options: {"where": None if options["where"] is None else options["where"].astype(bool)}
        ),
    )
    yield Mutant(
        "where-must-have-the-full-shape",
        options_of(
            lambda arrays, options: {
                "where": options["where"] if np.shape(options["where"]) == arrays[0].shape else None
            }
        ),
    )
    yield Mutant(
        "where-broadcasts-from-the-front",
        options_of(lambda arrays, options: {"where": _front_broadcast(options["where"], arrays[0].ndim)}),
    )
    yield Mutant(
        "strides-ignored",
        lambda operation, arrays, options: (
            tuple(np.ravel(a, order="K").reshape(a.shape) if a.flags.forc else _as_if_contiguous(a) for a in arrays),
            options,
        ),
    )
    yield Mutant(
        "zero-stride-unsupported",
        lambda operation, arrays, options: (
            tuple(
                np.where(np.arange(a.shape[0]).reshape(-1, *[1] * (a.ndim - 1)) == 0, a, 0).astype(a.dtype)
                if a.ndim > 1 and a.shape[0] > 1 and a.strides[0] == 0
                else a
                for a in arrays
            ),
            options,
        ),
    )
    yield Mutant("input-overwritten", after=_overwrite)
    yield _SharedBuffer("one-output-buffer")
    yield _Cached("cached-by-shape")
    yield Mutant("zero-size-raises", _refuse_empty)
    yield Mutant(
        "zero-size-unreshaped",
        after=lambda operation, result, arrays: result.reshape(-1) if operation in row and result.size == 0 else result,
    )
    yield Mutant("rank-above-four-raises", _refuse_high_rank)


def _front_broadcast(where: Array | None, ndim: int) -> Array | None:
    if where is None or where.ndim in (0, ndim):
        return where
    return where.reshape(*where.shape, *[1] * (ndim - where.ndim)) if where.ndim < ndim else where


def _as_if_contiguous(a: Array) -> Array:
    """The elements that follow the first one in memory, as a kernel without strides reads them."""
    if a.size == 0 or min(a.strides) <= 0:
        return a
    steps = np.cumprod((1, *a.shape[:0:-1]))[::-1] * a.itemsize
    reach = sum((n - 1) * s for n, s in zip(a.shape, a.strides, strict=True))
    fits = sum((n - 1) * s for n, s in zip(a.shape, steps, strict=True)) <= reach
    return np.lib.stride_tricks.as_strided(a, a.shape, tuple(map(int, steps))) if fits else a


def _overwrite(operation: str, result: Any, arrays: tuple[Array, ...]) -> Any:
    if operation == "sa_softmax" and arrays[0].flags.writeable and arrays[0].dtype == result.dtype:
        arrays[0][...] = result
    return result


def _refuse_empty(operation: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
    if any(array.size == 0 for array in arrays):
        raise ValueError("empty input")
    return arrays, options


def _refuse_high_rank(operation: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
    if arrays[0].ndim > 4:
        raise ValueError("too many axes")
    return arrays, options


class _SharedBuffer(ReferenceAdapter):
    """Writes every result of one shape and dtype into the same memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._buffers: dict[Any, Array] = {}

    def sa_softmax(self, x: Array, **options: Any) -> Array:
        y = super().sa_softmax(x, **options)
        buffer = self._buffers.setdefault((y.shape, str(y.dtype)), y)
        buffer[...] = y
        return buffer


class _Cached(ReferenceAdapter):
    """Computes the first input of each shape, dtype, variant and axis, and remembers the result."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._results: dict[Any, Array] = {}

    def sa_softmax(self, x: Array, **options: Any) -> Array:
        key = (x.shape, str(x.dtype), options["variant"], options["axis"])
        if key not in self._results:
            self._results[key] = super().sa_softmax(x, **options)
        return self._results[key].copy()


def _tails() -> Iterator[Backend]:
    """Mistakes at the ends of rows and at the boundaries of blocks, which only some lengths show."""

    def blocks(width: int) -> Callable[[int], Array]:
        """Entries in full blocks of ``width``; everything where there is no full block."""
        return lambda n: np.arange(n) < (n // width * width or n)

    def first(limit: int) -> Callable[[int], Array]:
        return lambda n: np.arange(n) < limit

    def extrema_over(seen: Callable[[int], Array]) -> Callable[..., Any]:
        def replaced(z: Array, on: Array, axis: int) -> tuple[Array, Array]:
            places = seen(z.shape[axis])
            x_min, x_max = _extrema(z, on & _along(places, z.ndim, axis), axis)
            return x_min, np.maximum(x_max, _extrema(z, on, axis)[1])

        return replaced

    def softmax_over(seen: Callable[[int], Array]) -> Callable[..., Any]:
        def replaced(z: Array, on: Array, axis: int) -> tuple[Array, Array, Array]:
            x_min, x_max = _extrema(z, on, axis)
            e = np.where(on, np.exp(z - x_max), 0)
            total = np.where(_along(seen(z.shape[axis]), z.ndim, axis), e, 0).sum(axis, keepdims=True)
            return e / np.where(total == 0, 1, total), x_min, x_max

        return _quietly(replaced)

    for width in (8, 16, 64, 128):
        yield Mutant(f"minimum-misses-the-tail-after-blocks-of-{width}", _extrema=extrema_over(blocks(width)))
        yield Mutant(f"sum-misses-the-tail-after-blocks-of-{width}", _softmax=softmax_over(blocks(width)))
    for limit in (256, 1024, 4096, 65536):
        yield Mutant(f"minimum-of-the-first-{limit}", _extrema=extrema_over(first(limit)))
        yield Mutant(f"sum-of-the-first-{limit}", _softmax=softmax_over(first(limit)))
    yield Mutant("minimum-misses-the-first-entry", _extrema=extrema_over(lambda n: np.arange(n) > (0 if n > 1 else -1)))
    yield Mutant("minimum-misses-the-last-entry", _extrema=extrema_over(lambda n: np.arange(n) < max(n - 1, 1)))
    yield Mutant(
        "last-entry-of-long-rows-unwritten",
        _forward=lambda z, on, axis, variant: (
            _row_forward(z, on, axis, variant)
            * _along(np.arange(z.shape[axis]) < max(z.shape[axis] - (z.shape[axis] > 1024), 0), z.ndim, axis)
        ),
    )


def _along(places: Array, ndim: int, axis: int) -> Array:
    shape = [1] * ndim
    shape[axis] = -1
    return places.reshape(shape)


def _gradients() -> Iterator[Backend]:
    """Mistakes in the gradient of the row operation; the forward is right."""

    def shares(low: Callable[[Array], Array], high: Callable[[Array], Array]) -> Callable[..., Any]:
        """Change the shares of the entries at the minimum and at the maximum."""

        def replaced(z: Array, on: Array, x_min: Array, x_max: Array, axis: int) -> tuple[Array, Array]:
            at_min, at_max = _shares(z, on, x_min, x_max, axis)
            return low(at_min), high(at_max)

        return replaced

    def same(share: Array) -> Array:
        return share

    def zero(share: Array) -> Array:
        return 0 * share

    def to_first(reverse: bool) -> Callable[..., Any]:
        def replaced(z: Array, on: Array, x_min: Array, x_max: Array, axis: int) -> tuple[Array, Array]:
            def first(share: Array) -> Array:
                held = np.flip(share, axis) if reverse else share
                winner = (held > 0) & (np.cumsum(held > 0, axis) == 1)
                return (np.flip(winner, axis) if reverse else winner).astype(share.dtype)

            at_min, at_max = _shares(z, on, x_min, x_max, axis)
            return first(at_min), first(at_max)

        return replaced

    yield Mutant("no-extremal-terms", _shares=shares(zero, zero))
    yield Mutant("no-extremal-term-at-the-minimum", _shares=shares(zero, same))
    yield Mutant("no-extremal-term-at-the-maximum", _shares=shares(same, zero))
    yield Mutant("extremal-sign-wrong-at-the-minimum", _shares=shares(lambda share: -share, same))
    yield Mutant("extremal-sign-wrong-at-the-maximum", _shares=shares(same, lambda share: -share))
    yield Mutant("ties-to-the-first", _shares=to_first(reverse=False))
    yield Mutant("ties-to-the-last", _shares=to_first(reverse=True))
    yield Mutant("ties-not-divided", _shares=shares(lambda share: (share > 0) * 1.0, lambda share: (share > 0) * 1.0))
    yield Mutant("ties-at-the-maximum-not-divided", _shares=shares(same, lambda share: (share > 0) * 1.0))
    yield Mutant(
        "ties-count-excluded-twins", _participating=_quietly(_keep_excluded_values), _shares=_shares_with_twins
    )
    yield Mutant("clamp-passes-at-zero", _shares=_clamp_at_zero(1.0))
    yield Mutant("clamp-passes-half-at-zero", _shares=_clamp_at_zero(0.5))
    yield Mutant("clamps-never-close", _shares=_unclamped_shares)

    def vjp(change: Callable[..., Array]) -> Callable[..., Any]:
        """``change(terms)`` computes dx from a dictionary of everything in the formula."""

        def replaced(z: Array, on: Array, g: Array, axis: int, variant: str) -> Array:
            g = np.where(on, g, 0)
            p, x_min, x_max = _softmax(z, on, axis)
            lo, unit, R = _range(x_min, x_max)
            a = z if variant == "product" else (z * unit - lo * unit) / R
            at_min, at_max = _shares(z, on, x_min, x_max, axis)
            D, S = (g * a * p).sum(axis, keepdims=True), (g * p).sum(axis, keepdims=True)
            inverse = np.ones_like(R) if variant == "product" else unit / R
            edge = 0 if variant == "product" else (at_min * (D - S) - at_max * D) * inverse
            terms = {
                "g": g,
                "p": p,
                "a": a,
                "D": D,
                "S": S,
                "inverse": inverse,
                "edge": edge,
                "at_min": at_min,
                "at_max": at_max,
                "variant": variant,
            }
            return np.where(on, change(**terms), 0).astype(z.dtype)

        return _quietly(replaced)

    yield Mutant("no-mean-subtracted", _vjp=vjp(lambda g, p, a, inverse, edge, **_: p * g * a + g * p * inverse + edge))
    yield Mutant("softmax-gradient-only", _vjp=vjp(lambda g, p, a, D, **_: p * (g * a - D)))
    yield Mutant("factor-gradient-only", _vjp=vjp(lambda g, p, inverse, edge, **_: g * p * inverse + edge))
    yield Mutant("plain-softmax-gradient", _vjp=vjp(lambda g, p, S, **_: p * (g - S)))
    yield Mutant("factor-not-divided", _vjp=vjp(lambda g, p, a, D, edge, **_: p * (g * a - D) + g * p + edge))
    yield Mutant(
        "minimum-term-without-s",
        _vjp=vjp(
            lambda g, p, a, D, inverse, at_min, at_max, variant, **_: (
                p * (g * a - D) + (g * p + (variant != "product") * (at_min - at_max) * D) * inverse
            )
        ),
    )
    yield Mutant(
        "mean-of-g-instead-of-d",
        _vjp=vjp(lambda g, p, a, S, inverse, edge, **_: p * (g * a - S * a) + g * p * inverse + edge),
    )
    by_inverse = vjp(lambda g, p, a, D, inverse, edge, **_: p * (g * a - D) + g * p * inverse + edge)
    yield Mutant(
        "inverse-of-the-range-overflows-in-the-gradient",
        _vjp=lambda z, on, g, axis, variant: (_row_vjp if variant == "product" else by_inverse)(
            z, on, g, axis, variant
        ),
    )
    yield Mutant("zero-gradient", _vjp=lambda z, on, g, axis, variant: np.zeros_like(z))
    yield Mutant("gradient-transposed-sign", _vjp=lambda z, on, g, axis, variant: -_row_vjp(z, on, g, axis, variant))
    yield Mutant("zero-range-passes-the-softmax-gradient", _vjp=_quietly(_alive_at_zero_range(1.0)))
    yield Mutant("zero-range-gradient-is-nan", _vjp=_quietly(_alive_at_zero_range(np.nan)))
    yield Mutant(
        "gradient-leaks-to-excluded-entries",
        _vjp=_quietly(
            lambda z, on, g, axis, variant: np.where(
                on, _row_vjp(z, on, g, axis, variant), np.nan_to_num(g) * 1e-3
            ).astype(z.dtype)
        ),
    )
    yield Mutant("upstream-of-excluded-entries-counts", _vjp=_quietly(_upstream_not_selected))
    yield Mutant(
        "nan-rows-get-zero-gradient",
        _vjp=lambda z, on, g, axis, variant: np.nan_to_num(_row_vjp(z, on, g, axis, variant)),
    )
    yield Mutant(
        "gradient-overflows",
        _vjp=vjp(lambda g, p, a, D, inverse, edge, **_: p * (g * a * 4 - D * 4) / 4 + g * p * inverse + edge),
    )
    yield Mutant(
        "gradient-ignores-the-variant", _vjp=lambda z, on, g, axis, variant: _row_vjp(z, on, g, axis, "normalized")
    )
    yield Mutant(
        "gradient-along-the-last-axis",
        lambda operation, arrays, options: (
            arrays,
            options | {"axis": -1} if operation == "sa_softmax_vjp" else options,
        ),
    )
    yield Mutant(
        "gradient-without-mask",
        lambda operation, arrays, options: (
            arrays,
            options | {"where": None} if operation == "sa_softmax_vjp" else options,
        ),
    )
    yield Mutant(
        "upstream-taken-as-ones",
        lambda operation, arrays, options: (
            (arrays[0], np.ones_like(arrays[1])) if operation == "sa_softmax_vjp" else arrays,
            options,
        ),
    )


def _shares_with_twins(z: Array, on: Array, x_min: Array, x_max: Array, axis: int) -> tuple[Array, Array]:
    at_min = ((z == x_min) & (x_min < 0)).astype(z.dtype)
    at_max = ((z == x_max) & (x_max > 0)).astype(z.dtype)
    return (
        on * at_min / np.maximum(at_min.sum(axis, keepdims=True), 1),
        on * at_max / np.maximum(at_max.sum(axis, keepdims=True), 1),
    )


def _clamp_at_zero(passed: float) -> Callable[..., Any]:
    def replaced(z: Array, on: Array, x_min: Array, x_max: Array, axis: int) -> tuple[Array, Array]:
        at_min, at_max = _unclamped_shares(z, on, x_min, x_max, axis)
        low = np.where(x_min == 0, passed, x_min < 0)
        high = np.where(x_max == 0, passed, x_max > 0)
        return at_min * low.astype(z.dtype), at_max * high.astype(z.dtype)

    return replaced


def _unclamped_shares(z: Array, on: Array, x_min: Array, x_max: Array, axis: int) -> tuple[Array, Array]:
    at_min, at_max = (on & (z == x_min)).astype(z.dtype), (on & (z == x_max)).astype(z.dtype)
    return (
        at_min / np.maximum(at_min.sum(axis, keepdims=True), 1),
        at_max / np.maximum(at_max.sum(axis, keepdims=True), 1),
    )


def _alive_at_zero_range(factor: float) -> Callable[..., Any]:
    def replaced(z: Array, on: Array, g: Array, axis: int, variant: str) -> Array:
        p, x_min, x_max = _softmax(z, on, axis)
        flat = on & (x_min == 0) & (x_max == 0) & (variant == "normalized")
        return np.where(flat, np.nan_to_num(g) * p * factor, _row_vjp(z, on, g, axis, variant)).astype(z.dtype)

    return replaced


def _upstream_not_selected(z: Array, on: Array, g: Array, axis: int, variant: str) -> Array:
    return np.where(on, _row_vjp(z, on, g, axis, variant) + 0 * g.sum(axis, keepdims=True), 0)


def _attention() -> Iterator[Backend]:
    """Mistakes in attention that show in its output."""
    heads = ("sa_attention", "sa_attention_vjp")

    def options_of(change: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
        def before(operation: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
            if operation not in heads:
                return arrays, options
            tq, tk = arrays[0].shape[-2], arrays[1].shape[-2]
            return arrays, options | change(arrays[0].shape[-1], tq, tk, **options)

        return before

    yield Mutant("scale-forgotten", options_of(lambda d, tq, tk, **_: {"scale": 1.0}))
    yield Mutant(
        "scale-is-one-over-d",
        options_of(lambda d, tq, tk, scale, **_: {"scale": 1 / max(d, 1) if scale is None else scale}),
    )
    yield Mutant("scale-zero-is-the-default", options_of(lambda d, tq, tk, scale, **_: {"scale": scale or None}))
    yield Mutant(
        "scale-is-a-magnitude",
        options_of(lambda d, tq, tk, scale, **_: {"scale": None if scale is None else abs(scale)}),
    )
    yield Mutant("scale-times-bias", _scores=_scores_with_scaled_bias)
    yield Mutant(
        "bias-ignored", options_of(lambda d, tq, tk, bias, **_: {"bias": None if bias is None else np.zeros_like(bias)})
    )
    yield Mutant("bias-outside-the-factor", _scores=_remember_bias, _forward=_quietly(_factor_without_bias))
    yield Mutant("mask-is-an-additive-lowest-finite", _scores=_quietly(_scores_with_additive_mask))
    yield Mutant("mask-unused", options_of(lambda d, tq, tk, **_: {"mask": None}))
    yield Mutant(
        "mask-of-queries-dropped",
        options_of(lambda d, tq, tk, mask, **_: {"mask": mask if mask is None or mask.ndim < 2 else mask[..., -1:, :]}),
    )
    yield Mutant(
        "mask-or-causal", options_of(lambda d, tq, tk, mask, is_causal, **_: {"mask": None if is_causal else mask})
    )
    yield Mutant("causal-unused", options_of(lambda d, tq, tk, **_: {"is_causal": False, "q_offset": 0}))
    yield Mutant(
        "causal-off-by-one",
        options_of(lambda d, tq, tk, is_causal, q_offset, **_: {"q_offset": q_offset - 1 if is_causal else 0}),
    )
    yield Mutant(
        "causal-always-lower-right",
        options_of(lambda d, tq, tk, is_causal, **_: {"q_offset": tk - tq if is_causal else 0}),
    )
    yield Mutant("offset-ignored", options_of(lambda d, tq, tk, **_: {"q_offset": 0}))
    yield Mutant("offset-negated", options_of(lambda d, tq, tk, q_offset, **_: {"q_offset": -q_offset}))
    yield Mutant("offset-never-negative", options_of(lambda d, tq, tk, q_offset, **_: {"q_offset": max(q_offset, 0)}))
    yield Mutant(
        "one-query-sees-everything",
        options_of(
            lambda d, tq, tk, is_causal, q_offset, **_: {
                "is_causal": is_causal and tq != 1,
                "q_offset": q_offset if tq != 1 else 0,
            }
        ),
    )
    yield Mutant("heads-interleaved", _interleave_heads)
    yield Mutant("first-key-head-for-all", _first_head)
    yield Mutant("excluded-value-leaks-nan", _weigh=_quietly(lambda w, on, v: w @ v))
    yield Mutant("nan-values-are-dropped", _weigh=lambda w, on, v: w @ np.where(np.isfinite(v), v, 0))
    yield Mutant(
        "fully-masked-query-averages",
        _weigh=_quietly(
            lambda w, on, v: np.where(
                on.any(-1, keepdims=True), _weigh(w, on, v), np.nan_to_num(v).mean(-2, keepdims=True) if v.size else 0
            )
        ),
    )
    yield Mutant(
        "attention-is-plain-softmax",
        _weigh=_quietly(
            lambda w, on, v: _weigh(w / np.where(w.sum(-1, keepdims=True) == 0, 1, w.sum(-1, keepdims=True)), on, v)
        ),
    )
    yield Mutant(
        "scores-rounded-to-bfloat16",
        _scores=lambda *args: (*_scores(*args)[:3], _round_to_bfloat16(_scores(*args)[3]), _scores(*args)[4]),
    )
    yield Mutant("batch-axis-required", _need_batch)
    yield Mutant("more-than-one-batch-axis-raises", _refuse_two_batch_axes)
    yield Mutant(
        "value-width-of-the-query",
        after=lambda operation, result, arrays: (
            result[..., : arrays[0].shape[-1]] if operation == "sa_attention" else result
        ),
    )
    yield Mutant("heads-recycled", _recycle_heads)
    yield Mutant(
        "attention-rows-share-extrema",
        _extrema=lambda z, on, axis: (
            _extrema(z, on, axis)
            if z.ndim < 3
            else (
                np.broadcast_to(_extrema(z, on, (-2, -1))[0], _extrema(z, on, axis)[0].shape),
                _extrema(z, on, axis)[1],
            )
        ),
    )


def _scores_with_scaled_bias(q: Array, k: Array, v: Array, bias: Array | None, *rest: Any) -> Any:
    scale = rest[-1]
    with np.errstate(invalid="ignore"):
        scaled = None if bias is None else bias.astype(np.float32 if bias.dtype != np.float64 else bias.dtype) * scale
    return _scores(q, k, v, scaled, *rest)


_last_bias: list[Any] = [None]


def _remember_bias(q: Array, k: Array, v: Array, bias: Array | None, *rest: Any) -> Any:
    _last_bias[0] = bias
    return _scores(q, k, v, bias, *rest)


def _factor_without_bias(z: Array, on: Array, axis: int, variant: str) -> Array:
    bias = _last_bias[0]
    if bias is None or z.ndim < 3:
        return _row_forward(z, on, axis, variant)
    bare = np.where(on, z - bias.astype(z.dtype), 0)
    p = _softmax(z, on, axis)[0]
    factor = _row_forward(bare, on, axis, variant) / np.where(
        _softmax(bare, on, axis)[0] == 0, 1, _softmax(bare, on, axis)[0]
    )
    return np.where(on, factor * p, 0).astype(z.dtype)


def _scores_with_additive_mask(q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None, *rest: Any) -> Any:
    if mask is None:
        return _scores(q, k, v, bias, mask, *rest)
    q_, k_, v_, x, on = _scores(q, k, v, bias, None, *rest)
    return q_, k_, v_, np.where(mask, x, np.finfo(x.dtype).min), on


def _heads(arrays: tuple[Array, ...], order: Callable[[int, int], Any]) -> tuple[Array, ...]:
    """k and v with one head for each query head, picked by ``order(query heads, key heads)``."""
    q, k, v, *rest = arrays
    if k.ndim < 3 or k.shape[-3] == 0 or q.shape[-3] % k.shape[-3] or q.shape[-3] == k.shape[-3]:
        return arrays
    picked = order(q.shape[-3], k.shape[-3])
    return q, k[..., picked, :, :], v[..., picked, :, :], *rest


def _interleave_heads(operation: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
    if operation != "sa_attention":
        return arrays, options
    return _heads(arrays, lambda hq, hkv: np.arange(hq) % hkv), options


def _first_head(operation: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
    if operation != "sa_attention":
        return arrays, options
    return _heads(arrays, lambda hq, hkv: np.zeros(hq, int)), options


def _recycle_heads(operation: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
    """Head counts that do not divide are accepted."""
    if operation != "sa_attention" or arrays[0].shape[-3] % arrays[1].shape[-3] == 0:
        return arrays, options
    q, k, v = arrays
    picked = np.arange(q.shape[-3]) % k.shape[-3]
    return (q, k[..., picked, :, :], v[..., picked, :, :]), options


def _need_batch(operation: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
    if operation.startswith("sa_attention") and arrays[0].ndim < 4:
        raise ValueError("q must be (batch, heads, length, dimension)")
    return arrays, options


def _refuse_two_batch_axes(operation: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
    if operation.startswith("sa_attention") and arrays[0].ndim > 4:
        raise ValueError("q must be (batch, heads, length, dimension)")
    return arrays, options


def _attention_gradients() -> Iterator[Backend]:
    """Mistakes in the gradients of attention; its output is right."""

    def gradients(change: Callable[..., Gradients]) -> Callable[..., Any]:
        def after(operation: str, result: Any, arrays: tuple[Array, ...]) -> Any:
            if operation != "sa_attention_vjp":
                return result
            with np.errstate(all="ignore"):
                return change(*result, arrays)

        return after

    def scaled(array: Array, factor: float) -> Array:
        return (array.astype(np.float64) * factor).astype(array.dtype)

    yield Mutant(
        "dq-without-scale",
        after=gradients(lambda dq, dk, dv, db, arrays: (scaled(dq, arrays[0].shape[-1] ** 0.5), dk, dv, db)),
    )
    yield Mutant(
        "dk-without-scale",
        after=gradients(lambda dq, dk, dv, db, arrays: (dq, scaled(dk, arrays[0].shape[-1] ** 0.5), dv, db)),
    )
    yield Mutant(
        "dbias-times-scale",
        after=gradients(
            lambda dq, dk, dv, db, arrays: (dq, dk, dv, None if db is None else scaled(db, arrays[0].shape[-1] ** -0.5))
        ),
    )
    yield Mutant("dbias-missing", after=gradients(lambda dq, dk, dv, db, arrays: (dq, dk, dv, None)))
    yield Mutant(
        "dbias-in-the-dtype-of-q",
        after=gradients(lambda dq, dk, dv, db, arrays: (dq, dk, dv, None if db is None else db.astype(dq.dtype))),
    )
    yield Mutant(
        "dbias-of-nothing",
        after=gradients(lambda dq, dk, dv, db, arrays: (dq, dk, dv, np.zeros_like(dq) if db is None else db)),
    )
    yield Mutant(
        "dbias-averaged", _sum_to=lambda dx, shape: _sum_to(dx, shape) / max(dx.size / max(int(np.prod(shape)), 1), 1)
    )
    yield Mutant(
        "dbias-not-summed-over-the-batch",
        _sum_to=lambda dx, shape: _sum_to(dx[:1] if dx.ndim > len(shape) else dx, shape),
    )
    yield Mutant(
        "dk-of-the-first-head-of-a-group",
        _sum_groups=lambda dk, k: dk[..., :: max(dk.shape[-3] // max(k.shape[-3], 1), 1), :, :],
    )
    yield Mutant(
        "dk-averaged-over-the-group",
        _sum_groups=lambda dk, k: _sum_groups(dk, k) / (dk.shape[-3] // max(k.shape[-3], 1)),
    )
    yield Mutant(
        "groups-summed-interleaved",
        _sum_groups=lambda dk, k: dk.reshape(
            *dk.shape[:-3], dk.shape[-3] // k.shape[-3], k.shape[-3], *dk.shape[-2:]
        ).sum(-4),
    )
    yield Mutant(
        "excluded-key-leaks-nan-into-dq",
        _finite=lambda v: v,
        _weigh=lambda w, on, v: _weigh(w, on, np.where(on.any(-2)[..., None], v, 0)),
    )
    yield Mutant(
        "gradient-of-attention-without-extremal-terms",
        _vjp=lambda z, on, g, axis, variant: (
            _row_vjp(z, on, g, axis, variant) if z.ndim < 3 else _without_edges(z, on, g, axis, variant)
        ),
    )
    yield _ValueGradientOfSoftmax("dv-of-plain-softmax")
    yield _SwappedGradients("dq-and-dk-swapped")


def _without_edges(z: Array, on: Array, g: Array, axis: int, variant: str) -> Array:
    with mock.patch.object(reference, "_shares", lambda z, *_: (np.zeros_like(z), np.zeros_like(z))):
        return _row_vjp(z, on, g, axis, variant)


class _ValueGradientOfSoftmax(ReferenceAdapter):
    """Uses the plain softmax p where the gradient of v needs Y."""

    def __init__(self, name: str) -> None:
        self.name = name

    def sa_attention_vjp(self, q: Array, k: Array, v: Array, do: Array, **options: Any) -> Gradients:
        dq, dk, _, dbias = super().sa_attention_vjp(q, k, v, do, **options)
        softmax = _quietly(lambda z, on, axis, variant: _softmax(z, on, axis)[0] * on)
        with mock.patch.object(reference, "_forward", softmax):
            return dq, dk, super().sa_attention_vjp(q, k, v, do, **options)[2], dbias


class _SwappedGradients(ReferenceAdapter):
    def __init__(self, name: str) -> None:
        self.name = name

    def sa_attention_vjp(self, q: Array, k: Array, v: Array, do: Array, **options: Any) -> Gradients:
        dq, dk, dv, dbias = super().sa_attention_vjp(q, k, v, do, **options)
        return dk, dq, dv, dbias


def main() -> None:
    """Print the first case that rejects each mutant."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from sa_softmax.conformance.kernel_mutants import kernel_mutants
    from sa_softmax.conformance.runner import execute

    table = Table("mutant", "rejected by")
    for name, mutant in track((mutants() | kernel_mutants()).items(), description="mutants"):
        failed = (result.id for result in execute(mutant) if result.status == "failed")
        table.add_row(name, next(failed, "[red]nothing: it survives[/]"))
    Console().print(table)


if __name__ == "__main__":
    main()
