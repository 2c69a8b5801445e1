"""The registry of backends: the one list that dispatch, tests, documentation and the command line read.

A backend named NAME is the folder ``backends/NAME``. Its package defines ``sa_softmax`` and ``sa_attention`` for the
framework's arrays, if it has arrays of its own; its module ``adapter`` defines ``Adapter``, which speaks the protocol
of :mod:`sa_softmax.backends.protocol` so that the conformance suite can run it.
"""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["REGISTRY", "Entry", "get"]


@dataclass(frozen=True)
class Entry:
    """One backend: its name, its framework's module with the array class that it owns (None for a runtime without
    arrays of its own), and the extra of ``sa-softmax`` that installs the framework."""

    name: str
    array_module: str
    array_class: str | None
    extra: str | None

    def owns(self, x: Any) -> bool:
        """Whether ``x`` is an array of this framework; a framework that nobody imported owns nothing."""
        module = sys.modules.get(self.array_module)
        if module is None or self.array_class is None:
            return False
        return isinstance(x, getattr(module, self.array_class, ()))

    def installed(self) -> bool:
        """Whether the framework could be imported; it is not."""
        return importlib.util.find_spec(self.package) is not None

    def load(self) -> ModuleType:
        """Import the backend's package; raises ImportError that names the extra if its framework is missing."""
        return self._import(f"sa_softmax.backends.{self.name}")

    def adapter(self) -> Any:
        """A fresh conformance adapter of this backend; raises ImportError like :meth:`load`."""
        return self._import(f"sa_softmax.backends.{self.name}.adapter").Adapter()

    def install(self) -> str:
        """The command that installs the framework."""
        return f"pip install '{f'sa-softmax[{self.extra}]' if self.extra else self.package}'"

    def missing(self) -> str:
        """What a user reads whose framework is not installed."""
        return f"backend {self.name!r} needs {self.package}, which is not installed: {self.install()}"

    @property
    def package(self) -> str:
        """The framework's top-level package."""
        return self.array_module.partition(".")[0]

    def _import(self, module: str) -> ModuleType:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if self.installed():
                raise
            raise ImportError(self.missing()) from error


# Recognition runs in this order. array_api comes last: it takes whatever array-API namespace no other backend owns.
REGISTRY = (
    Entry("numpy", "numpy", "ndarray", extra=None),
    Entry("torch", "torch", "Tensor", extra="torch"),
    Entry("jax", "jax", "Array", extra="jax"),
    Entry("mlx", "mlx.core", "array", extra="mlx"),
    Entry("onnxruntime", "onnxruntime", None, extra="onnx"),
    Entry("array_api", "array_api_strict._array_object", "Array", extra=None),  # the class has no public name
)


def __getattr__(name: str) -> ModuleType:
    """The package of the backend called ``name``, imported on first use; Dynamo traces this, but no import_module."""
    for entry in REGISTRY:
        if entry.name == name:
            return entry.load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get(name: str) -> Entry:
    """The registry's entry called ``name``; ValueError lists the known names."""
    for entry in REGISTRY:
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in REGISTRY)
    raise ValueError(f"unknown backend {name!r}; known: {known}. A backend of your own is named module:attribute")
