"""The inputs of the golden records: one deterministic list, from which the generator makes the golden data.

Every number is drawn from ``random.Random`` seeded with the record's id, built by exact arithmetic, and rounded to
the record's dtype, so it is the same on every machine and exactly representable.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from sa_softmax._validate import DTYPES

__all__ = [
    "LENGTHS",
    "SCALES",
    "AttentionInput",
    "Draw",
    "RowInput",
    "attention_inputs",
    "largest",
    "numpy_dtype",
    "row_inputs",
]

Array = np.ndarray[Any, Any]

LENGTHS = (
    1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257,
    1000, 1023, 1024, 1025, 4095, 4096, 4097, 65537,
)  # fmt: skip
"""Row lengths on both sides of every likely vector and tile boundary."""

DICTIONARY_FROM = 1000
"""Rows at least this long hold few distinct values and are stored as a dictionary and an index."""

SCALES = {
    "float16": (1e-4, 1e-2, 1.0, 10.0, 100.0, 1e3, 1e4, 65504.0),
    "bfloat16": (1e-30, 1e-20, 1e-10, 1e-4, 1e-2, 1.0, 10.0, 100.0, 1e4, 1e10, 1e20, 1e30, "max"),
    "float32": (1e-30, 1e-20, 1e-10, 1e-4, 1e-2, 1.0, 10.0, 100.0, 1e4, 1e10, 1e20, 1e30, "max"),
    "float64": (1e-300, 1e-100, 1e-30, 1e-10, 1e-2, 1.0, 10.0, 100.0, 1e4, 1e30, 1e100, 1e300, "max"),
}
"""Score scales. float16 starts where the gradient of the normalized variant, which grows like 1/R, still fits."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of one of DTYPES; NumPy itself has no bfloat16."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def largest(dtype: str) -> float:
    """The largest finite number of ``dtype``."""
    return float(ml_dtypes.finfo(numpy_dtype(dtype)).max)


@dataclass(frozen=True)
class RowInput:
    """Input of the row operation: x and g of one shape, ``where`` in its own broadcastable shape.

    With an ``index``, x and g are flat dictionaries: the arrays are x[index] and g[index], no entry of the dictionary
    is shared by two rows, and all dtypes share the index.
    """

    name: str
    dtype: str
    clauses: tuple[str, ...]
    x: Array
    g: Array
    where: Array | None = None
    axis: int = -1
    index: Array | None = None


@dataclass(frozen=True)
class AttentionInput:
    """Input of attention. ``compare`` names the outputs that are determined (ties leave some of them open, A8);
    ``dk_sum`` is dk summed over the keys.
    """

    name: str
    dtype: str
    clauses: tuple[str, ...]
    q: Array
    k: Array
    v: Array
    do: Array
    bias: Array | None = None
    mask: Array | None = None
    options: dict[str, Any] = field(default_factory=dict)
    compare: tuple[str, ...] = ("o", "dq", "dk", "dv", "dbias")


class Draw:
    """Random arrays of one dtype that are the same everywhere."""

    def __init__(self, seed: str, dtype: str) -> None:
        self.random = random.Random(seed)
        self.dtype = dtype

    def bell(self, *shape: int, scale: float = 1.0) -> Array:
        """Roughly normal with standard deviation ``scale``: the centred sum of four uniform integers."""
        return self._array(
            shape, lambda: sum(self.random.randrange(-(2**19), 2**19) for _ in range(4)) / 2**19.2, scale
        )

    def flat(self, *shape: int, scale: float = 1.0) -> Array:
        """Uniform between -scale and scale."""
        return self._array(shape, lambda: self.random.randrange(-(2**24), 2**24 + 1) / 2**24, scale)

    def mask(self, *shape: int, share: float = 0.7) -> Array:
        """Boolean, true with probability ``share``."""
        size = int(np.prod(shape))
        return np.array([self.random.randrange(1000) < 1000 * share for _ in range(size)], bool).reshape(shape)

    def choice(self, count: int, *shape: int) -> Array:
        """Integers from 0 to ``count`` - 1."""
        size = int(np.prod(shape))
        return np.array([self.random.randrange(count) for _ in range(size)], np.uint8).reshape(shape)

    def _array(self, shape: tuple[int, ...], draw: Any, scale: float) -> Array:
        values = [draw() * scale for _ in range(int(np.prod(shape)))]
        return np.array(values, np.float64).reshape(shape).astype(numpy_dtype(self.dtype))


# Row operation.


def row_inputs() -> Iterator[RowInput]:
    """Every golden record of the row operation."""
    for dtype in DTYPES:
        yield from _lengths(dtype)
        yield from _scales(dtype)
        yield from _corners(dtype)
        yield from _ties(dtype)
        yield from _wheres(dtype)
        yield from _axes(dtype)
        yield from _bases(dtype)


_DTYPE_CLAUSE = {"float16": "D1", "bfloat16": "D1", "float32": "D2", "float64": "D2"}


def _lengths(dtype: str) -> Iterator[RowInput]:
    clauses = ("R3", "R4", "R5", "C3", "D3", "G1", "G2", _DTYPE_CLAUSE[dtype])
    for n in LENGTHS:
        name = f"row.length/n={n}"
        draw = Draw(f"{name}/{dtype}", dtype)
        if n < DICTIONARY_FROM:
            x = draw.bell(2, n, scale=2.0)
            x[1] = -abs(x[1])
            yield RowInput(name, dtype, clauses, x, draw.bell(2, n))
            continue
        # 61 common values a row, and two that occur once: the maximum at the front and the minimum in the last place,
        # where a kernel that forgets its tail misses it; in the second row both inside, where one that merges its
        # first and last blocks only does.
        x = draw.bell(2, 63, scale=2.0)
        x[:, 61], x[:, 62] = 10, -10
        x[1] = -abs(x[1])
        x[1, 61] = -0.0078125
        index = Draw(name, dtype).choice(61, 2, n)  # one for all dtypes: it is the bulk of the data
        index[0, 0], index[0, -1] = 61, 62
        index[1, n // 2], index[1, n // 3] = 61, 62
        index[1] += 63
        yield RowInput(name, dtype, clauses, x.reshape(-1), draw.bell(126), index=index)


def _scales(dtype: str) -> Iterator[RowInput]:
    for scale in SCALES[dtype]:
        name = f"row.scale/{scale if isinstance(scale, str) else format(scale, 'g')}"
        draw = Draw(f"{name}/{dtype}", dtype)
        size = largest(dtype) if isinstance(scale, str) else scale
        x = draw.flat(4, 17, scale=size)
        x[1], x[2] = -abs(x[1]), abs(x[2])
        x[3, 3], x[3, 11] = size, -size
        # Two equal maxima: with one, a large scale leaves a gradient that is all cancellation, and bounds nothing.
        x[:, 5] = x.max(1)
        clauses = ("R3", "R4", "C7", "D5", "G1", "G2", "G8")
        yield RowInput(name, dtype, clauses, x, draw.flat(4, 17))


def _corners(dtype: str) -> Iterator[RowInput]:
    """One corner row beside an ordinary one, which it must not touch."""
    nan, inf, big = np.nan, np.inf, largest(dtype)
    n = 9
    everyone = np.ones(n, bool)

    def only(*places: int) -> Array:
        return np.isin(np.arange(n), places)

    def spread(**places: float) -> list[float]:
        row = [0.5, -1.5, 2.0, 1.25, -0.75, 0.25, 1.0, -0.5, 1.75]
        for place, value in places.items():
            row[int(place[1:])] = value
        return row

    positive = [0.5, 1.5, 2.0, 1.25, 0.75, 0.25, 1.0, 3.0, 1.75]
    negative = [-value for value in positive]
    corners: dict[str, tuple[list[float], Array, tuple[str, ...]]] = {
        "zero": ([0.0] * n, everyone, ("C1", "G5")),
        "signed-zero": ([0.0, -0.0] * 4 + [-0.0], everyone, ("C1", "G5")),
        "zero-under-mask": (spread(p1=0, p2=0), only(1, 2), ("C1", "G5")),
        "fully-masked": (spread(), only(), ("C2", "G5")),
        "fully-masked-nan": ([nan] * n, only(), ("C2", "C5", "G5")),
        "all-minus-inf": ([-inf] * n, everyone, ("C2", "R2", "G5")),
        "all-negative": (negative, everyone, ("C3",)),
        "all-positive": (positive, everyone, ("C3",)),
        "all-negative-under-mask": ([*negative[:5], 4.0, 5.0, 0.0, 7.0], only(0, 1, 2, 3, 4), ("C3", "C5")),
        "all-positive-under-mask": ([*positive[:5], -4.0, -5.0, 0.0, -7.0], only(0, 1, 2, 3, 4), ("C3", "C5")),
        "constant-positive": ([2.5] * n, everyone, ("C4", "G3")),
        "constant-negative": ([-2.5] * n, everyone, ("C4", "G3")),
        "constant-positive-under-mask": ([2.5] * 5 + [-9.0] * 4, only(0, 1, 2, 3), ("C4", "C5", "G3")),
        "one-positive": (spread(p4=1.5), only(4), ("C4",)),
        "one-negative": (spread(p4=-1.5), only(4), ("C4",)),
        "one-zero": (spread(p4=0.0), only(4), ("C1", "C4", "G5")),
        "one-positive-rest-minus-inf": ([-inf] * 8 + [1.5], everyone, ("C4", "R2")),
        "one-negative-rest-minus-inf": ([-1.5] + [-inf] * 8, everyone, ("C4", "R2")),
        "some-minus-inf": (spread(p0=-inf, p3=-inf, p8=-inf), everyone, ("R2", "C5", "G5")),
        "minus-inf-and-negative": ([-inf, *negative[1:]], everyone, ("R2", "C3")),
        "excluded-nan": (spread(p1=nan, p7=nan), ~only(1, 7), ("C5",)),
        "excluded-plus-inf": (spread(p0=inf, p8=inf), ~only(0, 8), ("C5",)),
        "excluded-minus-inf": (spread(p0=-inf, p8=-inf), ~only(0, 8), ("C5", "R2")),
        "excluded-largest": (spread(p2=big, p3=-big), ~only(2, 3), ("C5",)),
        "excluded-minimum": (spread(p3=-8.0), ~only(3), ("C5",)),
        "excluded-maximum": (spread(p3=8.0), ~only(3), ("C5",)),
        "nan": (spread(p4=nan), everyone, ("C6", "G7")),
        "nan-first": (spread(p0=nan), everyone, ("C6", "G7")),
        "nan-last": (spread(p8=nan), everyone, ("C6", "G7")),
        "nan-under-mask": (spread(p4=nan), ~only(0, 7), ("C6", "G7")),
        "nan-and-minus-inf": (spread(p4=nan, p5=-inf), everyone, ("C6", "R2", "G7")),
        "plus-inf": (spread(p6=inf), everyone, ("C6", "G7")),
        "two-plus-inf": (spread(p0=inf, p8=inf), everyone, ("C6", "G7")),
        "plus-inf-under-mask": (spread(p6=inf), ~only(0, 7), ("C6", "G7")),
        "both-infinities": (spread(p2=inf, p6=-inf), everyone, ("C6", "R2", "G7")),
        "lowest-finite-participates": (spread(p3=-big, p5=-big), everyone, ("C7", "G3")),
        "half-lowest-participates": (spread(p3=-big / 2), everyone, ("C7",)),
        "largest-and-lowest": (spread(p3=big, p5=-big), everyone, ("C7", "G8")),
        "constant-largest": ([big] * n, everyone, ("C4", "C7", "G8")),
        "constant-lowest": ([-big] * n, everyone, ("C4", "C7", "G8")),
        "minimum-zero": ([0.0, *positive[1:]], everyone, ("G4",)),
        "maximum-zero": ([0.0, *negative[1:]], everyone, ("G4",)),
        "minimum-minus-zero": ([-0.0, *positive[1:]], everyone, ("G4",)),
        "maximum-minus-zero": ([-0.0, *negative[1:]], everyone, ("G4",)),
        "extrema-zero-twice": ([0.0, 0.0, *positive[2:]], everyone, ("G4", "G3")),
    }
    for corner, (row, on, clauses) in corners.items():
        name = f"row.corner/{corner}"
        draw = Draw(f"{name}/{dtype}", dtype)
        x = np.array([row, spread()], numpy_dtype(dtype))
        where = None if on.all() else np.array([on, everyone])
        # An upstream gradient within [-1, 1] keeps g x finite beside the largest values (G8).
        g = draw.flat(2, n)
        if corner == "some-minus-inf":  # excluded without a mask, g is garbage there all the same
            g[0, [0, 3, 8]] = nan, inf, -inf
        yield RowInput(name, dtype, ("R3", "R4", *clauses), x, g, where)
    # Long enough that a kernel's vectors of 16 overflow where it sums x exp(x - max) before it divides.
    name = "row.corner/sum-overflows"
    draw = Draw(f"{name}/{dtype}", dtype)
    x = np.array([[0.75 * big] * 17, [*spread(), *negative[1:]]], numpy_dtype(dtype))
    g = draw.flat(2, 17)
    g[0] = 1
    yield RowInput(name, dtype, ("R3", "R4", "C4", "C7", "G8"), x, g)
    for shape in ((0,), (3, 0), (0, 5), (0, 0), (2, 0, 3)):
        name = f"row.corner/shape={'x'.join(map(str, shape))}"
        empty = np.zeros(shape, numpy_dtype(dtype))
        where = np.ones(shape[-1:], bool) if shape in ((3, 0), (0, 5)) else None
        axis = 1 if len(shape) == 2 else 0 if len(shape) == 1 else -1
        yield RowInput(name, dtype, ("R3", "R4", "R5", "C2"), empty, empty, where, axis=axis)


def _ties(dtype: str) -> Iterator[RowInput]:
    base = [0.5, -1.5, 2.0, 1.25, -0.75, 0.25, 1.0, -0.5, 1.75, 0.125, -1.0]
    rows = {
        "minimum": {4: -1.5},
        "minimum-thrice": {0: -1.5, 10: -1.5},
        "maximum": {6: 2.0},
        "maximum-thrice": {0: 2.0, 10: 2.0},
        "both": {0: 2.0, 10: -1.5},
        "minimum-zero": {1: 0.0, 4: 0.0, 7: 0.0, 10: 0.0},
        "all-but-one": {i: -1.5 for i in range(11) if i != 5},
        "two-values": {i: (2.0 if i % 3 else -1.5) for i in range(11)},
    }
    for tie, places in rows.items():
        name = f"row.ties/{tie}"
        draw = Draw(f"{name}/{dtype}", dtype)
        row = [places.get(i, value) for i, value in enumerate(base)]
        x = np.array([row, [-value for value in row]], numpy_dtype(dtype))
        clauses = ("R3", "R4", "G2", "G3", *(["G4"] if tie == "minimum-zero" else []))
        yield RowInput(name, dtype, clauses, x, draw.bell(2, 11))
    name = "row.ties/excluded-twins"
    draw = Draw(f"{name}/{dtype}", dtype)
    x = np.array([[*base[:9], -1.5, 2.0], [*base[:9], 2.0, -1.5]], numpy_dtype(dtype))
    on = np.arange(11) < 9
    yield RowInput(name, dtype, ("R3", "R4", "C5", "G3"), x, draw.bell(2, 11), on)


def _wheres(dtype: str) -> Iterator[RowInput]:
    shape = (3, 4, 9)
    places = np.arange(9)
    lengths = np.array([4, 9, 0])
    masks = {
        "full": None,
        "row": None,
        "last-two": None,
        "per-slice": np.array([True, False, True]).reshape(3, 1, 1),
        "per-row": np.array([True, True, False, True]).reshape(4, 1),
        "one-entry": np.array([True]),
        "no-entry": np.array([False]),
        "right-padding": (places < lengths[:, None, None]),
        "left-padding": (places >= 9 - lengths[:, None, None]),
        "causal": np.tri(4, 9, 3, dtype=bool),
    }
    drawn = {"full": shape, "row": (9,), "last-two": (4, 9)}
    for form, mask in masks.items():
        name = f"row.where/{form}"
        draw = Draw(f"{name}/{dtype}", dtype)
        where = draw.mask(*drawn[form]) if mask is None else mask
        x, g = draw.bell(*shape, scale=2.0), draw.bell(*shape)
        # Whatever an excluded entry holds, in x and in g, must not matter.
        on = np.broadcast_to(where, shape)
        garbage = np.array([np.nan, np.inf, -np.inf, largest(dtype), -largest(dtype), 77.0])[draw.choice(6, *shape)]
        x = np.where(on, x, garbage.astype(x.dtype))
        g = np.where(on, g, garbage[::-1, ::-1, ::-1].astype(g.dtype))
        yield RowInput(name, dtype, ("R2", "M1", "C5", "G5"), x, g, where)


def _axes(dtype: str) -> Iterator[RowInput]:
    shapes: tuple[tuple[int, ...], ...] = ((4, 3, 5),)
    if dtype == "float32":
        shapes = (
            (5,),
            (4, 5),
            (4, 3, 5),
            (2, 3, 4, 5),
            (2, 3, 2, 2, 3),
            (2, 1, 3, 2, 2, 3),
            (1, 40),
            (40, 1),
        )
    for shape in shapes:
        for axis in range(-len(shape), len(shape)):
            name = f"row.axes/{'x'.join(map(str, shape))}/axis={axis}"
            draw = Draw(f"{name}/{dtype}", dtype)
            yield RowInput(name, dtype, ("R1", "R5"), draw.bell(*shape, scale=2.0), draw.bell(*shape), axis=axis)
    for axis in (0, 1, 2):
        name = f"row.axes/where/axis={axis}"
        draw = Draw(f"{name}/{dtype}", dtype)
        x, g, where = draw.bell(4, 3, 5, scale=2.0), draw.bell(4, 3, 5), draw.mask(3, 1)
        yield RowInput(name, dtype, ("R5", "M1"), x, g, where, axis=axis)


def _bases(dtype: str) -> Iterator[RowInput]:
    """What the layout and independence cases take apart."""
    for name, clause, shape in (("row.layout/base", "R6", (6, 10)), ("row.independence/base", "R1", (5, 37))):
        draw = Draw(f"{name}/{dtype}", dtype)
        yield RowInput(name, dtype, (clause,), draw.bell(*shape, scale=2.0), draw.bell(*shape))
    name = "row.layout/same-rows"
    draw = Draw(f"{name}/{dtype}", dtype)
    x, g = draw.bell(10, scale=2.0), draw.bell(10)
    yield RowInput(name, dtype, ("R6",), np.stack([x] * 6), np.stack([g] * 6))


# Attention.


def attention_inputs() -> Iterator[AttentionInput]:
    """Every golden record of attention."""
    for dtype in DTYPES:
        yield from _attention(dtype)


def _attention(dtype: str) -> Iterator[AttentionInput]:
    nan, inf, big = np.nan, np.inf, largest(dtype)

    def make(
        name: str, *clauses: str, batch: tuple[int, ...] = (2,), heads: tuple[int, int] = (2, 2),
        t: tuple[int, int] = (5, 7), d: tuple[int, int] = (4, 4), size: float = 1.5, **fields: Any,
    ) -> AttentionInput:  # fmt: skip
        draw = Draw(f"{name}/{dtype}", dtype)
        q, k = draw.bell(*batch, heads[0], t[0], d[0], scale=size), draw.bell(*batch, heads[1], t[1], d[0])
        v, do = draw.bell(*batch, heads[1], t[1], d[1]), draw.bell(*batch, heads[0], t[0], d[1])
        for key in ("bias", "mask"):
            if callable(fields.get(key)):
                fields[key] = fields[key](draw)
        change = fields.pop("change", None)
        compare = fields.pop("compare", AttentionInput.compare)
        bias, mask = fields.pop("bias", None), fields.pop("mask", None)
        if change is not None:
            change(q, k, v, do)
        return AttentionInput(f"attention.{name}", dtype, clauses, q, k, v, do, bias, mask, fields, compare)

    base = ("A1", "A7", "A9", "A10")
    some_of_three = np.array([1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 0], bool).reshape(1, 1, 3, 1, 2, 3)
    yield make("shape/5x7", *base)
    yield make("shape/one-query", *base, t=(1, 7))
    yield make("shape/one-key", *base, t=(5, 1))
    yield make("shape/one-query-one-key", *base, t=(1, 1))
    yield make("shape/more-queries", *base, t=(9, 4))
    yield make("shape/dv-larger", *base, d=(3, 8))
    yield make("shape/dv-smaller", *base, d=(8, 2))
    yield make("shape/d=1", *base, d=(1, 1))
    yield make("shape/d=17", *base, d=(17, 17), t=(3, 5), batch=(1,))
    yield make("shape/no-batch", *base, batch=())
    yield make("shape/two-batch-axes", *base, batch=(2, 1), t=(3, 4))
    yield make("shape/keys=33", *base, t=(3, 33), batch=(), heads=(1, 1))
    yield make("shape/keys=65", *base, t=(2, 65), batch=(), heads=(1, 1))
    yield make("shape/keys=129", *base, t=(2, 129), d=(4, 3), batch=(), heads=(1, 1))
    yield make("shape/keys=257", *base, t=(1, 257), d=(2, 3), batch=(), heads=(1, 1))
    yield make("shape/queries=65", *base, t=(65, 3), d=(2, 3), batch=(), heads=(1, 1))
    yield make("shape/queries=129", *base, t=(129, 2), d=(2, 2), batch=(), heads=(1, 1))
    yield make("shape/no-queries", *base, t=(0, 7))
    yield make("shape/no-keys", *base, "A5", t=(5, 0))
    yield make("shape/no-batch-entries", *base, batch=(0,))
    yield make("shape/2x1x3-batches", *base, "A2", "A3", "M1", batch=(2, 1, 3), heads=(2, 1), t=(2, 3), d=(2, 1),
               bias=lambda draw: draw.bell(2, 1, 1, 2, 1, 3), mask=some_of_three)  # fmt: skip
    if dtype == "float32":
        yield make("shape/dv=0", *base, t=(2, 3), d=(2, 0), batch=())
        yield make("shape/d=0", *base, t=(2, 3), d=(0, 2), batch=(), scale=1.0, bias=lambda draw: draw.bell(2, 1, 3))
        yield make("shape/no-keys-under-mask-and-bias", *base, "A2", "A5", t=(3, 0), is_causal=True,
                   mask=np.ones((2, 1, 3, 1), bool), bias=lambda draw: draw.bell(2, 1, 1))  # fmt: skip
        yield make("shape/no-queries-under-mask-and-bias", *base, "A2", "A5", t=(0, 4), is_causal=True,
                   mask=np.ones((2, 1, 1, 4), bool), bias=lambda draw: draw.bell(1, 4))  # fmt: skip

    yield make("heads/4-over-2", "A3", heads=(4, 2), t=(3, 5))
    yield make("heads/4-over-1", "A3", heads=(4, 1), t=(3, 5))
    yield make("heads/6-over-3", "A3", heads=(6, 3), t=(2, 4))
    yield make("heads/6-over-2-bias-mask-causal", "A2", "A3", "A4", "A5", heads=(6, 2), t=(3, 5), batch=(1,),
               bias=lambda draw: draw.bell(6, 1, 5), mask=lambda draw: draw.mask(1, 6, 3, 5, share=0.8),
               is_causal=True, q_offset=2)  # fmt: skip
    yield make("heads/4-over-2-one-query", "A2", "A3", "A5", heads=(4, 2), t=(1, 9), d=(2, 2),
               bias=lambda draw: draw.bell(1, 4, 1, 9), mask=np.arange(9) < np.array([6, 9]).reshape(2, 1, 1, 1),
               is_causal=True, q_offset=7)  # fmt: skip

    yield make("causal/square", "A4", t=(6, 6), is_causal=True, batch=(1,))
    yield make("causal/wide-upper-left", "A4", t=(3, 7), is_causal=True, batch=(1,))
    yield make("causal/wide-lower-right", "A4", t=(3, 7), is_causal=True, q_offset=4, batch=(1,))
    yield make("causal/tall-upper-left", "A4", t=(7, 3), is_causal=True, batch=(1,))
    yield make("causal/tall-lower-right", "A4", "A5", t=(7, 3), is_causal=True, q_offset=-4, batch=(1,))
    yield make("causal/offset=-1", "A4", "A5", t=(5, 5), is_causal=True, q_offset=-1, batch=(1,))
    yield make("causal/offset=1", "A4", t=(5, 5), is_causal=True, q_offset=1, batch=(1,))
    yield make("causal/offset-beyond-keys", "A4", t=(3, 5), is_causal=True, q_offset=100, batch=(1,))
    yield make("causal/offset-before-queries", "A4", "A5", t=(3, 5), is_causal=True, q_offset=-100, batch=(1,))
    yield make("causal/decode", "A4", t=(1, 9), is_causal=True, q_offset=8, batch=(1,))
    yield make("causal/one-query-no-offset", "A4", t=(1, 9), is_causal=True, batch=(1,))
    yield make("causal/33", "A4", t=(33, 33), is_causal=True, batch=(), heads=(1, 1), d=(4, 3))
    if dtype in ("bfloat16", "float32"):
        yield make("causal/70x130", "A3", "A4", t=(70, 130), is_causal=True, q_offset=60, batch=(), heads=(2, 1),
                   d=(2, 1))  # fmt: skip
    if dtype == "float32":
        yield make("causal/offset=2^40", "A4", t=(3, 5), is_causal=True, q_offset=2**40, batch=(), d=(2, 2))
        yield make("causal/offset=-2^40", "A4", "A5", t=(3, 5), is_causal=True, q_offset=-(2**40), batch=(), d=(2, 2))

    window = np.tri(6, 6, 0, dtype=bool) & ~np.tri(6, 6, -3, dtype=bool)
    right = np.arange(7) < np.array([4, 7]).reshape(2, 1, 1, 1)
    left = np.arange(7) >= np.array([3, 0]).reshape(2, 1, 1, 1)
    # Adjacent queries differ, keys 0 and 6 lie outside, and one query sees nothing.
    some = np.array(
        [[0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 1, 1, 0, 0], [0] * 7, [0, 0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1, 0]], bool
    )
    yield make("mask/full", "M1", "A5", mask=lambda draw: draw.mask(2, 2, 5, 7))
    yield make("mask/queries-and-keys", "M1", "A5", mask=some)
    yield make("mask/keys", "M1", "A5", mask=lambda draw: draw.mask(7))
    yield make("mask/per-head", "M1", "A5", mask=np.array([True, False]).reshape(2, 1, 1))
    yield make("mask/per-query", "M1", "A5", mask=np.array([1, 0, 1, 1, 0], bool).reshape(5, 1))
    yield make("mask/right-padding", "M1", "A5", mask=right)
    yield make("mask/left-padding-causal", "M1", "A4", "A5", mask=left, is_causal=True, q_offset=2)
    yield make("mask/per-batch-queries-and-keys", "M1", "A2", "A5", t=(3, 4), d=(2, 2),
               mask=lambda draw: draw.mask(2, 1, 3, 4), bias=lambda draw: draw.bell(2, 1, 3, 4))  # fmt: skip
    yield make("mask/sliding-window", "M1", "A5", t=(6, 6), mask=window)
    yield make("mask/nothing", "M1", "A5", mask=np.zeros((1, 1), bool))

    def poison(value: float) -> Any:
        def change(q: Array, k: Array, v: Array, do: Array) -> None:
            k[..., [0, 6], :] = value
            v[..., [0, 6], :] = -value
            q[..., 2, :] = value
            do[..., 2, :] = value

        return change

    yield make("excluded/nan", "A5", "A6", mask=some, change=poison(nan), batch=(1,))
    yield make("excluded/inf", "A5", "A6", mask=some, change=poison(inf), batch=(1,))
    yield make("excluded/largest", "A5", "A6", mask=some, change=poison(big), batch=(1,))

    def nan_ahead(q: Array, k: Array, v: Array, do: Array) -> None:
        k[..., 4, :] = nan
        v[..., 4, :] = nan

    yield make("excluded/nan-in-the-future", "A4", "A6", t=(5, 5), is_causal=True, change=nan_ahead, batch=(1,))

    def nan_query(q: Array, k: Array, v: Array, do: Array) -> None:
        q[..., 1, :] = nan

    def nan_value(q: Array, k: Array, v: Array, do: Array) -> None:
        v[..., 3, 1] = nan

    yield make("excluded/nan-query-poisons-its-row", "A6", mask=some, change=nan_query, batch=(1,))
    yield make("excluded/nan-value-poisons-its-column", "A6", mask=some, change=nan_value, batch=(1,))

    def holes(draw: Draw) -> Array:
        bias = draw.bell(2, 5, 7)
        bias[0, 1, 2] = bias[1, :, 0] = bias[0, 3, :] = -inf
        return bias

    def nan_holes(draw: Draw) -> Array:
        return np.where(some, draw.bell(2, 2, 5, 7), np.array(nan, numpy_dtype(dtype)))

    def far(draw: Draw) -> Array:
        return np.array([1000, -1000, 1000, -1000, -1000], numpy_dtype(dtype)).reshape(5, 1)

    def lowest(draw: Draw) -> Array:
        bias = draw.bell(1, 2, 3, 4)
        bias[..., 0] = -inf
        bias[0, 0, 0, 1] = bias[0, 0, 2, 3] = -big
        return bias

    def overflowing_range(draw: Draw) -> Array:
        bias = draw.bell(2, 3, 4)
        bias[..., 1], bias[..., 3] = -big, big / 2
        return bias

    def small_v_and_do(q: Array, k: Array, v: Array, do: Array) -> None:
        v[...], do[...] = v / 8, do / 8

    def plus_inf(draw: Draw) -> Array:
        bias = draw.bell(2, 4, 4)
        bias[0, 1, 2], bias[1, 2, 0] = inf, nan
        return bias

    def nan_first_value(q: Array, k: Array, v: Array, do: Array) -> None:
        small_v_and_do(q, k, v, do)  # an upstream gradient of at most 1 (G8)
        v[..., 0, :] = nan

    def one_heavy_key(q: Array, k: Array, v: Array, do: Array) -> None:
        q[...], do[...] = 1, 1
        k[...], v[...] = 6 + k / 8, 1 + v / 8
        k[..., 0, :] = 15 if dtype == "float16" else 13

    def one_heavy_query(q: Array, k: Array, v: Array, do: Array) -> None:
        q[...], k[...], do[...] = 1 + q / 8, [[0.5], [1.5], [-1]], 2.0**-13 if dtype == "float16" else 2.0**-10
        v[...] = [[1], [-0.5], [0.25]]
        do[..., 0, :] = 1

    yield make("bias/full", "A2", "A7", bias=lambda draw: draw.bell(2, 2, 5, 7))
    yield make("bias/queries-and-keys", "A2", "A7", bias=lambda draw: draw.bell(5, 7))
    yield make("bias/per-head-and-key", "A2", "A7", bias=lambda draw: draw.bell(2, 1, 7))
    yield make("bias/keys", "A2", "A7", bias=lambda draw: draw.bell(7))
    yield make("bias/per-batch", "A2", "A7", bias=lambda draw: draw.bell(2, 1, 1, 1))
    yield make("bias/one", "A2", "A7", bias=lambda draw: draw.bell(1))
    yield make("bias/large", "A2", "A7", bias=lambda draw: draw.bell(2, 5, 7, scale=40.0))
    yield make("bias/minus-inf", "A2", "A7", "A5", "R2", bias=holes)
    yield make("bias/per-query-far", "A2", "A7", d=(2, 2), batch=(1,), bias=far)
    yield make("bias/excludes-and-lowest", "A2", "A7", "A6", "R2", "C7", t=(3, 4), d=(2, 2), batch=(1,),
               bias=lowest, change=nan_first_value)  # fmt: skip
    yield make("bias/plus-inf", "A2", "A7", "C6", t=(4, 4), d=(2, 2), batch=(1,), bias=plus_inf)
    yield make("bias/nan-where-masked", "A2", "A7", "A6", bias=nan_holes, mask=some)
    if dtype in ("float16", "bfloat16"):
        # One large term, then many that are lost if they are added to it in 16 bits, and are not small together.
        yield make("sum/keys", "A10", t=(1, 257), d=(1, 1), batch=(), heads=(1, 1), scale=1.0, change=one_heavy_key)
        yield make("sum/queries", "A10", t=(129, 3), d=(1, 1), batch=(), heads=(1, 1), scale=1.0,
                   bias=lambda draw: draw.bell(3, scale=0.1), change=one_heavy_query)  # fmt: skip
        yield make(
            "bias/float32",
            "A2",
            "A7",
            "A10",
            "D3",
            bias=lambda draw: Draw(draw.random.random().hex(), "float32").bell(5, 7),
        )

    yield make("scale/1", "A1", scale=1.0, size=0.7, batch=(1,))
    yield make("scale/0", "A1", scale=0.0, batch=(1,))
    yield make("scale/0-with-bias", "A1", "A2", scale=0.0, bias=lambda draw: draw.bell(5, 7), batch=(1,))
    yield make("scale/0-range-overflows", "A1", "A2", "A7", "C7", t=(3, 4), d=(2, 2), batch=(1,), scale=0.0,
               bias=overflowing_range, change=small_v_and_do)  # fmt: skip
    yield make("scale/negative", "A1", scale=-0.75, batch=(1,))
    yield make("scale/saturated", "A1", scale=8.0, batch=(1,))

    def negative(q: Array, k: Array, v: Array, do: Array) -> None:
        q[...], k[...] = abs(q), -abs(k)

    def positive(q: Array, k: Array, v: Array, do: Array) -> None:
        q[...], k[...] = abs(q), abs(k)

    def twins(q: Array, k: Array, v: Array, do: Array) -> None:
        k[..., 4:, :] = k[..., :3, :]

    def zero_key(q: Array, k: Array, v: Array, do: Array) -> None:
        q[...], k[...] = abs(q), abs(k)
        q[..., 2, :] *= -1
        k[..., 1, :] = 0

    yield make("sign/all-negative", "A1", "A7", change=negative, batch=(1,))
    yield make("sign/all-positive", "A1", "A7", change=positive, batch=(1,))
    # An extremal score that is exactly 0: the smallest of the first queries, the largest of the last.
    yield make("sign/extremum-zero", "A1", "A7", "G4", t=(3, 4), d=(2, 2), batch=(1,), change=zero_key)
    # Equal keys tie at every extremum: which twin gets dk is open, dq, dv and the sum of dk over the keys are not.
    yield make("ties/twin-keys", "A1", "A8", change=twins, compare=("o", "dq", "dk_sum", "dv"), batch=(1,))
