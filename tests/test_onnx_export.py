"""Export of models that call SA-Softmax, and the check of the files."""

import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import FLOATS, VARIANTS, attention_of_rounded_weights, numpy_dtype

import sa_softmax

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator  # noqa: E402

from sa_softmax.onnx_export import CheckError, check, export  # noqa: E402
from sa_softmax.onnx_export.bounds import expected  # noqa: E402
from sa_softmax.onnx_export.operators import nodes_of  # noqa: E402

ROOT = Path(__file__).parents[1]
SEED = 7


@pytest.fixture(scope="module")
def torch() -> Any:
    pytest.importorskip("onnxscript")
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def char_model(torch: Any) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module("char_model")


@pytest.fixture(scope="module")
def char_file(torch: Any, char_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """The demo's model, its file, and the report of the export."""
    torch.manual_seed(SEED)
    model = char_model.CharModel(31, "normalized")
    path = tmp_path_factory.mktemp("char") / "char.onnx"
    indices = torch.randint(31, (2, 9))
    return model, path, export(model, (indices,), path, dynamic=({0: "batch", 1: "length"},))


def dims(value: Any) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def clients(report: Any) -> set[str]:
    return {finding.client.split(" ")[-1] if "," in finding.client else finding.client.split(" ")[0]
            for finding in report.findings if finding.error is not None}  # fmt: skip


# PyTorch.


def test_character_model(torch: Any, char_file: Any) -> None:
    model, path, report = char_file
    assert report.ok
    assert clients(report) >= {"bodies", "onnx.reference"}
    assert any("its source" in finding.subject for finding in report.findings)
    exported = onnx.load(path)
    onnx.checker.check_model(exported, full_check=True)
    assert [dims(value) for value in (*exported.graph.input, *exported.graph.output)] == [
        ["batch", "length"], ["batch", "length", 31],
    ]  # fmt: skip
    assert [value.name for value in (*exported.graph.input, *exported.graph.output)] == ["indices", "output"]
    nodes = list(nodes_of(exported))
    assert [node.op_type for node in nodes] == ["SAAttention"] * 2
    known = {value.name: dims(value) for value in exported.graph.value_info}
    assert [known[node.output[0]] for node in nodes] == [["batch", 4, "length", 32]] * 2
    # Every length up to the context, of which the export saw one.
    indices = torch.randint(31, (1, 128))
    with torch.no_grad():
        wanted = model(indices).numpy()
    (got,) = ReferenceEvaluator(str(path)).run(None, {"indices": indices.numpy()})
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-4 * abs(wanted).max())


def test_export_leaves_the_model_as_it_was(torch: Any, char_file: Any) -> None:
    model, *_ = char_file
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_with_a_cache(torch: Any, tmp_path: Path, dtype: str, variant: str) -> None:
    """Grouped heads, an offset that depends on the lengths, and a mask: decoding, in one file for all steps."""
    from sa_softmax.backends.torch import sa_attention

    class Decoder(torch.nn.Module):
        def forward(self, query: Any, key: Any, value: Any, mask: Any) -> Any:
            offset = key.shape[-2] - query.shape[-2]
            return sa_attention(query, key, value, mask=mask, is_causal=True, q_offset=offset, variant=variant)

    torch.manual_seed(SEED)
    query, key, value = (
        torch.randn(shape, dtype=getattr(torch, dtype)) for shape in ((2, 4, 3, 8), (2, 2, 7, 8), (2, 2, 7, 5))
    )
    mask = torch.rand(2, 1, 1, 7) < 0.8
    batch, keys = {0: "batch"}, {0: "batch", 2: "keys"}
    dynamic = (batch | {2: "queries"}, keys, keys, batch | {3: "keys"})
    path = tmp_path / "decoder.onnx"
    report = export(Decoder(), (query, key, value, mask), path, dynamic=dynamic)
    assert report is not None
    assert report.ok
    exported = onnx.load(path)
    (node,) = nodes_of(exported)
    assert len(node.input) == 5
    assert node.input[3] == ""
    assert [dims(each) for each in exported.graph.output] == [["batch", 4, "queries", 5]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_may_be_rounded_in_16_bits_and_not_further(dtype: str, variant: str) -> None:
    """Clause A10: to the 11 bits of float16 or the 8 of bfloat16. In wider types not even so far."""
    rng = np.random.default_rng(SEED)
    shapes = {"Q": (2, 4, 6, 8), "K": (2, 2, 9, 8), "V": (2, 2, 9, 5)}
    inputs = {name: (3 * rng.standard_normal(shape)).astype(numpy_dtype(dtype)) for name, shape in shapes.items()}
    wanted = expected("SAAttention", inputs, {"variant": variant, "is_causal": 0, "q_offset": 0})

    def error(bits: int) -> float:
        return wanted.error(attention_of_rounded_weights(*inputs.values(), bits, variant=variant))

    bits = {"float16": 11, "bfloat16": 8}.get(dtype)
    if bits is None:
        assert error(11) > 1
    else:
        assert error(bits) <= 1 < error(bits - 1)
        assert error(5) > 2


def test_lengths_that_are_sums(torch: Any, tmp_path: Path) -> None:
    """Under a sliding window, which the operator holds as a mask."""
    from sa_softmax.backends.torch import sa_attention

    def step(x: Any, past: Any, mask: Any) -> Any:
        keys = torch.cat([past, x], -2)
        return sa_attention(x, keys, keys, mask=mask, is_causal=True, q_offset=past.shape[-2], window_size=(4, 0))

    args = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4), torch.rand(2, 1, 1, 8) < 0.8
    dynamic = ({0: "batch", 2: "length"}, {0: "batch", 2: "past"}, {0: "batch", 3: "past + length"})
    path = tmp_path / "step.onnx"
    report = export(step, args, path, dynamic=dynamic)
    assert report is not None
    assert len(report.inputs) == 4
    assert dims(onnx.load(path).graph.input[2]) == ["batch", 1, 1, "past + length"]
    with pytest.raises(CheckError, match="the model: error inf"):  # a name of its own may have any length
        export(step, args, path, dynamic=(*dynamic[:2], {0: "batch", 3: "total"}))


def test_every_way_to_call_it(torch: Any, tmp_path: Path) -> None:
    """The module, the backend's function and the dispatching one; axes, masks; keyword arguments; several outputs."""
    from sa_softmax.backends import torch as backend

    module = backend.SASoftmax(axis=1, variant="product")

    def function(x: Any, *, where: Any) -> Any:
        return module(x), backend.sa_softmax(x, where=where), sa_softmax.sa_softmax(x, axis=0)

    inputs = {"x": torch.randn(3, 4), "where": torch.rand(3, 1) < 0.5}
    path = tmp_path / "calls.onnx"
    report = export(function, inputs, path, dynamic={"x": {0: "n"}, "where": {0: "n"}}, opset=21)
    assert report is not None
    assert report.ok
    exported = onnx.load(path)
    assert [value.name for value in exported.graph.input] == ["x", "where"]
    assert [value.name for value in exported.graph.output] == ["output_0", "output_1", "output_2"]
    assert [each.version for each in exported.opset_import if each.domain == ""] == [21]
    assert [each.name for each in exported.functions] == ["SASoftmax"]
    assert len(list(nodes_of(exported))) == 3


def test_bias_in_the_compute_dtype(torch: Any, tmp_path: Path) -> None:
    from sa_softmax.backends.torch import sa_attention

    q, bias = torch.randn(1, 2, 3, 4, dtype=torch.float16), torch.randn(2, 3, 3)
    report = export(lambda q, bias: sa_attention(q, q, q, bias=bias, scale=0.3), (q, bias), tmp_path / "mixed.onnx")
    assert report is not None
    assert report.ok


def test_one_operator_under_torch_export(torch: Any) -> None:
    from sa_softmax.backends.torch import SASoftmax, sa_attention

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.softmax = SASoftmax()

        def forward(self, x: Any) -> Any:
            return sa_attention(self.softmax(x), x, x, is_causal=True)

    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    for strict in (False, True):
        program = torch.export.export(Model(), (x,), strict=strict)
        called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert called == ["sa_softmax.sa_softmax.default", "sa_softmax.sa_attention.default"]
        y = program.module()(x)
        torch.testing.assert_close(y, Model()(x))
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        (wanted,) = torch.autograd.grad(Model()(x).square().sum(), x)
        torch.testing.assert_close(dx, wanted)


# JAX.


def test_jax(tmp_path: Path) -> None:
    pytest.importorskip("jax2onnx")
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    rng = np.random.default_rng(SEED)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731

    @jax.jit
    def attend(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return sa_softmax.sa_attention(q, k, v, bias=bias, is_causal=True, q_offset=2)

    args = array(2, 4, 5, 8), array(2, 2, 7, 8), array(2, 2, 7, 3), array(4, 1, 1)
    before = np.asarray(attend(*args))
    dynamic = ({0: "batch", 2: "queries"}, {0: "batch", 2: "keys"}, {0: "batch", 2: "keys"}, None)
    report = export(attend, args, tmp_path / "attend.onnx", dynamic=dynamic)
    assert report is not None
    assert report.ok
    exported = onnx.load(tmp_path / "attend.onnx")
    assert [node.op_type for node in nodes_of(exported)] == ["SAAttention"]
    assert [value.name for value in exported.graph.input] == ["q", "k", "v", "bias"]
    assert dims(exported.graph.output[0]) == ["batch", 4, "queries", 3]
    assert np.array_equal(attend(*args), before)  # the export left nothing behind in JAX's caches

    def model(weights: Any, x: Any, where: Any) -> Any:
        rows = jax.vmap(lambda row, keep: sa_softmax.sa_softmax(row, where=keep, variant="product"))
        return rows(x @ weights["w"] + weights["b"], where)

    weights = {"w": array(8, 4), "b": array(4)}
    report = export(model, (weights, array(3, 8), array(3, 4) > 0), tmp_path / "rows.onnx")
    assert report is not None
    assert report.ok
    exported = onnx.load(tmp_path / "rows.onnx")
    assert [value.name for value in exported.graph.input] == ["weights_b", "weights_w", "x", "where"]
    assert [node.op_type for node in nodes_of(exported)] == ["SASoftmax"]


# The check.


def tampered(path: Path, to: Path, old: str, new: str) -> Path:
    """The file with one operator of a body replaced."""
    model = onnx.load(path)
    nodes = [node for body in model.functions for node in body.node if node.output[0] == old]
    assert nodes
    nodes[0].op_type = new
    onnx.save(model, to)
    return to


@pytest.mark.parametrize(("value", "operator"), [("ap", "Max"), ("z_above_lo", "Add"), ("seen", "GreaterOrEqual")])
def test_check_finds_a_wrong_body(char_file: Any, tmp_path: Path, value: str, operator: str) -> None:
    with pytest.raises(CheckError, match="DOES NOT COMPUTE") as caught:
        check(tampered(char_file[1], tmp_path / "wrong.onnx", value, operator))
    wrong = [finding for finding in caught.value.report.findings if not finding.ok]
    assert {finding.subject for finding in wrong} >= {"SAAttention 1 of 2, normalized"}
    assert not caught.value.report.ok
    assert "FAIL" in str(caught.value)


def test_check_finds_what_differs_from_the_source(torch: Any, char_file: Any) -> None:
    _, path, _ = char_file
    indices = np.zeros((1, 3), np.int64)
    with pytest.raises(CheckError) as caught:
        check(path, inputs={"indices": indices}, outputs=[np.ones((1, 3, 31), np.float32)])
    assert {finding.subject for finding in caught.value.report.findings if not finding.ok} == {
        "output 'output' against its source"
    }


def test_check_says_what_does_not_run(char_file: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckError) as caught:
        check(tampered(char_file[1], tmp_path / "broken.onnx", "k_transposed", "NoSuchOperator"))
    failed = [finding for finding in caught.value.report.findings if not finding.ok]
    assert failed
    assert {finding.subject for finding in failed} == {"the model"}
    assert "NoSuchOperator" in str(caught.value)


def test_check_prints_what_it_found(char_file: Any) -> None:
    _, path, report = char_file
    lines = str(report).splitlines()
    assert lines[0] == f"{path} computes what it should"
    assert lines[1] == "  on indices [2, 9]"
    assert sum("SAAttention 2 of 2, normalized" in line for line in lines) >= 2


def test_check_with_external_data(char_file: Any, tmp_path: Path) -> None:
    model = onnx.load(char_file[1])
    path = tmp_path / "external.onnx"
    onnx.save(model, path, save_as_external_data=True, location="external.data")
    assert (tmp_path / "external.data").stat().st_size > 10**6
    assert check(path).ok
    assert sorted(each.name for each in tmp_path.iterdir()) == ["external.data", "external.onnx"]


def test_check_refuses_what_is_no_file_of_ours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check(tmp_path / "missing.onnx")
    path = tmp_path / "file.onnx"
    path.write_bytes(b"this is no protocol buffer")
    with pytest.raises(ValueError, match="is not an ONNX file"):
        check(path)
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 18]> g (float[2] x) => (float[2] y) { y = Neg(x) }'
        ),
        path,
    )
    with pytest.raises(ValueError, match="no node of the domain sa_softmax"):
        check(path)


# Errors of the export.


def test_export_errors(torch: Any, tmp_path: Path) -> None:
    from sa_softmax.backends.torch import SASoftmax

    x = torch.randn(3, 4)
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match=r"must be 18 to .* got 17"):
        export(SASoftmax(), x, path, opset=17)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module or a function; got dict"):
        export({"weights": x}, x, path)
    with pytest.raises(TypeError, match=r"of PyTorch or of JAX; got function with arguments of numpy.ndarray"):
        export(sa_softmax.sa_softmax, np.ones(3), path)
    with pytest.raises(IsADirectoryError, match="got the folder"):
        export(SASoftmax(), x, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export(SASoftmax(), x, tmp_path / "nowhere" / "model.onnx")
    with pytest.raises(ValueError, match="never called sa_softmax"):
        export(torch.nn.Softmax(-1), x, path)
    assert not path.exists()
    fixed = torch.nn.Sequential(torch.nn.Unflatten(0, (3, 1)), SASoftmax())
    with pytest.raises(torch.onnx.OnnxExporterError, match="static shape of 3 for dimension"):
        export(fixed, x, path, dynamic=({0: "rows"},))
    assert export(SASoftmax(), x, path, verify=False) is None
    assert check(path).ok


@pytest.mark.parametrize(("package", "extra"), [("onnxscript", "onnx"), ("jax2onnx", "jax2onnx")])
def test_export_names_the_missing_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, extra: str
) -> None:
    jax = pytest.importorskip("jax")
    torch = pytest.importorskip("torch")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    x = torch.ones(3) if package == "onnxscript" else jax.numpy.ones(3)
    with pytest.raises(ImportError, match=rf"needs {package}, .*sa-softmax\[{extra}\]"):
        export(sa_softmax.sa_softmax, x, tmp_path / "model.onnx")


# The command line.


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The commands, run in a folder of their own."""
    typer = pytest.importorskip("typer")
    testing = importlib.import_module("typer.testing")
    from sa_softmax._onnx import add_commands

    def fail(error: Exception) -> Any:
        typer.echo(f"error: {error}", err=True)
        return typer.Exit(2)

    app = typer.Typer()
    add_commands(app, fail)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda *args: testing.CliRunner().invoke(app, [str(each) for each in args])


def test_commands(torch: Any, command: Any, char_file: Any, tmp_path: Path) -> None:
    (tmp_path / "exported_model.py").write_text(
        "import torch\n"
        "from sa_softmax.backends.torch import SASoftmax\n"
        "def make():\n"
        "    return SASoftmax(variant='product'), torch.randn(3, 4), ({0: 'rows'},)\n"
        "def wrong():\n"
        "    return SASoftmax()\n"
    )
    done = command("export", "exported_model:make", "model.onnx", "--opset", 20)
    assert done.exit_code == 0, done.output
    assert "model.onnx computes what it should" in done.output
    done = command("check", "model.onnx")
    assert done.exit_code == 0
    assert "SASoftmax 1 of 1, product" in done.output
    done = command("check", tampered(tmp_path / "model.onnx", tmp_path / "wrong.onnx", "ap", "Add"))
    assert done.exit_code == 1
    assert "FAIL" in done.output
    for args in (
        ("check", "missing.onnx"),
        ("export", "exported_model:make", "model.onnx", "--opset", 17),
        ("export", "exported_model:wrong", "model.onnx"),
        ("export", "exported_model:missing", "model.onnx"),
        ("export", "no colon", "model.onnx"),
    ):
        done = command(*args)
        assert done.exit_code == 2, args
        assert "error: " in done.output


# The documents.


def test_the_operator_pages_say_what_the_schemas_say() -> None:
    from sa_softmax.onnx_export.operators import SCHEMAS

    pages = dict(
        part.split("\n", 1) for part in (ROOT / "docs" / "operators.md").read_text().split("\n## ") if part[:2] == "SA"
    )
    assert set(pages) == set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        page = pages[name]
        positions = [page.index(f"- `{each.name}` (") for each in (*schema.inputs, *schema.outputs)]
        assert positions == sorted(positions)
        for each in schema.inputs:
            optional = ", optional" if each.option.name == "Optional" else ""
            assert f"- `{each.name}` ({each.type_str}{optional})" in page
        for attribute in schema.attributes.values():
            assert f"`{attribute.name}`" in page
            default = attribute.default_value
            if default.name and not page.count("as in SASoftmax"):
                value = onnx.helper.get_attribute_value(default)
                said = f'"{value.decode()}"' if isinstance(value, bytes) else value
                assert f"- `{attribute.name}` ({attribute.type.name.lower()}, default {said})" in page


def test_the_code_of_the_guide_runs(torch: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "export.md").read_text()
    blocks = re.findall(r"^(?:<!-- needs (.+?) -->\n)?```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert [package for package, _ in blocks] == ["", "transformers", "", "", "", *["sa-softmax-native"] * 2]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for package, code in blocks:
        if not package or importlib.util.find_spec(package.replace("-", "_")):
            exec(code, names)
    assert names["report"].ok
    assert names["checked"].ok
    assert names["y"].shape == (2, 32)
