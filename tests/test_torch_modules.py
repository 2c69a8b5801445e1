"""Modules in the place of PyTorch's: nn.MultiheadAttention's interface over the reference's numbers, and the switch."""

import copy
import inspect
import math
from typing import Any

import pytest
from support import VARIANTS

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from sa_softmax import reference  # noqa: E402
from sa_softmax.backends.torch import SAMultiheadAttention, convert_module  # noqa: E402

E, H, N, L, S = 8, 2, 3, 4, 5
CAUSAL = torch.ones(L, S, dtype=torch.bool).triu(1)  # True excludes


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(variant: str = "normalized", **options: Any) -> SAMultiheadAttention:
    torch.manual_seed(0)
    module = SAMultiheadAttention(E, H, batch_first=True, dtype=torch.float64, variant=variant, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def inputs_of(module: SAMultiheadAttention) -> tuple[Any, Any, Any]:
    return random(N, L, E), random(N, S, module.kdim, seed=1), random(N, S, module.vdim, seed=2)


def expected(module: Any, query: Any, key: Any, value: Any, mask: Any = None, bias: Any = None) -> tuple[Any, Any]:
    """Output (N, L, E) and Y (N, H, L, S'), from the state dict and the reference; ``mask``: True participates."""
    state = {name: weight.numpy() for name, weight in module.state_dict().items()}
    packed = "in_proj_weight" in state
    maps = state["in_proj_weight"].reshape(3, E, -1) if packed else [state[f"{x}_proj_weight"] for x in "qkv"]
    biases = state.get("in_proj_bias", torch.zeros(3 * E).numpy()).reshape(3, E)
    q, k, v = (torch.from_numpy(x.numpy() @ w.T + b) for x, w, b in zip((query, key, value), maps, biases, strict=True))
    if "bias_k" in state:
        k, v = (torch.cat([x, module.state_dict()[b].expand(N, 1, E)], 1) for x, b in ((k, "bias_k"), (v, "bias_v")))
    if module.add_zero_attn:
        k, v = (torch.cat([x, torch.zeros(N, 1, E)], 1) for x in (k, v))
    q, k, v = (x.reshape(N, -1, H, E // H).transpose(1, 2).numpy() for x in (q, k, v))
    added = k.shape[2] - S
    keep = torch.ones(N, H, L, S, dtype=torch.bool) if mask is None else mask.expand(N, H, L, S)
    plus = torch.zeros(N, H, L, S, dtype=torch.float64) if bias is None else bias.expand(N, H, L, S)
    keep, plus = nn.functional.pad(keep, (0, added), value=True).numpy(), nn.functional.pad(plus, (0, added)).numpy()
    out = reference.sa_attention(q, k, v, variant=module.variant, mask=keep, bias=plus)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(E // H) + plus
    y = reference.sa_softmax(scores, variant=module.variant, where=keep)
    out = out.swapaxes(1, 2).reshape(N, L, E) @ state["out_proj.weight"].T + state.get("out_proj.bias", 0)
    return torch.from_numpy(out), torch.from_numpy(y)


def assert_close(actual: Any, expected: Any) -> None:
    """Sums of at most 8 terms, in float64, three times over."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e3 * torch.finfo(torch.float64).eps * expected.abs().max()


# Numbers.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"kdim": 6, "vdim": 7}, {"add_bias_kv": True}, {"add_bias_kv": True, "add_zero_attn": True}],
    ids=str,
)
def test_output_and_weights_are_the_reference_s(variant: str, options: dict[str, Any]) -> None:
    module = make(variant, **options)
    inputs = inputs_of(module)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 3:], padding[2, 0] = True, True
    out, y = module(*inputs, attn_mask=CAUSAL, key_padding_mask=padding, average_attn_weights=False)
    o, weights = expected(module, *inputs, mask=~CAUSAL & ~padding[:, None, None])
    assert_close(out, o)
    assert_close(y, weights)
    assert torch.equal(module(*inputs, attn_mask=CAUSAL, key_padding_mask=padding)[1], y.mean(1))
    alone, none = module(*inputs, attn_mask=CAUSAL, key_padding_mask=padding, need_weights=False)
    assert none is None
    assert torch.equal(alone, out)


def test_a_query_whose_keys_are_all_masked_gets_the_output_bias() -> None:
    module = make()
    out, y = module(*inputs_of(module), key_padding_mask=torch.ones(N, S, dtype=torch.bool))
    assert (y == 0).all()
    assert torch.equal(out, module.out_proj.bias.expand(N, L, E))


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float64).min])
def test_additive_masks_exclude_or_are_bias(lowest: float) -> None:
    module, bias = make(), random(N, H, L, S, seed=3)
    inputs = inputs_of(module)
    o, y = expected(module, *inputs, mask=~CAUSAL, bias=bias)
    out, weights = module(*inputs, attn_mask=bias.masked_fill(CAUSAL, lowest).flatten(0, 1), average_attn_weights=False)
    assert_close(out, o)
    assert_close(weights, y)
    padding = random(N, S, seed=4)
    keep = torch.ones(N, S, dtype=torch.bool)
    keep[0, 1] = False
    out, _ = module(*inputs, attn_mask=CAUSAL, key_padding_mask=padding.masked_fill(~keep, lowest))
    assert_close(out, expected(module, *inputs, mask=~CAUSAL & keep[:, None, None], bias=padding[:, None, None])[0])


def test_axes_may_stand_in_any_of_the_three_ways() -> None:
    module = make()
    query, key, value = inputs_of(module)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, 2:] = True
    out, y = module(query, key, value, key_padding_mask=padding)
    single = module(query[0], key[0], value[0], key_padding_mask=padding[0])
    assert_close(single[0], out[0])
    assert_close(single[1], y[0])
    module.batch_first = False
    swapped = module(*(x.transpose(0, 1) for x in (query, key, value)), key_padding_mask=padding)
    assert_close(swapped[0], out.transpose(0, 1))
    assert_close(swapped[1], y)


def test_gradients_are_those_of_differences() -> None:
    module, mask = make(), random(L, L, seed=3).masked_fill(CAUSAL[:, :L], -math.inf).requires_grad_()
    x = random(N, L, E).requires_grad_()

    def function(x: Any, *parameters: Any) -> Any:
        return torch.func.functional_call(
            module, dict(zip(dict(module.named_parameters()), parameters, strict=True)), (x, x, x), {"attn_mask": mask}
        )[0]

    assert torch.autograd.gradcheck(function, (x, *module.parameters()), fast_mode=True)
    function(x, *module.parameters()).sum().backward()
    assert (mask.grad[~CAUSAL[:, :L]] != 0).any()
    assert (mask.grad[CAUSAL[:, :L]] == 0).all()


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_in_one_graph() -> None:
    module = make()
    inputs = inputs_of(module)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(compiled(*inputs, attn_mask=CAUSAL)[0], module(*inputs, attn_mask=CAUSAL)[0])


# The interface of nn.MultiheadAttention.


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 6, "vdim": 7}, {"add_bias_kv": True}], ids=lambda x: "".join(x)
)
def test_state_dicts_are_those_of_pytorch(options: dict[str, Any]) -> None:
    theirs, ours = nn.MultiheadAttention(E, H, **options), SAMultiheadAttention(E, H, **options)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(0)
    for a, b in zip(theirs.parameters(), SAMultiheadAttention(E, H, **options).parameters(), strict=True):
        assert torch.equal(a, b)


def test_signatures_are_those_of_pytorch() -> None:
    for method in ("__init__", "forward"):
        theirs, ours = (
            {p.name: p.default for p in inspect.signature(getattr(cls, method)).parameters.values()}
            for cls in (nn.MultiheadAttention, SAMultiheadAttention)
        )
        assert list(theirs.items()) == [item for item in ours.items() if item[0] != "variant"]


def test_what_is_refused() -> None:
    module = make(dropout=0.1)
    inputs = inputs_of(module)
    with pytest.raises(ValueError, match=r"no dropout.*dropout=0\.1"):
        module(*inputs)
    module.eval()(*inputs)
    with pytest.raises(ValueError, match="attn_mask is the causal mask"):
        module(*inputs, is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask must have shape \(4, 5\) or \(6, 4, 5\); got \(3, 4, 5\)"):
        module(*inputs, attn_mask=CAUSAL.expand(N, L, S))
    with pytest.raises(ValueError, match="key_padding_mask must have shape"):
        module(*inputs, key_padding_mask=torch.zeros(S, N, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"attn_mask must be boolean.*uint8"):
        module(*inputs, attn_mask=CAUSAL.byte())
    with pytest.raises(ValueError, match="variant must be"):
        SAMultiheadAttention(E, H, variant="softmax")
    nested = torch.nested.as_nested_tensor([random(2, E), random(3, E)], layout=torch.jagged)
    with pytest.raises(ValueError, match="nested"):
        module(nested, nested, nested)


def test_projections_that_start_at_zero_warn() -> None:
    module = make()
    nn.init.zeros_(module.in_proj_weight)
    nn.init.zeros_(module.in_proj_bias)
    with pytest.warns(UserWarning, match="exactly 0.*will not learn"):
        module(*inputs_of(module))
    product = make("product")
    nn.init.zeros_(product.in_proj_weight)
    product(*inputs_of(product))


# The switch.


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, dtype=torch.float64, **options).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The variant of every call of SAMultiheadAttention."""
    seen: list[str] = []
    forward = SAMultiheadAttention.forward

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.variant)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SAMultiheadAttention, "forward", record)
    return seen


def by_hand(layer: Any, x: Any, keep: Any) -> Any:
    """A post-norm encoder layer with ReLU around the attention of the reference."""
    x = layer.norm1(x + reference_self_attention(layer.self_attn, x, keep))
    return layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))


def reference_self_attention(attention: Any, x: Any, keep: Any) -> Any:
    q, k, v = (nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2).detach().numpy() for y in (q, k, v))
    out = reference.sa_attention(q, k, v, variant=attention.variant, mask=keep[:, None, None].numpy())
    return attention.out_proj(torch.from_numpy(out).transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:.*does not keep its quality")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_encoder_layer_in_evaluation_mode_runs_sa_attention(variant: str, grad: bool, calls: list[str]) -> None:
    """PyTorch's kernel for such layers reads the weights and computes softmax; it must not be reached."""
    layer = encoder_layer()
    x, padding = random(N, L, E), torch.zeros(N, L, dtype=torch.bool)
    padding[1, 2:] = True
    with torch.set_grad_enabled(grad):
        softmax = layer(x, src_key_padding_mask=padding)
        assert convert_module(layer, variant) is layer
        out = layer(x, src_key_padding_mask=padding)
        expected = by_hand(layer, x, ~padding)
    assert calls == [variant]
    assert_close(out[~padding], expected[~padding])
    assert (softmax - out)[~padding].abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*does not keep its quality")
def test_an_encoder_with_padding_makes_no_nested_tensors(calls: list[str]) -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    x, padding = random(N, L, E), torch.zeros(N, L, dtype=torch.bool)
    padding[1, 2:] = True
    assert encoder.use_nested_tensor
    convert_module(encoder)
    with torch.inference_mode():
        out = encoder(x, src_key_padding_mask=padding)
        alone = encoder(x[1:2, :2])
    assert calls == ["normalized"] * 4
    assert_close(out[1:2, :2], alone)


@pytest.mark.filterwarnings("ignore:.*does not keep its quality", "ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_whole_transformer(norm_first: bool, calls: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 1, 1, 16, dropout=0.0, batch_first=True, dtype=torch.float64, norm_first=norm_first)
    state, weights = copy.deepcopy(model.state_dict()), list(model.parameters())
    convert_module(model, "product")
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    model.load_state_dict(state)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    for mode in (True, False):
        calls.clear()
        source, target = random(N, S, E), random(N, L, E, seed=1)
        out = model.train(mode)(source, target, tgt_mask=causal, tgt_is_causal=True)
        assert calls == ["product"] * 3
        target[:, -1] += 1
        moved = (model(source, target, tgt_mask=causal) - out).abs().amax((0, 2))
        assert (moved[:-1] == 0).all()
        assert moved[-1] > 0


def test_the_switch_warns_keeps_hooks_and_can_change_the_variant() -> None:
    attention, seen = nn.MultiheadAttention(E, H), []
    attention.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="^MultiheadAttention now runs.*does not keep its quality"):
        convert_module(attention)
    with pytest.warns(UserWarning, match=r"\(product\)"):
        convert_module(attention, "product")
    assert isinstance(attention, SAMultiheadAttention)
    assert "variant='product'" in repr(attention)
    attention(*(torch.zeros(L, E) for _ in range(3)))
    assert seen == [1]
    assert copy.deepcopy(attention).variant == "product"


def test_what_the_switch_refuses() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.Sequential(nn.MultiheadAttention(E, H), Own(E, H))
    with pytest.raises(ValueError, match="Own in Sequential is a subclass"):
        convert_module(model)
    assert type(model[0]) is nn.MultiheadAttention
    with pytest.raises(ValueError, match=r"holds no nn\.MultiheadAttention"):
        convert_module(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="variant must be"):
        convert_module(model, "softmax")
