"""Where the shared library with the kernels of Self-Adjust Softmax lies."""

from pathlib import Path

__all__ = ["library_path"]

_NAMES = ("libsa_softmax_onnxruntime.so", "libsa_softmax_onnxruntime.dylib", "sa_softmax_onnxruntime.dll")


def library_path() -> str:
    """The path of the library that exports ``RegisterCustomOps`` for onnxruntime.

    Raises:
        FileNotFoundError: the package lies there without its library, as in a checkout that was not built.
    """
    folder = Path(__file__).resolve().parent
    for name in _NAMES:
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(f"no library of sa_softmax_native in {folder}: run pip install ./backends/native")
