"""From a model in PyTorch or JAX to one .onnx file that runs everywhere."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import onnx

from sa_softmax.onnx_export.bodies import DOMAIN
from sa_softmax.onnx_export.checker import Report, check
from sa_softmax.onnx_export.operators import check_opset, complete, nodes_of

__all__ = ["export"]


def export(
    model: Callable[..., Any],
    args: Any,
    path: str | PathLike[str],
    *,
    dynamic: Any = None,
    opset: int = 18,
    verify: bool = True,
) -> Report | None:
    """Write ``model`` to an ONNX file in which each call of SA-Softmax is one node of the domain ``sa_softmax``.

    The file carries a body in standard operators for each operator of ours, so it runs in any onnxruntime from 1.19 and
    in onnx.reference; where the library of sa-softmax-native is registered its kernels run instead. Modules are
    exported as in evaluation. Inputs are called what the model's parameters are; outputs ``output``, or ``output_0``,
    ``output_1`` and so on; or both what a PyTorch module lists as its ``input_names`` and ``output_names``, as
    :class:`~sa_softmax.backends.torch.transformers.WithPast` does.

    Args:
        model: a torch.nn.Module, a function of torch tensors, or a function of JAX arrays, that calls ``sa_softmax``,
            ``sa_attention`` (of :mod:`sa_softmax` or of the backend) or ``SASoftmax``.
        args: example inputs: a tuple of positional arguments, a dict of keyword arguments, or a single array.
        path: the file to write. PyTorch models above 2 GB put their weights beside it, in PATH.data.
        dynamic: which axes may have any length, in the structure of ``args``: for each array a dict from axis to a
            name, or None. Axes of one name have one length, and a name may be a sum of names.
            ``({0: "batch", 1: "length"}, {1: "past + length"})``
        opset: the default opset, 18 to the newest that onnx knows.
        verify: run :func:`sa_softmax.onnx_export.check` on the file, on ``args`` too, against ``model`` itself.

    Returns:
        The report of the check, or None without ``verify``.

    Raises:
        TypeError: ``model`` is not callable, or ``args`` hold arrays of no supported framework, or of two.
        ValueError: opset below 18 or unknown, or no call of ours in the model.
        ImportError: a package that the export needs is missing; the message names the extra.
        OSError: the file cannot be written.
        CheckError: the file does not compute what the model does. It stays where it is.

    What torch.onnx and jax2onnx raise about the rest of a model, or a dynamic axis that it fixes, passes through.
    """
    check_opset(opset)
    path = Path(path)
    if not callable(model):
        raise TypeError(
            f"model must be a torch.nn.Module or a function; got {type(model).__qualname__}. "
            "Pass the model itself, and its inputs as args"
        )
    if path.is_dir():
        raise IsADirectoryError(
            f"path must name the file to write; got the folder {path}. Add a name: {path}/model.onnx"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} to write {path.name} in does not exist. Make it first")
    if isinstance(args, Mapping):
        args, kwargs = (), dict(args)
    else:
        args, kwargs = (args if isinstance(args, tuple) else (args,)), {}
    if isinstance(dynamic, Mapping) and args:
        dynamic = (dynamic,)

    if _framework(model, args, kwargs) == "torch":
        _need("onnxscript", "onnx")
        from sa_softmax.onnx_export.torch_export import export_torch

        inputs, outputs = export_torch(model, args, kwargs, path, dynamic=dynamic, opset=opset)
    else:
        _need("jax2onnx", "jax2onnx")
        from sa_softmax.onnx_export.jax_export import export_jax

        inputs, outputs = export_jax(model, args, kwargs, path, dynamic=dynamic, opset=opset)

    exported = onnx.load(path, load_external_data=False)
    if not any(nodes_of(exported)):
        path.unlink()
        raise ValueError(
            f"the model holds no node of the domain {DOMAIN}: it never called sa_softmax, SASoftmax or sa_attention. "
            "If its attention should be SA attention, switch it before the export"
        )
    complete(exported)
    onnx.save(exported, path)
    if not verify:
        return None
    used = {each.name for each in exported.graph.input}
    return check(path, inputs={name: array for name, array in inputs.items() if name in used}, outputs=outputs)


def _framework(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """torch or jax, by the leaves of the arguments, or by the model where there are none."""
    found = {name for name in ("torch", "jax") if any(_is_array(leaf, name) for leaf in _leaves((args, kwargs)))}
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        found.add("torch")
    if len(found) != 1:
        kinds = sorted({f"{type(leaf).__module__}.{type(leaf).__qualname__}" for leaf in _leaves((args, kwargs))})
        raise TypeError(
            f"model and args must be of PyTorch or of JAX; got {type(model).__qualname__} with arguments of "
            f"{', '.join(kinds) or 'no kind'}. Pass example inputs as torch tensors, or as jax arrays"
        )
    return found.pop()


def _is_array(leaf: Any, framework: str) -> bool:
    module = sys.modules.get(framework)
    return module is not None and isinstance(leaf, module.Tensor if framework == "torch" else module.Array)


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, Mapping):
        return [leaf for each in tree.values() for leaf in _leaves(each)]
    if isinstance(tree, list | tuple):
        return [leaf for each in tree for leaf in _leaves(each)]
    return [tree]


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"this export needs {package}, which is not installed: pip install 'sa-softmax[{extra}]'")
