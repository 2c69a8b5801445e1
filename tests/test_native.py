"""The onnxruntime custom ops of sa-softmax-native against the reference, through models that hold one node.

The models take float32 or float64; a 16-bit type is entered and left by Cast nodes, which every onnxruntime from 1.19
has and its Python interface can feed.
"""

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import (
    CORNER_ROWS,
    FLOATS,
    VARIANTS,
    attention_of_rounded_weights,
    finfo,
    numpy_dtype,
    variants,
    weights_rounding,
)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402

from sa_softmax import reference  # noqa: E402
from sa_softmax.backends import onnxruntime as door  # noqa: E402

installed = importlib.util.find_spec("sa_softmax_native") is not None
kernels = pytest.mark.skipif(not installed, reason="needs sa-softmax-native: pip install ./backends/native")
floats = pytest.mark.parametrize("dtype", FLOATS)

Array = np.ndarray[Any, Any]
NAN, INF = np.nan, np.inf
SOURCE = Path(__file__).parents[1] / "backends" / "native" / "src"
ELEMENT = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "bool": TensorProto.BOOL,
    "int32": TensorProto.INT32,
}
RELEASE = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
infers_shapes = pytest.mark.skipif(RELEASE < (1, 24), reason="onnxruntime crashes before 1.24, see onnxruntime.cpp")


def carrier(dtype: str) -> str:
    """The type in which a model takes values of ``dtype``."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def model(
    op: str, inputs: dict[str, str | None], attributes: dict[str, Any], shapes: dict[str, Any] | None = None
) -> bytes:
    """A model of one node; ``inputs`` names the element type of each input, None where it is left out."""
    nodes, names, graph_inputs = [], [], []
    for name, dtype in inputs.items():
        names.append("" if dtype is None else name)
        if dtype is None:
            continue
        shape = (shapes or {}).get(name)
        graph_inputs.append(helper.make_tensor_value_info(f"{name}_in", ELEMENT[carrier(dtype)], shape))
        nodes.append(helper.make_node("Cast", [f"{name}_in"], [name], to=ELEMENT[dtype]))
    element = next(dtype for dtype in inputs.values() if dtype is not None)
    nodes.append(helper.make_node(op, names, ["y"], domain="sa_softmax", **attributes))
    nodes.append(helper.make_node("Cast", ["y"], ["y_out"], to=ELEMENT[carrier(element)]))
    outputs = [helper.make_tensor_value_info("y_out", ELEMENT[carrier(element)], None)]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("sa_softmax", 1)]
    graph = helper.make_graph(nodes, "one_node", graph_inputs, outputs)
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def session(serialized: bytes, threads: int = 1) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    door.register(options)
    return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


def run(op: str, arrays: dict[str, Array | None], dtype: str = "float32", threads: int = 1, **attributes: Any) -> Array:
    types = {
        name: None if array is None else "bool" if array.dtype == bool else dtype for name, array in arrays.items()
    }
    feeds = {
        f"{name}_in": np.asarray(array if array.dtype == bool else array.astype(carrier(dtype)))
        for name, array in arrays.items()
        if array is not None
    }
    result: Array = session(model(op, types, attributes), threads).run(None, feeds)[0]
    return result


def rounded(x: Array, dtype: str) -> Array:
    """The values that ``dtype`` can hold, in it."""
    return np.asarray(x.astype(numpy_dtype(dtype)))


def assert_close(got: Array, expected: Array, dtype: str, scale: float | None = None) -> None:
    """Both were computed in the same type and rounded once: within one unit of the type, relative to the value, and
    eight of the compute type, relative to ``scale``, by default the largest value.
    """
    assert got.shape == expected.shape
    expected = expected.astype(got.dtype)
    if scale is None:
        scale = float(np.nanmax(np.abs(expected), initial=0))
    bound = 8 * float(finfo(carrier(dtype)).eps) * max(1.0, scale)
    np.testing.assert_allclose(got, expected, rtol=float(finfo(dtype).eps), atol=bound)


def steepness(x: Array, g: Array, axis: int = -1, where: Any = True) -> float:
    """What multiplies the roundings of a gradient: upstream times the scores under product, over R under normalized."""
    z = np.where(np.isfinite(x) & where, x, 0).astype(np.float64)
    R = np.max(z, axis, initial=0) - np.min(z, axis, initial=0)
    upstream = float(np.max(np.abs(g), where=np.isfinite(g), initial=0))
    return upstream * max(float(np.max(np.abs(z), initial=0)), float(1 / np.min(R, where=R > 0, initial=1)))


def randn(*shape: int, seed: int = 0) -> Array:
    return np.asarray(3 * np.random.default_rng(seed).standard_normal(shape))


def test_a_missing_distribution_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sa_softmax_native", None)
    with pytest.raises(ImportError, match="pip install sa-softmax-native"):
        door.get_library_path()


@kernels
def test_the_library_lies_in_its_package() -> None:
    assert Path(door.get_library_path()).is_file()


# The row operation.


@kernels
@floats
@variants
@pytest.mark.parametrize(
    "shape", [(7,), (3, 70), (3, 4, 5), (2, 3, 2, 4), (2, 1, 3, 2, 5), (2, 1, 3, 2, 2, 3)], ids=str
)
def test_every_axis_of_every_rank(shape: tuple[int, ...], variant: str, dtype: str) -> None:
    x, g = rounded(randn(*shape), dtype), rounded(randn(*shape, seed=1), dtype)
    for axis in range(-len(shape), len(shape)):
        options: dict[str, Any] = {"axis": axis, "variant": variant}
        y = run("SASoftmax", {"X": x}, dtype, **options)
        assert_close(y, reference.sa_softmax(x, **options), dtype)
        dx = run("SASoftmaxGrad", {"X": x, "G": g}, dtype, **options)
        assert_close(dx, reference.sa_softmax_vjp(x, g, **options), dtype, steepness(x, g, axis))


@kernels
@floats
def test_defaults_are_the_last_axis_and_normalized(dtype: str) -> None:
    x = rounded(randn(4, 9), dtype)
    assert_close(run("SASoftmax", {"X": x, "where": None}, dtype), reference.sa_softmax(x), dtype)


@kernels
@floats
@variants
@pytest.mark.parametrize("shape", [(3, 4, 65), (65,), (4, 1), (3, 1, 1), (1, 4, 65), (1,), ()], ids=str)
def test_where_broadcasts_and_excluded_entries_do_not_matter(shape: tuple[int, ...], variant: str, dtype: str) -> None:
    x, g = rounded(randn(3, 4, 65), dtype), rounded(randn(3, 4, 65, seed=1), dtype)
    where = np.asarray(np.random.default_rng(2).random(shape) < 0.6)
    full = np.broadcast_to(where, x.shape)
    x[~full], g[~full] = NAN, INF
    for axis in range(3):
        options: dict[str, Any] = {"axis": axis, "variant": variant}
        y = run("SASoftmax", {"X": x, "where": where}, dtype, **options)
        assert (y[~full] == 0).all()
        assert_close(y, reference.sa_softmax(x, where=where, **options), dtype)
        dx = run("SASoftmaxGrad", {"X": x, "G": g, "where": where}, dtype, **options)
        assert (dx[~full] == 0).all()
        assert_close(dx, reference.sa_softmax_vjp(x, g, where=where, **options), dtype, steepness(x, g, axis, full))


@kernels
@floats
@variants
@pytest.mark.parametrize(
    "row", [*CORNER_ROWS.values(), [NAN, 1, -INF], [INF, 0, -INF]], ids=[*CORNER_ROWS, "NaN", "+inf"]
)
def test_corner_rows(row: list[float], variant: str, dtype: str) -> None:
    x = rounded(np.array([row, row[::-1]]), dtype)
    g = rounded(randn(*x.shape), dtype)
    y = run("SASoftmax", {"X": x}, dtype, variant=variant)
    expected = reference.sa_softmax(x, variant=variant)
    assert_close(y, expected, dtype)
    assert ((y == 0) == (expected == 0)).all()
    dx = run("SASoftmaxGrad", {"X": x, "G": g}, dtype, variant=variant)
    assert_close(dx, reference.sa_softmax_vjp(x, g, variant=variant), dtype, steepness(x, g))


@kernels
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)], ids=str)
def test_zero_sizes(shape: tuple[int, ...]) -> None:
    x = np.zeros(shape, np.float32)
    for axis in range(len(shape)):
        assert run("SASoftmax", {"X": x}, axis=axis).shape == shape
        assert run("SASoftmaxGrad", {"X": x, "G": x}, axis=axis).shape == shape


@kernels
@pytest.mark.parametrize("shape", [(2**40, 0), (0, 2**40)])
def test_huge_dimensions_of_empty_rows_take_no_time(shape: tuple[int, ...]) -> None:
    assert run("SASoftmax", {"X": np.zeros(shape, np.float32), "where": None}).shape == shape


@kernels
def test_huge_dimensions_of_empty_attention_take_no_time() -> None:
    empty = np.zeros((1, 1, 2**40, 0), np.float32)
    o = run("SAAttention", {"Q": empty, "K": empty, "V": empty, "bias": None, "mask": None}, scale=1.0)
    assert o.shape == empty.shape


@kernels
@variants
def test_long_rows_are_accurate(variant: str) -> None:
    """Within 8 units of exact values although x - max rounds: the error of the difference is compensated."""
    x = (10 * np.random.default_rng(0).standard_normal((4, 5000))).astype(np.float32)
    wide = x.astype(np.float64)
    e = np.exp(wide - wide.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    error = np.abs(run("SASoftmax", {"X": x}, variant=variant) - reference.sa_softmax(wide, variant=variant))
    factor = np.abs(wide) if variant == "product" else 1
    assert (error <= 8 * float(finfo("float32").eps) * p * factor + float(finfo("float32").tiny)).all()


# Attention.

SCALE = 1000.0  # scores up to 30, which enter the exponent, times values up to 10, times the score under product

ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "product": {"variant": "product"},
    "causal": {"is_causal": True},
    "causal, lower right": {"is_causal": True, "q_offset": 4},
    "causal, before the keys": {"is_causal": True, "q_offset": -3},
    "causal, far": {"is_causal": True, "q_offset": 2**62},
    "causal, nothing": {"is_causal": True, "q_offset": -(2**62)},
    "scale": {"scale": -0.75},
    "scale 0": {"scale": 0.0, "variant": "product"},
}
EXTRAS: dict[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]] = {
    "bare": (None, None),
    "mask": (None, (7, 11)),
    "mask of keys": (None, (2, 1, 1, 11)),
    "mask of queries": (None, (7, 1)),
    "bias": ((2, 6, 7, 11), None),
    "bias of heads": ((6, 1, 1), None),
    "bias of keys, mask of batches": ((11,), (2, 1, 1, 1)),
    "scalars": ((), ()),
}


def qkv(heads: tuple[int, int] = (6, 2), batch: tuple[int, ...] = (2,), d: int = 8, dv: int = 5) -> list[Array]:
    hq, hkv = heads
    return [randn(*batch, hq, 7, d), randn(*batch, hkv, 11, d, seed=1), randn(*batch, hkv, 11, dv, seed=2)]


def attend(
    arrays: list[Array], bias: Array | None, mask: Array | None, dtype: str, threads: int = 1, **options: Any
) -> Array:
    q, k, v = arrays
    options |= {"is_causal": int(options.get("is_causal", False))}
    return run("SAAttention", {"Q": q, "K": k, "V": v, "bias": bias, "mask": mask}, dtype, threads, **options)


def assert_attention(got: Array, arrays: list[Array], dtype: str, **options: Any) -> None:
    """As assert_close; but in bfloat16 Y may be rounded, too, before it multiplies V (A10)."""
    if dtype != "bfloat16":
        assert_close(got, reference.sa_attention(*arrays, **options), dtype, scale=SCALE)
        return
    bias = options.pop("bias", None)
    bias = None if bias is None else bias.astype(np.float64)
    expected = reference.sa_attention(*(array.astype(np.float64) for array in arrays), bias=bias, **options)
    rounding = float(finfo(dtype).eps) / 2 * np.abs(expected) + weights_rounding(*arrays, bias=bias, **options)
    bound = rounding + 8 * float(finfo("float32").eps) * SCALE
    assert got.shape == expected.shape
    assert (np.isnan(got) == np.isnan(expected)).all()
    assert (np.isnan(got) | (np.abs(got - expected) <= bound)).all()


@kernels
@floats
@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_attention(extras: tuple[Any, Any], options: dict[str, Any], dtype: str) -> None:
    arrays = [rounded(array, dtype) for array in qkv()]
    bias = None if extras[0] is None else rounded(randn(*extras[0], seed=3), dtype)
    mask = None if extras[1] is None else np.asarray(np.random.default_rng(4).random(extras[1]) < 0.7)
    o = attend(arrays, bias, mask, dtype, **options)
    assert_attention(o, arrays, dtype, bias=bias, mask=mask, **options)


@variants
def test_bound_of_rounded_weights_tells_right_from_wrong(variant: str) -> None:
    """Of Y the 8 bits of bfloat16 must be left, 7 or 5 are not enough; zeros and the other variant are wrong."""
    arrays = [rounded(array, "bfloat16") for array in qkv()]

    def output(bits: int, variant: str = variant) -> Array:
        return attention_of_rounded_weights(*arrays, bits, variant=variant).astype(np.float32)

    assert_attention(output(8), arrays, "bfloat16", variant=variant)
    other = "product" if variant == "normalized" else "normalized"
    for wrong in (output(7), output(5), 0 * output(8), output(53, other)):
        with pytest.raises(AssertionError):
            assert_attention(wrong, arrays, "bfloat16", variant=variant)


@kernels
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (2, 2), (0,)], ids=str)
def test_heads_and_batches(batch: tuple[int, ...], heads: tuple[int, int]) -> None:
    arrays = [array.astype(np.float32) for array in qkv(heads, batch)]
    assert_close(attend(arrays, None, None, "float32"), reference.sa_attention(*arrays), "float32", scale=SCALE)


@kernels
@pytest.mark.parametrize(
    "lengths", [(1, 1, 1, 1), (100, 130, 33, 70), (3, 600, 300, 2), (0, 4, 3, 2), (4, 0, 3, 2), (4, 5, 3, 0)], ids=str
)
def test_lengths(lengths: tuple[int, int, int, int]) -> None:
    tq, tk, d, dv = lengths
    arrays = [randn(2, tq, d), randn(2, tk, d, seed=1) / 8, randn(2, tk, dv, seed=2)]
    arrays = [array.astype(np.float32) for array in arrays]
    options: dict[str, Any] = {"is_causal": True, "q_offset": tk - tq}
    for chosen in ({}, options):
        o = attend(arrays, None, None, "float32", **chosen)
        assert_close(o, reference.sa_attention(*arrays, **chosen), "float32", scale=SCALE)


@kernels
@floats
def test_excluded_keys_do_not_matter_whatever_they_hold(dtype: str) -> None:
    q, k, v = (rounded(array, dtype) for array in qkv())
    mask = np.random.default_rng(4).random((7, 11)) < 0.5
    mask[:, 3] = False
    k[..., 3, :], v[..., 3, :] = NAN, INF
    v[0, 0, 5, 1] = INF  # takes part in some rows: there the column is NaN
    o = attend([q, k, v], None, mask, dtype)
    expected = reference.sa_attention(q, k, v, mask=mask)
    assert np.isnan(expected).any()
    assert np.isfinite(expected).any()
    assert_attention(o, [q, k, v], dtype, mask=mask)


# Threads.


@kernels
@variants
def test_bits_do_not_depend_on_threads(variant: str) -> None:
    x = randn(600, 700).astype(np.float32)
    arrays = [randn(4, 300, 16).astype(np.float32), *randn(2, 2, 200, 16, seed=1).astype(np.float32)]
    for axis in (0, 1):
        one, two = (run("SASoftmax", {"X": x}, threads=n, axis=axis, variant=variant) for n in (1, 2))
        assert one.tobytes() == two.tobytes()
        one, two = (run("SASoftmaxGrad", {"X": x, "G": x}, threads=n, axis=axis, variant=variant) for n in (1, 2))
        assert one.tobytes() == two.tobytes()
    one, two = (attend(arrays, None, None, "float32", threads=n, variant=variant) for n in (1, 2))
    assert one.tobytes() == two.tobytes()
    assert_close(one, reference.sa_attention(*arrays, variant=variant), "float32", scale=SCALE)


@kernels
def test_bits_do_not_depend_on_the_place_of_a_row() -> None:
    x = randn(40, 77).astype(np.float32)
    together = run("SASoftmax", {"X": x})
    for i in (0, 13, 39):
        assert run("SASoftmax", {"X": x[i : i + 1]}).tobytes() == together[i].tobytes()
    assert (
        np.ascontiguousarray(run("SASoftmax", {"X": np.ascontiguousarray(x.T)}, axis=0).T).tobytes()
        == together.tobytes()
    )


@kernels
def test_many_threads_and_two_sessions_at_once() -> None:
    x = randn(120, 600).astype(np.float32)
    sessions = [session(model("SASoftmax", {"X": "float32"}, {"variant": variant}), threads=2) for variant in VARIANTS]
    expected = [s.run(None, {"X_in": x})[0].tobytes() for s in sessions]
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda i: sessions[i % 2].run(None, {"X_in": x})[0].tobytes() == expected[i % 2], range(64))
    assert all(results)


# Instruction sets.


@kernels
@pytest.mark.skipif(sys.platform == "win32", reason="reads /proc or sysctl")
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4+amx", "generic"])
def test_every_instruction_set(level: str) -> None:
    """The same checks under each one that this processor runs, with the proof that it ran."""
    environment = os.environ | {"SA_SOFTMAX_INSTRUCTION_SET": level}
    probe = "from sa_softmax_native.c_api import instruction_set; print(instruction_set())"
    ran = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    if "must name what this processor runs" in ran.stderr:
        pytest.skip(f"this processor or build has no {level}")
    assert ran.stdout.strip() == level
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "corner or lengths or place or where",
        ],
        env=environment,
        check=True,
        capture_output=True,
    )


@kernels
def test_an_unknown_instruction_set_is_an_error() -> None:
    code = "import onnxruntime; from sa_softmax.backends.onnxruntime import register; "
    code += "register(onnxruntime.SessionOptions())"
    environment = os.environ | {"SA_SOFTMAX_INSTRUCTION_SET": "x87"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "SA_SOFTMAX_INSTRUCTION_SET must name what this processor runs" in ran.stderr


# Errors.

X34 = np.zeros((3, 4), np.float32)
ROW_ERRORS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "0-d": ({"X": np.zeros((), np.float32)}, {}, "must have at least one axis; got a 0-d array"),
    "axis too large": ({}, {"axis": 2}, r"axis must be in \[-2, 1\] for an array of shape \(3, 4\); got 2"),
    "axis too small": ({}, {"axis": -3}, "got -3"),
    "variant": ({}, {"variant": "plain"}, "variant must be one of 'normalized', 'product'; got 'plain'"),
    "axis of a wrong type": ({}, {"axis": 1.0}, "attribute axis must be an int; got a float"),
    "axes": ({}, {"axis": [0, 1]}, "attribute axis must be an int; got a list"),
    "variant of a wrong type": ({}, {"variant": 1}, "attribute variant must be a string; got an int"),
    "where's shape": ({"where": np.ones((3, 5), bool)}, {}, r"where must broadcast .* \(3, 4\); got \(3, 5\)"),
    "where's rank": ({"where": np.ones((1, 3, 4), bool)}, {}, r"where must broadcast .* got \(1, 3, 4\)"),
    "where of length 0": ({"where": np.ones((0,), bool)}, {}, r"where must broadcast .* got \(0,\)"),
    "where's type": ({"where": X34}, {}, "(?i)type"),
}


@kernels
@pytest.mark.parametrize(("arrays", "attributes", "sentence"), ROW_ERRORS.values(), ids=ROW_ERRORS)
@pytest.mark.parametrize("op", ["SASoftmax", "SASoftmaxGrad"])
def test_row_errors(op: str, arrays: dict[str, Array], attributes: dict[str, Any], sentence: str) -> None:
    x = arrays.get("X", X34)
    inputs = {"X": x} | ({"G": x} if op == "SASoftmaxGrad" else {}) | {"where": arrays.get("where")}
    with pytest.raises(Exception, match=sentence):
        run(op, inputs, **attributes)


@kernels
def test_the_upstream_gradient_has_the_shape_of_x() -> None:
    with pytest.raises(Exception, match=r"g must have the shape of x, \(3, 4\); got \(4,\)"):
        run("SASoftmaxGrad", {"X": X34, "G": X34[0]})


@kernels
def test_types_must_agree_and_be_floating() -> None:
    with pytest.raises(Exception, match=r"(?i)type"):
        session(model("SASoftmax", {"X": "int32"}, {}))
    serialized = model("SASoftmaxGrad", {"X": "float32", "G": "float64"}, {})
    with pytest.raises(Exception, match=r"(?i)type|NOT_IMPLEMENTED"):
        session(serialized).run(None, {"X_in": X34, "G_in": X34.astype(np.float64)})


Q = np.zeros((4, 3, 4), np.float32)
ATTENTION_ERRORS: dict[str, tuple[dict[str, Array], dict[str, Any], str]] = {
    "rank": ({"Q": Q[0]}, {}, r"q must be \(..., heads, length, dimension\), at least 3-d; got the shape \(3, 4\)"),
    "batches": ({"Q": np.zeros((2, 4, 3, 4), np.float32)}, {}, "q, k and v must have the same batch axes"),
    "D": ({"K": Q[..., :3]}, {}, "q and k must have the same last axis D"),
    "lengths": ({"K": Q[:, :2]}, {}, "k and v must have the same heads Hkv and length Tk"),
    "heads": ({"K": Q[:3], "V": Q[:3]}, {}, "must be a multiple of the number of key/value heads; got 4 and 3"),
    "more key heads": ({"Q": Q[:2]}, {}, "got 2 and 4"),
    "no key heads": ({"K": Q[:0], "V": Q[:0]}, {}, "got 4 and 0"),
    "mask's shape": ({"mask": np.ones((3, 4), bool)}, {}, r"mask must broadcast .* \(4, 3, 3\); got \(3, 4\)"),
    "bias's shape": ({"bias": np.ones((3, 3, 3), np.float32)}, {}, r"bias must broadcast .* got \(3, 3, 3\)"),
    "offset alone": ({}, {"q_offset": 1}, "q_offset shifts the causal mask and needs is_causal; got q_offset=1"),
    "is_causal": ({}, {"is_causal": 2}, "is_causal must be 0 or 1; got 2"),
    "scale": ({}, {"scale": INF}, "scale must be finite; got inf"),
    "scale of a wrong type": ({}, {"scale": 1}, "attribute scale must be a float; got an int"),
    "no scale": ({"Q": Q[..., :0], "K": Q[..., :0]}, {}, r"the default scale 1/sqrt\(D\) needs D >= 1"),
    "variant": ({}, {"variant": ""}, "variant must be one of 'normalized', 'product'; got ''"),
}


@kernels
@pytest.mark.parametrize(("arrays", "attributes", "sentence"), ATTENTION_ERRORS.values(), ids=ATTENTION_ERRORS)
def test_attention_errors(arrays: dict[str, Array], attributes: dict[str, Any], sentence: str) -> None:
    inputs: dict[str, Array | None] = {"Q": Q, "K": Q, "V": Q, "bias": None, "mask": None}
    with pytest.raises(Exception, match=sentence):
        run("SAAttention", inputs | arrays, **attributes)


@kernels
@pytest.mark.parametrize("left_out", ["Q", "K", "V"])
def test_a_required_input_that_is_left_out_is_an_error(left_out: str) -> None:
    types: dict[str, str | None] = {"Q": "float32", "K": "float32", "V": "float32"}
    with pytest.raises(Exception, match=r"(?i)input|type"):
        session(model("SAAttention", types | {left_out: None}, {})).run(
            None, {f"{name}_in": Q for name in types if name != left_out}
        )


# Shape inference.


@kernels
@infers_shapes
@floats
def test_shapes_are_inferred(dtype: str) -> None:
    types: dict[str, str | None] = {"X": dtype, "where": None}
    inferred = session(model("SASoftmax", types, {}, {"X": ["N", 5, "T"]})).get_outputs()[0]
    assert inferred.shape == ["N", 5, "T"]
    types = {"X": dtype, "G": dtype}
    shapes = {"X": ["N", 5], "G": ["N", 5]}
    assert session(model("SASoftmaxGrad", types, {}, shapes)).get_outputs()[0].shape == ["N", 5]
    types = {"Q": dtype, "K": dtype, "V": dtype, "bias": None, "mask": "bool"}
    shapes = {"Q": ["B", 6, "T", 8], "K": ["B", 2, "S", 8], "V": ["B", 2, "S", 5], "mask": ["T", "S"]}
    assert session(model("SAAttention", types, {}, shapes)).get_outputs()[0].shape == ["B", 6, "T", 5]


@kernels
@infers_shapes
def test_what_is_not_known_is_left_open() -> None:
    x = X34[None]
    for shape in ([None, 3, "T"], None):
        s = session(model("SASoftmax", {"X": "float32"}, {}, {"X": shape}))
        assert s.run(None, {"X_in": x})[0].shape == x.shape
        assert -1 not in (s.get_outputs()[0].shape or [])


# The declarations of onnxruntime's C interface.


def test_declarations_agree_with_the_official_header() -> None:
    """The source compiles against the official header: its assertions hold the positions, the compiler the types."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folders = [os.environ.get("SA_SOFTMAX_ONNXRUNTIME_INCLUDE", ""), "/usr/include/onnxruntime"]
    include = next((folder for folder in folders if folder and (Path(folder) / "onnxruntime_c_api.h").is_file()), None)
    if include is None:
        pytest.skip("needs onnxruntime_c_api.h: set SA_SOFTMAX_ONNXRUNTIME_INCLUDE or install libonnxruntime-dev")
    own = ["-std=c++17", "-fsyntax-only", "-I", str(SOURCE.parent / "include"), str(SOURCE / "onnxruntime.cpp")]
    subprocess.run([compiler, *own], check=True)
    subprocess.run([compiler, "-DSA_SOFTMAX_OFFICIAL_HEADERS", "-I", include, *own], check=True)


@kernels
def test_the_library_exports_nothing_else() -> None:
    library = ctypes.CDLL(door.get_library_path())
    assert hasattr(library, "RegisterCustomOps")
    if nm := shutil.which("nm"):
        listed = subprocess.run([nm, "-D", "--defined-only", door.get_library_path()], capture_output=True, text=True)
        names = {line.split()[-1] for line in listed.stdout.splitlines() if " T " in line or " D " in line}
        header = (SOURCE.parent / "include" / "sa_softmax" / "c_api.h").read_text()
        assert names == {"RegisterCustomOps", *re.findall(r"\b(sa_softmax_\w+)\(", header)}


# The machine code.


def innermost_loops(listing: str) -> list[list[str]]:
    """The bodies of a disassembly's loops that hold no other."""
    lines = [match.groups() for line in listing.splitlines() if (match := re.match(r"\s*([0-9a-f]+):\t(.+)", line))]
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    loops, begin = [], -1
    for i, (_, text) in enumerate(lines):
        jump = re.match(r"j\w+\s+([0-9a-f]+)\b", text)
        start = place.get(int(jump[1], 16), i + 1) if jump else i + 1
        if begin < start <= i:
            loops.append([text for _, text in lines[start : i + 1]])
            begin = start
    return loops


@kernels
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads the machine code of x86-64")
def test_sums_of_the_microkernel_stay_in_registers() -> None:
    """A compiler that keeps them in memory makes attention half as fast, and nothing else tells of it.

    In the microkernel's loops what is broadcast from memory, once for each of 6 rows, is multiplied by 4 vectors, or by
    2 where there are 16 registers.
    """
    if (objdump := shutil.which("objdump")) is None:
        pytest.skip("needs objdump")
    command = [objdump, "-d", "-w", "--no-show-raw-insn", "-j", ".text", door.get_library_path()]
    found = set()
    for body in innermost_loops(subprocess.run(command, capture_output=True, text=True, check=True).stdout):
        products = [line for line in body if re.match(r"vfmadd|vdpbf16ps", line)]
        broadcasts = [line for line in body if re.match(r"vbroadcasts[sd] .*\((?!%r[is]p)", line)]
        register = "zmm" if any("%zmm" in line for line in products) else "ymm"
        if len(broadcasts) in (6, 12) and len(products) == len(broadcasts) * {"zmm": 4, "ymm": 2}[register]:
            spills = [line for line in body if "mm" in line and re.search(r"\(%rsp|-0x\w+\(%rbp\)", line)]
            assert not spills
            found.add((re.sub("132|213|231", "", products[0].split()[0]), register))
    assert found == {(name, register) for name in ("vfmaddps", "vfmaddpd") for register in ("zmm", "ymm")} | {
        ("vdpbf16ps", "zmm")
    }
