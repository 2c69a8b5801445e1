"""Models of Transformers as .onnx files: one node for each attention, and the numbers of PyTorch in onnxruntime.

All models are tiny, built from configs; nothing is downloaded.
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from sa_softmax.backends.onnxruntime._session import Session  # noqa: E402
from sa_softmax.backends.torch.transformers import IMPLEMENTATIONS, WithPast, _attend, register  # noqa: E402
from sa_softmax.onnx_export import Report, export  # noqa: E402
from sa_softmax.onnx_export.operators import nodes_of  # noqa: E402

register()

VOCAB, LAYERS, HEADS, WIDTH = 40, 2, 4, 16
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**TINY, num_key_value_heads=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**TINY),
    "bert": lambda: transformers.BertConfig(**TINY),
}
DECODERS = ("llama", "gpt_neox")
KEY_HEADS = {"llama": 2, "gpt_neox": HEADS, "bert": HEADS}

needs_native = pytest.mark.skipif(
    importlib.util.find_spec("sa_softmax_native") is None, reason="needs sa-softmax-native"
)
KERNEL = [pytest.param(False, id="bodies"), pytest.param(True, id="kernels", marks=needs_native)]


def make(name: str, implementation: str = "sa_softmax", dtype: Any = torch.float32) -> Any:
    """Weights large enough for attention to matter."""
    auto = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(CONFIGS[name](), attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype)


def tokens(*shape: int) -> Any:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(sum(shape)))


def mask_of(paddings: list[int], length: int) -> Any:
    """Integers, 0 for as many positions on the left of each row as ``paddings`` says."""
    return (torch.arange(length) >= torch.tensor(paddings)[:, None]).long()


class Exported(NamedTuple):
    model: Any
    function: Any
    path: Path
    report: Report

    def session(self, kernel: bool) -> Callable[[Mapping[str, Any]], list[Any]]:
        """From inputs to outputs, as tensors; asserts that the kernel runs, or that the body does."""
        session = Session(onnx.load(self.path), kernel=kernel, threads=1)

        def run(inputs: Mapping[str, Any]) -> list[Any]:
            outputs = session.run({name: x.numpy() for name, x in inputs.items()})
            assert ("SAAttention" in session.ran) is kernel
            return [torch.from_numpy(x) for x in outputs.values()]

        return run


def export_model(model: Any, path: Path) -> Exported:
    if model.can_generate():
        function = WithPast(model)
        report = export(function, function.example(), path, dynamic=function.dynamic_shapes())
        return Exported(model, function, path, report)
    inputs = {"input_ids": tokens(2, 5), "attention_mask": mask_of([0, 2], 5), "token_type_ids": tokens(2, 5) % 2}
    report = export(model, inputs, path, dynamic={key: {0: "batch", 1: "length"} for key in inputs})
    return Exported(model, model, path, report)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    files: dict[tuple[str, str], Exported] = {}

    def get(name: str, implementation: str = "sa_softmax") -> Exported:
        key = name, implementation
        if key not in files:
            path = tmp_path_factory.mktemp("models") / f"{name}.onnx"
            files[key] = export_model(make(name, implementation), path)
        return files[key]

    return get


def assert_close(actual: list[Any], expected: list[Any], dtype: Any = None) -> None:
    """Within 1024 roundoffs of ``dtype``, or 32 in 16 bits, of the largest number, like the check of a file."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.isfinite(b).all()
        roundoff = torch.finfo(dtype or b.dtype).eps / 2
        allowed = (1024 if (dtype or b.dtype) == torch.float32 else 32) * roundoff * b.abs().max()
        assert (a - b).abs().max() <= allowed, ((a - b).abs().max(), allowed)


def dims(value: Any) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


# The file.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_each_attention_is_one_node(name: str, implementation: str, exported: Any) -> None:
    _, function, path, _ = exported(name, implementation)
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    nodes = list(nodes_of(file))
    assert [node.op_type for node in nodes] == ["SAAttention"] * LAYERS
    assert [each.name for each in file.functions] == ["SAAttention"]

    types = {value.name: value for value in (*file.graph.value_info, *file.graph.input, *file.graph.output)}
    keys = "length" if name == "bert" else "past + length"
    for node in nodes:
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        assert attributes["variant"].decode() == IMPLEMENTATIONS[implementation]
        assert attributes["scale"] == (WIDTH // HEADS) ** -0.5
        assert not attributes["is_causal"]  # the mask says it
        query, key, value, bias, mask = node.input
        assert not bias
        assert types[mask].type.tensor_type.elem_type == onnx.TensorProto.BOOL
        assert dims(types[query]) == ["batch", HEADS, "length", WIDTH // HEADS]
        assert dims(types[key]) == dims(types[value]) == ["batch", KEY_HEADS[name], keys, WIDTH // HEADS]

    # Nothing of an attention stands beside the nodes: no softmax, and no product of two matrices that are no weights.
    assert {node.op_type for node in file.graph.node}.isdisjoint({"Softmax", "Exp", "ReduceMax", "ReduceSum", "Einsum"})
    weights = {tensor.name for tensor in file.graph.initializer}
    products = [node for node in file.graph.node if node.op_type in ("MatMul", "Gemm")]
    assert products
    assert all(node.input[1] in weights for node in products)

    inputs, outputs = list(file.graph.input), list(file.graph.output)
    assert dims(outputs[0]) == ["batch", "length", VOCAB]
    if name == "bert":
        assert [dims(each) for each in inputs] == [["batch", "length"]] * 3
    else:
        assert [each.name for each in inputs] == function.input_names
        assert [each.name for each in outputs] == function.output_names
        assert [dims(each) for each in inputs[:3]] == [["batch", "length"], ["batch", keys], ["batch", "length"]]
        past = ["batch", KEY_HEADS[name], "past", WIDTH // HEADS]
        assert [dims(each) for each in inputs[3:]] == [past] * 2 * LAYERS
        assert [dims(each) for each in outputs[1:]] == [[*past[:2], keys, past[3]]] * 2 * LAYERS


@pytest.mark.parametrize("kernel", KERNEL)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_check_ran(name: str, implementation: str, kernel: bool, exported: Any) -> None:
    report = exported(name, implementation).report
    assert report.ok
    client = "kernels" if kernel else "bodies"
    subjects = {finding.subject for finding in report.findings if finding.client.endswith(f", {client}")}
    variant = IMPLEMENTATIONS[implementation]
    assert subjects >= {f"SAAttention {i + 1} of {LAYERS}, {variant}" for i in range(LAYERS)}
    assert any("its source" in subject for subject in subjects)
    assert any(finding.client.startswith("onnx.reference") and finding.error for finding in report.findings)


# Its numbers.


@pytest.mark.parametrize("kernel", KERNEL)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_encoder_computes_what_pytorch_does(implementation: str, kernel: bool, exported: Any) -> None:
    file = exported("bert", implementation)
    run = file.session(kernel)
    for paddings, length in (([0], 1), ([3], 7), ([0, 6, 2], 9), ([0, 0, 0, 0, 16], 17)):
        ids = tokens(len(paddings), length)
        for mask in (mask_of(paddings, length), mask_of(paddings, length).flip(1)):
            inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
            with torch.no_grad():
                assert_close(run(inputs), [file.model(**inputs).logits])


def feeds(function: WithPast, arguments: tuple[Any, Any, Any, list[Any]]) -> dict[str, Any]:
    *arrays, past = arguments
    return dict(zip(function.input_names, (*arrays, *past), strict=True))


def arguments_of(function: WithPast, paddings: list[int], length: int, past: int) -> tuple[Any, Any, Any, list[Any]]:
    """New tokens behind a random past, whose first positions are padding."""
    mask = mask_of(paddings, past + length)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    empty = function.example(len(paddings), length, past)[3]
    generator = torch.Generator().manual_seed(length)
    return tokens(len(paddings), length), mask, positions, [torch.randn(x.shape, generator=generator) for x in empty]


@pytest.mark.parametrize("kernel", KERNEL)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_computes_what_pytorch_does(name: str, implementation: str, kernel: bool, exported: Any) -> None:
    """A prefill, a step of decoding, several tokens at once behind a past; queries without keys among them."""
    file = exported(name, implementation)
    run = file.session(kernel)
    for paddings, length, past in (
        ([0], 1, 0), ([2, 0, 5], 6, 0), ([0], 1, 8), ([4, 0, 1, 9], 1, 9), ([7, 0], 5, 4), ([0, 3], 13, 1),
    ):  # fmt: skip
        arguments = arguments_of(file.function, paddings, length, past)
        with torch.no_grad():
            logits, present = file.function(*arguments)
        assert_close(run(feeds(file.function, arguments)), [logits, *present])


def greedy(file: Exported, run: Callable[[Mapping[str, Any]], list[Any]], ids: Any, mask: Any, count: int) -> Any:
    """``ids`` and the ``count`` tokens that follow: a prefill, then steps of one token."""
    past = file.function.example(*ids.shape, past=0)[3]
    new = ids
    for _ in range(count):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        logits, *past = run(feeds(file.function, (new, mask, positions, past)))
        new = logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return ids


@pytest.mark.parametrize("kernel", KERNEL)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", DECODERS)
def test_decoding_is_that_of_generate_token_for_token(
    name: str, implementation: str, kernel: bool, exported: Any
) -> None:
    file = exported(name, implementation)
    run = file.session(kernel)
    for paddings, length in (([0], 4), ([2, 0, 5], 6)):
        ids, mask = tokens(len(paddings), length), mask_of(paddings, length)
        # The prefill and 8 steps that get its keys and values back.
        wanted = file.model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
        assert torch.equal(greedy(file, run, ids, mask, 9), wanted)
    assert len(wanted[:, length:].unique()) >= 5  # not one token again and again


# 16 bits.


@needs_native
def test_a_float16_model_runs_with_the_library(tmp_path: Path) -> None:
    """onnxruntime computes what it has no float16 kernels for, matrix products say, in float32 between casts."""
    file = export_model(make("llama", dtype=torch.float16), tmp_path / "llama.onnx")
    assert types_of_attention(file) == {onnx.TensorProto.FLOAT16}
    for paddings, length, past in (([2, 0, 5], 6, 0), ([4, 0], 1, 9)):
        *arrays, keys_and_values = arguments_of(file.function, paddings, length, past)
        arguments = *arrays, [x.half() for x in keys_and_values]
        with torch.no_grad():
            logits, present = file.function(*arguments)
        for kernel in (True, False):
            assert_close(file.session(kernel)(feeds(file.function, arguments)), [logits, *present])


@needs_native
def test_a_model_with_bfloat16_attention_runs_with_the_library(tmp_path: Path, monkeypatch: Any) -> None:
    """Its attention alone is bfloat16: onnxruntime lacks kernels of its own for the rest of such a model on the CPU."""
    for operator in ("Add", "MatMul"):
        text = f'<ir_version: 8, opset_import: ["": 18]> g (bfloat16[2] x) => (bfloat16[] y) {{ y = {operator}(x, x) }}'
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented, match=operator):
            Session(onnx.parser.parse_model(text), kernel=True)

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        narrow = [x.bfloat16() if x.dtype == torch.float32 else x for x in args]
        out, weights = _attend(module, "normalized", *narrow, **kwargs)
        return out.float(), weights

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "sa_softmax", attend)
    file = export_model(make("llama"), tmp_path / "llama.onnx")
    assert file.report.ok
    assert types_of_attention(file) == {onnx.TensorProto.BFLOAT16}
    for paddings, length, past in (([2, 0, 5], 6, 0), ([4, 0], 1, 9)):
        arguments = arguments_of(file.function, paddings, length, past)
        with torch.no_grad():
            logits, present = file.function(*arguments)
        for kernel in (True, False):
            actual = file.session(kernel)(feeds(file.function, arguments))
            assert_close(actual, [logits, *present], torch.bfloat16)


def types_of_attention(file: Exported) -> set[int]:
    model = onnx.load(file.path)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    return {types[name] for node in nodes_of(model) for name in (node.input[0], node.output[0])}
