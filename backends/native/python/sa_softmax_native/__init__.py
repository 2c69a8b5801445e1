"""The shared library with the kernels of Self-Adjust Softmax, and its C interface called through ctypes."""

from pathlib import Path

__all__ = ["library_path"]

_NAMES = ("libsa_softmax_native.so", "libsa_softmax_native.dylib", "sa_softmax_native.dll")


def library_path() -> str:
    """The path of the library, which exports ``RegisterCustomOps`` for onnxruntime and the functions of ``c_api.h``.

    Raises:
        FileNotFoundError: the package lies there without its library, as in a checkout that was not built.
    """
    folder = Path(__file__).resolve().parent
    for name in _NAMES:
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(f"no library of sa_softmax_native in {folder}: run pip install ./backends/native")
