"""Which implementation CPU arrays of NumPy and PyTorch get: the kernels of sa-softmax-native, or the framework's own
operations.

The environment variable ``SA_SOFTMAX_IMPLEMENTATION``, read when a backend is imported, chooses: ``native`` or
``composition`` (in NumPy, the reference). Without it the kernels run where they are installed. A choice that cannot be
met is an error.
"""

import importlib
import os
from types import ModuleType

__all__ = ["native"]


def native() -> ModuleType | None:
    """The C interface of the kernels (``sa_softmax_native.c_api``), or None where the framework's operations run.

    Raises:
        ValueError: an unknown ``SA_SOFTMAX_IMPLEMENTATION``, or an instruction set that this processor lacks.
        ImportError: ``native`` is asked for and not installed.
    """
    choice = os.environ.get("SA_SOFTMAX_IMPLEMENTATION", "")
    if choice not in ("", "native", "composition"):
        raise ValueError(f"SA_SOFTMAX_IMPLEMENTATION must be 'native' or 'composition'; got {choice!r}. Unset it")
    if choice == "composition":
        return None
    try:
        kernels = importlib.import_module("sa_softmax_native.c_api")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        if choice == "native":
            raise ImportError(
                f"SA_SOFTMAX_IMPLEMENTATION=native needs sa-softmax-native: pip install sa-softmax-native ({error})"
            ) from error
        return None
    kernels.instruction_set()
    return kernels
