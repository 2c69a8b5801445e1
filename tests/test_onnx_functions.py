"""The operators of the ONNX domain: schemas, function bodies, and what completes a model that uses them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import CORNERS, FLOATS, VARIANTS, numpy_dtype

from sa_softmax import reference
from sa_softmax.conformance import cases, run

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import ModelProto, TensorProto, helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from sa_softmax.backends.onnxruntime.adapter import Adapter, BodyAdapter  # noqa: E402
from sa_softmax.onnx_export import complete, functions  # noqa: E402
from sa_softmax.onnx_export.bounds import expected  # noqa: E402
from sa_softmax.onnx_export.operators import MIN_OPSET, SCHEMAS, nodes_of  # noqa: E402

OPSETS = range(MIN_OPSET, onnx.defs.onnx_opset_version() + 1)
NAN_ROWS = np.array([[1, np.nan, 2, -1], [1, np.inf, 2, -np.inf], [np.nan, 1, 2, 3], [0, 0, np.nan, 0]])


def model(
    operator: str, inputs: dict[str, Any], *, opset: int = MIN_OPSET, shapes: bool = False, **attributes: Any
) -> ModelProto:
    """A complete model of one node; None stands for an input that is not given."""

    def value(name: str, array: Any) -> Any:
        element_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        return helper.make_tensor_value_info(name, element_type, array.shape if shapes else [None] * array.ndim)

    first = next(iter(inputs.values()))
    node = helper.make_node(
        operator, [name if array is not None else "" for name, array in inputs.items()], ["output"],
        domain="sa_softmax", **attributes,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        operator,
        [value(name, array) for name, array in inputs.items() if array is not None],
        [helper.make_tensor_value_info("output", helper.np_dtype_to_tensor_dtype(first.dtype), [None] * first.ndim)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    complete(made)
    onnx.checker.check_model(made, full_check=True)
    return made


def run_in_onnxruntime(made: ModelProto, inputs: dict[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, given(inputs))[0]


def run_in_reference(made: ModelProto, inputs: dict[str, Any]) -> Any:
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(made).run(None, given(inputs))[0]


def given(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in inputs.items() if array is not None}


CLIENTS = pytest.mark.parametrize(
    "client", [run_in_onnxruntime, run_in_reference], ids=["onnxruntime", "onnx.reference"]
)


def assert_expected(operator: str, inputs: dict[str, Any], attributes: dict[str, Any], got: Any) -> None:
    """Within the bounds of the spec, and 0 exactly where nothing participates."""
    assert got.dtype == next(iter(inputs.values())).dtype
    assert expected(operator, given(inputs), attributes).error(got) <= 1


# Conformance.


@pytest.mark.parametrize("opset", [MIN_OPSET, 21])
def test_bodies_conform(opset: int) -> None:
    adapter = BodyAdapter()
    adapter.opset = opset
    report = run(adapter)
    assert report.ok, [(result.id, result.message) for result in report.results if result.status == "failed"][:5]
    assert report.count("passed") == sum(case.operation != "sa_attention_vjp" for case in cases())
    assert {result.message for result in report.results if result.status == "skipped"} == {
        "sa_attention_vjp is not declared"
    }


def test_kernels_conform() -> None:
    pytest.importorskip("sa_softmax_native")
    report = run(Adapter())
    assert report.ok, [(result.id, result.message) for result in report.results if result.status == "failed"][:5]
    assert report.count("passed") == sum(case.operation != "sa_attention_vjp" for case in cases())


def test_adapter_refuses_results_of_the_wrong_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that was asked for and did not run is an error: here the library registers nothing."""
    from sa_softmax.backends.onnxruntime import _session

    monkeypatch.setattr(_session, "register", lambda options: None)
    adapter = BodyAdapter()
    monkeypatch.setattr(adapter, "_kernel", True)
    with pytest.raises(RuntimeError, match="must run, and did not"):
        adapter.sa_softmax(np.ones((2, 3), np.float32), axis=-1, variant="product", where=None, device="cpu")


# Bodies in both Python clients, in every opset.


@CLIENTS
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operator", ["SASoftmax", "SASoftmaxGrad"])
def test_rows(operator: str, dtype: str, masked: bool, variant: str, client: Callable[..., Any]) -> None:
    if dtype == "bfloat16" and client is run_in_onnxruntime:
        pytest.skip("onnxruntime's Python has no bfloat16; the conformance suite goes through float32")
    x = np.concatenate([CORNERS, NAN_ROWS]).astype(numpy_dtype(dtype))
    inputs = {"X": x}
    if operator == "SASoftmaxGrad":
        inputs["G"] = np.cos(np.arange(x.size)).reshape(x.shape).astype(x.dtype)
    where = np.arange(x.size).reshape(x.shape) % 3 != 1
    inputs["where"] = where if masked else None
    attributes = {"axis": -1, "variant": variant}
    got = client(model(operator, inputs, **attributes), inputs)
    assert_expected(operator, inputs, attributes, got)
    excluded = (x == -np.inf) | (~where if masked else False)
    assert not np.any(got[excluded] != 0)


@CLIENTS
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(opset: int, client: Callable[..., Any]) -> None:
    rng = np.random.default_rng(opset)
    row = {"X": rng.standard_normal((3, 5)).astype(np.float32)}
    heads = {name: rng.standard_normal((2, 3, 4)).astype(np.float32) for name in "QKV"}
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("SASoftmax", row, {"axis": 0, "variant": "product"}),
        ("SASoftmaxGrad", row | {"G": row["X"][::-1].copy()}, {"axis": 1, "variant": "normalized"}),
        ("SAAttention", heads, {"variant": "normalized", "is_causal": 1, "q_offset": 0, "scale": 0.5}),
    ]
    for operator, inputs, attributes in cases:
        made = model(operator, inputs, opset=opset, **attributes)
        assert [each.version for each in made.functions[0].opset_import] == [opset]
        try:
            got = client(made, inputs)
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            if f"opset {opset}" not in str(error):
                raise
            pytest.skip(f"onnxruntime {onnxruntime.__version__} is older than opset {opset}")
        assert_expected(operator, inputs, attributes, got)


@CLIENTS
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("options", [(), ("bias",), ("mask",), ("bias", "mask")], ids=str)
@pytest.mark.parametrize("causal", [0, 1])
def test_attention(causal: int, options: tuple[str, ...], dtype: str, variant: str, client: Callable[..., Any]) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, *shape)).astype(dtype) for shape in ((4, 5, 8), (2, 6, 8), (2, 6, 3)))
    k[0, 1, 2], v[1, 0, 3, 0], v[0, 0, 1, 1] = np.nan, np.nan, np.inf
    mask = rng.random((2, 1, 5, 6)) < 0.7
    mask[0, :, 2] = False
    bias = rng.standard_normal((4, 1, 6)).astype(dtype)
    bias[1, 0, 4] = -np.inf
    optional = {"bias": bias, "mask": mask}
    inputs = {"Q": q, "K": k, "V": v} | {name: optional[name] if name in options else None for name in optional}
    attributes = {"variant": variant, "is_causal": causal, "q_offset": causal, "scale": -0.75}
    assert_expected("SAAttention", inputs, attributes, client(model("SAAttention", inputs, **attributes), inputs))


@pytest.mark.parametrize("scale", [None, 0.0])
def test_scale_of_zero_is_not_an_absent_one(scale: float | None) -> None:
    rng = np.random.default_rng(2)
    inputs = {name: rng.standard_normal((1, 3, 4)) for name in "QKV"} | {"bias": rng.standard_normal((3, 3))}
    attributes: dict[str, Any] = {"variant": "normalized", "is_causal": 0, "q_offset": 0}
    if scale is not None:
        attributes["scale"] = scale
    got = run_in_onnxruntime(model("SAAttention", inputs, **attributes), inputs)
    assert_expected("SAAttention", inputs, attributes, got)


def test_unknown_variant_is_an_error() -> None:
    x = np.ones((2, 3), np.float32)
    for name in ("softmax", "normalize", "Product", ""):
        with pytest.raises(Exception, match="out of data bounds"):
            run_in_onnxruntime(model("SASoftmax", {"X": x}, variant=name), {"X": x})
        with pytest.raises(IndexError):
            run_in_reference(model("SASoftmax", {"X": x}, variant=name), {"X": x})


def test_nothing_about_the_variant_is_left_at_run_time() -> None:
    from sa_softmax.backends.onnxruntime._session import Session

    x = np.ones((2, 3), np.float32)
    for variant in VARIANTS:
        session = Session(model("SASoftmax", {"X": x}, variant=variant), kernel=False)
        session.run({"X": x})
        assert not session.ran & {"Unique", "Concat", "Gather", "If", "Reshape", "SASoftmax"}
        assert "ReduceMax" in session.ran


# Schemas.


def test_schemas_know_the_inputs_of_the_bodies() -> None:
    for body in functions(opset=MIN_OPSET):
        schema = SCHEMAS[body.name]
        assert [each.name for each in schema.inputs] == list(body.input)
        assert [each.name for each in schema.outputs] == list(body.output)
        assert set(schema.attributes) == {each.name for each in body.attribute_proto}
    for body in functions(opset=MIN_OPSET, optional=("mask",)):
        assert list(body.input) == {
            "SASoftmax": ["X"], "SASoftmaxGrad": ["X", "G"], "SAAttention": ["Q", "K", "V", "bias", "mask"]
        }[body.name]  # fmt: skip


def test_shapes_are_inferred() -> None:
    rows = model("SASoftmax", {"X": np.ones((2, 3), np.float32)}, shapes=True)
    heads = {"Q": np.ones((2, 4, 5, 8)), "K": np.ones((2, 2, 6, 8)), "V": np.ones((2, 2, 6, 3))}
    attention = model("SAAttention", heads, shapes=True, scale=1.0)
    for made, shape in ((rows, [2, 3]), (attention, [2, 4, 5, 3])):
        inferred = onnx.shape_inference.infer_shapes(made, strict_mode=True)
        assert [dim.dim_value for dim in inferred.graph.output[0].type.tensor_type.shape.dim] == shape
    with pytest.raises(Exception, match="at least one axis"):
        model("SASoftmax", {"X": np.array(1.0, np.float32)})
    with pytest.raises(Exception, match="rank 3 or more"):
        model("SAAttention", dict.fromkeys("QKV", np.ones((2, 3), np.float32)))


# Completion.


def chain(*nodes: Any, x: int = TensorProto.FLOAT, opset: int = MIN_OPSET) -> ModelProto:
    """X -> nodes -> Y, with W the mask, nothing known of what is between."""
    graph = helper.make_graph(
        list(nodes), "chain",
        [helper.make_tensor_value_info(name, kind, ["n", 4]) for name, kind in (("X", x), ("W", TensorProto.BOOL))],
        [helper.make_tensor_value_info("Y", x, ["n", 4])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


def softmax(*inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node("SASoftmax", inputs, [output], domain="sa_softmax", **attributes)


@CLIENTS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_complete_lets_nodes_differ(dtype: str, client: Callable[..., Any]) -> None:
    made = chain(
        softmax("X", output="a"),
        helper.make_node("Neg", ["a"], ["b"]),
        softmax("b", "W", output="c", axis=0, variant="product"),
        softmax("c", "", output="Y"),
        x=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
    )
    complete(made)
    complete(made)  # a second time changes nothing
    onnx.checker.check_model(made, full_check=True)
    assert [each.name for each in made.functions] == ["SASoftmax"]
    assert {each.domain: each.version for each in made.opset_import} == {"": MIN_OPSET, "sa_softmax": 1}
    assert made.ir_version >= 8
    known = {value.name: value for value in made.graph.value_info}
    assert all(known[name].type.tensor_type.shape.dim[0].dim_param == "n" for name in "abc")
    ours = list(nodes_of(made))
    assert [attribute.i for node in ours for attribute in node.attribute if attribute.name == "axis"] == [-1, -2, -1]
    assert all(node.input[1] for node in ours)

    rng = np.random.default_rng(3)
    inputs = {"X": rng.standard_normal((3, 4)).astype(dtype), "W": rng.random((3, 4)) < 0.7}
    x, where = inputs["X"].astype(np.float64), inputs["W"]
    wanted = reference.sa_softmax(
        reference.sa_softmax(-reference.sa_softmax(x), axis=0, variant="product", where=where)
    )
    np.testing.assert_allclose(client(made, inputs), wanted, rtol=0, atol=100 * np.finfo(dtype).eps)


def test_complete_gives_a_bias_without_effect() -> None:
    made = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18, "sa_softmax": 1]>
        g (float16[2, 3, 4] Q, float16[2, 3, 3] B, bool[3, 3] M) => (float16[2, 3, 4] Y) {
            A = sa_softmax.SAAttention <scale: float = 1.0> (Q, Q, Q, B)
            Y = sa_softmax.SAAttention <scale: float = 1.0> (A, A, A, "", M)
        }"""
    )
    complete(made)
    onnx.checker.check_model(made, full_check=True)
    rng = np.random.default_rng(4)
    inputs = {"Q": rng.standard_normal((2, 3, 4)), "B": rng.standard_normal((2, 3, 3))}
    inputs = {name: array.astype(np.float16) for name, array in inputs.items()} | {"M": np.tri(3, dtype=bool)}
    q, b, m = (inputs[name].astype(np.float64) if name != "M" else inputs[name] for name in "QBM")
    a = reference.sa_attention(q, q, q, bias=b, scale=1.0)
    wanted = reference.sa_attention(a, a, a, mask=m, scale=1.0)
    for client in (run_in_onnxruntime, run_in_reference):
        np.testing.assert_allclose(client(made, inputs), wanted, rtol=0, atol=20 * 2.0**-11)


def test_complete_reaches_subgraphs() -> None:
    def branch(variant: str) -> Any:
        output = helper.make_tensor_value_info(f"{variant}_y", TensorProto.FLOAT, ["n", 4])
        return helper.make_graph([softmax("X", output=f"{variant}_y", variant=variant)], variant, [], [output])

    made = chain(
        helper.make_node("ReduceMax", ["W_int"], ["any"], keepdims=0),
        helper.make_node("Cast", ["any"], ["condition"], to=TensorProto.BOOL),
        helper.make_node("If", ["condition"], ["Y"], then_branch=branch("product"), else_branch=branch("normalized")),
    )
    made.graph.node.insert(0, helper.make_node("Cast", ["W"], ["W_int"], to=TensorProto.INT32))
    complete(made)
    assert len(list(nodes_of(made))) == 2
    x = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)
    for condition, variant in ((True, "product"), (False, "normalized")):
        inputs = {"X": x, "W": np.full((2, 4), condition)}
        attributes = {"axis": -1, "variant": variant}
        assert_expected("SASoftmax", {"X": x}, attributes, run_in_onnxruntime(made, inputs))


def test_complete_refuses_what_it_cannot_do() -> None:
    for opset in (17, onnx.defs.onnx_opset_version() + 1):
        with pytest.raises(ValueError, match=f"must be 18 to .* got {opset}"):
            complete(chain(softmax("X", output="Y"), opset=opset))
        with pytest.raises(ValueError, match=f"got {opset}"):
            functions(opset=opset)
    unknown = chain(helper.make_node("Mystery", ["X"], ["a"], domain="elsewhere"), softmax("a", output="Y"))
    unknown.opset_import.append(helper.make_opsetid("elsewhere", 1))
    with pytest.raises(ValueError, match=r"the type of 'a'.*value_info"):
        complete(unknown)
    inside = chain(helper.make_node("F", ["X"], ["Y"], domain="theirs"))
    body = [softmax("x", output="y")]
    inside.functions.append(helper.make_function("theirs", "F", ["x"], ["y"], body, [helper.make_opsetid("", 18)]))
    with pytest.raises(ValueError, match="inline_local_functions"):
        complete(inside)


def test_importing_the_package_alone_leaves_the_interpreter_in_peace(tmp_path: Path) -> None:
    """The schemas hold Python functions, which onnx must not call after the end."""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", "import sa_softmax.onnx_export"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
