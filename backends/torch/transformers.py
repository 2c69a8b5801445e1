"""SA attention in the models of Hugging Face Transformers: one call registers it, one argument selects it.

    register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sa_softmax")

Transformers hands its attention functions masks in many forms; each becomes participation before the row operation
sees it, because a score of finfo.min that takes part would set lo, and turn ``normalized`` back into softmax (C7).
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from sa_softmax.backends.torch import sa_attention
from sa_softmax.backends.torch._attention import combined_mask, window
from sa_softmax.backends.torch._integration import participation, warn_of_zeros, weights

__all__ = ["IMPLEMENTATIONS", "Change", "WithPast", "convert", "register"]

IMPLEMENTATIONS = {"sa_softmax": "normalized", "sa_softmax_product": "product"}
"""The values of ``attn_implementation`` that :func:`register` adds, and the variant that each of them computes."""

# Besides the name of the implementation, which transformers itself reads, a saved config holds its variant under this
# key: it outlives loaders that ask for another implementation, and processes that know nothing of this module.
_RECORD = "sa_softmax"

# Keywords by which models ask for something that SA attention has no definition for.
_REFUSED = {
    "softcap": "a soft cap on the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "a sparse choice of keys",
    "block_indices": "a sparse choice of keys",
    "cache": "the paged cache of continuous batching",
}


def register() -> None:
    """Make SA attention available to every model of Transformers that dispatches through its attention interface.

    Afterwards ``from_config``, ``from_pretrained`` and ``model.set_attn_implementation`` take
    ``attn_implementation="sa_softmax"`` (normalized) or ``"sa_softmax_product"``: O = Y V with Y the row operation over
    scaling * Q K^T + position_bias + additive mask. Calling it again changes nothing.

    A query [B, Hq, Q, D], key [B, Hkv, K, D] and value [B, Hkv, K, Dv] give [B, Q, Hq, Dv]; a query whose keys are all
    masked, of left padding say, gets 0. Masks may be boolean (True participates), additive (entries of at most half the
    lowest number of the mask's dtype exclude, every other value is bias), or absent. ``output_attentions=True`` in the
    call returns Y, whose rows do not sum to 1.

    So that no model trains or runs with softmax where SA attention was meant, registration also extends Transformers:

    - A saved config records the choice, and a model made from such a config is an SA model again. Where this module is
      not registered, Transformers refuses the unknown name; where another implementation is asked for while loading,
      the model refuses. ``set_attn_implementation`` on the loaded model is the deliberate way to change it.
    - A model, or a part of one, that does not dispatch through the interface raises where it would ignore the choice.

    Raises:
        ValueError: later, when models are made, switched or run: a model without the interface; a recorded choice that
            differs from the requested one; softcap, attention sinks, sparse indices, a paged cache, dropout; masks
            that are not 4-d.
        TypeError: likewise, masks that are neither boolean nor floating.

    Source: docs/spec.md, clauses A and C7.
    """
    if "sa_softmax" in AttentionInterface._global_mapping:
        return
    for name, attend in (("sa_softmax", _normalized_attention), ("sa_softmax_product", _product_attention)):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, _boolean_mask)
    _extend(PreTrainedConfig, "to_dict", _to_dict)
    _extend(PreTrainedModel, "get_correct_attn_implementation", _get_correct_attn_implementation)
    _extend(PreTrainedModel, "set_attn_implementation", _set_attn_implementation)


@dataclass(frozen=True)
class Change:
    """How far the outputs of a model moved when its attention was switched, without training.

    ``relative`` is the Euclidean norm of the difference over that of the output before, ``largest`` the greatest
    difference of one number, ``agreement`` the share of positions whose greatest logit is still the same one (None for
    a model without logits). All numbers of the output count, those at padded positions too.
    """

    implementation: str
    relative: float
    largest: float
    agreement: float | None

    def __str__(self) -> str:
        text = f"{self.implementation}: outputs moved by {self.relative:.1%} (at most {self.largest:.3g})"
        return text if self.agreement is None else f"{text}, {self.agreement:.1%} of the top predictions unchanged"


def convert(
    model: PreTrainedModel, implementation: str = "sa_softmax", *, inputs: Mapping[str, Any] | None = None
) -> Change | None:
    """Switch the attention of a trained model, in place, and measure how far its outputs move on ``inputs``.

    A model that was trained with softmax does not keep its quality: finetune it, or train it again. Every call warns
    so, since the weights cannot tell.

    Args:
        model: any model that dispatches through Transformers' attention interface.
        implementation: "sa_softmax" or "sa_softmax_product".
        inputs: keyword arguments of the model's call. It runs twice, in evaluation mode and without gradients.

    Returns:
        The :class:`Change` of the logits, or of the last hidden state; None without ``inputs``.

    Raises:
        ValueError: unknown implementation, or the one that runs already; a model without the interface; outputs
            without logits and hidden state; a run in which nothing moved, so that no attention can have been switched;
            what the attention itself refuses (see :func:`register`). The model is then left as it was.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(map(repr, IMPLEMENTATIONS))}; got {implementation!r}"
        )
    register()
    previous = model.config._attn_implementation
    if previous == implementation:
        raise ValueError(
            f"{type(model).__name__} already runs {implementation!r}. If it should not: from_config writes the "
            "implementation into the config it is given, for every model made from it later. Name one each time"
        )
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    implementations = [config._attn_implementation for config in configs]
    before = None if inputs is None else _output(model, inputs)
    change = None
    try:
        model.set_attn_implementation(implementation)
        if inputs is not None:
            change = _change(implementation, before, _output(model, inputs))
            if change.largest == 0:
                raise ValueError(
                    f"{type(model).__name__} computes the same outputs under {previous!r} and {implementation!r}: no "
                    "attention of it can have been switched. Pass inputs of more than one token"
                )
    except Exception:
        for config, name in zip(configs, implementations, strict=True):
            config._attn_implementation_internal = name
        raise
    warnings.warn(
        f"{type(model).__name__} now runs {implementation!r}. A model that was trained with another attention does not "
        "keep its quality; finetune it or train it anew" + ("" if change is None else f" ({change})"),
        stacklevel=2,
    )
    return change


def _output(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            outputs = model(**inputs)
    finally:
        model.train(training)
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(outputs, name, None), Tensor):
            return {name: outputs[name].double()}
    raise ValueError(f"to measure the change, the outputs must hold logits or last_hidden_state; got {list(outputs)}")


def _change(implementation: str, before: Any, after: dict[str, Tensor]) -> Change:
    ((name, x),), ((_, y),) = before.items(), after.items()
    agreement = (x.argmax(-1) == y.argmax(-1)).double().mean().item() if name == "logits" else None
    return Change(implementation, ((y - x).norm() / x.norm()).item(), (y - x).abs().max().item(), agreement)


class WithPast(nn.Module):
    """A causal language model as a function of tensors alone, for export to ONNX.

    The keys and values of the past go in and come out as tensors, so one graph serves the prefill, with a past of
    length 0, and each step of decoding::

        model = WithPast(AutoModelForCausalLM.from_pretrained(path))
        sa_softmax.onnx_export.export(model, model.example(), "model.onnx", dynamic=model.dynamic_shapes())

    Args:
        model: a decoder-only model whose layers all cache keys and values. It is set to evaluation mode.

    Attributes:
        input_names: input_ids, attention_mask, position_ids, past_key_values.0.key, past_key_values.0.value, ...
        output_names: logits, present.0.key, present.0.value, ...
        past_shapes: (Hkv, D) of each tensor of the past, keys and values of a layer in turn.

    Raises:
        ValueError: a model that is not decoder-only, or keeps a state of another kind in a layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        if not model.can_generate() or model.config.is_encoder_decoder:
            raise ValueError(f"model must be a decoder-only language model; got {type(model).__name__}")
        self.model = model
        self.train(False)
        with torch.no_grad():
            outputs = model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
        layers = getattr(outputs.get("past_key_values"), "layers", [])
        states = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        past = [x for x in states if isinstance(x, Tensor) and x.ndim == 4]
        if not past or len(past) < len(states):
            raise ValueError(f"every layer of {type(model).__name__} must cache keys and values; some do not")
        self.past_shapes = [(x.shape[1], x.shape[3]) for x in past]
        pairs = [f"{layer}.{kind}" for layer in range(len(layers)) for kind in ("key", "value")]
        self.input_names = [
            "input_ids",
            "attention_mask",
            "position_ids",
            *(f"past_key_values.{pair}" for pair in pairs),
        ]
        self.output_names = ["logits", *(f"present.{pair}" for pair in pairs)]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The logits of new tokens, and the past with them.

        Args:
            input_ids: (B, T) integers, the new tokens.
            attention_mask: (B, P + T) integers, 0 where past or new tokens are padding.
            position_ids: (B, T) integers, the positions of the new tokens, padding not counted.
            past: (B, Hkv, P, D) for keys and values of each layer in turn.

        Returns:
            Logits (B, T, vocabulary), and (B, Hkv, P + T, D) for keys and values of each layer.
        """
        cache = DynamicCache(zip(past[::2], past[1::2], strict=True))
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
        )
        return outputs.logits, [x for layer in outputs.past_key_values.layers for x in (layer.keys, layer.values)]

    def example(self, batch: int = 2, length: int = 3, past: int = 4) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Arguments of :meth:`forward`, to trace it with. Sizes of 0 and 1 would be taken for constants."""
        device, dtype = self.model.device, self.model.dtype
        return (
            torch.zeros(batch, length, dtype=torch.long, device=device),
            torch.ones(batch, past + length, dtype=torch.long, device=device),
            torch.arange(past, past + length, device=device).repeat(batch, 1),
            [torch.zeros(batch, heads, past, dim, device=device, dtype=dtype) for heads, dim in self.past_shapes],
        )

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """The axes that may have any length, by name, for sa_softmax.onnx_export and torch.onnx.export."""
        tokens = {0: "batch", 1: "length"}
        return tokens, {0: "batch", 1: "past + length"}, tokens, [{0: "batch", 2: "past"} for _ in self.past_shapes]


# The attention function and the mask function.


def _normalized_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend(module, "normalized", *args, **kwargs)


def _product_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend(module, "product", *args, **kwargs)


def _boolean_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """``sdpa_mask`` that always gives the mask [B, 1, Q, K], True where a key participates.

    The None in which it would rather say "causal", or "everything", leaves the attention function to guess which: in
    the prefill of a static cache, keys that are not filled yet would take part.
    """
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _attend(
    module: nn.Module,
    variant: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"SA attention does not define {what}, which {type(module).__name__} asks for with {name}=. "
                "Choose an architecture without it, or turn it off in the config"
            )
    if dropout > 0:
        raise ValueError(
            f"SA attention has no dropout; {type(module).__name__} asks for dropout={dropout} in training. "
            "Set the attention dropout of the config to 0 (attention_dropout, attention_probs_dropout_prob, "
            "attn_pdrop or dropout_rate, by architecture)"
        )
    mask, bias = _participation(query.dtype, attention_mask, position_bias)
    q_offset, left, right = 0, -1, -1
    if attention_mask is None:
        # Transformers' meaning of None: upper-left causal, except that a single query, decoding, is the last key's.
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        decoding = query.shape[-2] == 1
        if sliding_window is not None:  # keys nearer than this many positions
            left = right = sliding_window - 1
            q_offset = key.shape[-2] - 1 if causal and decoding else 0
        if causal and not decoding:
            right = 0
    packing = _packing(query, key, position_ids, use_cache, cu_seq_lens_q, cu_seq_lens_k)
    if packing is not None:
        mask = packing if mask is None else mask & packing
    if variant == "normalized" and module.training and bias is None:
        warn_of_zeros(module, query, key, "'sa_softmax_product'")
    out = sa_attention(
        query, key, value, variant=variant, bias=bias, mask=mask, q_offset=q_offset, scale=scaling,
        window_size=(left, right),
    )  # fmt: skip
    y = None
    if output_attentions:
        seen = combined_mask(query, key, mask, *window(q_offset, left, right))
        y = weights(query, key, bias, seen, scaling, variant)
    return out.transpose(1, 2).contiguous(), y


def _participation(
    dtype: torch.dtype, attention_mask: Tensor | None, position_bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The boolean mask and the bias, in the dtype that queries of ``dtype`` are computed in, of masks of any form."""
    mask: Tensor | None = None
    bias: Tensor | None = None
    for name, given in (("attention_mask", attention_mask), ("position_bias", position_bias)):
        if given is None:
            continue
        if given.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, queries, keys] in attention; got {tuple(given.shape)}")
        keep, added = participation(given, name, dtype)
        mask = keep if mask is None else mask & keep
        if added is not None:
            bias = added if bias is None else bias + added
    return mask, bias


def _packing(
    query: Tensor, key: Tensor, position_ids: Tensor | None, use_cache: bool | None,
    cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """True where query and key are of one of the sequences packed in a row; None where the mask says so, or nothing is.

    Boundaries come as cumulative lengths, or as positions that start again: that fall, or, after a sequence of one
    token, are the first once more. (The tokens of an image may share a position.) Without a cache Transformers reads
    them into the mask; with one, which models make whenever ``config.use_cache`` says so, it does not.
    """
    queries, keys = query.shape[-2], key.shape[-2]
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if cu_seq_lens_q is None or cu_seq_lens_k is None or len(query) > 1:
            raise ValueError(
                "packed sequences must come in one row, with both cu_seq_lens_q and cu_seq_lens_k; got a batch of "
                f"{len(query)}, cu_seq_lens_q {_shape(cu_seq_lens_q)}, cu_seq_lens_k {_shape(cu_seq_lens_k)}"
            )
        of_query, of_key = _sequence(cu_seq_lens_q, queries), _sequence(cu_seq_lens_k, keys)
        return (of_query.unsqueeze(-1) == of_key)[None, None]
    if not use_cache or position_ids is None or position_ids.ndim != 2 or torch.compiler.is_exporting():
        return None
    if queries != keys or queries == 1:
        return None  # decoding, or a cache that was filled before
    step, first = position_ids.diff(dim=-1), position_ids[:, 1:] == position_ids[:, :1]
    sequence = F.pad(((step < 0) | (step == 0) & first).cumsum(-1), (1, 0))
    return (sequence.unsqueeze(-1) == sequence.unsqueeze(-2)).unsqueeze(1)


def _sequence(cu_seq_lens: Tensor, length: int) -> Tensor:
    """The number of the sequence that each of ``length`` tokens is part of."""
    tokens = torch.arange(length, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    return torch.searchsorted(cu_seq_lens[1:], tokens, right=True)


def _shape(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else tuple(x.shape)


# What registration adds to the classes of Transformers.


def _extend(cls: type, name: str, extension: Callable[..., Any]) -> None:
    """Replace a method by ``extension``, which gets the method as its first argument."""
    original = getattr(cls, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return extension(original, self, *args, **kwargs)

    setattr(cls, name, method)


def _to_dict(original: Callable[..., dict[str, Any]], config: PreTrainedConfig) -> dict[str, Any]:
    """Transformers drops the implementation when it serialises a config, but reads ``attn_implementation`` from one."""
    output = original(config)
    output.pop(_RECORD, None)
    selection = _selection(config)
    if selection is not None:
        output["attn_implementation"] = selection
    if (own := _own(config)) is not None:
        output[_RECORD] = IMPLEMENTATIONS[own]
    return output


def _selection(config: PreTrainedConfig) -> str | dict[str, Any] | None:
    """The value of ``attn_implementation`` that brings SA attention back: a name, or one for each part that has it."""
    own = _own(config)
    chosen = {key: _selection(part) for key, part in _parts(config).items()}
    if all(name == own for name in chosen.values()):
        return own
    return ({} if own is None else {"": own}) | {key: name for key, name in chosen.items() if name is not None}


def _own(config: PreTrainedConfig) -> str | None:
    name = getattr(config, "_attn_implementation", None)  # not there yet while a config is being made
    return name if name in IMPLEMENTATIONS else None


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {key: part for key, part in parts.items() if isinstance(part, PreTrainedConfig)}


def _get_correct_attn_implementation(
    original: Callable[..., str], model: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False
) -> str:
    """Called for each model and submodel, when it is made and when its implementation is set."""
    config = model.config
    recorded = getattr(config, _RECORD, None)
    if is_init_check and recorded is not None:
        trained = next((name for name, variant in IMPLEMENTATIONS.items() if variant == recorded), None)
        if trained is None:
            raise ValueError(f"config.{_RECORD} must be 'normalized' or 'product'; got {recorded!r}")
        if requested_attention is None:
            requested_attention = trained
        elif requested_attention != trained:
            raise ValueError(
                f"the config of {type(model).__name__} says that it was trained with {trained!r} ({recorded} SA "
                f"attention), but attn_implementation={requested_attention!r} was requested, which computes something "
                f"else. Load it with {trained!r}; to change it on purpose, call set_attn_implementation afterwards"
            )
    if requested_attention in IMPLEMENTATIONS:
        _check_interface(model)
    chosen = original(model, requested_attention, is_init_check)
    if recorded is not None:
        delattr(config, _RECORD)  # from here on the implementation itself is the record
    return chosen


def _set_attn_implementation(
    original: Callable[..., None], model: PreTrainedModel, attn_implementation: str | dict[str, Any], *args: Any,
    **kwargs: Any,
) -> None:  # fmt: skip
    """Transformers only logs a warning where a model, or a part of one, ignores the choice."""
    wanted = _wanted(model.config, attn_implementation)
    for module in model.modules():
        # As Transformers has it, a submodel whose config is none of the parts follows the whole.
        if isinstance(module, PreTrainedModel) and (
            wanted.get(id(module.config), wanted[id(model.config)]) in IMPLEMENTATIONS
        ):
            _check_interface(module)
    original(model, attn_implementation, *args, **kwargs)


def _wanted(config: PreTrainedConfig, choice: str | dict[str, Any] | None) -> dict[int, str | None]:
    """The implementation that ``choice`` names for a config and each of its parts, by identity."""
    by_part = choice if isinstance(choice, dict) else dict.fromkeys(("", *config.sub_configs), choice)
    wanted = {id(config): by_part.get("")}
    for key, part in _parts(config).items():
        wanted |= _wanted(part, by_part.get(key))
    return wanted


def _check_interface(model: PreTrainedModel) -> None:
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} of Transformers {transformers.__version__} does not dispatch through its "
            "attention interface: it would go on with softmax. Choose an architecture that does; "
            "a class of your own must be defined in a file, since Transformers reads its source to tell"
        )
