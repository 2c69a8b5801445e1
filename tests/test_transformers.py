"""SA attention in models of Transformers: the table of architectures, the attention function, refusals, tools."""

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import architecture_matrix  # noqa: E402
from architecture_matrix import (  # noqa: E402
    AUTO,
    CHECKS,
    CONFIGS,
    DECODERS,
    GROUPED,
    REFUSED,
    TINY,
    VOCAB,
    assert_close,
    inputs_of,
    make,
    result,
    table,
    tokens,
)

from sa_softmax import reference  # noqa: E402
from sa_softmax.backends.torch.transformers import (  # noqa: E402
    IMPLEMENTATIONS,
    WithPast,
    _attend,
    convert,
    register,
)

GUIDE = architecture_matrix.GUIDE.read_text()
RESULTS: dict[tuple[str, str], str] = {}

# Architectures.


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("check", CHECKS)
def test_architecture(name: str, check: str) -> None:
    RESULTS[name, check] = result(name, check)
    assert (RESULTS[name, check] == "refused") <= (name in REFUSED)


def test_the_table_of_the_guide_is_what_these_tests_found() -> None:
    if len(RESULTS) < len(CHECKS) * len(CONFIGS):
        pytest.skip("needs the results of all of test_architecture")
    assert table(RESULTS) in GUIDE, "python tests/architecture_matrix.py writes it anew"


# Numbers.


def test_where_packed_sequences_begin() -> None:
    """In a call that starts a cache; without one it is Transformers that reads the positions."""
    model, ids = make("llama"), tokens(1, 6)

    def logits_of(ids: Any, positions: Any, **options: Any) -> Any:
        return model(ids, position_ids=torch.tensor([positions]), **options).logits

    whole = logits_of(ids, [5, 6, 7, 0, 1, 2])  # a row that begins in the midst of a sequence
    assert_close(whole[:, 3:], logits_of(ids[:, 3:], [0, 1, 2]))
    shared = logits_of(ids, [0, 1, 1, 1, 2, 3])  # an image's tokens, say
    changed = logits_of(torch.cat([ids[:, :1] + 1, ids[:, 1:]], 1), [0, 1, 1, 1, 2, 3])
    assert ((shared - changed).abs().amax(-1) > 1e-9).all()


def test_cumulative_lengths_part_queries_from_keys() -> None:
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.float64) for n in (5, 6, 6))
    lengths = {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 3, 6], dtype=torch.int32)}
    out, _ = _attend(Module(), "normalized", q, k, v, None, **lengths)
    halves = ((slice(0, 2), slice(0, 3)), (slice(2, 5), slice(3, 6)))
    parts = [_attend(Module(), "normalized", q[:, :, i], k[:, :, j], v[:, :, j], None)[0] for i, j in halves]
    assert_close(out, torch.cat(parts, 1))
    with pytest.raises(ValueError, match=r"packed sequences must come in one row.*got a batch of 2"):
        attend(None, **lengths)
    with pytest.raises(ValueError, match="cu_seq_lens_k None"):
        _attend(Module(), "normalized", q, k, v, None, cu_seq_lens_q=lengths["cu_seq_lens_q"])


def test_a_decoder_made_bidirectional_sees_every_token() -> None:
    ids = tokens(1, 6)
    changed = ids.clone()
    changed[0, -1] = 1
    for model, options in ((make("llama", is_causal=False), {}), (make("llama"), {"is_causal": False})):
        moved = model(ids, **options).logits - model(changed, **options).logits
        assert (moved[0, 0].abs() > 1e-6).any()
    assert (make("llama")(ids).logits[0, 0] == make("llama")(changed).logits[0, 0]).all()


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_models_always_make_a_boolean_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None would mean one thing in the prefill of a static cache, another in decoding, a third in an encoder."""
    masks = []

    def record(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        masks.append(attention_mask)
        return _attend(module, "normalized", query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "sa_softmax", record)
    model, ids = make(name), tokens(1, 4)
    model(ids)
    if name != "bert":
        model(ids, past_key_values=transformers.StaticCache(config=model.config, max_cache_len=9))
        model(ids[:, :1], use_cache=False)
    assert len(masks) == (2 if name == "bert" else 6)
    assert all(mask.dtype == torch.bool and mask.ndim == 4 for mask in masks)


def test_16_bits_follow_float32() -> None:
    model, ids = make("llama").float(), tokens(2, 6)
    expected = model(ids).logits
    actual = model.bfloat16()(ids).logits
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() < 0.05 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.float()(ids).logits.float() - expected).norm() < 0.05 * expected.norm()


# The attention function by itself.


class Module(torch.nn.Module):
    is_causal = False


def attend(mask: Any = None, *, variant: str = "normalized", queries: int = 5, **kwargs: Any) -> tuple[Any, Any]:
    """The output, and a function from mask and bias to the reference's. Two key heads serve four query heads."""
    shapes = (2, 4, queries, 3), (2, 2, 6, 3), (2, 2, 6, 3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

    def expected(keep: Any, bias: Any = None) -> Any:
        options = {key: None if x is None else x.numpy() for key, x in (("mask", keep), ("bias", bias))}
        out = reference.sa_attention(q.numpy(), k.numpy(), v.numpy(), variant=variant, **options)
        return torch.from_numpy(out).transpose(1, 2)

    return _attend(Module().eval(), variant, q, k, v, mask, **kwargs)[0], expected


KEEP = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(5)) < 0.6
KEEP[0, 0, 0] = False  # a query without keys
BIAS = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@pytest.mark.parametrize("variant", ["normalized", "product"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masks_of_every_form_exclude(variant: str, dtype: Any) -> None:
    lowest = torch.finfo(dtype).min
    forms = [KEEP] + [
        torch.zeros(KEEP.shape, dtype=dtype).masked_fill(~KEEP, low) for low in (-math.inf, lowest, lowest / 2)
    ]
    for mask in forms:
        out, expected = attend(mask, variant=variant)
        assert_close(out, expected(KEEP))
        assert (out[0, 0] == 0).all()


def test_other_additive_values_are_bias() -> None:
    lowest = torch.finfo(torch.float64).min
    out, expected = attend(BIAS.masked_fill(~KEEP, lowest))
    assert_close(out, expected(KEEP, BIAS))
    out, expected = attend(torch.full_like(BIAS, lowest / 4))  # participates, by the rule
    assert_close(out, expected(None, torch.full_like(BIAS, lowest / 4)))


def test_position_bias_joins_the_scores_and_the_mask() -> None:
    out, expected = attend(KEEP, position_bias=BIAS)
    assert_close(out, expected(KEEP, BIAS))
    out, expected = attend(BIAS.masked_fill(~KEEP, -math.inf), position_bias=BIAS)
    assert_close(out, expected(KEEP, 2 * BIAS))


def test_no_mask_is_upper_left_causal_or_everything() -> None:
    causal = torch.ones(5, 6, dtype=torch.bool).tril()
    out, expected = attend(None, is_causal=True)
    assert_close(out, expected(causal))
    for options in ({}, {"is_causal": True, "queries": 1}):  # the module is not causal; decoding one token
        out, expected = attend(None, **options)
        assert_close(out, expected(None))


@pytest.mark.parametrize("size", [1, 3, 6, 9])
def test_a_sliding_window_without_a_mask_is_the_one_of_transformers(size: int) -> None:
    def seen(rule: Any, first: int, queries: int = 5) -> Any:
        return rule(0, 0, torch.arange(first, first + queries).unsqueeze(-1), torch.arange(6))

    masking_utils = transformers.masking_utils
    causal = masking_utils.sliding_window_causal_mask_function(size)
    encoder = masking_utils.sliding_window_bidirectional_mask_function(size - 1)  # whose models pass one more
    for keep, options in (
        (seen(causal, 0), {"is_causal": True}),
        (seen(encoder, 0), {"is_causal": False}),
        (seen(causal, 5, 1), {"is_causal": True, "queries": 1}),  # decoding, with every key in the cache
    ):
        out, expected = attend(None, sliding_window=size, **options)
        assert_close(out, expected(keep))


def test_models_with_a_sliding_window_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make("mistral"), tokens(2, 7)
    expected = model(ids, output_attentions=True)
    assert not expected.attentions[0][:, :, 6, :4].any()
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "sa_softmax", lambda *_, **__: None)
    got = model(ids, output_attentions=True)
    assert_close(got.logits, expected.logits)
    for actual, wanted in zip(got.attentions, expected.attentions, strict=True):
        assert_close(actual, wanted)


def test_weights_are_y() -> None:
    model, ids = make("llama"), tokens(2, 6)
    out = model.model(ids, output_attentions=True)
    assert [w.shape for w in out.attentions] == [(2, 4, 6, 6)] * 2
    assert_close(out.last_hidden_state, model.model(ids).last_hidden_state)
    v = torch.randn(2, 2, 6, 3, dtype=torch.float64)
    q, k = torch.randn(2, 4, 5, 3, dtype=torch.float64), torch.randn(2, 2, 6, 3, dtype=torch.float64)
    for options in ({"attention_mask": KEEP}, {"attention_mask": None, "is_causal": True}, {"attention_mask": BIAS}):
        o, y = _attend(Module(), "product", q, k, v, **options, output_attentions=True)
        assert_close((y @ v.repeat_interleave(2, 1)).transpose(1, 2), o)


# What is refused.


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("softcap", 30.0), ("s_aux", torch.zeros(4)), ("indices", torch.zeros(1)), ("cache", object()), ("dropout", 0.1)],
)
def test_what_the_operation_does_not_define_is_refused(keyword: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{keyword}=|cache"):
        attend(KEEP, **{keyword: value})


def test_masks_that_could_mean_two_things_are_refused() -> None:
    with pytest.raises(TypeError, match=r"got torch\.int64.*mask != 0"):
        attend(KEEP.long())
    with pytest.raises(ValueError, match="attention_mask must be"):
        attend(KEEP[:, 0, 0])


def test_architectures_that_ask_for_more_are_refused() -> None:
    gemma = transformers.Gemma2Config(**GROUPED, head_dim=8)
    with pytest.raises(ValueError, match="soft cap"):
        transformers.AutoModel.from_config(gemma, attn_implementation="sa_softmax").eval()(tokens(1, 4))
    gpt_oss = transformers.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="attention sinks"):
        transformers.AutoModel.from_config(gpt_oss, attn_implementation="sa_softmax").eval()(tokens(1, 4))
    bert = make("bert", attention_probs_dropout_prob=0.1)
    bert(tokens(1, 4))
    with pytest.raises(ValueError, match="attention dropout of the config to 0"):
        bert.train()(tokens(1, 4))


@pytest.mark.parametrize("kind", ["Bloom", "Falcon", "GPTJ", "Mpt"])
def test_models_without_the_interface_are_refused(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCAB)
    for key in ("hidden_size", "n_embd", "d_model"):
        if hasattr(config, key):
            setattr(config, key, 16)
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_attention_heads", "n_head", "n_heads"):
        if hasattr(config, key):
            setattr(config, key, 2)
    config.rotary_dim = 4
    with pytest.raises(ValueError, match="does not dispatch through"):
        transformers.AutoModel.from_config(config, attn_implementation="sa_softmax")
    model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match="does not dispatch through"):
        model.set_attn_implementation("sa_softmax")
    with pytest.raises(ValueError, match="does not dispatch through"):
        convert(model)
    assert model.config._attn_implementation == "eager"


# The choice stays with the model.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_reloaded_model_is_still_an_sa_model(name: str, implementation: str, tmp_path: Path) -> None:
    model, inputs = make(name, implementation), inputs_of(name)
    model.save_pretrained(tmp_path / "once")
    auto = getattr(transformers, AUTO.get(name, "AutoModelForCausalLM"))
    again = auto.from_pretrained(tmp_path / "once")
    again.save_pretrained(tmp_path / "twice")
    for path in ("once", "twice"):
        loaded = auto.from_pretrained(tmp_path / path)
        assert loaded.dtype == torch.float64
        # Not bit for bit: the weights are read in place, at addresses that decide in which order a product sums.
        assert_close(loaded(**inputs).logits, model(**inputs).logits)
        assert auto.from_pretrained(tmp_path / path, attn_implementation=implementation) is not None
    # A config that went through hands that drop the name keeps the record of the variant.
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    assert config["attn_implementation"] == implementation
    assert config["sa_softmax"] == IMPLEMENTATIONS[implementation]
    del config["attn_implementation"]
    (tmp_path / "once" / "config.json").write_text(json.dumps(config))
    assert_close(auto.from_pretrained(tmp_path / "once")(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("other", ["sdpa", "eager", "sa_softmax_product"])
def test_loading_with_another_implementation_is_refused(other: str, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained with 'sa_softmax'"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=other)
    config = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation=other)
    with pytest.raises(ValueError, match="trained with 'sa_softmax'"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=config)


def test_the_choice_can_be_changed_on_purpose(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "sa")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sa")
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path / "softmax")
    assert "sa_softmax" not in (tmp_path / "softmax" / "config.json").read_text()
    assert transformers.AutoModel.from_pretrained(tmp_path / "softmax").config._attn_implementation == "sdpa"
    assert transformers.AutoModel.from_config(model.config).config._attn_implementation == "sdpa"


def test_one_config_makes_models_of_every_kind() -> None:
    config = CONFIGS["llama"]()
    for implementation in (*IMPLEMENTATIONS, "sdpa", "sa_softmax"):
        model = transformers.AutoModel.from_config(config, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation


def test_a_process_that_knows_nothing_of_sa_softmax_refuses_the_model(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert 'ValueError: Specified `attn_implementation="sa_softmax"` is not supported' in run.stderr


def test_a_part_of_a_composite_model_keeps_its_choice(tmp_path: Path) -> None:
    vision = {**{k: TINY[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
              "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GROUPED), vision_config=transformers.CLIPVisionConfig(**vision)
    )
    auto = transformers.AutoModelForImageTextToText
    model = auto.from_config(config, attn_implementation={"text_config": "sa_softmax"})
    ids = tokens(1, 4)
    model.save_pretrained(tmp_path / "part")
    stored = json.loads((tmp_path / "part" / "config.json").read_text())
    assert stored["attn_implementation"] == {"text_config": "sa_softmax"}
    loaded = auto.from_pretrained(tmp_path / "part")
    assert loaded.config.text_config._attn_implementation == "sa_softmax"
    assert loaded.config.vision_config._attn_implementation == "sdpa"
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    choices = {"": "sa_softmax", "text_config": "sa_softmax_product", "vision_config": "eager"}
    loaded.set_attn_implementation(choices)
    del choices["vision_config"]
    assert loaded.config.to_dict()["attn_implementation"] == choices
    loaded.set_attn_implementation("sa_softmax_product")
    loaded.save_pretrained(tmp_path / "whole")
    whole = auto.from_pretrained(tmp_path / "whole").config
    assert {whole._attn_implementation, whole.text_config._attn_implementation} == {"sa_softmax_product"}
    assert whole.vision_config._attn_implementation == "sa_softmax_product"


def test_registering_again_changes_nothing() -> None:
    before = transformers.PreTrainedConfig.to_dict, transformers.PreTrainedModel.set_attn_implementation
    register()
    assert before == (transformers.PreTrainedConfig.to_dict, transformers.PreTrainedModel.set_attn_implementation)


def test_other_models_are_saved_as_before(tmp_path: Path) -> None:
    make("llama", "sdpa").save_pretrained(tmp_path)
    assert not {"attn_implementation", "sa_softmax"} & json.loads((tmp_path / "config.json").read_text()).keys()


# Switching a trained model, and starting one.


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_convert_switches_and_measures(name: str) -> None:
    model, inputs = make(name, "sdpa").train(), inputs_of(name)
    before = model.eval()(**inputs).logits
    with pytest.warns(UserWarning, match="does not keep its quality"):
        change = convert(model, inputs=inputs)
    assert change is not None
    after = make(name)(**inputs).logits
    assert torch.equal(model(**inputs).logits, after)
    assert change.relative == pytest.approx(((after - before).norm() / before.norm()).item())
    assert change.largest == pytest.approx((after - before).abs().max().item())
    assert change.agreement == (after.argmax(-1) == before.argmax(-1)).double().mean().item()
    assert f"moved by {change.relative:.1%}" in str(change)


def test_convert_leaves_a_model_that_refuses_as_it_was() -> None:
    config = transformers.Gemma2Config(**GROUPED, head_dim=8)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match="soft cap"):
        convert(model, inputs={"input_ids": tokens(1, 4)})
    assert model.config._attn_implementation == "eager"
    assert model.training
    with pytest.raises(ValueError, match="implementation must be one of"):
        convert(model, "sdpa")
    with pytest.raises(ValueError, match="already runs"):
        convert(make("llama"))


@pytest.mark.parametrize(("name", "projection"), [("llama", "q_proj"), ("llama", "k_proj"), ("gpt2", "c_attn")])
def test_projections_that_start_at_zero_warn(name: str, projection: str) -> None:
    for implementation in IMPLEMENTATIONS:
        model = make(name, implementation)
        for key, parameter in model.named_parameters():
            if projection in key:
                torch.nn.init.zeros_(parameter)
        if implementation == "sa_softmax":
            with pytest.warns(UserWarning, match="exactly 0.*will not learn"):
                model.train()(tokens(1, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.train()(tokens(1, 4))


# Under the tools that people train and deploy with.


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_gradients() -> None:
    model, inputs = make("llama"), inputs_of("llama")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weights = list(model.parameters())
    results = []
    for function in (compiled, model):
        logits = function(**inputs).logits
        results.append((logits, torch.autograd.grad(logits.square().sum(), weights, allow_unused=True)))
    (actual, gradients), (expected, expected_gradients) = results
    assert_close(actual, expected)
    largest = max(g.abs().max().item() for g in expected_gradients if g is not None)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            assert_close(gradient, other, largest)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert"])
def test_exported_for_any_batch_and_length(name: str) -> None:
    model, inputs = make(name), inputs_of(name)
    # AUTO, since torch 2.13 cannot prove min(L, L * L) == L, which it asks of the reshape that groups the heads.
    shapes = {key: dict.fromkeys((0, 1), torch.export.Dim.AUTO) for key in inputs}
    options = {} if name == "bert" else {"use_cache": False}
    program = torch.export.export(model, (), inputs | options, dynamic_shapes=shapes | dict.fromkeys(options))
    other = {"input_ids": tokens(3, 11), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    assert_close(program.module()(**other, **options).logits, model(**other, **options).logits)


def greedy(step: Callable[..., Any], ids: Any, mask: Any, past: list[Any], count: int) -> Any:
    """The tokens that follow, from a function of ids, mask, positions and past: a prefill, then steps of one token."""
    new = ids
    for _ in range(count):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        logits, past = step(new, mask, positions, past)
        new = logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return ids


@pytest.mark.parametrize("name", DECODERS)
def test_the_past_as_tensors_decodes_as_generate_does(name: str) -> None:
    model = make(name)
    function = WithPast(model)
    ids, mask = tokens(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    *_, empty = function.example(2, 5, past=0)
    with torch.no_grad():
        assert torch.equal(
            greedy(function, ids, mask, empty, 6),
            model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False),
        )
        assert [x.shape for x in function(*function.example(3, 2, 4))[1]] == [
            x.shape for x in function.example(3, 0, 6)[3]
        ]


def test_models_without_such_a_past_are_refused() -> None:
    for name in ("t5", "bert"):
        with pytest.raises(ValueError, match="decoder-only"):
            WithPast(make(name))
    mamba = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="must cache keys and values"):
        WithPast(transformers.AutoModelForCausalLM.from_config(mamba))


@pytest.mark.filterwarnings("default")
def test_one_onnx_file_prefills_and_decodes(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make("llama").float()
    function = WithPast(model)
    path = tmp_path / "llama.onnx"
    torch.onnx.export(
        function, function.example(), path, dynamo=True, dynamic_shapes=function.dynamic_shapes(),
        input_names=function.input_names, output_names=function.output_names,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path)
    assert [x.name for x in session.get_inputs()] == function.input_names
    assert [x.name for x in session.get_outputs()] == function.output_names

    def step(ids: Any, mask: Any, positions: Any, past: list[Any]) -> tuple[Any, list[Any]]:
        arguments = [x.numpy() for x in (ids, mask, positions, *past)]
        out = [torch.from_numpy(x) for x in session.run(None, dict(zip(function.input_names, arguments, strict=True)))]
        with torch.no_grad():
            logits, present = function(ids, mask, positions, past)
        for actual, expected in zip(out, (logits, *present), strict=True):
            assert_close(actual, expected)
        return out[0], out[1:]

    for batch in (1, 3):
        ids, mask = tokens(batch, 5), torch.ones(batch, 5, dtype=torch.long)
        mask[0, :2] = 0
        *_, empty = function.example(batch, 5, past=0)
        tokens_out = greedy(step, ids, mask, empty, 4)
        assert torch.equal(tokens_out, model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False))


@pytest.mark.filterwarnings("ignore:.*does not keep its quality")
def test_the_code_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert names["change"].relative > 0
    assert [x.shape for x in names["present"]] == [(2, 2, 7, 16)] * 4
