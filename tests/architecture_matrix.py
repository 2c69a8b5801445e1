"""Which architectures of Transformers pass which checks under SA attention: the checks, and the table of the guide.

    python tests/architecture_matrix.py     # writes the table into docs/transformers.md

All models are tiny, built from configs, in float64; nothing is downloaded.
"""

import inspect
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from sa_softmax.backends.torch.transformers import IMPLEMENTATIONS, register

register()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

GUIDE = Path(__file__).parents[1] / "docs" / "transformers.md"
BEGIN, END = "<!-- written by tests/architecture_matrix.py -->", "<!-- end of the table -->"
VOCAB = 40
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = TINY | {"num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**TINY),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=3),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, attn_pdrop=0.0, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    ),
    "bert": lambda: transformers.BertConfig(**TINY, attention_probs_dropout_prob=0.0),
    "vit": lambda: transformers.ViTConfig(
        **{key: TINY[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
        image_size=8, patch_size=4,
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
    ),
    "whisper": lambda: transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=4, max_source_positions=6,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=2,
    ),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8),
    "gpt_oss": lambda: transformers.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
}  # fmt: skip
REFUSED = ("gemma2", "gpt_oss")
AUTO = {
    "bert": "AutoModelForMaskedLM",
    "vit": "AutoModelForImageClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
}
DECODERS = ("llama", "gpt_neox", "qwen3", "mistral", "gpt2")


def make(name: str, implementation: str = "sa_softmax", **config_changes: Any) -> Any:
    """The same weights for every implementation, large enough for attention to matter."""
    config = CONFIGS[name]()
    config.update(config_changes)
    auto = getattr(transformers, AUTO.get(name, "AutoModelForCausalLM"))
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation=implementation).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(*shape: int, seed: int = 0) -> Any:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(name: str) -> dict[str, Any]:
    """A batch of two: the first row padded on the left, the second on the right, where the model knows padding."""
    noise = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=noise, dtype=torch.float64)}
    if name == "whisper":
        features = torch.randn(2, 4, 12, generator=noise, dtype=torch.float64)
        return {"input_features": features, "decoder_input_ids": tokens(2, 5)}
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 5:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | {"decoder_input_ids": tokens(2, 5, seed=1)} if name == "t5" else inputs


def definition(x: Any, variant: str) -> Any:
    """The row operation as docs/spec.md defines it, where scores of finfo.min are what eager attention has masked.

    Composed so that autograd gives the spec's gradient for rows without ties, and none for rows without entries.
    """
    on = x > torch.finfo(x.dtype).min / 2
    x = torch.where(on, x, 0)
    p = torch.softmax(torch.where(on | ~on.any(-1, keepdim=True), x, -math.inf), -1)
    lo, hi = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    R = torch.where(hi > lo, hi - lo, 1)
    return torch.where(on, (x if variant == "product" else (x - lo) / R) * p, 0)


@contextmanager
def eager_computes(variant: str) -> Iterator[None]:
    """Within, the softmax of the models' own eager attention is the definition."""
    original = F.softmax
    F.softmax = lambda x, dim=-1, dtype=None: definition(x.double(), variant)
    try:
        yield
    finally:
        F.softmax = original


def assert_close(actual: Any, expected: Any, size: float | None = None) -> None:
    """Two layers of sums of at most 40 terms in the dtype at hand, both sides in it, relative to the largest number."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.isfinite(expected).all()
    error, size = (actual - expected).abs().max().item(), size or expected.abs().max().item()
    assert error <= 1e3 * torch.finfo(expected.dtype).eps * size, (error, size)


# The checks. Each returns if the model passes, raises NotApplicable where the architecture has no such thing, and
# otherwise fails: with the sentence of a refusal, or with what went wrong.


class NotApplicable(Exception):
    """The architecture has no such thing."""


def need(condition: Any) -> None:
    if not condition:
        raise NotApplicable


def parameters_of(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def from_config(name: str) -> None:
    """Outputs and the gradients of all parameters are those of the definition in the model's own eager attention."""
    inputs = inputs_of(name)
    keep = inputs.get("attention_mask", torch.ones(2, 1)).bool() if name in (*DECODERS, "bert") else ...
    for implementation, variant in IMPLEMENTATIONS.items():
        model, oracle = make(name, implementation), make(name, "eager")
        logits = model(**inputs).logits
        logits[keep].square().sum().backward()
        softmax = make(name, "sdpa")(**inputs).logits
        with eager_computes(variant):
            expected = oracle(**inputs).logits
            expected[keep].square().sum().backward()
        assert_close(logits[keep], expected[keep])
        assert (softmax[keep] - expected[keep]).abs().max() > 1e-3 * expected.abs().max()
        assert_same_gradients(model, oracle)


def assert_same_gradients(model: Any, oracle: Any) -> None:
    gradients = {key: parameter.grad for key, parameter in oracle.named_parameters() if parameter.grad is not None}
    largest = max(gradient.abs().max().item() for gradient in gradients.values())  # those of key biases are rounding
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (key not in gradients)
        if key in gradients:
            assert_close(parameter.grad, gradients[key], largest)


def save_and_load(name: str) -> None:
    """A reloaded model is the same SA model, of either variant."""
    for implementation in IMPLEMENTATIONS:
        model, inputs = make(name, implementation), inputs_of(name)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder)
            assert loaded.config._attn_implementation == implementation
            assert_close(loaded(**inputs).logits, model(**inputs).logits)


def set_attn_implementation(name: str) -> None:
    """There and back."""
    model, inputs = make(name, "eager"), inputs_of(name)
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        assert torch.equal(model(**inputs).logits, make(name, implementation)(**inputs).logits)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**inputs).logits, make(name, "sdpa")(**inputs).logits)


GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def prompt_of(name: str) -> dict[str, Any]:
    if name == "whisper":
        return inputs_of(name) | {"decoder_input_ids": tokens(2, 2)}
    if name == "t5":
        return {key: value for key, value in inputs_of(name).items() if key != "decoder_input_ids"}
    return {"input_ids": tokens(2, 5), "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}


def cached(name: str, **options: Any) -> None:
    """``generate`` gives the tokens that it gives without a cache."""
    model = make(name)
    need(model.can_generate())
    uncached = model.generate(**prompt_of(name), **GREEDY, use_cache=False)
    assert torch.equal(model.generate(**prompt_of(name), **GREEDY, **options), uncached)


def dynamic_cache(name: str) -> None:
    cached(name)
    if name in DECODERS:
        cache_in_steps(name, lambda config: transformers.DynamicCache(config=config))


def static_cache(name: str) -> None:
    cached(name, cache_implementation="static")
    if name in DECODERS:
        cache_in_steps(name, lambda config: transformers.StaticCache(config=config, max_cache_len=12))


def cache_in_steps(name: str, make_cache: Callable[[Any], Any]) -> Any:
    """A prefill and steps of one token give the logits of one call without a cache."""
    model, ids = make(name), tokens(2, 9)
    cache = make_cache(model.config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in (ids[:, :5], *ids[:, 5:].split(1, 1))]
        assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits)
    return cache


def sliding_cache(name: str) -> None:
    """A cache that keeps the window only, over three times its length."""
    need(getattr(make(name).config, "sliding_window", None))
    cached(name)
    cache = cache_in_steps(name, lambda config: transformers.DynamicCache(config=config))
    assert all(cache.is_sliding)
    assert max(layer.keys.shape[-2] for layer in cache.layers) < 9


def padding(name: str, left: bool) -> None:
    """Padded rows give the logits, and on the left the generated tokens, of rows without padding."""
    model, ids, pads = make(name), tokens(2, 5), tokens(2, 3, seed=2)
    need(name not in ("vit", "whisper"))  # whose inputs all have one length
    mask = torch.cat([torch.zeros_like(pads), torch.ones_like(ids)], 1)
    padded = torch.cat([pads, ids] if left else [ids, pads], 1)
    mask = mask if left else mask.flip(1)
    inputs = {"input_ids": padded, "attention_mask": mask}
    if name == "t5":
        decoder = {"decoder_input_ids": tokens(2, 5, seed=1)}
        assert_close(model(**inputs, **decoder).logits, model(ids, **decoder).logits)
        return
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    plain = model(ids, attention_mask=torch.ones_like(ids)).logits
    assert_close(model(**inputs).logits[mask.bool()].view_as(plain), plain)
    if left and model.can_generate():
        del inputs["position_ids"]
        assert torch.equal(model.generate(**inputs, **GREEDY)[:, 8:], model.generate(ids, **GREEDY)[:, 5:])


def left_padding(name: str) -> None:
    padding(name, left=True)


def right_padding(name: str) -> None:
    padding(name, left=False)


def grouped_heads(name: str) -> None:
    """Key and value heads that serve several query heads equal as many copies of them."""
    model = make(name)
    heads, groups = model.config.num_attention_heads, getattr(model.config, "num_key_value_heads", None)
    need(groups not in (None, heads))
    repeated, inputs = make(name, num_key_value_heads=heads), inputs_of(name)
    weights = model.state_dict()
    for key, weight in weights.items():
        if "k_proj" in key or "v_proj" in key:
            weights[key] = weight.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0).flatten(0, 1)
    repeated.load_state_dict(weights)
    keep = inputs["attention_mask"].bool()
    assert_close(model(**inputs).logits[keep], repeated(**inputs).logits[keep])


def packed_sequences(name: str) -> None:
    """Sequences in one row give the logits of each alone, whichever way their boundaries are told."""
    model, parts = make(name), [tokens(1, 4), tokens(1, 1, seed=2), tokens(1, 3, seed=1)]
    need("position_ids" in parameters_of(model))
    alone = torch.cat([model(part).logits for part in parts], 1)
    rows = [{"input_ids": part[0].tolist()} for part in parts]
    batch = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    del batch["labels"]
    assert_close(model(**batch).logits, alone)
    restarting = {key: batch[key] for key in ("input_ids", "position_ids")}
    if name != "bert":  # an encoder is not given the boundaries by its positions, under any attention
        for use_cache in (True, False):
            assert_close(model(**restarting, use_cache=use_cache).logits, alone)
    unpacked = model(batch["input_ids"]).logits
    assert (unpacked - alone).abs().max() > 1e-3 * alone.abs().max()


def position_bias(name: str) -> None:
    """The bias reaches the scores, and its gradient is the definition's (see from_config)."""
    model = make(name)
    biases = [weight for key, weight in model.named_parameters() if "relative_attention_bias" in key]
    need(biases)
    model(**inputs_of(name)).logits.square().sum().backward()
    assert all(bias.grad.abs().max() > 0 for bias in biases)


def compiled(name: str) -> None:
    """In one graph, with the outputs of eager mode."""
    model, inputs = make(name), inputs_of(name)
    torch.compiler.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Function'> should not be instantiated", DeprecationWarning)
        expected = model(**inputs).logits
        assert_close(torch.compile(model, fullgraph=True, backend="eager")(**inputs).logits, expected)


def gradient_checkpointing(name: str) -> None:
    """The gradients are those without it."""
    for reentrant in (True, False):
        plain, checkpointed = make(name).train(), make(name).train()
        checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
        options = {"use_cache": False} if "use_cache" in parameters_of(plain) else {}
        for model in (plain, checkpointed):
            torch.manual_seed(0)  # of the dropout outside of attention
            model(**inputs_of(name), **options).logits.square().sum().backward()
        assert_same_gradients(checkpointed, plain)


def trainer(name: str) -> None:
    """The loss falls, and the checkpoint is an SA model."""
    row = {key: value[1] for key, value in inputs_of(name).items() if key != "decoder_input_ids"}
    row["labels"] = torch.tensor(1) if name == "vit" else tokens(7)
    model = make(name).float()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("default")
        args = transformers.TrainingArguments(
            folder, max_steps=6, learning_rate=1e-2, lr_scheduler_type="constant", per_device_train_batch_size=2,
            logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, save_steps=6,
        )  # fmt: skip
        rows = [{key: value.float() if value.is_floating_point() else value for key, value in row.items()}] * 2
        run = transformers.Trainer(model, args, train_dataset=rows)
        run.remove_callback(transformers.PrinterCallback)
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert losses[-1] < 0.9 * losses[0], losses
        saved = type(model).from_pretrained(f"{folder}/checkpoint-6")
    assert saved.config._attn_implementation == "sa_softmax"


CHECKS: dict[str, Callable[[str], None]] = {
    "from_config": from_config,
    "save, load": save_and_load,
    "set_attn_implementation": set_attn_implementation,
    "dynamic cache": dynamic_cache,
    "static cache": static_cache,
    "sliding cache": sliding_cache,
    "left padding": left_padding,
    "right padding": right_padding,
    "grouped heads": grouped_heads,
    "packed sequences": packed_sequences,
    "position_bias": position_bias,
    "torch.compile": compiled,
    "gradient checkpointing": gradient_checkpointing,
    "Trainer": trainer,
}
TITLES = {
    "llama": "Llama", "gpt_neox": "GPT-NeoX", "qwen3": "Qwen3", "mistral": "Mistral", "gpt2": "GPT-2", "bert": "BERT",
    "vit": "ViT", "t5": "T5", "whisper": "Whisper", "gemma2": "Gemma 2", "gpt_oss": "GPT-OSS",
}  # fmt: skip


def result(name: str, check: str) -> str:
    """What a cell of the table says; anything but a pass, a refusal, or no such thing propagates."""
    try:
        CHECKS[check](name)
    except NotApplicable:
        return "-"
    except ValueError as error:
        if "SA attention does not define" not in str(error):
            raise
        return "refused"
    return "yes"


def table(results: dict[tuple[str, str], str]) -> str:
    rows = [("", *(TITLES[name] for name in CONFIGS)), ("---",) * (len(CONFIGS) + 1)]
    rows += [(check, *(results[name, check] for name in CONFIGS)) for check in CHECKS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    before, _, rest = GUIDE.read_text().partition(BEGIN)
    cells = {(name, check): result(name, check) for name in CONFIGS for check in CHECKS}
    GUIDE.write_text(f"{before}{BEGIN}\n\n{table(cells)}\n\n{END}{rest.partition(END)[2]}")
