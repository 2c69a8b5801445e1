"""A backend of one's own: Self-Adjust Softmax, with gradients, for https://github.com/HIPS/autograd.

    pip install autograd 'sa-softmax[conformance]'
    cd examples && sa-softmax conformance --backend autograd_backend:Adapter

It passes every case of the suite. No formula of a gradient is in it: autograd differentiates the two functions below.

What the suite says if they are composed naively, as the formulas stand: every sixth case of the row operation fails.
NaN gets out of excluded entries, -inf and rows of zeros (C5, R2, C1, G5), and R, or the square of R that autodiff
divides by, overflows (C7, G8). In long rows the gradient of the shift by the maximum, which is zero, is noise (G1, G2).
And when only `minimum(low, 0)` and `maximum(high, 0)` are left of the naive composition, six rows still fail in every
dtype, all by the gradient (G4): at an extremum that is exactly 0 autograd sends half of it on, and the spec nothing.
"""

from importlib import metadata

import autograd.numpy as np
from autograd import make_vjp
from autograd.tracer import getval  # a value without its gradient


def participating(where, shape):
    if where is not None and where.dtype != bool:
        raise TypeError(f"a mask must be boolean; got {where.dtype}")
    return np.broadcast_to(True if where is None else where, shape)


def softmax(x, *, axis, variant, where):
    """Sections 1 and 2 of the spec, composed so that autodiff gives section 5."""
    if variant not in ("product", "normalized"):
        raise ValueError(f"unknown variant {variant!r}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"no axis {axis} in the shape {x.shape}")
    on = participating(where, x.shape) & (x != -np.inf)
    z = np.where(on, x, 0)  # from an excluded entry nothing gets in, and to it no gradient gets out
    low = np.min(np.where(on, x, np.inf), axis, keepdims=True, initial=np.inf)
    high = np.max(np.where(on, x, -np.inf), axis, keepdims=True, initial=-np.inf)  # autograd shares among ties: G3
    e = np.where(on, np.exp(z - getval(high)), 0)  # the shift cancels in p, and has no gradient
    p = e / np.sum(e, axis, keepdims=True)
    if variant == "product":
        return np.where(on, z * p, 0)
    lo, hi = np.where(low >= 0, 0, low), np.where(high <= 0, 0, high)  # the strict clamp of G4
    size = getval(np.maximum(np.maximum(hi, -lo), np.finfo(x.dtype).tiny))
    unit = np.frexp(size)[0] / size  # a power of two: it brings R near 1, and rounds nothing
    R = hi * unit - lo * unit
    a = (z * unit - lo * unit) / np.where(R == 0, 1, R)
    return np.where(on & (R != 0), a * p, 0)


def attention(q, k, v, bias=0, *, variant, mask, is_causal, q_offset, scale):
    """Section 6. Each query gets its own keys and values, 0 where it must not look: 0 times NaN would be NaN."""
    (Hq, Tq, D), (Hkv, Tk) = q.shape[-3:], k.shape[-3:-1]
    shape = (*q.shape[:-1], Tk)
    if k.shape != (*q.shape[:-3], Hkv, Tk, D) or v.shape[:-1] != k.shape[:-1] or Hq % Hkv:
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if np.broadcast_shapes(np.shape(bias), shape) != shape:
        raise ValueError(f"the bias does not broadcast to {shape}; got {np.shape(bias)}")
    on = participating(mask, shape)
    if is_causal:
        on = on & (np.arange(Tk) <= np.arange(Tq)[:, None] + q_offset)

    def per_query(t):
        t = np.repeat(t, Hq // Hkv, axis=t.ndim - 3)  # autograd's repeat needs its axis counted from the front
        return np.repeat(t[..., None, :, :], Tq, axis=t.ndim - 2)

    def scores(k):
        return np.sum(q[..., None, :] * k, -1) * (D**-0.5 if scale is None else scale) + bias

    k, v = per_query(k), per_query(v)
    on = on & (scores(k) != -np.inf)
    k, v = np.where(on[..., None], k, 0), np.where(on[..., None], v, 0)
    y = softmax(scores(k), axis=-1, variant=variant, where=on)
    return np.sum(y[..., None] * v, -2)


def widened(x):
    """Clause D1: 16 bits are computed in float32."""
    if x.dtype.name not in Adapter.dtypes:
        raise TypeError(f"the dtype must be one of {', '.join(Adapter.dtypes)}; got {x.dtype}")
    return x.astype(np.promote_types(x.dtype, np.float32))


@np.errstate(all="ignore")
def value(f, arrays, options):
    return f(*map(widened, arrays), **options).astype(arrays[0].dtype)


@np.errstate(all="ignore")
def gradients(f, arrays, g, options):
    vjp, _ = make_vjp(f, tuple(range(len(arrays))))(*map(widened, arrays), **options)
    return tuple(dx.astype(x.dtype) for x, dx in zip(arrays, vjp(widened(g)), strict=True))


class Adapter:
    name = "autograd"
    version, implementation = metadata.version("autograd"), "autodiff"
    operations = ("sa_softmax", "sa_softmax_vjp", "sa_attention", "sa_attention_vjp")
    dtypes = ("float16", "bfloat16", "float32", "float64")
    devices = ("cpu",)

    def sa_softmax(self, x, *, device, **options):
        return value(softmax, (x,), options)

    def sa_softmax_vjp(self, x, g, *, device, **options):
        return gradients(softmax, (x,), g, options)[0]

    def sa_attention(self, q, k, v, *, bias, device, **options):
        return value(attention, (q, k, v) if bias is None else (q, k, v, bias), options)

    def sa_attention_vjp(self, q, k, v, do, *, bias, device, **options):
        if bias is None:
            return *gradients(attention, (q, k, v), do, options), None
        return gradients(attention, (q, k, v, bias), do, options)
