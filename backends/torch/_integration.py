"""What the integrations share: masks as participation, weights as a matrix, a warning of zeros."""

import warnings
from weakref import WeakSet

import torch
from torch import Tensor, nn

import sa_softmax.backends.torch as ops

__all__ = ["participation", "warn_of_zeros", "weights"]


def participation(mask: Tensor, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Which keys take part by ``mask``, True where one does, and what it adds to scores of queries of ``dtype``.

    A boolean mask is taken for the first. Entries of an additive one exclude if they are -inf or at most half the
    lowest number of its dtype, and are bias otherwise: a score of finfo.min that took part would set lo, and turn
    ``normalized`` back into softmax (C7).
    """
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise TypeError(
            f"{name} must be boolean, or floating to be added to the scores; got {mask.dtype}. "
            "If it holds 0 and 1, compare it: mask != 0"
        )
    # An addition may have pushed finfo.min to -inf, or somewhat up; no bias of a working model is near it.
    excluded = mask <= torch.finfo(mask.dtype).min / 2
    return ~excluded, mask.masked_fill(excluded, 0).to(torch.promote_types(dtype, torch.float32))


def weights(
    q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float | None, variant: str
) -> Tensor:
    """Y (..., Hq, Tq, Tk) of attention, in the dtype of ``q``."""
    c = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    x = (q.to(c) * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.to(c).mT
    return ops.sa_softmax(x if bias is None else x + bias, variant=variant, where=mask).to(q.dtype)


_SEEN: WeakSet[nn.Module] = WeakSet()


def warn_of_zeros(module: nn.Module, query: Tensor, key: Tensor, remedy: str) -> None:
    """Warn of a model that cannot start to learn, once per module: reading values stalls a device."""
    if torch.compiler.is_compiling() or module in _SEEN or not (_readable(query) and _readable(key)):
        return
    _SEEN.add(module)
    for name, x in (("query", query), ("key", key)):
        if x.numel() > 0 and not x.any():
            warnings.warn(
                f"every {name} of {type(module).__name__} is exactly 0, as after a projection that starts at zero. "
                "Under the normalized variant the gradient of scores that are all 0 is 0 (docs/spec.md, G5), so this "
                f"attention will not learn. Initialise the projection at random, or choose {remedy}",
                stacklevel=3,
            )


def _readable(x: Tensor) -> bool:
    plain = type(x) is Tensor and not x.is_meta
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(x)
