"""The row operation in float32: the kernels against torch.softmax, torch.compile and memcpy; custom ops of onnxruntime.

Outputs are allocated before: the first touch of a large one would take longer than any kernel. ``public`` figures call
the functions that users call, which allocate, against a torch.softmax that does, too.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa_softmax._validate import VARIANTS
from sa_softmax.backends import torch as backend
from sa_softmax.backends.torch._row import compose
from sa_softmax.benchmarks.measure import Call, Figure, Progress, cuda, interleave, wall
from sa_softmax.benchmarks.shapes import ROWS

__all__ = ["inputs", "rows"]


def inputs(shape: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    """Scores of standard deviation 3, and an upstream gradient."""
    generator = torch.Generator(device).manual_seed(0)
    x, g = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    return 3 * x, g


def rows(device: str, rounds: int, progress: Progress) -> Iterator[Figure]:
    """Forward, and forward with VJP, at every shape of ROWS."""
    for shape in ROWS:
        label = "x".join(map(str, shape))
        x, g = inputs(shape, device)
        groups = _forward_cuda(x) if device == "cuda" else _forward(x)
        groups |= {"forward + VJP": _gradient(x, g)}
        for part, calls in groups.items():
            times = interleave(calls, rounds, cuda if device == "cuda" else wall, progress(f"rows {label}, {part}"))
            peer, *candidates = calls
            for name in candidates:
                yield Figure.of("rows", name, label, peer, times, part)
        if device == "cpu":
            yield from _onnxruntime(x.numpy(), label, rounds, progress)


def _forward(x: Tensor) -> dict[str, dict[str, Call]]:
    """By part, calls by name; the first of each is the peer."""
    out = torch.empty_like(x)
    compiled = torch.compile(compose)
    calls: dict[str, Call] = {"torch.softmax(out=)": lambda: torch.softmax(x, -1, out=out)}
    calls |= {variant: _kernel(variant, x, torch.empty_like(x)) for variant in VARIANTS}
    calls |= {"torch.compile normalized": lambda: compiled(x, None, 1, "normalized")}
    calls |= {"memcpy": lambda: out.copy_(x)}
    public: dict[str, Call] = {"torch.softmax": lambda: torch.softmax(x, -1)}
    public |= {"normalized": lambda: backend.sa_softmax(x)}
    return {"forward": calls, "forward, public": public}


def _forward_cuda(x: Tensor) -> dict[str, dict[str, Call]]:
    out = torch.empty_like(x)
    calls: dict[str, Call] = {"device copy": lambda: out.copy_(x), "torch.softmax": lambda: torch.softmax(x, -1)}
    calls |= {variant: lambda variant=variant: backend.sa_softmax(x, variant=variant) for variant in VARIANTS}  # type: ignore[misc]
    return {"forward": calls}


def _gradient(x: Tensor, g: Tensor) -> dict[str, Call]:
    y, dx = torch.empty_like(x), torch.empty_like(x)
    backward = torch.ops.aten._softmax_backward_data.out

    def softmax() -> None:
        torch.softmax(x, -1, out=y)
        backward(g, y, -1, x.dtype, grad_input=dx)

    def of(variant: str) -> Call:
        if x.device.type == "cuda":
            needs = x.clone().requires_grad_()
            return lambda: torch.autograd.grad(backend.sa_softmax(needs, variant=variant), needs, g)
        forward, vjp = _kernel(variant, x, y), _kernel(variant, x, dx, g)

        def both() -> None:
            forward()
            vjp()

        return both

    return {"torch.softmax, forward + backward": softmax} | {variant: of(variant) for variant in VARIANTS}


def _kernel(variant: str, x: Tensor, y: Tensor, g: Tensor | None = None) -> Call:
    """The kernel of sa-softmax-native, or its VJP, into ``y``. Raises ImportError where it is not installed."""
    from sa_softmax_native import c_api

    from sa_softmax.backends.torch._native import threads

    def array(a: Tensor) -> Any:
        return c_api.array(a.data_ptr(), a.shape, a.stride())

    arrays = [array(a) for a in (x, y, *([] if g is None else [g]))]

    def call() -> tuple[Tensor | None, ...]:
        if g is None:
            c_api.row("float32", variant, 1, arrays[0], None, arrays[1], threads())
        else:
            c_api.row_vjp("float32", variant, 1, arrays[0], arrays[2], None, arrays[1], threads())
        return x, y, g  # the arrays do not keep them alive

    return call


def _onnxruntime(x: np.ndarray[Any, Any], label: str, rounds: int, progress: Progress) -> Iterator[Figure]:
    """The custom op against onnxruntime's own Softmax, both on its threads, inputs and outputs bound."""
    calls = {"onnxruntime Softmax": _session("Softmax", "", x, axis=-1)}
    calls |= {variant: _session("SASoftmax", "sa_softmax", x, axis=-1, variant=variant) for variant in VARIANTS}
    peer, *names = calls
    times = interleave(calls, rounds, wall, progress(f"rows {label}, custom op"))
    for name in names:
        yield Figure.of("rows", name, label, peer, times, "custom op")


def _session(operator: str, domain: str, x: np.ndarray[Any, Any], **attributes: Any) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper

    from sa_softmax.backends.onnxruntime import register

    node = helper.make_node(operator, ["x"], ["y"], domain=domain, **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in "xy"]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("sa_softmax", 1)]
    graph = helper.make_graph([node], operator, values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    register(options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(np.empty_like(x)))
    return lambda: session.run_with_iobinding(binding)
