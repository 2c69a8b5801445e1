"""SA-Softmax in onnxruntime: the custom ops of ``sa-softmax-native``, registered with a session's options.

An ONNX model holds the operators with a function body each, so it runs without this; with the ops registered, the
session runs their kernels instead.
"""

import importlib
from typing import Any

__all__ = ["get_library_path", "register"]


def get_library_path() -> str:
    """The path of the shared library that exports ``RegisterCustomOps``.

    Raises:
        ImportError: the distribution with the library is not installed; the message names it.
    """
    try:
        native = importlib.import_module("sa_softmax_native")
    except ModuleNotFoundError as error:
        raise ImportError(
            "the onnxruntime kernels are a distribution of their own, which is not installed: "
            "pip install sa-softmax-native"
        ) from error
    path: str = native.library_path()
    return path


def register(session_options: Any) -> None:
    """Register the ops SASoftmax, SASoftmaxGrad and SAAttention of the domain ``sa_softmax``.

    ``session_options`` is an ``onnxruntime.SessionOptions``; sessions made with it run the kernels on the CPU
    provider and its threads. Raises ImportError like :func:`get_library_path`.
    """
    session_options.register_custom_ops_library(get_library_path())
