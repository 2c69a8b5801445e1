"""The function bodies of the operators: the spec in standard operators, for clients that have no kernel.

A body is written in ONNX's own text form, with ``$c`` for the compute type and ``$to`` for its number. What it computes
is :mod:`sa_softmax.reference`; three devices are its own:

- The variant is a string, but costs nothing: ``number`` is 0 for normalized, 1 for product and 2 for any other name,
  which the ``Gather`` after it refuses. onnxruntime computes all that once, when it loads the file. ``product`` is the
  formula of ``normalized`` with lo = hi = 0, where a range of zero is taken for 1 instead of for infinity (C1).
- ``m`` holds -inf where an entry does not participate, ``z`` holds 0 there, which changes neither lo nor hi.
- Rows that hold NaN or +inf need no care, although onnxruntime's ReduceMin and ReduceMax may drop a NaN: the sum of the
  exponentials keeps it, so p is NaN in the whole row (C6).
"""

from collections.abc import Collection
from string import Template

from onnx import FunctionProto, TensorProto, parser

__all__ = ["DOMAIN", "OPTIONAL", "VERSION", "function"]

DOMAIN = "sa_softmax"
VERSION = 1
OPTIONAL = {"SASoftmax": ("where",), "SASoftmaxGrad": ("where",), "SAAttention": ("bias", "mask")}
"""The optional inputs of each operator; they come last, in this order."""

_CONSTANTS = """
    zero = Constant <value = $c {0}> ()
    one = Constant <value = $c {1}> ()
    half = Constant <value = $c {0.5}> ()
    minus_inf = Constant <value = $c {-inf}> ()
    minus_1 = Constant <value_ints: ints = [-1]> ()

    known = Constant <value_strings: strings = ["normalized", "product"]> ()
    name = Constant <value_string: string = @variant> ()
    name_1d = Reshape (name, minus_1)
    names = Concat <axis = 0> (known, name_1d)
    unused_places, unused_sources, numbers = Unique <sorted = 0> (names)
    last = Constant <value_int: int = 2> ()
    number = Gather (numbers, last)
    clamp_factors = Constant <value = $c[2] {1, 0}> ()
    clamp_factor = Gather (clamp_factors, number)
    ranges_of_zero = Constant <value = $c[2] {inf, 1}> ()
    range_of_zero = Gather (ranges_of_zero, number)
"""

# X -> m, p: the softmax over the participating entries, NaN in a row that has none, where ``off`` selects later on.
_SOFTMAX = """
    axis_0d = Constant <value_int: int = @axis> ()
    axes = Reshape (axis_0d, minus_1)
    x = Cast <to = $to> (X)
    $where
    top = ReduceMax (m, axes)
    below_top = Sub (m, top)
    e = Exp (below_top)
    l = ReduceSum (e, axes)
    p = Div (e, l)
"""

# m, p -> off, z, lo, hi, a = (z - lo) / (hi - lo), R = unit * (hi - lo), and ap, which is y where not off (C7).
_FACTOR = """
    off = Equal (m, minus_inf)
    z = Where (off, zero, m)
    z_min = ReduceMin (z, axes)
    lo_normalized = Min (z_min, zero)
    lo = Mul (lo_normalized, clamp_factor)
    z_max = ReduceMax (z, axes)
    hi_normalized = Max (z_max, zero)
    hi = Mul (hi_normalized, clamp_factor)
    minus_lo = Neg (lo)
    size = Max (hi, minus_lo)
    is_large = Greater (size, one)
    unit = Where (is_large, half, one)
    hi_units = Mul (hi, unit)
    lo_units = Mul (lo, unit)
    range = Sub (hi_units, lo_units)
    is_zero = Equal (range, zero)
    R = Where (is_zero, range_of_zero, range)
    z_units = Mul (z, unit)
    z_above_lo = Sub (z_units, lo_units)
    a = Div (z_above_lo, R)
    ap = Mul (a, p)
"""

# G1 and G2, with g y in place of p (g a), which may overflow under product. Where lo = hi = 0 no entry is beyond (G4).
_GRADIENT = """
    g_all = Cast <to = $to> (G)
    g = Where (off, zero, g_all)
    gy = Mul (g, ap)
    gp = Mul (g, p)
    D = ReduceSum (gy, axes)
    S = ReduceSum (gp, axes)

    equals_lo = Equal (z, lo)
    lo_is_free = Less (lo, zero)
    at_lo = And (equals_lo, lo_is_free)
    ones_at_lo = Cast <to = $to> (at_lo)
    n_lo = ReduceSum (ones_at_lo, axes)
    D_minus_S = Sub (D, S)
    share_of_lo = Div (D_minus_S, n_lo)
    through_lo = Where (at_lo, share_of_lo, zero)

    equals_hi = Equal (z, hi)
    hi_is_free = Greater (hi, zero)
    at_hi = And (equals_hi, hi_is_free)
    ones_at_hi = Cast <to = $to> (at_hi)
    n_hi = ReduceSum (ones_at_hi, axes)
    share_of_hi = Div (D, n_hi)
    through_hi = Where (at_hi, share_of_hi, zero)

    gp_and_lo = Add (gp, through_lo)
    gp_lo_and_hi = Sub (gp_and_lo, through_hi)
    through_a_units = Div (gp_lo_and_hi, R)
    through_a = Mul (through_a_units, unit)
    pD = Mul (p, D)
    through_p = Sub (gy, pD)
    dx_all = Add (through_p, through_a)
    dx = Where (off, zero, dx_all)
    dX = CastLike (dx, X)
"""

# Q, K, bias, mask -> m, p. N counts the key/value heads of all batches, and the G Tq queries of a group are the rows of
# one matrix, so that no key is repeated (A3). A scale of NaN stands for none. It multiplies the keys after they are
# transposed, because onnxruntime before 1.23 fuses a Transpose with a MatMul of doubles, and then lacks a kernel.
_SCORES = """
    Hq = Shape <start = -3, end = -2> (Q)
    Tq = Shape <start = -2, end = -1> (Q)
    d = Shape <start = -1> (Q)
    all_kv_heads = Shape <end = -2> (K)
    Hkv = Shape <start = -3, end = -2> (K)
    Tk = Shape <start = -2, end = -1> (K)
    N = ReduceProd (all_kv_heads)
    Hq_Tq = Mul (Hq, Tq)
    G_Tq = Div (Hq_Tq, Hkv)

    scale_0d = Constant <value_float: float = @scale> ()
    no_scale = IsNaN (scale_0d)
    given_scale = Cast <to = $to> (scale_0d)
    d_number = Cast <to = $to> (d)
    d_root = Sqrt (d_number)
    default_scale = Div (one, d_root)
    scale_ = Where (no_scale, default_scale, given_scale)

    q = Cast <to = $to> (Q)
    q_shape = Concat <axis = 0> (N, G_Tq, d)
    q_3d = Reshape <allowzero = 1> (q, q_shape)
    k = Cast <to = $to> (K)
    k_shape = Concat <axis = 0> (N, Tk, d)
    k_3d = Reshape <allowzero = 1> (k, k_shape)
    k_transposed = Transpose <perm = [0, 2, 1]> (k_3d)
    k_scaled = Mul (k_transposed, scale_)
    x_3d = MatMul (q_3d, k_scaled)
    q_rows = Shape <end = -1> (Q)
    x_shape = Concat <axis = 0> (q_rows, Tk)
    x_unbiased = Reshape <allowzero = 1> (x_3d, x_shape)
    $bias

    first = Constant <value_int: int = 0> ()
    step = Constant <value_int: int = 1> ()
    Tq_0d = Squeeze (Tq)
    i_1d = Range (first, Tq_0d, step)
    i = Unsqueeze (i_1d, minus_1)
    Tk_0d = Squeeze (Tk)
    j = Range (first, Tk_0d, step)
    j_minus_i = Sub (j, i)
    causal_int = Constant <value_int: int = @is_causal> ()
    causal = Cast <to = 9> (causal_int)
    offset = Constant <value_int: int = @q_offset> ()
    no_limit = Constant <value_int: int = 9223372036854775807> ()
    limit = Where (causal, offset, no_limit)
    seen = LessOrEqual (j_minus_i, limit)
    $mask
    m = Where (on, x, minus_inf)
    p = Softmax <axis = -1> (m)
    axes = Identity (minus_1)
"""

# Which query sees a value that is not finite (A6) takes a second product. Only the keys that have one take part in it:
# none, as a rule.
_WEIGHTED_VALUES = """
    y = Where (off, zero, ap)
    y_shape = Concat <axis = 0> (N, G_Tq, Tk)
    y_3d = Reshape <allowzero = 1> (y, y_shape)
    v = Cast <to = $to> (V)
    Dv = Shape <start = -1> (V)
    v_shape = Concat <axis = 0> (N, Tk, Dv)
    v_3d = Reshape <allowzero = 1> (v, v_shape)
    v_is_nan = IsNaN (v_3d)
    v_is_inf = IsInf (v_3d)
    v_is_bad = Or (v_is_nan, v_is_inf)
    v_finite = Where (v_is_bad, zero, v_3d)
    o_finite = MatMul (y_3d, v_finite)

    bad = Cast <to = $to> (v_is_bad)
    all_but_keys = Constant <value_ints: ints = [0, 2]> ()
    bad_values = ReduceSum <keepdims = 0> (bad, all_but_keys)
    key_is_bad = Greater (bad_values, zero)
    bad_of_bad_keys = Compress <axis = 1> (bad, key_is_bad)
    participates = Not (off)
    participates_3d = Reshape <allowzero = 1> (participates, y_shape)
    bad_keys_seen = Compress <axis = 2> (participates_3d, key_is_bad)
    ones_seen = Cast <to = $to> (bad_keys_seen)
    bad_seen = MatMul (ones_seen, bad_of_bad_keys)
    is_poisoned = Greater (bad_seen, zero)
    not_a_number = Constant <value = $c {nan}> ()
    o_3d = Where (is_poisoned, not_a_number, o_finite)
    o_shape = Concat <axis = 0> (q_rows, Dv)
    o = Reshape <allowzero = 1> (o_3d, o_shape)
    O = CastLike (o, Q)
"""

_ROW_ATTRIBUTES = 'axis: int = -1, variant: string = "normalized"'
_ATTENTION_ATTRIBUTES = 'variant: string = "normalized", is_causal: int = 0, q_offset: int = 0, scale: float = 0'
_SELECT = """
    y = Where (off, zero, ap)
    Y = CastLike (y, X)
"""

# attributes, required inputs, output, text
_BODIES = {
    "SASoftmax": (_ROW_ATTRIBUTES, ("X",), "Y", _CONSTANTS + _SOFTMAX + _FACTOR + _SELECT),
    "SASoftmaxGrad": (_ROW_ATTRIBUTES, ("X", "G"), "dX", _CONSTANTS + _SOFTMAX + _FACTOR + _GRADIENT),
    "SAAttention": (
        _ATTENTION_ATTRIBUTES,
        ("Q", "K", "V"),
        "O",
        _CONSTANTS + _SCORES + _FACTOR + _WEIGHTED_VALUES,
    ),
}

# An optional input, when it is given and when it is not.
_IF_GIVEN = {
    "where": ("m = Where (where, x, minus_inf)", "m = Identity (x)"),
    "bias": ("bias_ = Cast <to = $to> (bias) x = Add (x_unbiased, bias_)", "x = Identity (x_unbiased)"),
    "mask": ("on = And (seen, mask)", "on = Identity (seen)"),
}


def function(name: str, *, opset: int, double: bool, optional: Collection[str]) -> FunctionProto:
    """The body of operator ``name`` that computes in float, or double, with those ``optional`` inputs that are named.

    A function of ONNX cannot ask whether an input was given, so bodies differ in it, and take no input after the last
    one that is given.
    """
    attributes, inputs, output, text = _BODIES[name]
    given = [each in optional for each in OPTIONAL[name]]
    inputs += OPTIONAL[name][: max((i + 1 for i, is_given in enumerate(given) if is_given), default=0)]
    choices = {each: _IF_GIVEN[each][not is_given] for each, is_given in zip(OPTIONAL[name], given, strict=True)}
    types = {"c": "double", "to": TensorProto.DOUBLE} if double else {"c": "float", "to": TensorProto.FLOAT}
    text = Template(Template(text).safe_substitute(choices)).substitute(types)
    proto = parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{name} <{attributes}> ({', '.join(inputs)}) => ({output})\n{{{text}}}"
    )
    for attribute in proto.attribute_proto:
        if attribute.name == "scale":
            attribute.f = float("nan")  # absent; the text form has no NaN for attributes
    return proto
