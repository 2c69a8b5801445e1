"""ONNX: the operators of the domain ``sa_softmax``, export of models that use them, and the check of exported files."""

try:
    import onnx  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("ONNX export needs onnx, which is not installed: pip install 'sa-softmax[onnx]'") from error

from sa_softmax.onnx_export.checker import CheckError, Finding, Report, check
from sa_softmax.onnx_export.exporter import export
from sa_softmax.onnx_export.operators import complete, functions

__all__ = ["CheckError", "Finding", "Report", "check", "complete", "export", "functions"]
