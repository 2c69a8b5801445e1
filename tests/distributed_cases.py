"""Problems of attention over many devices, with the reference's answers in float64; JAX and PyTorch run the same."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from support import finfo, numpy_dtype

from sa_softmax import reference
from sa_softmax.backends.zigzag import zigzag

Array = np.ndarray[Any, Any]
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625]).reshape(4, 1, 1)


class Case(NamedTuple):
    name: str
    tq: int
    tk: int
    variant: str = "normalized"
    dtype: str = "float64"
    causal: bool = False
    zigzag: bool = False
    bias: str | None = None  # "array", "keys" (the same for all queries), "function" (of the distance)
    mask: str | None = None  # "padding", "queries", "shard" (all keys of device 1), "all"
    block: int = 512  # the largest tile
    size: float = 1.0  # of the scores


CASES = [
    Case("plain", 24, 24, dtype="float32"),
    Case("causal", 24, 24, "product", causal=True, bias="keys", mask="padding", block=3),
    Case("zigzag", 48, 48, causal=True, zigzag=True, bias="array", block=3),
    Case("zigzag-uneven", 37, 37, "product", causal=True, zigzag=True, bias="function", block=2),
    Case("cross", 5, 19, mask="queries", bias="array", block=2),
    Case("masked-shard", 16, 16, mask="shard"),
    Case("masked-shard-zigzag", 16, 16, "product", causal=True, zigzag=True, mask="shard"),
    Case("all-masked", 8, 8, bias="array", mask="all"),
    Case("shorter-than-the-ring", 3, 3, causal=True, bias="keys"),
    Case("one-query", 1, 9, "product", mask="padding"),
    Case("bfloat16", 32, 32, dtype="bfloat16", causal=True, zigzag=True, bias="function"),
    Case("float16", 16, 16, "product", dtype="float16", mask="padding", bias="array"),
    Case("large-scores", 24, 24, causal=True, size=1e4),
]


class Problem(NamedTuple):
    """Inputs and answers in the order of the devices: those of device d are at ``positions[d]``."""

    q: Array
    k: Array
    v: Array
    do: Array
    bias: Array | None
    mask: Array | None
    q_positions: list[Array]
    k_positions: list[Array]
    options: dict[str, Any]
    answers: dict[str, Array]
    allowed: dict[str, float]  # errors, in epsilons

    def of_rank(self, rank: int) -> "Problem":
        """The part of one rank, in PyTorch's form."""
        i, j = (
            slice(start := sum(map(len, parts[:rank])), start + len(parts[rank]))
            for parts in (self.q_positions, self.k_positions)
        )
        rows = lambda x: x[..., i, :] if x is not None and x.shape[-2] > 1 else x  # noqa: E731
        answers = {
            name: rows(x) if name == "dbias" else x[:, :, j if name in ("dk", "dv") else i]
            for name, x in self.answers.items()
        }
        return self._replace(
            q=self.q[:, :, i], k=self.k[:, :, j], v=self.v[:, :, j], do=self.do[:, :, i], bias=rows(self.bias),
            mask=rows(self.mask), answers=answers,
        )  # fmt: skip

    def check(self, **got: Array) -> None:
        """Each value within what is allowed of its answer."""
        for name, value in got.items():
            expected, value = self.answers[name], np.asarray(value)
            assert value.shape == expected.shape, (name, value.shape, expected.shape)
            error = np.abs(value.astype(np.float64) - expected).max(initial=0)
            allowed = self.allowed[name] * float(finfo(value.dtype).eps)
            assert error <= allowed, f"{name} is off by {error:.3g}, allowed {allowed:.3g}"


def problem(case: Case, devices: int) -> Problem:
    rng = np.random.default_rng(7)
    draw = lambda *shape: rng.standard_normal(shape).astype(numpy_dtype(case.dtype))  # noqa: E731
    q, k = draw(2, 4, case.tq, 8), draw(2, 2, case.tk, 8)
    v, do = draw(2, 2, case.tk, 6), draw(2, 4, case.tq, 6)
    parts = [
        zigzag(t, devices) if case.zigzag else np.array_split(np.arange(t, dtype=np.int32), devices)
        for t in (case.tq, case.tk)
    ]
    i, j = (np.concatenate(part) for part in parts)
    bias: Array | None = None
    match case.bias:
        case "array":
            bias = draw(4, case.tq, case.tk)
        case "keys":
            bias = draw(1, case.tk)
        case "function":
            bias = distance_bias(np.arange(case.tq)[:, None], np.arange(case.tk)[None])
    mask: Array | None = None
    match case.mask:
        case "padding":
            mask = np.ones((2, 1, 1, case.tk), bool)
            mask[1, ..., case.tk // 2 :] = False
        case "queries":
            mask = rng.random((case.tq, case.tk)) < 0.7
            mask[1] = False
            q[:, :, 1], do[:, :, 1] = np.nan, np.inf  # a query without keys has no influence
        case "shard":
            mask = np.ones((1, case.tk), bool)
            mask[:, parts[1][1]] = False
            k[:, :, parts[1][1]], v[:, :, parts[1][1]] = np.inf, np.nan  # nor have excluded keys
        case "all":
            mask = np.zeros((1, 1), bool)
    options = {"variant": case.variant, "is_causal": case.causal, "scale": case.size * 0.5}
    wide = [x.astype(np.float64) for x in (q, k, v)]
    wide_bias = None if bias is None else bias.astype(np.float64)
    o = reference.sa_attention(*wide, bias=wide_bias, mask=mask, **options)
    dq, dk, dv, dbias = reference.sa_attention_vjp(*wide, do.astype(np.float64), bias=wide_bias, mask=mask, **options)
    answers = {"o": o[:, :, i], "dq": dq[:, :, i], "dk": dk[:, :, j], "dv": dv[:, :, j]}
    if dbias is not None:
        answers["dbias"] = of_scores(dbias, i, j)
    # Of the largest entry: one rounding in 16 bits; else some, times the size of the scores, whose error exp makes one
    # of its values. Nothing, where the answer is 0 as a whole.
    units = 1 if q.dtype.itemsize == 2 else 64 * case.size
    allowed = {name: units * float(np.abs(x).max(initial=0)) for name, x in answers.items()}
    bias, mask = (None if x is None else of_scores(x, i, j) for x in (bias, mask))
    return Problem(q[:, :, i], k[:, :, j], v[:, :, j], do[:, :, i], bias, mask, *parts, options, answers, allowed)


def distance_bias(i: Any, j: Any, slopes: Any = SLOPES) -> Any:
    return -slopes * abs(i - j)


def example(framework: str) -> str:
    """The code of a section of docs/distributed.md."""
    guide = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    return guide.partition(f"## {framework}\n")[2].partition("```python\n")[2].partition("```")[0]


def of_scores(x: Array, i: Array, j: Array) -> Array:
    """Rows ``i`` and columns ``j``, where there is more than one."""
    x = x[..., i, :] if x.shape[-2] > 1 else x
    return x[..., j] if x.shape[-1] > 1 else x
