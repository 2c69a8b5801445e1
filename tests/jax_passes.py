"""Counts the passes over the rows that XLA makes of the row operation; ``python tests/jax_passes.py`` prints a table.

A pass is an instruction of the optimised program that reads or writes an array as large as x.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sa_softmax.backends.jax import sa_softmax

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.+?) ([\w-]+)\(([^)]*)\)", re.MULTILINE)
_FREE = {"parameter", "bitcast", "tuple", "get-tuple-element", "constant"}


class Passes(NamedTuple):
    """Passes, the arrays as large as x that they write, and how many such arrays are alive beside the results."""

    passes: int
    writes: int
    temporaries: float


def passes(function: Callable[..., Any], *arrays: Any) -> Passes:
    """Of ``function`` of arrays, the first of which is x, under jax.jit."""
    compiled = jax.jit(function).lower(*arrays).compile()
    text = compiled.as_text()
    size, sizes, count, writes = arrays[0].size, {}, 0, 0
    for name, types, operation, operands in _INSTRUCTION.findall(text[text.index("\nENTRY") :]):
        shapes = re.findall(r"\w+\[([\d,]*)\]", types)
        sizes[name] = max((math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes), default=0)
        if operation in _FREE:
            continue
        reads = any(sizes.get(operand, 0) >= size for operand in re.findall(r"%([^\s,)]+)", operands))
        count += sizes[name] >= size or reads
        writes += sizes[name] >= size
    temporary = compiled.memory_analysis().temp_size_in_bytes / arrays[0].nbytes
    return Passes(count, writes, round(temporary, 1))


def both(f: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Value and gradient of ``f``."""

    def value_and_gradient(x: Any, g: Any) -> Any:
        y, pullback = jax.vjp(f, x)
        return y, pullback(g)[0]

    return value_and_gradient


def main() -> None:
    x = jnp.ones((4096, 1024))
    print("| | passes | arrays written | temporaries |")
    print("| --- | --- | --- | --- |")
    functions = {"jax.nn.softmax": jax.nn.softmax}
    for variant in ("normalized", "product"):
        functions[variant] = lambda x, variant=variant: sa_softmax(x, variant=variant)
    for name, f in functions.items():
        for way, result in (("forward", passes(f, x)), ("forward + backward", passes(both(f), x, x))):
            print(f"| {name} {way} | {result.passes} | {result.writes} | {result.temporaries:g} |")


if __name__ == "__main__":
    main()
