"""Compile every Triton kernel for GPUs that need not be there, and say how many registers it takes and what it spills.

    python -m sa_softmax.backends.torch._triton.compile_check [--write docs/triton-registers.md]

A module of kernels takes part by being named in ``MODULES`` and defining ``instances(target)``, which yields an
:class:`Instance` for each way the kernels are launched on that GPU which is worth a line. Triton brings the assemblers
along. TRITON_INTERPRET must not be set: it replaces the compiler.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["MODULES", "TARGETS", "Instance", "Usage", "broken", "check", "instances", "measure"]

MODULES = ("rows", "attention_launch")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Instance:
    """One compilation of a kernel, for the target that :func:`instances` was asked for.

    ``arguments`` are those of a launch by name, with a ``torch.dtype`` in the place of a tensor; whatever is a multiple
    of 16, pointers included, or 1, is compiled as such, as a launch would. ``options`` are those of the launch;
    ``spills`` is the most bytes that it may spill.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    spills: int = 0

    def most_registers(self, target: str) -> int:
        """What the register file gives to each thread of one program."""
        most, file = (255, 65536) if TARGETS[target].backend == "cuda" else (512, 131072)
        return min(most, file // (self.options["num_warps"] * TARGETS[target].warp_size))


@dataclass(frozen=True)
class Usage:
    """Registers of a thread (AMD: vector ones), bytes of them that it spills, bytes of shared memory of a program."""

    registers: int
    spills: int
    shared: int


def instances(target: str) -> Iterator[Instance]:
    """Those of all MODULES on one of TARGETS."""
    for module in MODULES:
        yield from importlib.import_module(f"sa_softmax.backends.torch._triton.{module}").instances(TARGETS[target])


def measure(instance: Instance, target: str) -> Usage:
    """Compile, and read what the assembler says. RuntimeError where Triton interprets instead."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET replaces the compiler; unset it before Triton is imported")
    compiled = triton.compile(_source(instance), target=TARGETS[target], options=instance.options)
    return (_nvidia if TARGETS[target].backend == "cuda" else _amd)(compiled)


def _source(instance: Instance) -> ASTSource:
    kernel = instance.kernel
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def type_of(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of(item, (*path, i)) for i, item in enumerate(value))
        if value is None or (value == 1 and len(path) >= 1 and not isinstance(value, bool)):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.dtype):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + _TYPES[value]
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature: dict[str, Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = instance.arguments[parameter.name]
        if parameter.is_constexpr:
            constants[(i,)] = value
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = type_of(value, (i,))
    return ASTSource(kernel, signature, constants, attributes)


_TYPES = {
    torch.bool: "i1", torch.int32: "i32", torch.int64: "i64",
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
}  # fmt: skip


def _nvidia(compiled: Any) -> Usage:
    """ptxas tells its counts to nobody, but the cubin holds them; a thread's stack is where spilled registers live."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return Usage(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared)


def _amd(compiled: Any) -> Usage:
    used = {key: int(value) for key, value in re.findall(r"^ *-? *\.(\w+): *(\d+)$", compiled.asm["amdgcn"], re.M)}
    spills = 4 * used["vgpr_spill_count"] + used["private_segment_fixed_size"]
    return Usage(used["vgpr_count"], spills, compiled.metadata.shared)


SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""The most bytes of shared memory that a program can have."""


def broken(instance: Instance, target: str, usage: Usage) -> list[str]:
    """What the usage breaks, in words; empty if it keeps all bounds."""
    bounds = {
        "registers": instance.most_registers(target),
        "spills": instance.spills,
        "shared": SHARED[target],
    }
    return [
        f"{instance.name} on {target}: {name} {getattr(usage, name)}, at most {bound}"
        for name, bound in bounds.items()
        if getattr(usage, name) > bound
    ]


def check() -> tuple[str, list[str]]:
    """The Markdown table of every instance on every target, and what breaks its bounds."""
    rows, problems = [], []
    for on_targets in zip(*(instances(target) for target in TARGETS), strict=True):
        cells = []
        for target, instance in zip(TARGETS, on_targets, strict=True):
            usage = measure(instance, target)
            problems += broken(instance, target, usage)
            registers = f"{usage.registers} of {instance.most_registers(target)}"
            cells.append(f"{registers}, {usage.spills} B, {usage.shared / 1024:g} KiB")
        rows.append(f"| {on_targets[0].name} | {' | '.join(cells)} |")
    head = ["kernel", *TARGETS]
    return "\n".join([f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *rows]), problems


_PAGE = """\
# Registers of the Triton kernels

Written by `python -m sa_softmax.backends.torch._triton.compile_check --write docs/triton-registers.md` with Triton
{version}, which compiles for GPUs that need not be there. None of these kernels has run on a GPU yet.

Each cell: registers of a thread, of those that it may take; bytes of them that are spilled to memory; shared memory of
a program. On AMD, registers are vector registers. A test compiles all of this again and fails where a bound is broken.

{table}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="write the page instead of printing the table")
    arguments = parser.parse_args()
    rows, problems = check()
    if arguments.write is None:
        print(rows)
    else:
        arguments.write.write_text(_PAGE.format(version=triton.__version__, table=rows))
    print(*problems, sep="\n", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
