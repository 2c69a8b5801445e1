"""The list of cases: what is called, and what must come back.

A case id reads group/name/dtype/variant/part, for example ``row.length/n=17/float32/normalized/vjp``.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np

from sa_softmax._validate import VARIANTS
from sa_softmax.backends.protocol import Backend
from sa_softmax.conformance import derived, golden
from sa_softmax.conformance.derived import Derived
from sa_softmax.conformance.golden import Expected, Record
from sa_softmax.conformance.inputs import numpy_dtype

__all__ = ["Case", "Mismatch", "call", "cases", "compare"]

Array = np.ndarray[Any, Any]
Layout = Callable[[str, Array], Array]


class Mismatch(Exception):
    """A backend's answer is not the one that the spec asks for."""


@dataclass(frozen=True)
class Case:
    """One check of one operation.

    ``check(backend, device)`` returns the largest error in units of the bound (at most 1), or raises
    :class:`Mismatch`. ``dtype`` is what the backend must declare for the case to run.
    """

    id: str
    clauses: tuple[str, ...]
    operation: str
    dtype: str
    check: Callable[[Backend, str], float]

    @property
    def group(self) -> str:
        """The first part of the id."""
        return self.id.partition("/")[0]


@cache
def cases() -> tuple[Case, ...]:
    """Every case of the suite, in a fixed order."""
    return (
        *_golden_cases(), *_derived_cases(), *_subnormal_cases(),
        *_layout_cases(), *_independence_cases(), *_error_cases(),
    )  # fmt: skip


def compare(name: str, got: Any, expected: Expected) -> float:
    """The largest error of ``got`` in units of its bound; Mismatch names the first thing that is wrong.

    Type, shape, dtype and the places of NaN come before any value.
    """
    if not isinstance(got, np.ndarray):
        raise Mismatch(f"{name} must be a NumPy array; got {type(got).__name__}")
    if got.shape != expected.value.shape:
        raise Mismatch(f"{name} must have the shape {expected.value.shape}; got {got.shape}")
    if got.dtype != expected.dtype:
        raise Mismatch(f"{name} must have the dtype {expected.dtype}; got {got.dtype}")
    value = got.astype(np.float64)
    wrong_nan = np.isnan(value) != np.isnan(expected.value)
    if wrong_nan.any():
        at = tuple(map(int, np.argwhere(wrong_nan)[0]))
        raise Mismatch(
            f"{name}{list(at)} must be {expected.value[at]}; got {value[at]} ({wrong_nan.sum()} such entries)"
        )
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        difference = np.where(np.isnan(value), 0.0, abs(value - expected.value))
        error = np.where(difference == 0, 0.0, difference / expected.bound)
    worst = float(error.max(initial=0.0))
    if not worst <= 1:
        at = tuple(map(int, np.unravel_index(np.argmax(error), error.shape)))
        raise Mismatch(
            f"{name}{list(at)} must be {expected.value[at]:.17g} within {expected.bound[at]:.3g}; got {value[at]:.17g} "
            f"({(error > 1).sum()} of {error.size} entries are off, this one by {worst:.3g} times its bound)"
        )
    return worst


# Golden cases: each record, both variants, forward and gradient.

_PARTS: dict[bool, dict[str, tuple[str, tuple[str, ...]]]] = {
    False: {"forward": ("sa_softmax", ("y",)), "vjp": ("sa_softmax_vjp", ("dx",))},
    True: {"forward": ("sa_attention", ("o",)), "vjp": ("sa_attention_vjp", ("dq", "dk", "dv", "dbias"))},
}


def _golden_cases() -> Iterator[Case]:
    for record in golden.records():
        yield from _cases_of(record, record.id, record.clauses, _check_golden)


# Clauses that one variant or one part alone can exercise; a record's other clauses belong to all of its cases.
_ONLY_VARIANT = {
    "R3": "product",
    "G1": "product",
    "R4": "normalized",
    "C3": "normalized",
    "C4": "normalized",
} | dict.fromkeys(("G2", "G3", "G4"), "normalized")
_ONLY_VJP = {"G1", "G2", "G3", "G4", "G5", "G7", "G8", "A7", "A8"}


def _cases_of(
    record: Record | Derived, id: str, clauses: tuple[str, ...], check: Callable[..., float]
) -> Iterator[Case]:
    """The cases that run ``check(record, variant, operation, outputs, backend, device)``."""
    for variant in VARIANTS:
        for part, (operation, outputs) in _PARTS[record.is_attention].items():
            exercised = tuple(
                clause
                for clause in clauses
                if _ONLY_VARIANT.get(clause, variant) == variant and (part == "vjp" or clause not in _ONLY_VJP)
            )
            yield Case(
                f"{id}/{variant}/{part}", exercised, operation, record.dtype,
                partial(check, record, variant, operation, outputs),
            )  # fmt: skip


def _check_golden(
    record: Record, variant: str, operation: str, outputs: tuple[str, ...], backend: Backend, device: str
) -> float:
    results = call(backend, operation, record, variant, device)
    return _worst(record, variant, outputs, results)


def _derived_cases() -> Iterator[Case]:
    for record in (*derived.row_records(), *derived.attention_records()):
        yield from _cases_of(record, f"{record.id}/{record.dtype}", record.clauses, _check_derived)


def _check_derived(
    record: Derived, variant: str, operation: str, outputs: tuple[str, ...], backend: Backend, device: str
) -> float:
    return _check_golden(record.make(), variant, operation, outputs, backend, device)


# Subnormal rows: whether they are flushed is open (D5), whether they stay finite is not (C7, G8).


def _subnormal_cases() -> Iterator[Case]:
    on = np.array([[True, True, True], [True, True, True], [False, True, False]])
    for dtype, size in (("bfloat16", 2.0**-130), ("float32", 2.0**-130), ("float64", 2.0**-1030)):
        # 1 / R overflows; g / R does not.
        x = np.array([[0.5, -0.25, 1], [-0.5, -1, -0.25], [0.5, 1, 0.25]]) * size
        g = np.array([[1, -0.5, 0.25], [-0.75, 0.5, 1], [1, -1, 0.5]]) * 2.0**-10
        inputs = {"x": x.astype(numpy_dtype(dtype)), "g": g.astype(numpy_dtype(dtype)), "where": on}
        record = Record(f"row.subnormal/all/{dtype}", dtype, ("C7", "D5", "G8"), inputs, {"axis": -1}, {})
        yield from _cases_of(record, record.id, record.clauses, _check_subnormal)


def _check_subnormal(
    record: Record, variant: str, operation: str, outputs: tuple[str, ...], backend: Backend, device: str
) -> float:
    """y is between 0 and 1, or no larger than x; dx is a few times g / R, or no larger than g."""
    x, g, on = (record.inputs[name].astype(np.float64) for name in ("x", "g", "where"))
    low, high = np.zeros_like(x), np.ones_like(x)
    if variant == "product":
        high = abs(x) if operation == "sa_softmax" else abs(g)
        low = -high
    elif operation == "sa_softmax_vjp":
        high[:] = 4 * abs(g).max() / abs(x).max()
        low = -high
    (got,) = call(backend, operation, record, variant, device)
    middle, radius = (low + high) / 2 * on, (high - low) / 2 * on
    compare(outputs[0], got, Expected(middle, radius, record.inputs["x"].dtype))
    return 0.0  # a range has no error


def _worst(record: Record, variant: str, outputs: tuple[str, ...], results: tuple[Any, ...]) -> float:
    if len(results) != len(outputs):
        raise Mismatch(f"must return {len(outputs)} arrays ({', '.join(outputs)}); got {len(results)}")
    worst = 0.0
    for name, got in zip(outputs, results, strict=True):
        if name in record.outputs():
            worst = max(worst, compare(name, got, record.expected(name, variant)))
        elif name == "dk" and "dk_sum" in record.outputs():
            worst = max(worst, _compare_sum(got, record, variant))
        elif name == "dbias" and "bias" not in record.inputs and got is not None:
            raise Mismatch("dbias must be None where no bias is given")
    return worst


def _compare_sum(dk: Any, record: Record, variant: str) -> float:
    """Compare dk by its sum over the keys, which does not depend on how ties share (A8)."""
    k, expected = record.inputs["k"], record.expected("dk_sum", variant)
    compare("dk", dk, Expected(np.zeros(k.shape), np.full(k.shape, np.inf), expected.dtype))
    value = dk.astype(np.float64)
    rounding = float(ml_dtypes.finfo(expected.dtype).eps) / 2 * abs(value).sum(-2, keepdims=True)
    return compare(
        "dk summed over the keys",
        value.sum(-2, keepdims=True),
        Expected(expected.value, expected.bound + rounding, np.dtype(np.float64)),
    )


def call(
    backend: Backend,
    operation: str,
    record: Record,
    variant: str,
    device: str,
    layout: Layout = lambda name, array: array.copy(),
) -> tuple[Any, ...]:
    """Call one operation of ``backend`` on a record's inputs, laid out by ``layout``; inputs must stay as they are."""
    index = record.inputs.get("index")
    values = {
        name: layout(name, array if index is None or name == "where" else array[index])
        for name, array in record.inputs.items()
        if name != "index"
    }
    before = {name: array.tobytes() for name, array in values.items()}
    positional = {"sa_softmax": ("x",), "sa_softmax_vjp": ("x", "g"), "sa_attention": ("q", "k", "v")}.get(
        operation, ("q", "k", "v", "do")
    )
    options: dict[str, Any] = {"where": values.get("where")}
    if record.is_attention:
        options = {
            "bias": values.get("bias"),
            "mask": values.get("mask"),
            "is_causal": False,
            "q_offset": 0,
            "scale": None,
        }
    options |= record.options | {"variant": variant, "device": device}
    result = getattr(backend, operation)(*(values[name] for name in positional), **options)
    for name, array in values.items():
        if array.tobytes() != before[name]:
            raise Mismatch(f"the input {name} was changed in place")
    if operation.startswith("sa_softmax") or operation == "sa_attention":
        return (result,)
    if not isinstance(result, tuple):
        raise Mismatch(f"{operation} must return the tuple (dq, dk, dv, dbias); got {type(result).__name__}")
    return result


# Layouts: the same values, other strides (R6).


def _transposed(x: Array) -> Array:
    return np.ascontiguousarray(x.T).T


def _sliced(x: Array) -> Array:
    """Every second entry along every axis; what lies between is NaN, or true."""
    room = np.full([2 * n + 1 for n in x.shape], np.nan, x.dtype)
    view = room[(slice(0, -1, 2),) * (x.ndim - 1) + (slice(1, None, 2),)]
    view[...] = x
    return view


def _reversed(x: Array) -> Array:
    backwards = (slice(None, None, -1),) * x.ndim
    return np.ascontiguousarray(x[backwards])[backwards]


def _shifted(x: Array) -> Array:
    """Aligned to the element, to nothing wider."""
    view = np.empty(x.size + 1, x.dtype)[1:].reshape(x.shape)
    view[...] = x
    return view


def _middle_sliced(x: Array) -> Array:
    """Axes that no single stride collapses."""
    room = np.full((*x.shape[:-2], 2 * x.shape[-2] + 1, x.shape[-1]), np.nan, x.dtype)
    view = room[..., :-1:2, :]
    view[...] = x
    return view


def _heads_last(x: Array) -> Array:
    """(..., length, heads, dimension) in memory, as projections leave it."""
    return np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2) if x.ndim > 2 else _transposed(x)


def _of(**layouts: Callable[[Array], Array]) -> Layout:
    """A layout for each name; ``rest`` for the others, contiguous by default."""
    rest = layouts.get("rest", np.copy)
    return lambda name, array: layouts.get(name, rest)(array)


def _layout_cases() -> Iterator[Case]:
    everything = {"transposed": _transposed, "sliced": _sliced, "reversed": _reversed, "shifted": _shifted}
    layouts: dict[str, dict[str, Layout]] = {
        "row.layout/base": {name: _of(rest=layout) for name, layout in everything.items()}
        | {"transposed-x": _of(x=_transposed), "transposed-g": _of(g=_transposed)},
        "row.layout/same-rows": {"broadcast": _of(rest=lambda x: np.broadcast_to(x[0].copy(), x.shape))},
        "row.where/full": {
            "middle-sliced": _of(rest=_middle_sliced),
            "where-transposed": _of(where=_transposed),
            "where-sliced": _of(where=_sliced),
            "where-reversed": _of(where=_reversed),
        },
        "row.where/last-two": {"where-broadcast": _of(where=lambda w: np.broadcast_to(w, (3, *w.shape)))},
        "row.where/per-row": {"where-broadcast-along-rows": _of(where=lambda w: np.broadcast_to(w, (4, 9)))},
        "attention.heads/6-over-2-bias-mask-causal": {name: _of(rest=layout) for name, layout in everything.items()}
        | {
            "heads-last": _of(rest=_heads_last),
            "mixed": _of(q=_heads_last, k=_transposed, v=_sliced, do=_reversed, bias=_shifted),
            "heads-last-do": _of(do=_heads_last),
        },
        "attention.mask/right-padding": {"mask-broadcast": _of(mask=lambda m: np.broadcast_to(m, (2, 2, 5, 7)))},
        "attention.shape/no-batch": {"broadcast": _of(rest=lambda x: np.broadcast_to(x, (3, *x.shape)))},
    }
    for record in golden.records():
        group = record.id.partition(".")[0] + ".layout"
        for name, layout in layouts.get(record.id.rpartition("/")[0], {}).items():
            yield from _cases_of(record, f"{group}/{name}/{record.dtype}", ("R6",), partial(_check_layout, layout))


def _check_layout(
    layout: Layout,
    record: Record,
    variant: str,
    operation: str,
    outputs: tuple[str, ...],
    backend: Backend,
    device: str,
) -> float:
    results = call(backend, operation, record, variant, device, layout)
    if getattr(backend, "bitwise_rows", False) and not record.is_attention:
        _same_bits(results, call(backend, operation, record, variant, device))
    if record.is_attention and results[0].ndim > record.inputs["q"].ndim:  # each batch entry is the record
        return max(_worst(record, variant, outputs, _entry(results, i)) for i in range(len(results[0])))
    return _worst(record, variant, outputs, results)


def _entry(results: tuple[Any, ...], i: int) -> tuple[Any, ...]:
    return tuple(None if array is None else array[i] for array in results)


# Independence: a row's result depends on that row alone (R1).


def _independence_cases() -> Iterator[Case]:
    checks = {"alone": _check_alone, "moved": _check_moved, "beside-nan": _check_beside_nan, "kept": _check_kept}
    for record in golden.records():
        of = record.id.rpartition("/")[0]
        group = record.id.partition(".")[0] + ".independence"
        if of in ("row.independence/base", "attention.shape/5x7"):
            for name, check in checks.items():
                yield from _cases_of(record, f"{group}/{name}/{record.dtype}", ("R1",), check)
        if of in ("row.where/full", "attention.mask/per-batch-queries-and-keys"):
            yield from _cases_of(record, f"{group}/kept-masked/{record.dtype}", ("R1",), _check_kept)


def _only(name: str, x: Array, i: int) -> Array:
    return x[i : i + 1].copy()


def _check_alone(
    record: Record, variant: str, operation: str, outputs: tuple[str, ...], backend: Backend, device: str
) -> float:
    batch = call(backend, operation, record, variant, device)
    rows = [call(backend, operation, record, variant, device, partial(_only, i=i)) for i in range(len(batch[0]))]
    return _check_rows(record, variant, outputs, backend, _together(rows), batch)


def _check_moved(
    record: Record, variant: str, operation: str, outputs: tuple[str, ...], backend: Backend, device: str
) -> float:
    batch = call(backend, operation, record, variant, device)
    moved = call(backend, operation, record, variant, device, lambda name, x: np.roll(x, -1, 0))
    rows = tuple(None if array is None else np.roll(array, 1, 0) for array in moved)
    return _check_rows(record, variant, outputs, backend, rows, batch)


def _check_beside_nan(
    record: Record, variant: str, operation: str, outputs: tuple[str, ...], backend: Backend, device: str
) -> float:
    def beside_nan(name: str, x: Array, i: int) -> Array:
        lonely = np.full_like(x, np.nan)
        lonely[i] = x[i]
        return lonely

    batch = call(backend, operation, record, variant, device)
    rows = []
    for i in range(len(batch[0])):
        results = call(backend, operation, record, variant, device, partial(beside_nan, i=i))
        rows.append(tuple(None if array is None else array[i : i + 1] for array in results))
    return _check_rows(record, variant, outputs, backend, _together(rows), batch)


def _check_kept(
    record: Record, variant: str, operation: str, outputs: tuple[str, ...], backend: Backend, device: str
) -> float:
    """A later call on other values leaves an earlier result alone."""
    results = call(backend, operation, record, variant, device)
    call(backend, operation, record, variant, device, lambda name, x: x[::-1] if x.dtype == bool else -x[::-1])
    return _worst(record, variant, outputs, results)


def _together(rows: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(None if parts[0] is None else np.concatenate(parts) for parts in zip(*rows, strict=True))


def _check_rows(
    record: Record,
    variant: str,
    outputs: tuple[str, ...],
    backend: Backend,
    rows: tuple[Any, ...],
    batch: tuple[Any, ...],
) -> float:
    if getattr(backend, "bitwise_rows", False) and not record.is_attention:
        _same_bits(rows, batch)
    return _worst(record, variant, outputs, rows)


def _same_bits(got: tuple[Array, ...], expected: tuple[Array, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        if a.tobytes() != b.tobytes():
            raise Mismatch("the backend declares bitwise_rows, and the same row gave other bits at another place")


# Errors: input that has no right answer must not get one.


def _error_cases() -> Iterator[Case]:
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    q = np.linspace(-1, 1, 48, dtype=np.float32).reshape(4, 3, 4)
    row = {"axis": -1, "variant": "normalized", "where": None}
    heads = {"variant": "normalized", "bias": None, "mask": None, "is_causal": False, "q_offset": 0, "scale": None}
    for kind in ("int8", "int32", "int64", "uint8", "bool", "complex64", "complex128"):
        # A framework may narrow 64 bits on the way in, and not know complex128 at all.
        word = None if kind == "complex128" else kind.rstrip("0123456789")
        refused: tuple[tuple[str, str, tuple[Array, ...], dict[str, Any], str | None], ...] = (
            ("sa_softmax", "row.errors/", (x,), row, word),
            ("sa_attention", "attention.errors/", (q, q, q), heads, word),
            ("sa_softmax_vjp", "row.errors/vjp-", (x, x), row, None),  # automatic differentiation may refuse it first
        )
        for operation, name, arrays, options, named in refused:
            given = tuple(array.astype(kind) for array in arrays)
            check = partial(_check_error, operation, given, options, named)
            yield Case(f"{name}{kind}", ("D4",), operation, "float32", check)
    unknown: tuple[tuple[str, str, tuple[Array, ...], dict[str, Any]], ...] = (
        ("sa_softmax_vjp", "row.errors/vjp-unknown-variant", (x, x), row),
        ("sa_attention", "attention.errors/unknown-variant", (q, q, q), heads),
        ("sa_attention_vjp", "attention.errors/vjp-unknown-variant", (q, q, q, q), heads),
    )
    for operation, name, arrays, options in unknown:
        check = partial(_check_error, operation, arrays, options | {"variant": "plain"}, None)
        yield Case(name, ("R4",), operation, "float32", check)
    wrong_rows: dict[str, tuple[Array, dict[str, Any], str]] = {
        "0-d": (x[0, 0].reshape(()), {}, "R5"),
        "axis-too-large": (x, {"axis": 2}, "R5"),
        "axis-too-small": (x, {"axis": -3}, "R5"),
        "unknown-variant": (x, {"variant": "plain"}, "R4"),
        "where-not-boolean": (x, {"where": np.ones((3, 4), np.float32)}, "M1"),
        "where-shape": (x, {"where": np.ones((3, 5), bool)}, "M1"),
        "where-broadcasts-x": (x, {"where": np.ones((2, 3, 4), bool)}, "M1"),
    }
    for name, (array, options, clause) in wrong_rows.items():
        check = partial(_check_error, "sa_softmax", (array,), row | options, None)
        yield Case(f"row.errors/{name}", (clause,), "sa_softmax", "float32", check)
    wrong_heads: dict[str, tuple[tuple[Array, ...], dict[str, Any], str]] = {
        "heads-do-not-divide": ((q, q[:3], q[:3]), {}, "A3"),
        "more-key-heads": ((q[:2], q, q), {}, "A3"),
        "key-and-value-heads-differ": ((q, q[:2], q), {}, "A3"),
        "d-differs": ((q, q[..., :3], q), {}, "A9"),
        "lengths-differ": ((q, q[:, :2], q), {}, "A9"),
        "mask-not-boolean": ((q, q, q), {"mask": np.zeros((3, 3), np.float32)}, "M1"),
        "mask-shape": ((q, q, q), {"mask": np.ones((3, 4), bool)}, "M1"),
        "mask-broadcasts-scores": ((q, q, q), {"mask": np.ones((2, 4, 3, 3), bool)}, "M1"),
        "bias-shape": ((q, q, q), {"bias": np.ones((3, 3, 3), np.float32)}, "A2"),
        "bias-broadcasts-scores": ((q, q, q), {"bias": np.ones((2, 4, 3, 3), np.float32)}, "A2"),
    }
    for name, (arrays, options, clause) in wrong_heads.items():
        check = partial(_check_error, "sa_attention", arrays, heads | options, None)
        yield Case(f"attention.errors/{name}", (clause,), "sa_attention", "float32", check)


def _check_error(
    operation: str, arrays: tuple[Array, ...], options: dict[str, Any], dtype: str | None, backend: Backend, device: str
) -> float:
    try:
        getattr(backend, operation)(*arrays, device=device, **options)
    except Exception as error:
        # As a word: "floating point" names no int.
        if dtype is not None and not (isinstance(error, TypeError) and re.search(rf"\b{dtype}", str(error))):
            raise Mismatch(f"must raise a TypeError that names {dtype}; got {error!r}") from error
        return 0.0
    raise Mismatch("must raise an error; got a result")
