"""The GPU that kernels are compiled for: of a launch, its device; of the compile check, one that need not be there."""

from functools import lru_cache

import torch
from triton.backends.compiler import GPUTarget

__all__ = ["target_of"]


@lru_cache
def target_of(device: torch.device) -> GPUTarget:
    """The GPU ``device``; Hopper for the CPU, where Triton interprets."""
    if device.type == "cpu":
        return GPUTarget("cuda", 90, 32)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return GPUTarget("hip", properties.gcnArchName.split(":")[0], properties.warp_size)
    return GPUTarget("cuda", 10 * properties.major + properties.minor, properties.warp_size)
