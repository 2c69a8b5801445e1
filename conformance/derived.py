"""Records that are made of golden records when they are needed, and cost no golden data.

Excluded entries have no influence (C5, A6) and rows are independent (R1), so the golden answer of a short row is also
that of the same entries spread over a long row of excluded ones, in another axis, or in a batch of thousands. This is
how every corner row meets every block size.
"""

import random
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from sa_softmax._validate import DTYPES
from sa_softmax.conformance import golden
from sa_softmax.conformance.golden import EXACT, Record
from sa_softmax.conformance.inputs import largest, numpy_dtype

__all__ = ["Derived", "attention_records", "row_records"]

Array = np.ndarray[Any, Any]
Places = tuple[Array, ...]


class Derived(NamedTuple):
    """What a case must know of a record before it is made: ``make()`` is cheap to call twice in a row."""

    id: str
    dtype: str
    clauses: tuple[str, ...]
    is_attention: bool
    make: Callable[[], Record]


def row_records() -> Iterator[Derived]:
    """The corner, tie and scale rows of each dtype in one array, in other company."""
    yield _row("rows=70000", "float32", ("R1",), partial(_many, "float32", 70000))
    for n, every in ((70001, 4), (270001, 12)):  # longer than a block of 65536 or 131072, as vocabularies are
        yield _row(f"where-n={n}", "float32", ("R2", "C5", "G3", "G5"), partial(_spread, "float32", n, "where", every))
    for dtype in DTYPES:
        for n in (40, 300, 1100, 5000):
            for form in ("where", "minus-inf"):
                yield _row(f"{form}-n={n}", dtype, ("R2", "C5", "G3", "G5"), partial(_spread, dtype, n, form))
        yield _row("axis=0", dtype, ("R5", "C5", "G3"), partial(_along, dtype, 40, 0))
        yield _row("axis=1", dtype, ("R5", "C5", "G3"), partial(_along, dtype, 300, 1))


def _row(name: str, dtype: str, clauses: tuple[str, ...], make: Callable[[], Record]) -> Derived:
    return Derived(f"row.embedded/{name}", dtype, clauses, False, lru_cache(1)(make))


def _short_rows(dtype: str) -> Record:
    """Every corner row, row with ties and row of some scale, excluded entries behind the shorter ones."""
    rows: list[dict[str, Array]] = []
    for record in golden.records():
        group, x = record.id.partition("/")[0], record.inputs.get("x")
        if record.dtype != dtype or group not in ("row.corner", "row.ties", "row.scale") or x is None or x.size == 0:
            continue
        where = np.broadcast_to(record.inputs.get("where", np.ones(1, bool)), x.shape)
        for i in range(1 if group == "row.corner" else len(x)):
            rows.append(
                {"x": x[i], "g": record.inputs["g"][i], "where": where[i]}
                | {name: array[:, i] for name, array in record._expected.items()}
            )
    width = max(row["x"].size for row in rows)

    def padded(name: str, fill: float) -> Array:
        ends = [np.full((*row[name].shape[:-1], width - row[name].shape[-1]), fill, row[name].dtype) for row in rows]
        return np.stack([np.concatenate([row[name], end], -1) for row, end in zip(rows, ends, strict=True)], -2)

    inputs = {name: padded(name, 0) for name in ("x", "g", "where")}
    expected = {name: padded(name, EXACT if name.endswith("_scale") else 0) for name in rows[0] if name not in inputs}
    return Record("row.embedded", dtype, (), inputs, {"axis": -1}, expected)


def _into(array: Array, places: Array, n: int, fill: Any) -> Array:
    """``array`` (..., rows, width) at ``places`` (rows, width) of rows of length n."""
    out = np.empty((*array.shape[:-1], n), array.dtype)
    out[...] = fill
    np.put_along_axis(out, np.broadcast_to(places, array.shape), array, -1)
    return out


def _garbage(dtype: str, n: int) -> Array:
    return np.resize(np.array([np.nan, np.inf, 77, largest(dtype), -np.inf, -largest(dtype)]), n).astype(
        numpy_dtype(dtype)
    )


def _spread(dtype: str, n: int, form: str, every: int = 1) -> Record:
    """A third of the rows begins in the first place, a third ends in the last, a third is all over the place."""
    record = _short_rows(dtype)
    inputs = {name: array[::every] for name, array in record.inputs.items()}
    rows, width = inputs["x"].shape
    draw = random.Random(n)
    ways = (
        lambda: list(range(width)),
        lambda: list(range(n - width, n)),
        lambda: sorted(draw.sample(range(n), width)),
    )
    places = np.array([ways[i % 3]() for i in range(rows)])
    on = _into(inputs["where"], places, n, False)
    x, g = (_into(inputs[name], places, n, _garbage(dtype, n)[::step]) for name, step in (("x", 1), ("g", -1)))
    given = {"x": x, "g": g, "where": on}
    if form == "minus-inf":
        given = {"x": np.where(on, x, np.array(-np.inf, x.dtype)), "g": g}
    expected = {
        name: _into(array[:, ::every], places, n, EXACT if name.endswith("_scale") else 0)
        for name, array in record._expected.items()
    }
    return Record("row.embedded", dtype, (), given, {"axis": -1}, expected)


def _along(dtype: str, n: int, axis: int) -> Record:
    """The rows along the first axis of a matrix, or the middle one of three."""
    record = _spread(dtype, n, "where")

    def moved(array: Array) -> Array:
        *lead, rows, n = array.shape
        if axis == 0:
            return np.ascontiguousarray(np.swapaxes(array, -1, -2))
        whole = array[..., : rows // 5 * 5, :].reshape(*lead, 5, rows // 5, n)
        return np.ascontiguousarray(np.swapaxes(whole, -1, -2))

    return Record(
        "row.embedded", dtype, (),
        {name: moved(array) for name, array in record.inputs.items()},
        {"axis": axis},
        {name: moved(array) for name, array in record._expected.items()},
    )  # fmt: skip


def _many(dtype: str, count: int) -> Record:
    record = _short_rows(dtype)
    times = -(-count // len(record.inputs["x"]))
    return Record(
        "row.embedded", dtype, (),
        {name: np.tile(array, (times, 1)) for name, array in record.inputs.items()},
        {"axis": -1},
        {name: np.tile(array, (1, times, 1)) for name, array in record._expected.items()},
    )  # fmt: skip


# Attention.

_TILE_EDGES = {130: (62, 63, 64, 65, 127, 128), 600: (127, 128, 255, 256, 511, 512)}
"""Queries at both sides of where tiles end, by Tq."""


def attention_records() -> Iterator[Derived]:
    """Golden records of attention among excluded keys and queries and zeros along D, and batches of thousands."""
    wider: tuple[tuple[str, str, tuple[int, int], tuple[int, int], str], ...] = (
        ("70x300", "shape/5x7", (70, 300), (4, 4), "mask"),
        ("d=264-dv=136", "shape/5x7", (5, 7), (264, 136), "none"),
        ("gqa-130x65-d=72-dv=40", "heads/4-over-2", (130, 65), (72, 40), "mask"),
        ("bias-70x140", "bias/full", (70, 140), (4, 4), "mask"),
        ("bias-minus-inf-20x1100", "bias/full", (20, 1100), (4, 4), "minus-inf"),
        ("few-queries-5x1100", "shape/5x7", (5, 1100), (4, 4), "mask"),
        ("gqa-one-query-1x2300", "heads/4-over-2-one-query", (1, 2300), (64, 40), "mask"),
        ("large-bias-5x300", "bias/large", (5, 300), (4, 4), "mask"),
        ("gqa-bias-33x1100", "heads/6-over-2-bias-mask-causal", (33, 1100), (4, 4), "mask"),
        ("negative-scale-130x20", "scale/negative", (130, 20), (72, 40), "mask"),
        ("twin-keys-8x140", "ties/twin-keys", (8, 140), (4, 4), "mask"),
        ("nan-query-40x140", "excluded/nan-query-poisons-its-row", (40, 140), (4, 4), "mask"),
        ("many-queries-600x70", "shape/5x7", (600, 70), (4, 4), "mask"),
        ("causal-130x170", "causal/square", (130, 170), (4, 4), "causal"),
        ("causal-600x640", "causal/square", (600, 640), (4, 4), "causal"),
    )
    found = {record.id: record for record in golden.records()}
    for dtype in DTYPES:
        for name, of, t, d, form in wider:
            record = found[f"attention.{of}/{dtype}"]
            clauses = ("A4", "A5", "A6") if form == "causal" else ("A9",) if form == "none" else ("A5", "A6")
            yield _attention(name, dtype, clauses, partial(_wider, record, t, d, form))
    record = found["attention.heads/4-over-2/float32"]
    yield _attention("batch=16400", "float32", ("A9",), partial(_repeated, record, 8200))


def _attention(name: str, dtype: str, clauses: tuple[str, ...], make: Callable[[], Record]) -> Derived:
    return Derived(f"attention.embedded/{name}", dtype, clauses, True, lru_cache(1)(make))


def _at(array: Array, shape: tuple[int, ...], places: Places, fill: Any) -> Array:
    """``array`` at ``places`` of its last axes in an array of ``shape``."""
    out = np.empty(shape, array.dtype)
    out[...] = fill
    at: Any = (..., *np.ix_(*places))
    out[at] = array
    return out


def _wider(record: Record, t: tuple[int, int], d: tuple[int, int], form: str) -> Record:
    """The record's queries, keys and dimensions at some places of larger arrays.

    ``mask``: the others are excluded, and hold anything. ``minus-inf``: the same by the bias. ``causal``: key j stands
    where query j just sees it. ``none``: only D and Dv grow.
    """
    given, scale = record.inputs, record.options.get("scale")
    q, k, v, bias = given["q"], given["k"], given["v"], given.get("bias")
    scores = (*q.shape[:-1], k.shape[-2])
    draw = random.Random(record.id)

    def places(few: int, many: int) -> Array:
        """In ascending order, the last one the last."""
        return np.array([*sorted(draw.sample(range(many - 1), few - 1)), many - 1])

    of_q, of_k = places(scores[-2], t[0]), places(scores[-1], t[1])
    of_d, of_dv = places(q.shape[-1], d[0]), places(v.shape[-1], d[1])
    options: dict[str, Any] = {"scale": scale if scale is not None else q.shape[-1] ** -0.5}
    keep = np.broadcast_to(given.get("mask", np.ones(1, bool)), scores)
    if form == "causal":
        of_q = np.array(_TILE_EDGES[t[0]])
        of_k, options = of_q + 40, options | {"is_causal": True, "q_offset": 40}
    elif record.options.get("is_causal"):
        keep = keep & np.tri(scores[-2], scores[-1], record.options.get("q_offset", 0), dtype=bool)

    def grown(array: Array, rows: Array, columns: Array, n: int, m: int, fill: float) -> Array:
        """Zeros in the other columns, ``fill`` in the other rows."""
        wide = _at(array, (*array.shape[:-1], m), (columns,), 0)
        return _at(wide, (*array.shape[:-2], n, m), (rows, np.arange(m)), fill)

    # A score of -inf needs a finite q K^T beside the bias of -inf.
    other = 77 if form == "minus-inf" else np.nan
    inputs = {
        "q": grown(q, of_q, of_d, t[0], d[0], other),
        "k": grown(k, of_k, of_d, t[1], d[0], other),
        "v": grown(v, of_k, of_dv, t[1], d[1], np.nan),
        "do": grown(given["do"], of_q, of_dv, t[0], d[1], np.nan),
    }
    full = (*scores[:-2], *t)
    expected = dict(record._expected)
    if form == "minus-inf":
        whole = np.zeros(scores, q.dtype) if bias is None else np.broadcast_to(bias, scores)
        inputs["bias"] = _at(np.where(keep, whole, -np.inf).astype(whole.dtype), full, (of_q, of_k), -np.inf)
        if bias is None or bias.shape != scores:
            expected = {name: array for name, array in expected.items() if not name.startswith("dbias")}
    else:
        if form != "none":
            inputs["mask"] = _at(keep, full, (of_q, of_k), False)
        if bias is not None:
            rows, columns = _bias_axes(bias, of_q, of_k, t)
            inputs["bias"] = _at(bias, (*bias.shape[:-2], rows[1], columns[1]), (rows[0], columns[0]), np.nan)
    sizes: dict[str, tuple[Places, tuple[int, int]]] = {
        "o": ((of_q, of_dv), (t[0], d[1])),
        "dq": ((of_q, of_d), (t[0], d[0])),
        "dk": ((of_k, of_d), (t[1], d[0])),
        "dk_sum": ((np.arange(1), of_d), (1, d[0])),
        "dv": ((of_k, of_dv), (t[1], d[1])),
    }
    if "bias" in inputs and bias is not None:
        rows, columns = _bias_axes(bias, of_q, of_k, t)
        sizes["dbias"] = (rows[0], columns[0]), (rows[1], columns[1])
    larger = {}
    for name, array in expected.items():
        at, size = sizes[name.removesuffix("_scale")]
        fill = EXACT if name.endswith("_scale") else 0
        larger[name] = _at(array, (*array.shape[:-2], *size), at, fill)
    return Record("attention.embedded", record.dtype, (), inputs, options, larger)


def _bias_axes(bias: Array, of_q: Array, of_k: Array, t: tuple[int, int]) -> tuple[tuple[Array, int], ...]:
    """Places and length of the bias's last two axes; an axis of length 1 keeps it."""
    pairs = zip(bias.shape[-2:], (of_q, of_k), t, strict=True)
    return tuple((np.arange(1), 1) if n == 1 else (of, m) for n, of, m in pairs)


def _repeated(record: Record, times: int) -> Record:
    """The record's batch many times over."""

    def repeated(array: Array, axis: int) -> Array:
        return np.concatenate([array] * times, axis)

    return Record(
        "attention.embedded", record.dtype, (),
        {name: repeated(array, 0) for name, array in record.inputs.items()},
        record.options,
        {name: repeated(array, 1) for name, array in record._expected.items()},
    )  # fmt: skip
