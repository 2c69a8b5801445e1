"""Wrong backends that are right on small inputs: each takes another, mistaken path for some sizes, layouts or dtypes.

That is how kernels fail: in the block that has no participating entry, in the split of a long row, in the tail of a
head dimension, in the path for strided memory. The mistakes apply where ``when`` says so.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

from sa_softmax import reference
from sa_softmax.backends.numpy.adapter import ReferenceAdapter
from sa_softmax.backends.protocol import Array, Backend, Gradients
from sa_softmax.conformance.mutants import Mutant, _overflowing_factor, _softmax_unshifted

__all__ = ["KernelMutant", "When", "kernel_mutants"]

When = Callable[[tuple[Array, ...], dict[str, Any]], bool]

# What the originals do, for the replacements to build on.
_original: dict[str, Any] = dict(vars(reference))
_extrema, _range, _softmax = _original["_extrema"], _original["_range"], _original["_softmax"]
_forward, _vjp, _shares = _original["_forward"], _original["_vjp"], _original["_shares"]
_participating, _scores = _original["_participating"], _original["_scores"]
_weigh, _sum_to, _sum_groups, _t = (_original[name] for name in ("_weigh", "_sum_to", "_sum_groups", "_t"))


class KernelMutant(Mutant):
    """The reference with ``parts`` replaced, in the row operation or in attention, where ``when`` holds."""

    def __init__(self, name: str, kind: str, when: When, **parts: Any) -> None:
        super().__init__(name, **parts)
        self._kind, self._when = kind, when

    def _run(self, operation: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
        if self._kind not in operation or not all(a.size for a in arrays) or not self._when(arrays, options):
            return getattr(ReferenceAdapter, operation)(self, *arrays, **options)
        with np.errstate(all="ignore"):
            return super()._run(operation, arrays, options)


def kernel_mutants() -> dict[str, Backend]:
    """A fresh set of all of them by name."""
    families = (_rows, _row_memory, _attention, _attention_memory, _attention_precision, _input_checks)
    return {mutant.name: mutant for family in families for mutant in family()}


# Mistakes of the row operation.

_unshifted: dict[str, Any] = {"_softmax": _softmax_unshifted}
_nan_zero_range: dict[str, Any] = {
    "_range": lambda a, b: (np.minimum(a, 0), np.ones_like(a), np.maximum(b, 0) - np.minimum(a, 0))
}
_overflowing_range: dict[str, Any] = {"_range": _overflowing_factor}
_unclamped_range: dict[str, Any] = {
    "_range": lambda a, b: _range(a, b) if (a <= 0).all() and (b >= 0).all() else (a, np.ones_like(a), b - a)
}


def _ties_to_the_first(z: Array, on: Array, x_min: Array, x_max: Array, axis: int) -> tuple[Array, ...]:
    shares = _shares(z, on, x_min, x_max, axis)
    return tuple(((s > 0) & (np.cumsum(s > 0, axis) == 1)).astype(z.dtype) for s in shares)


def _ties_of_a_block(block: int) -> dict[str, Any]:
    """Each block divides by the ties of its own."""

    def shares(z: Array, on: Array, x_min: Array, x_max: Array, axis: int) -> tuple[Array, ...]:
        def share(whole: Array) -> Array:
            tied = np.moveaxis((whole > 0).astype(z.dtype), axis, -1)
            starts = range(0, tied.shape[-1], block)
            parts = [
                tied[..., s : s + block] / np.maximum(tied[..., s : s + block].sum(-1, keepdims=True), 1)
                for s in starts
            ]
            return np.moveaxis(np.concatenate(parts, -1), -1, axis)

        return tuple(map(share, _shares(z, on, x_min, x_max, axis)))

    return {"_shares": shares}


def _blocks(on: Array, axis: int, block: int) -> Iterator[Array]:
    """Of each block of a row: whether it has participating entries, with the axis kept."""
    for start in range(0, on.shape[axis], block):
        places = range(start, min(start + block, on.shape[axis]))
        yield np.any(on.take(places, axis), axis, keepdims=True)


def _nan_behind_an_empty_block(block: int, only_first: bool) -> dict[str, Any]:
    """exp(-inf - -inf) of a block without participating entries."""

    def poisoned(result: Array, on: Array, axis: int) -> Array:
        blocks = list(_blocks(on, axis, block))
        empty = ~blocks[0] if only_first else ~np.all(blocks, 0)
        return np.where(on & empty & (len(blocks) > 1), np.nan, result)

    return {
        "_forward": lambda z, on, axis, variant: poisoned(_forward(z, on, axis, variant), on, axis),
        "_vjp": lambda z, on, g, axis, variant: poisoned(_vjp(z, on, g, axis, variant), on, axis),
    }


def _online_sum(block: int, rescaled: bool) -> dict[str, Any]:
    """A running maximum whose sum is not rescaled, or that stays that of the first block."""

    def softmax(z: Array, on: Array, axis: int) -> tuple[Array, Array, Array]:
        z_, on_ = np.moveaxis(z, axis, -1), np.moveaxis(on, axis, -1)
        m = np.full((*z_.shape[:-1], 1), -np.inf, z.dtype)
        total = np.zeros_like(m)
        for start in range(0, z_.shape[-1], block):
            part, inside = z_[..., start : start + block], on_[..., start : start + block]
            if start == 0 or not rescaled:
                m = np.maximum(m, np.max(part, -1, keepdims=True, where=inside, initial=-np.inf))
            total = total + np.where(inside, np.exp(part - m), 0).sum(-1, keepdims=True)
        e = np.where(on_, np.exp(z_ - m), 0) / np.where(total == 0, 1, total)
        return np.moveaxis(e, -1, axis), *_extrema(z, on, axis)

    return {"_softmax": softmax}


def _extrema_of_the_ends(block: int) -> dict[str, Any]:
    """The merge of a split row takes the first and the last block only."""

    def softmax(z: Array, on: Array, axis: int) -> tuple[Array, Array, Array]:
        n = z.shape[axis]
        ends = [*range(min(block, n)), *range((n - 1) // block * block, n)]
        return _softmax(z, on, axis)[0], *_extrema(z.take(ends, axis), on.take(ends, axis), axis)

    return {"_softmax": softmax}


def _nan_of_later_blocks_lost(block: int) -> dict[str, Any]:
    def clean(z: Array, axis: int) -> Array:
        late = np.arange(z.shape[axis]).reshape([-1 if i == axis % z.ndim else 1 for i in range(z.ndim)]) >= block
        return ~(np.isnan(z) & late)

    return {
        "_forward": lambda z, on, axis, variant: _forward(
            np.where(clean(z, axis), z, 0), on & clean(z, axis), axis, variant
        ),
        "_vjp": lambda z, on, g, axis, variant: _vjp(
            np.where(clean(z, axis), z, 0), on & clean(z, axis), g, axis, variant
        ),
    }


def _rows_from(limit: int) -> dict[str, Any]:
    """A grid of ``limit`` programs; the rows beyond stay 0."""

    def cut(y: Array, axis: int) -> Array:
        rows = np.ascontiguousarray(np.moveaxis(y, axis, -1))
        rows.reshape(-1, rows.shape[-1])[limit:] = 0
        return np.moveaxis(rows, -1, axis)

    return {
        "_forward": lambda z, on, axis, variant: cut(_forward(z, on, axis, variant), axis),
        "_vjp": lambda z, on, g, axis, variant: cut(_vjp(z, on, g, axis, variant), axis),
    }


def _divided_late(lanes: int) -> dict[str, Any]:
    """A vector's lanes sum g x exp(x - max), and are divided by the sum of the exponentials afterwards."""

    def vjp(z: Array, on: Array, g: Array, axis: int, variant: str) -> Array:
        if variant == "normalized":
            return _vjp(z, on, g, axis, variant)
        p, *_ = _softmax(z, on, axis)
        whole = np.max(p, axis, keepdims=True)  # 1 / the sum
        terms = np.moveaxis(np.where(on, g, 0) * (z * (p / np.where(whole == 0, 1, whole))), axis, -1)
        of_lanes = [terms[..., lane::lanes].sum(-1) for lane in range(lanes)]
        D = np.moveaxis(sum(lane[..., None] * np.moveaxis(whole, axis, -1) for lane in of_lanes), -1, axis)
        return np.where(on, (np.where(on, g, 0) * (z * p) - p * D) + g * p, 0)

    return {"_vjp": vjp}


def _where_multiplies(x: Array, axis: int, where: Array | None) -> tuple[Array, Array]:
    z, on = _participating(x, axis, None)
    return (z, on) if where is None else (z * where, on & where)


def _nan_is_excluded(x: Array, axis: int, where: Array | None) -> tuple[Array, Array]:
    z, on = _participating(x, axis, where)
    on = on & ~np.isnan(z)
    return np.where(on, z, 0), on


def _longer(n: int) -> When:
    return lambda arrays, options: arrays[0].shape[options["axis"]] > n


def _strided(arrays: tuple[Array, ...], options: dict[str, Any]) -> bool:
    return options["axis"] % arrays[0].ndim != arrays[0].ndim - 1


def _of_dtype(dtype: str) -> When:
    return lambda arrays, options: str(arrays[0].dtype) == dtype


def _always(arrays: tuple[Array, ...], options: dict[str, Any]) -> bool:
    return True


def _rows() -> Iterator[KernelMutant]:
    """Long rows, many rows, rows along another axis."""
    for n in (32, 256, 1024, 32768, 131072):
        yield KernelMutant(f"no-maximum-subtracted-beyond-{n}", "softmax", _longer(n), **_unshifted)
        yield KernelMutant(f"ties-to-the-first-beyond-{n}", "softmax", _longer(n), _shares=_ties_to_the_first)
    for n in (32, 256, 1024):
        yield KernelMutant(f"zero-range-nan-beyond-{n}", "softmax", _longer(n), **_nan_zero_range)
        yield KernelMutant(f"range-overflows-beyond-{n}", "softmax", _longer(n), **_overflowing_range)
        yield KernelMutant(f"extrema-not-clamped-beyond-{n}", "softmax", _longer(n), **_unclamped_range)
        yield KernelMutant(f"extrema-of-the-end-blocks-of-{n}", "softmax", _always, **_extrema_of_the_ends(n))
        yield KernelMutant(f"nan-beyond-{n}-lost", "softmax", _always, **_nan_of_later_blocks_lost(n))
    for block in (16, 128):
        yield KernelMutant(f"ties-counted-per-block-of-{block}", "softmax", _always, **_ties_of_a_block(block))
    for block in (32, 512):
        for only_first, which in ((True, "first"), (False, "any")):
            parts = _nan_behind_an_empty_block(block, only_first)
            yield KernelMutant(f"nan-if-{which}-block-of-{block}-is-masked", "softmax", _always, **parts)
        yield KernelMutant(f"online-sum-not-rescaled-{block}", "softmax", _always, **_online_sum(block, False))
        yield KernelMutant(f"maximum-of-the-first-block-of-{block}", "softmax", _always, **_online_sum(block, True))
    for limit in (256, 65535):
        yield KernelMutant(f"rows-from-{limit}-unwritten", "softmax", _always, **_rows_from(limit))
    yield KernelMutant("lanes-overflow", "softmax", _always, **_divided_late(16))
    yield KernelMutant("strided-ties-to-the-first", "softmax", _strided, _shares=_ties_to_the_first)
    yield KernelMutant("strided-where-multiplies", "softmax", _strided, _participating=_where_multiplies)
    yield KernelMutant("strided-nan-is-excluded", "softmax", _strided, _participating=_nan_is_excluded)
    yield KernelMutant("strided-no-maximum-subtracted", "softmax", _strided, **_unshifted)
    yield KernelMutant("strided-zero-range-nan", "softmax", _strided, **_nan_zero_range)


# Memory: one operand is read with strides that are not its own.


def _as_contiguous(a: Array | None) -> Array | None:
    """What a kernel reads that takes the first entry's address and the strides of a contiguous array."""
    if a is None or a.flags.c_contiguous or a.size == 0:
        return a
    return np.ravel(a, order="K").reshape(a.shape)


def _as_forwards(a: Array | None) -> Array | None:
    """What a kernel reads that takes the lowest address and the sizes of the strides, and not their signs."""
    if a is None:
        return a
    return a[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in a.strides)]


class _Misread(ReferenceAdapter):
    """Takes ``reading(operand)`` for one operand."""

    def __init__(self, operand: str, name: str, reading: Callable[[Array | None], Array | None]) -> None:
        self.name, self._operand, self._reading = f"{operand}-read-{name}", operand, reading

    def _operands(self, given: dict[str, Any]) -> dict[str, Any]:
        return given | {self._operand: self._reading(given[self._operand])} if self._operand in given else given

    def sa_softmax(self, x: Array, **options: Any) -> Any:
        return super().sa_softmax(**self._operands({"x": x} | options))

    def sa_softmax_vjp(self, x: Array, g: Array, **options: Any) -> Any:
        return super().sa_softmax_vjp(**self._operands({"x": x, "g": g} | options))

    def sa_attention(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        return super().sa_attention(**self._operands({"q": q, "k": k, "v": v} | options))

    def sa_attention_vjp(self, q: Array, k: Array, v: Array, do: Array, **options: Any) -> Any:
        return super().sa_attention_vjp(**self._operands({"q": q, "k": k, "v": v, "do": do} | options))


class _OneBuffer(ReferenceAdapter):
    """Writes the results of one operation for one shape into one buffer."""

    def __init__(self, operation: str) -> None:
        self.name, self._operation = f"{operation}-into-one-buffer", operation
        self._buffers: dict[Any, tuple[Any, ...]] = {}

    def _kept(self, operation: str, results: tuple[Any, ...]) -> tuple[Any, ...]:
        if operation != self._operation:
            return results
        key = tuple(None if r is None else (r.shape, str(r.dtype)) for r in results)
        kept = self._buffers.setdefault(key, results)
        for buffer, result in zip(kept, results, strict=True):
            if result is not None:
                buffer[...] = result
        return kept

    def sa_attention(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        return self._kept("sa_attention", (super().sa_attention(q, k, v, **options),))[0]

    def sa_attention_vjp(self, q: Array, k: Array, v: Array, do: Array, **options: Any) -> Any:
        return self._kept("sa_attention_vjp", super().sa_attention_vjp(q, k, v, do, **options))


def _row_memory() -> Iterator[Backend]:
    for operand in ("g", "where"):
        yield _Misread(operand, "as-contiguous", _as_contiguous)
    for operand in ("x", "g", "where"):
        yield _Misread(operand, "forwards", _as_forwards)


def _attention_memory() -> Iterator[Backend]:
    for operand in ("q", "k", "v", "do", "bias", "mask"):
        yield _Misread(operand, "as-contiguous", _as_contiguous)
    for operand in ("q", "k", "v", "do", "bias"):
        yield _Misread(operand, "forwards", _as_forwards)
    yield from map(_OneBuffer, ("sa_attention", "sa_attention_vjp"))


# Attention.


def _keys_from(limit: int) -> Callable[..., Any]:
    def scores(*given: Any) -> Any:
        q, k, v, x, on = _scores(*given)
        on = on & (np.arange(x.shape[-1]) < limit)
        return q, k, v, np.where(on, x, 0), on

    return scores


def _output_from(axis: int, limit: int) -> Callable[..., Array]:
    def weigh(w: Array, on: Array, v: Array) -> Array:
        out = _weigh(w, on, v).copy()
        np.moveaxis(out, axis, 0)[limit:] = 0
        return out

    return weigh


def _dimensions_from(limit: int) -> Callable[..., Any]:
    return lambda q, *rest: _scores(np.where(np.arange(q.shape[-1]) < limit, q, 0).astype(q.dtype), *rest)


def _without(place: int, neutral: Any) -> Callable[..., Any]:
    """The scores without one of (q, k, v, bias, mask, is_causal, q_offset, scale)."""
    return lambda *given: _scores(*given[:place], neutral, *given[place + 1 :])


def _low_bias_excludes(limit: Callable[[Array], float]) -> Callable[..., Any]:
    def scores(q: Array, k: Array, v: Array, bias: Array | None, *rest: Any) -> Any:
        if bias is not None:
            bias = np.where(bias.astype(np.float64) <= limit(bias), np.array(-np.inf, bias.dtype), bias)
        return _scores(q, k, v, bias, *rest)

    return scores


def _nan_bias_excludes(q: Array, k: Array, v: Array, bias: Array | None, *rest: Any) -> Any:
    bias = None if bias is None else np.where(np.isnan(bias), np.array(-np.inf, bias.dtype), bias)
    return _scores(q, k, v, bias, *rest)


def _nan_key_excluded(q: Array, k: Array, *rest: Any) -> Any:
    q_, k_, v_, x, on = _scores(q, k, *rest)
    on = on & ~np.isnan(k_).any(-1)[..., None, :]
    return q_, k_, v_, np.where(on, x, 0), on


def _dbias_of_the_first(axis: int) -> Callable[..., Array]:
    """Where a bias repeats along an axis, the gradient of the first copy alone."""

    def sum_to(dx: Array, shape: tuple[int, ...]) -> Array:
        repeats = len(shape) < -axis or shape[axis] == 1
        return _sum_to(dx.take([0], axis) if repeats else dx, shape)

    return sum_to


def _more_keys(n: int, needs: str | None = None) -> When:
    return lambda arrays, options: (
        arrays[1].shape[-2] > n and (needs is None or (options[needs] is not None and options[needs] is not False))
    )


def _few_keys(most: int) -> When:
    return lambda arrays, options: arrays[1].shape[-2] <= most


def _few_queries(most: int, needs: str | None = None) -> When:
    return lambda arrays, options: arrays[0].shape[-2] <= most and (needs is None or options[needs] is not None)


def _attention() -> Iterator[KernelMutant]:
    def mutant(name: str, when: When = _always, **parts: Any) -> KernelMutant:
        return KernelMutant(f"attention-{name}", "attention", when, **parts)

    for limit in (257, 1024):
        yield mutant(f"keys-from-{limit}-lost", _scores=_keys_from(limit))
    for most, limit in ((5, 512), (1, 1024), (1, 2048)):
        yield mutant(f"keys-from-{limit}-lost-of-up-to-{most}-queries", _few_queries(most), _scores=_keys_from(limit))
    yield mutant("queries-from-129-lost", _weigh=_output_from(-2, 129))
    for limit in (256, 512):
        yield mutant(f"queries-from-{limit}-lost-of-few-keys", _few_keys(256), _weigh=_output_from(-2, limit))
    yield mutant("values-from-32-lost", _weigh=_output_from(-1, 32))
    for limit in (32, 64, 128):
        yield mutant(f"dimensions-from-{limit}-lost", _scores=_dimensions_from(limit))
    yield mutant(
        "batch-entries-from-4096-lost", lambda arrays, options: arrays[0].ndim > 3, _weigh=_output_from(0, 4096)
    )
    yield mutant("mask-ignored-beyond-64-keys", _more_keys(64, "mask"), _scores=_without(4, None))
    yield mutant("bias-ignored-beyond-64-keys", _more_keys(64, "bias"), _scores=_without(3, None))
    yield mutant("offset-ignored-beyond-64-keys", _more_keys(64, "is_causal"), _scores=_without(6, 0))
    yield mutant("offset-ignored-beyond-512-keys", _more_keys(512, "is_causal"), _scores=_without(6, 0))
    yield mutant("mask-ignored-for-one-query", _few_queries(1, "mask"), _scores=_without(4, None))
    yield mutant("bias-ignored-for-one-query", _few_queries(1, "bias"), _scores=_without(3, None))
    yield mutant(
        "lowest-finite-bias-excludes", _scores=_low_bias_excludes(lambda b: float(ml_dtypes.finfo(b.dtype).min) / 2)
    )
    yield mutant("bias-below-minus-1e4-excludes", _scores=_low_bias_excludes(lambda b: -1e4))
    yield mutant("nan-bias-excludes", _scores=_nan_bias_excludes)
    yield mutant("nan-key-is-excluded", _scores=_nan_key_excluded)
    yield mutant("range-overflows", **_overflowing_range)
    yield mutant("ties-of-a-block", **_ties_of_a_block(2))
    yield mutant("ties-to-every-key", _shares=lambda *given: tuple((s > 0).astype(s.dtype) for s in _shares(*given)))
    for dtype in ("float32", "float64"):
        yield mutant(f"no-maximum-subtracted-in-{dtype}", _of_dtype(dtype), **_unshifted)
    for axis, what in ((-3, "head"), (-2, "query"), (-1, "key")):
        yield mutant(f"dbias-of-the-first-{what}", _sum_to=_dbias_of_the_first(axis))


# 16-bit accumulation, which the spec does not allow (A10).


def _rounded_sum(w: Array, v: Array, dtype: Any) -> Array:
    """w (..., T, n) @ v (..., n, d) with an accumulator of ``dtype``."""
    total = np.zeros((*np.broadcast_shapes(w.shape[:-2], v.shape[:-2]), w.shape[-2], v.shape[-1]), dtype)
    for j in range(w.shape[-1]):
        total = (total.astype(np.float32) + w[..., j : j + 1] * v[..., j : j + 1, :]).astype(dtype)
    return total.astype(np.float32)


class _RoundedSums(ReferenceAdapter):
    """Adds one of o, dq, dk, dv and dbias in the 16 bits of q."""

    def __init__(self, output: str) -> None:
        self.name, self._output = f"{output}-summed-in-16-bits", output

    def sa_attention(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        if self._output != "o" or q.itemsize != 2:
            return super().sa_attention(q, k, v, **options)

        def weigh(w: Array, on: Array, v: Array) -> Array:
            return np.where(
                np.isnan(_weigh(w, on, v)), np.nan, _rounded_sum(w, np.where(np.isfinite(v), v, 0), q.dtype)
            )

        with np.errstate(all="ignore"), mock.patch.object(reference, "_weigh", weigh):
            return super().sa_attention(q, k, v, **options)

    def sa_attention_vjp(self, q: Array, k: Array, v: Array, do: Array, **options: Any) -> Gradients:
        right = super().sa_attention_vjp(q, k, v, do, **options)
        if self._output == "o" or q.itemsize != 2 or not np.isfinite(right[0].astype(np.float32)).all():
            return right
        scale = options["scale"] if options["scale"] is not None else q.shape[-1] ** -0.5
        places = ("bias", "mask", "is_causal", "q_offset")
        with np.errstate(all="ignore"):
            q_, k_, v_, x, on = _scores(q, k, v, *(options[name] for name in places), scale)
            d = np.where(on.any(-1, keepdims=True), do.astype(x.dtype), 0)
            y = _forward(x, on, -1, options["variant"])
            dx = _vjp(x, on, d @ _t(v_), -1, options["variant"])
            q_, k_ = (np.where(np.isfinite(a), a, 0) for a in (q_, k_))
            wrong: dict[str, Any] = dict(zip(("dq", "dk", "dv", "dbias"), right, strict=True))
            if self._output == "dq":
                wrong["dq"] = (scale * _rounded_sum(dx, k_, q.dtype)).astype(q.dtype)
            elif self._output == "dk":
                dk = scale * _rounded_sum(_t(dx), q_, q.dtype)
                wrong["dk"] = _sum_groups(dk, k).astype(q.dtype)
            elif self._output == "dv":
                wrong["dv"] = _sum_groups(_rounded_sum(_t(y), d, q.dtype), v).astype(q.dtype)
        return wrong["dq"], wrong["dk"], wrong["dv"], wrong["dbias"]


class _RoundedOutput(ReferenceAdapter):
    """Takes D = sum(g y) of a row from the output that was rounded to 16 bits: D = sum(do * o)."""

    def __init__(self, dtype: str) -> None:
        self.name, self._dtype = f"d-of-the-output-in-{dtype}", dtype

    def sa_attention_vjp(self, q: Array, k: Array, v: Array, do: Array, **options: Any) -> Gradients:
        if q.dtype.name != self._dtype:
            return super().sa_attention_vjp(q, k, v, do, **options)
        o = super().sa_attention(q, k, v, **options).astype(np.float32)

        def vjp(z: Array, on: Array, g: Array, axis: int, variant: str) -> Array:
            """dx is linear in D, with the factor -p, and +-1/R for the entries at an extremum."""
            p, x_min, x_max = _softmax(z, on, axis)
            _, unit, R = _range(x_min, x_max)
            at_min, at_max = _shares(z, on, x_min, x_max, axis)
            edge = 0 if variant == "product" else (at_min - at_max) / R * unit
            off = np.sum(do.astype(np.float32) * o, -1, keepdims=True)
            off = off - np.sum(np.where(on, g * _forward(z, on, axis, variant), 0), axis, keepdims=True)
            return np.where(on, _vjp(z, on, g, axis, variant) + np.where(np.isfinite(off), off, 0) * (edge - p), 0)

        with np.errstate(all="ignore"), mock.patch.object(reference, "_vjp", vjp):
            return super().sa_attention_vjp(q, k, v, do, **options)


def _attention_precision() -> Iterator[Backend]:
    yield from map(_RoundedSums, ("o", "dq", "dk", "dv"))
    yield from map(_RoundedOutput, ("float16", "bfloat16"))
    for dtype in ("float16", "bfloat16"):
        yield KernelMutant(f"scores-kept-in-{dtype}", "attention", _of_dtype(dtype), _scores=_scores_rounded)
        yield KernelMutant(
            f"query-scaled-in-{dtype}", "attention", _of_dtype(dtype),
            _scores=lambda q, *rest: _scores((q.astype(np.float32) * rest[-1]).astype(q.dtype), *rest[:-1], 1.0),
        )  # fmt: skip


def _scores_rounded(q: Array, *rest: Any) -> Any:
    *operands, x, on = _scores(q, *rest)
    return *operands, x.astype(q.dtype).astype(x.dtype), on


# Input checks that one operation has and another lacks.


class _Casting(ReferenceAdapter):
    """Casts integers to float32 in one operation."""

    def __init__(self, operation: str) -> None:
        self.name, self._operation = f"{operation}-casts-integers", operation

    def _cast(self, operation: str, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        if operation != self._operation:
            return arrays
        return tuple(
            a.astype(np.float32) if a.dtype.kind in "biu" and a.dtype.name != "bfloat16" else a for a in arrays
        )

    def sa_softmax_vjp(self, x: Array, g: Array, **options: Any) -> Any:
        return super().sa_softmax_vjp(*self._cast("sa_softmax_vjp", (x, g)), **options)

    def sa_attention(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        return super().sa_attention(*self._cast("sa_attention", (q, k, v)), **options)


class _Enlarging(ReferenceAdapter):
    """Lets a bias or a mask with more axes than the scores enlarge the output."""

    def __init__(self, operand: str) -> None:
        self.name, self._operand = f"{operand}-enlarges-the-output", operand

    def sa_attention(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        extra = options[self._operand]
        lead = () if extra is None else extra.shape[: max(extra.ndim - q.ndim, 0)]
        return super().sa_attention(*(np.broadcast_to(a, (*lead, *a.shape)) for a in (q, k, v)), **options)


class _AnyVariant(ReferenceAdapter):
    """Attention takes every unknown variant for the normalized one."""

    name = "attention-takes-any-variant"

    def sa_attention(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        variant = "product" if options["variant"] == "product" else "normalized"
        return super().sa_attention(q, k, v, **options | {"variant": variant})


class _UnequalHeads(ReferenceAdapter):
    """Repeats the heads of k and v each by a count of its own."""

    name = "k-and-v-may-have-unequal-heads"

    def sa_attention(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        if k.shape[-3] != v.shape[-3] and q.shape[-3] % k.shape[-3] == q.shape[-3] % v.shape[-3] == 0:
            k, v = (np.repeat(a, q.shape[-3] // a.shape[-3], -3) for a in (k, v))
        return super().sa_attention(q, k, v, **options)


def _input_checks() -> Iterator[Backend]:
    yield from map(_Casting, ("sa_softmax_vjp", "sa_attention"))
    yield from map(_Enlarging, ("bias", "mask"))
    yield _AnyVariant()
    yield _UnequalHeads()
