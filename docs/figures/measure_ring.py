"""Processor time and memory of ring attention against the number of devices:  python docs/figures/measure_ring.py

Prints the table of docs/distributed.md. All devices share the cores of the machine, so what is told is the processor
time of all devices together: it would stay the same if the ring were free. Memory is XLA's own account of one device:
arguments, results and temporaries of a jitted forward and backward pass.
"""

import os
import platform
import statistics
import time

DEVICES = 64
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from sa_softmax.backends.jax.distributed import ring_attention  # noqa: E402
from sa_softmax.backends.zigzag import zigzag  # noqa: E402

HEADS, KV_HEADS, D = 4, 2, 64
TIMED, LONG = 4096, 2**20  # tokens


def step(n: int, length: int, dtype: jnp.dtype, backward: bool = True) -> tuple[jax.stages.Compiled, NamedSharding]:
    """A causal forward and backward pass, zig-zag, compiled for ``n`` devices."""
    mesh = Mesh(np.array(jax.devices()[:n]), ("sequence",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "sequence", None))
    positions = np.concatenate(zigzag(length, n))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, i: jax.Array) -> jax.Array:
        return ring_attention(q, k, v, mesh=mesh, axis_name="sequence", is_causal=True, positions=i)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, i: jax.Array) -> tuple[jax.Array, ...]:
        o, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, i), q, k, v)
        return (o, *vjp(o))

    line = NamedSharding(mesh, PartitionSpec("sequence"))
    q, k = (jax.ShapeDtypeStruct((h, length, D), dtype) for h in (HEADS, KV_HEADS))
    i = jax.ShapeDtypeStruct(positions.shape, np.int32)
    function = jax.jit(both if backward else attend, in_shardings=(sharding,) * 3 + (line,), out_shardings=sharding)
    return function.lower(q, k, k, i).compile(), sharding


def seconds(n: int, backward: bool = True) -> float:
    """Processor time of a run, all devices together; the median of three."""
    compiled, sharding = step(n, TIMED, jnp.float32, backward)
    rng = np.random.default_rng(0)
    qkv = [
        jax.device_put(rng.standard_normal((h, TIMED, D), np.float32), sharding) for h in (HEADS, KV_HEADS, KV_HEADS)
    ]
    line = NamedSharding(sharding.mesh, PartitionSpec("sequence"))
    positions = jax.device_put(np.concatenate(zigzag(TIMED, n)), line)
    times = []
    for _ in range(4):
        start = time.process_time()
        jax.block_until_ready(compiled(*qkv, positions))
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def mebibytes(n: int, length: int, dtype: jnp.dtype) -> float:
    """XLA's account of the memory of one of ``n`` devices."""
    memory = step(n, length, dtype)[0].memory_analysis()
    parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return sum(parts) / 2**20


def main() -> None:
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}")
    print(f"causal, zig-zag, Hq = {HEADS}, Hkv = {KV_HEADS}, D = {D}, forward and backward\n")
    print(f"| devices | processor s, T = {TIMED}, float32 | MiB per device | MiB per device, T = {LONG}, bfloat16 |")
    print("| --- | --- | --- | --- |")
    for n in (1, 2, 4, 8, 64):
        timed = f"{seconds(n):.2f} | {mebibytes(n, TIMED, jnp.float32):.1f}" if n <= 8 else "- | -"
        print(f"| {n} | {timed} | {mebibytes(n, LONG, jnp.bfloat16):.0f} |", flush=True)
    pairs = HEADS * TIMED * (TIMED + 512) / 2  # of queries and keys in the tiles of a causal mask
    forward, both = seconds(1, backward=False), seconds(1)
    # As FlashAttention counts: 4 D for a pair forward, 10 D backward.
    print(f"\none device, per core: forward {4 * D * pairs / forward / 1e9:.1f} GFLOP/s, ", end="")
    print(f"backward {10 * D * pairs / (both - forward) / 1e9:.1f} GFLOP/s")


if __name__ == "__main__":
    main()
