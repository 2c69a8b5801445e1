"""The list of cases: what is called, and what must come back.

A case id reads group/name/dtype/variant/part, for example ``row.length/n=17/float32/normalized/vjp``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from sa_softmax._validate import VARIANTS
from sa_softmax.backends.protocol import Backend
from sa_softmax.conformance import golden
from sa_softmax.conformance.golden import Expected, Record

__all__ = ["Case", "Mismatch", "call", "cases", "compare"]

Array = np.ndarray[Any, Any]
Layout = Callable[[Array], Array]


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
        return self.id.partition("/")[0]


@cache
def cases() -> tuple[Case, ...]:
    """Every case of the suite, in a fixed order."""
    return (*_golden_cases(), *_layout_cases(), *_independence_cases(), *_error_cases())


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


def _cases_of(record: Record, id: str, clauses: tuple[str, ...], check: Callable[..., float]) -> Iterator[Case]:
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


def _worst(record: Record, variant: str, outputs: tuple[str, ...], results: tuple[Any, ...]) -> float:
    if len(results) != len(outputs):
        raise Mismatch(f"must return {len(outputs)} arrays ({', '.join(outputs)}); got {len(results)}")
    worst = 0.0
    for name, got in zip(outputs, results, strict=True):
        if name in record.outputs():
            worst = max(worst, compare(name, got, record.expected(name, variant)))
        elif name == "dbias" and "bias" not in record.inputs and got is not None:
            raise Mismatch("dbias must be None where no bias is given")
    return worst


def call(
    backend: Backend,
    operation: str,
    record: Record,
    variant: str,
    device: str,
    layout: Layout = np.copy,
) -> tuple[Any, ...]:
    """Call one operation of ``backend`` on a record's inputs, laid out by ``layout``; inputs must stay as they are."""
    index = record.inputs.get("index")
    values = {
        name: layout(array if index is None or name == "where" else array[index])
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
    return result if isinstance(result, tuple) else (result,)


# Layouts: the same values, other strides (R6).


def _transposed(x: Array) -> Array:
    return np.ascontiguousarray(x.T).T


def _sliced(x: Array) -> Array:
    """Every second column of every second row; what lies between is NaN."""
    room = np.full((2 * x.shape[0], 2 * x.shape[1] + 1), np.nan, x.dtype)
    view = room[::2, 1::2]
    view[...] = x
    return view


def _reversed(x: Array) -> Array:
    return np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1]


def _shifted(x: Array) -> Array:
    """Aligned to the element, to nothing wider."""
    view = np.empty(x.size + 1, x.dtype)[1:].reshape(x.shape)
    view[...] = x
    return view


def _broadcast(x: Array) -> Array:
    return np.broadcast_to(x[0].copy(), x.shape)


def _layout_cases() -> Iterator[Case]:
    layouts: dict[str, dict[str, Layout]] = {
        "base": {"transposed": _transposed, "sliced": _sliced, "reversed": _reversed, "shifted": _shifted},
        "same-rows": {"broadcast": _broadcast},
    }
    for record in golden.records():
        group, name, *_ = record.id.split("/")
        if group == "row.layout":
            for layout_name, layout in layouts[name].items():
                id = f"{group}/{layout_name}/{record.dtype}"
                yield from _cases_of(record, id, ("R6",), partial(_check_layout, layout))


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
    if getattr(backend, "bitwise_rows", False):
        _same_bits(results, call(backend, operation, record, variant, device))
    return _worst(record, variant, outputs, results)


# Independence: a row's result depends on that row alone (R1).


def _independence_cases() -> Iterator[Case]:
    checks = {"alone": _check_alone, "moved": _check_moved, "beside-nan": _check_beside_nan, "kept": _check_kept}
    for record in golden.records():
        if record.id.startswith("row.independence/"):
            for name, check in checks.items():
                yield from _cases_of(record, f"row.independence/{name}/{record.dtype}", ("R1",), check)


def _row(x: Array, i: int) -> Array:
    return x[i : i + 1].copy()


def _check_alone(
    record: Record, variant: str, operation: str, outputs: tuple[str, ...], backend: Backend, device: str
) -> float:
    (batch,) = call(backend, operation, record, variant, device)
    rows = [call(backend, operation, record, variant, device, partial(_row, i=i))[0] for i in range(len(batch))]
    return _check_rows(record, variant, outputs, backend, np.concatenate(rows), batch)


def _check_moved(
    record: Record, variant: str, operation: str, outputs: tuple[str, ...], backend: Backend, device: str
) -> float:
    (batch,) = call(backend, operation, record, variant, device)
    (moved,) = call(backend, operation, record, variant, device, lambda x: np.concatenate([x[1:], x[:1]]))
    return _check_rows(record, variant, outputs, backend, np.concatenate([moved[-1:], moved[:-1]]), batch)


def _check_beside_nan(
    record: Record, variant: str, operation: str, outputs: tuple[str, ...], backend: Backend, device: str
) -> float:
    def beside_nan(x: Array, i: int) -> Array:
        lonely = np.full_like(x, np.nan)
        lonely[i] = x[i]
        return lonely

    (batch,) = call(backend, operation, record, variant, device)
    rows = [
        call(backend, operation, record, variant, device, partial(beside_nan, i=i))[0][i] for i in range(len(batch))
    ]
    return _check_rows(record, variant, outputs, backend, np.stack(rows), batch)


def _check_kept(
    record: Record, variant: str, operation: str, outputs: tuple[str, ...], backend: Backend, device: str
) -> float:
    """A later call on other values leaves an earlier result alone."""
    results = call(backend, operation, record, variant, device)
    call(backend, operation, record, variant, device, lambda x: -x)
    return _worst(record, variant, outputs, results)


def _check_rows(
    record: Record, variant: str, outputs: tuple[str, ...], backend: Backend, rows: Array, batch: Array
) -> float:
    if getattr(backend, "bitwise_rows", False):
        _same_bits((rows,), (batch,))
    return _worst(record, variant, outputs, (rows,))


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
    for kind in ("int32", "uint8", "bool", "complex64"):
        yield Case(
            f"row.errors/{kind}", ("D4",), "sa_softmax", "float32",
            partial(_check_error, "sa_softmax", (x.astype(kind),), row, kind.rstrip("0123456789").removeprefix("u")),
        )  # fmt: skip
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
        "d-differs": ((q, q[..., :3], q), {}, "A9"),
        "lengths-differ": ((q, q[:, :2], q), {}, "A9"),
        "mask-not-boolean": ((q, q, q), {"mask": np.zeros((3, 3), np.float32)}, "M1"),
        "mask-shape": ((q, q, q), {"mask": np.ones((3, 4), bool)}, "M1"),
        "bias-shape": ((q, q, q), {"bias": np.ones((3, 3, 3), np.float32)}, "A2"),
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
        if dtype is not None and not (isinstance(error, TypeError) and dtype in str(error)):
            raise Mismatch(f"must raise a TypeError that names {dtype}; got {error!r}") from error
        return 0.0
    raise Mismatch("must raise an error; got a result")
