"""Every rule of validation, for every backend: the message names the rule, the value received and the likely fix."""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from support import array_backends, to_framework

import sa_softmax
from sa_softmax import reference
from sa_softmax.backends import REGISTRY, Entry


@dataclass
class Calls:
    """The two operations of a backend on arrays of ones, and everything that was passed to them."""

    entry: Entry
    made: list[tuple[Any, np.ndarray[Any, Any]]] = field(default_factory=list)

    def array(self, *shape: int, dtype: str = "float32") -> Any:
        values = np.ones(shape)
        array = to_framework(self.entry.name, values, dtype)
        self.made.append((array, values))
        return array

    def softmax(self, x: Any = None, **options: Any) -> Any:
        return self.entry.load().sa_softmax(self.array(2, 3) if x is None else x, **options)

    def attention(self, q: Any = None, k: Any = None, v: Any = None, **options: Any) -> Any:
        """Hq=4, Hkv=2, Tq=3, Tk=5, D=2, Dv=3 unless given."""
        q, k, v = (
            self.array(*shape) if array is None else array
            for array, shape in ((q, (1, 4, 3, 2)), (k, (1, 2, 5, 2)), (v, (1, 2, 5, 3)))
        )
        return self.entry.load().sa_attention(q, k, v, **options)

    @property
    def other_float(self) -> str:
        """A floating dtype besides float32 that the framework has."""
        return "float64" if self.entry.name in ("numpy", "array_api") else "float16"

    def attention_with_shapes(self, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> Any:
        return self.attention(self.array(*q), self.array(*k), self.array(*v))


@pytest.fixture(params=array_backends())
def calls(request: pytest.FixtureRequest) -> Calls:
    return Calls(request.param)


Call = Callable[[Calls], Any]

FLOATING = "a floating dtype (float16, bfloat16, float32, float64)"
FOREIGN = "must be an array of the same framework as the function; got "
BOOLEAN = "must be boolean, True where an entry participates; got "

# What is called, the error, and what its message says.
RULES: dict[str, tuple[Call, type[Exception], tuple[str, ...]]] = {
    "softmax variant": (
        lambda c: c.softmax(variant="softmax"),
        ValueError, ("variant must be one of 'product', 'normalized'", "got 'softmax'"),
    ),
    "softmax variant None": (lambda c: c.softmax(variant=None), ValueError, ("variant", "got None")),
    "softmax of a list": (lambda c: c.softmax([1.0, 2.0]), TypeError, (f"x {FOREIGN}builtins.list", "Convert it with")),
    "softmax where a list": (
        lambda c: c.softmax(where=[True, False, True]), TypeError, (f"where {FOREIGN}builtins.list", "Convert it with"),
    ),
    "softmax int32": (
        lambda c: c.softmax(c.array(2, 3, dtype="int32")),
        TypeError, (f"x must have {FLOATING}", "got int32", "Cast it first"),
    ),
    "softmax uint8": (lambda c: c.softmax(c.array(2, 3, dtype="uint8")), TypeError, (FLOATING, "got uint8")),
    "softmax bool": (lambda c: c.softmax(c.array(2, 3, dtype="bool")), TypeError, (FLOATING, "got bool")),
    "softmax complex64": (
        lambda c: c.softmax(c.array(2, 3, dtype="complex64")), TypeError, (FLOATING, "got complex64"),
    ),
    "softmax 0-d": (
        lambda c: c.softmax(c.array()), ValueError, ("x must have at least one axis", "0-d", "Reshape it to (1,)"),
    ),
    "softmax axis too large": (
        lambda c: c.softmax(axis=2), ValueError, ("axis must be in [-2, 1]", "shape (2, 3)", "got 2"),
    ),
    "softmax axis too small": (lambda c: c.softmax(axis=-3), ValueError, ("axis must be in [-2, 1]", "got -3")),
    "softmax axis a tuple": (
        lambda c: c.softmax(axis=(0, 1)), TypeError, ("axis must be one integer", "got (0, 1)", "Flatten"),
    ),
    "softmax axis a float": (lambda c: c.softmax(axis=1.0), TypeError, ("axis must be one integer", "got 1.0")),
    "softmax axis None": (lambda c: c.softmax(axis=None), TypeError, ("axis must be one integer", "got None")),
    "softmax where a float array": (
        lambda c: c.softmax(where=c.array(2, 3)), TypeError, (f"where {BOOLEAN}float32", "finfo.min / 2"),
    ),
    "softmax where an integer array": (
        lambda c: c.softmax(where=c.array(2, 3, dtype="int32")), TypeError, (f"where {BOOLEAN}int32", "mask != 0"),
    ),
    "softmax where of another length": (
        lambda c: c.softmax(where=c.array(2, dtype="bool")),
        ValueError, ("where must broadcast to the shape of x, (2, 3); got (2,)", "last axes"),
    ),
    "softmax where with too many axes": (
        lambda c: c.softmax(where=c.array(1, 2, 3, dtype="bool")),
        ValueError, ("where must broadcast to the shape of x, (2, 3); got (1, 2, 3)",),
    ),
    "softmax where that would widen x": (
        lambda c: c.softmax(c.array(1, 3), where=c.array(2, 3, dtype="bool")),
        ValueError, ("where must broadcast to the shape of x, (1, 3); got (2, 3)",),
    ),
    "attention variant": (
        lambda c: c.attention(variant="Product"), ValueError, ("variant must be one of", "got 'Product'"),
    ),
    "attention q a list": (lambda c: c.attention([[[1.0]]]), TypeError, (f"q {FOREIGN}builtins.list",)),
    "attention k a list": (lambda c: c.attention(k=[[[1.0]]]), TypeError, (f"k {FOREIGN}builtins.list",)),
    "attention v a list": (lambda c: c.attention(v=[[[1.0]]]), TypeError, (f"v {FOREIGN}builtins.list",)),
    "attention bias a number": (lambda c: c.attention(bias=0.5), TypeError, (f"bias {FOREIGN}builtins.float",)),
    "attention mask a bool": (lambda c: c.attention(mask=True), TypeError, (f"mask {FOREIGN}builtins.bool",)),
    "attention int32": (
        lambda c: c.attention(c.array(1, 4, 3, 2, dtype="int32")), TypeError, (f"q must have {FLOATING}", "got int32"),
    ),
    "attention k of another dtype": (
        lambda c: c.attention(k=c.array(1, 2, 5, 2, dtype=c.other_float)),
        TypeError, ("k must have the dtype of q (float32); got float", "Cast it first"),
    ),
    "attention v of another dtype": (
        lambda c: c.attention(v=c.array(1, 2, 5, 3, dtype="int32")),
        TypeError, ("v must have", "got int32", "Cast it first"),
    ),
    "attention bias of another dtype": (
        lambda c: c.attention(bias=c.array(3, 5, dtype=c.other_float)),
        TypeError, ("bias must have the dtype of q", "(float32); got float", "Cast it first"),
    ),
    "attention bias an integer": (
        lambda c: c.attention(bias=c.array(3, 5, dtype="int32")), TypeError, ("bias must have", "got int32"),
    ),
    "attention bias a mask": (
        lambda c: c.attention(bias=c.array(3, 5, dtype="bool")), TypeError, ("bias must have", "got bool"),
    ),
    "attention bias that does not broadcast": (
        lambda c: c.attention(bias=c.array(5, 3)),
        ValueError, ("bias must broadcast to the shape of the scores (..., Hq, Tq, Tk), (1, 4, 3, 5); got (5, 3)",),
    ),
    "attention bias per key head": (
        lambda c: c.attention(bias=c.array(2, 3, 5)),
        ValueError, ("bias must broadcast", "(1, 4, 3, 5); got (2, 3, 5)"),
    ),
    "attention bias with too many axes": (
        lambda c: c.attention(bias=c.array(1, 1, 1, 1, 1)), ValueError, ("bias must broadcast", "got (1, 1, 1, 1, 1)"),
    ),
    "attention mask additive": (
        lambda c: c.attention(mask=c.array(3, 5)), TypeError, (f"mask {BOOLEAN}float32", "mask > finfo.min / 2"),
    ),
    "attention mask of 0 and 1": (
        lambda c: c.attention(mask=c.array(3, 5, dtype="int32")), TypeError, (f"mask {BOOLEAN}int32", "mask != 0"),
    ),
    "attention mask that does not broadcast": (
        lambda c: c.attention(mask=c.array(5, 3, dtype="bool")),
        ValueError, ("mask must broadcast to the shape of the scores", "(1, 4, 3, 5); got (5, 3)"),
    ),
    "attention mask with too many axes": (
        lambda c: c.attention(mask=c.array(1, 1, 4, 3, 5, dtype="bool")),
        ValueError, ("mask must broadcast", "got (1, 1, 4, 3, 5)"),
    ),
    "attention q without heads": (
        lambda c: c.attention_with_shapes((3, 2), (5, 2), (5, 3)),
        ValueError, ("q must be (..., heads, length, dimension)", "got shape (3, 2)", "Add a heads axis"),
    ),
    "attention v without heads": (
        lambda c: c.attention_with_shapes((1, 3, 2), (1, 5, 2), (5, 3)),
        ValueError, ("v must be (..., heads, length, dimension)", "got shape (5, 3)"),
    ),
    "attention batch": (
        lambda c: c.attention_with_shapes((2, 4, 3, 2), (1, 2, 5, 2), (1, 2, 5, 3)),
        ValueError, ("the same batch axes", "q (2, 4, 3, 2), k (1, 2, 5, 2), v (1, 2, 5, 3)", "Expand"),
    ),
    "attention batch of v": (
        lambda c: c.attention_with_shapes((4, 3, 2), (2, 5, 2), (1, 2, 5, 3)), ValueError, ("the same batch axes",),
    ),
    "attention D": (
        lambda c: c.attention_with_shapes((1, 4, 3, 2), (1, 2, 5, 3), (1, 2, 5, 3)),
        ValueError, ("q and k must have the same last axis D", "q (1, 4, 3, 2), k (1, 2, 5, 3)", "Transpose"),
    ),
    "attention Tk": (
        lambda c: c.attention_with_shapes((1, 4, 3, 2), (1, 2, 5, 2), (1, 2, 6, 3)),
        ValueError,
        ("k and v must have the same heads Hkv and length Tk", "k (1, 2, 5, 2), v (1, 2, 6, 3)", "the same tokens"),
    ),
    "attention heads of v": (
        lambda c: c.attention_with_shapes((1, 4, 3, 2), (1, 2, 5, 2), (1, 4, 5, 3)),
        ValueError, ("k and v must have the same heads Hkv",),
    ),
    "attention heads that do not divide": (
        lambda c: c.attention_with_shapes((1, 3, 3, 2), (1, 2, 5, 2), (1, 2, 5, 3)),
        ValueError,
        (
            "the number of query heads must be a multiple of the number of key/value heads; got 3 and 2",
            "(..., heads, length, dimension)",
        ),
    ),
    "attention fewer query heads": (
        lambda c: c.attention_with_shapes((1, 2, 3, 2), (1, 4, 5, 2), (1, 4, 5, 3)), ValueError, ("got 2 and 4",),
    ),
    "attention no key heads": (
        lambda c: c.attention_with_shapes((1, 2, 3, 2), (1, 0, 5, 2), (1, 0, 5, 3)), ValueError, ("got 2 and 0",),
    ),
    "attention is_causal an array": (
        lambda c: c.attention(is_causal=c.array(3, 5, dtype="bool")),
        TypeError, ("is_causal must be True or False", "A mask array goes to mask="),
    ),
    "attention is_causal an int": (
        lambda c: c.attention(is_causal=1), TypeError, ("is_causal must be True or False; got 1",),
    ),
    "attention q_offset a float": (
        lambda c: c.attention(is_causal=True, q_offset=1.0),
        TypeError, ("q_offset must be an integer; got 1.0", "Python int"),
    ),
    "attention q_offset alone": (
        lambda c: c.attention(q_offset=2), ValueError, ("q_offset", "needs is_causal=True", "q_offset=2"),
    ),
    "attention scale nan": (lambda c: c.attention(scale=float("nan")), ValueError, ("scale must be finite; got nan",)),
    "attention scale inf": (lambda c: c.attention(scale=float("inf")), ValueError, ("scale must be finite; got inf",)),
    "attention scale an array": (
        lambda c: c.attention(scale=c.array(1)), TypeError, ("scale must be a Python number", "float()"),
    ),
    "attention scale a bool": (
        lambda c: c.attention(scale=True), TypeError, ("scale must be a Python number, or None", "got True"),
    ),
    "attention scale a string": (lambda c: c.attention(scale="auto"), TypeError, ("scale", "got 'auto'")),
    "attention D of 0 without a scale": (
        lambda c: c.attention_with_shapes((1, 1, 3, 0), (1, 1, 5, 0), (1, 1, 5, 3)),
        ValueError, ("the default scale 1/sqrt(D) needs D >= 1", "Pass scale="),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_named_with_the_value_received_and_the_fix(calls: Calls, rule: str) -> None:
    call, error, fragments = RULES[rule]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(calls)
    message = str(caught.value)
    assert caught.type is error, message
    for fragment in fragments:
        assert fragment in message
    for array, values in calls.made:  # an error leaves its arguments as they were
        np.testing.assert_array_equal(np.asarray(array, dtype=np.complex128), values)


def test_what_keeps_the_rules_is_computed(calls: Calls) -> None:
    """The widest calls that validation must let through, so that no rule above fails for another reason."""
    assert tuple(calls.softmax().shape) == (2, 3)
    for axis in (-2, 1, np.int64(0)):
        assert tuple(calls.softmax(axis=axis).shape) == (2, 3)
    for shape in ((), (3,), (2, 1), (1, 1), (2, 3)):
        calls.softmax(where=calls.array(*shape, dtype="bool"))
    assert tuple(calls.attention().shape) == (1, 4, 3, 3)
    for shape in ((), (5,), (3, 1), (4, 1, 1), (1, 4, 3, 5)):
        calls.attention(bias=calls.array(*shape), mask=calls.array(*shape, dtype="bool"))
    calls.attention(is_causal=True, q_offset=np.int64(-7), scale=0)
    if calls.other_float == "float16":
        half = [calls.array(1, 1, 2, 2, dtype="float16") for _ in range(3)]
        calls.attention(*half, bias=calls.array(2, 2))  # a bias may have the compute dtype


@pytest.mark.parametrize("far", [2**31, 2**40])
def test_any_integer_is_an_offset(calls: Calls, far: int) -> None:
    everything, nothing = (np.asarray(calls.attention(is_causal=True, q_offset=sign * far)) for sign in (1, -1))
    np.testing.assert_array_equal(everything, np.asarray(calls.attention()))
    np.testing.assert_array_equal(nothing, np.zeros((1, 4, 3, 3)))


@pytest.mark.parametrize("argument", ["where", "k", "v", "bias", "mask"])
def test_arrays_of_two_frameworks_do_not_mix(calls: Calls, argument: str) -> None:
    dtype = "bool" if argument in ("where", "mask") else "float32"
    foreign = to_framework("array_api" if calls.entry.name == "numpy" else "numpy", np.ones((1, 2, 2)), dtype)
    message = f"{argument} {FOREIGN}{type(foreign).__module__}.{type(foreign).__qualname__}. Convert it with"
    own = calls.array(1, 2, 2)
    for module in (sa_softmax, calls.entry.load()):
        with pytest.raises(TypeError, match=re.escape(message)):  # noqa: PT012
            if argument == "where":
                module.sa_softmax(own, where=foreign)
            else:
                module.sa_attention(**{"q": own, "k": own, "v": own, argument: foreign})


@pytest.mark.parametrize("argument", ["x", "q", "k", "v"])
def test_none_is_no_array(calls: Calls, argument: str) -> None:
    backend, own = calls.entry.load(), calls.array(1, 2, 2)
    with pytest.raises(TypeError, match=f"{argument} {FOREIGN}builtins.NoneType"):  # noqa: PT012
        if argument == "x":
            backend.sa_softmax(None)
        else:
            backend.sa_attention(**{"q": own, "k": own, "v": own, argument: None})


# Devices. The frameworks that are not here place no array by itself, or have one device only on a machine of one CPU.


def _on_two_devices() -> dict[str, Callable[[], tuple[Any, Any]]]:
    def torch() -> tuple[Any, Any]:
        torch = importlib.import_module("torch")
        return torch.ones(1, 2, 2), torch.ones(1, 2, 2, device="meta")

    def array_api() -> tuple[Any, Any]:
        strict = importlib.import_module("array_api_strict")
        return strict.ones((1, 2, 2)), strict.ones((1, 2, 2), device=strict.Device("device1"))

    return {"torch": torch, "array_api": array_api}


@pytest.mark.parametrize("calls", [entry for entry in array_backends() if entry.id in _on_two_devices()], indirect=True)
def test_arrays_on_two_devices_are_refused_by_place(calls: Calls) -> None:
    here, there = _on_two_devices()[calls.entry.name]()
    for call in (
        lambda: calls.softmax(here, where=there > 0),
        lambda: calls.attention(here, here, there),
        lambda: calls.attention(here, here, here, mask=there > 0),
        lambda: calls.attention(there, there, there, bias=here),
    ):
        with pytest.raises(ValueError, match="all arrays must be on one device; got ") as caught:
            call()
        message = str(caught.value)
        for array in (here, there):
            assert f" on {array.device}" in message
        assert "Move them to one device first" in message


# What only the reference has.


@pytest.mark.parametrize("name", ["g", "t"])
def test_an_upstream_or_a_tangent_is_like_x(name: str) -> None:
    operation = reference.sa_softmax_vjp if name == "g" else reference.sa_softmax_jvp
    x = np.ones((2, 3), np.float32)
    for wrong, error, message in (
        (np.ones((3,), np.float32), ValueError, rf"{name} must have the shape of x, \(2, 3\); got \(3,\)\. Broadcast"),
        (np.ones((2, 3)), TypeError, rf"{name} must have the dtype of x \(float32\); got float64"),
        ([[1.0]], TypeError, f"{name} {FOREIGN}builtins.list"),
        (None, TypeError, f"{name} {FOREIGN}builtins.NoneType"),
    ):
        with pytest.raises(error, match=message):
            operation(x, wrong)


def test_an_upstream_of_attention_is_like_the_output() -> None:
    q = np.ones((2, 3, 4), np.float32)
    for wrong, error, message in (
        (
            np.ones((2, 3, 5), np.float32),
            ValueError,
            r"do must have the shape of the output, \(2, 3, 4\); got \(2, 3, 5\)\. Broadcast",
        ),
        (np.ones((2, 3, 4)), TypeError, r"do must have the dtype of q \(float32\); got float64"),
        (None, TypeError, f"do {FOREIGN}builtins.NoneType"),
    ):
        with pytest.raises(error, match=message):
            reference.sa_attention_vjp(q, q, q, wrong)


def test_the_dtypes_of_numpy_that_no_framework_shares_are_named() -> None:
    for dtype in (np.longdouble, np.complex128, ">f4", "O"):
        x = np.ones(3).astype(dtype)
        with pytest.raises(TypeError, match=re.escape(f"got {x.dtype}. Cast it first")):
            reference.sa_softmax(x)


def test_every_backend_of_the_registry_is_validated() -> None:
    assert [parameter.id for parameter in array_backends()] == [entry.name for entry in REGISTRY if entry.array_class]
