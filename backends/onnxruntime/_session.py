"""One model in onnxruntime: NumPy in and out, bfloat16 included, and the knowledge of what ran."""

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import ModelProto, TensorProto, helper

from sa_softmax.backends.onnxruntime import register

__all__ = ["Session"]

_BORDER = "_as_float32"

Array = npt.NDArray[Any]


class Session:
    """A model on the CPU, with the kernels of our library or with the function bodies alone.

    Args:
        model: the model. onnxruntime has no bfloat16 in Python, so inputs and outputs of that type cross the border as
            float32, which holds them exactly.
        kernel: whether to register our library.
        folder: where the model's external data lies, if it has any.
        threads: of each operator; 0 leaves the number to onnxruntime.
    """

    def __init__(self, model: ModelProto, *, kernel: bool, folder: Path | None = None, threads: int = 0) -> None:
        self._outputs = [output.name for output in model.graph.output]
        model, self._bfloat16 = _with_float32_borders(model)
        folder_of_profile = tempfile.mkdtemp()
        self._clean_up = weakref.finalize(self, shutil.rmtree, folder_of_profile, ignore_errors=True)
        self._is_profiled = False
        self.ran: frozenset[str] = frozenset()
        """The operators that the first run executed. Ours is one of them if a kernel ran, and none if a body did."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder_of_profile, "profile"))
        if kernel:
            register(options)
        with _source(model, folder) as source:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs of the model by name."""
        feeds = {}
        for name, array in inputs.items():
            if name in self._bfloat16:
                feeds[name + _BORDER] = array.astype(np.float32)
            else:
                feeds[name] = np.ascontiguousarray(array)
        arrays = self._session.run(None, feeds)
        if not self._is_profiled:
            self._is_profiled = True
            events = json.loads(Path(self._session.end_profiling()).read_text())
            self.ran = frozenset(event["args"]["op_name"] for event in events if event.get("cat") == "Node")
            self._clean_up()
        return {
            name: array.astype(ml_dtypes.bfloat16) if name in self._bfloat16 else array
            for name, array in zip(self._outputs, arrays, strict=True)
        }


def _with_float32_borders(model: ModelProto) -> tuple[ModelProto, set[str]]:
    """The model with a Cast beside each bfloat16 input and output, and the names of these."""
    names = {
        value.name
        for value in (*model.graph.input, *model.graph.output)
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16
    }
    if not names:
        return model, names
    bordered = ModelProto()
    bordered.CopyFrom(model)
    for values, to in ((bordered.graph.input, TensorProto.BFLOAT16), (bordered.graph.output, TensorProto.FLOAT)):
        for value in values:
            if value.name in names:
                inner, outer = value.name, value.name + _BORDER
                is_input = to == TensorProto.BFLOAT16
                cast = helper.make_node("Cast", [outer if is_input else inner], [inner if is_input else outer], to=to)
                bordered.graph.node.insert(0 if is_input else len(bordered.graph.node), cast)
                value.name = outer
                value.type.tensor_type.elem_type = TensorProto.FLOAT
    return bordered, names


@contextmanager
def _source(model: ModelProto, folder: Path | None) -> Iterator[bytes | str]:
    """What onnxruntime loads: the bytes, or a file beside the external data."""
    if folder is None:
        yield model.SerializeToString()
        return
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".onnx") as file:
        file.write(model.SerializeToString())
        file.flush()
        yield file.name
