"""One of two JAX processes, each with a device of the ring; ``test_distributed_jax.py`` starts both.

They compute attention and its gradients right once; then the second one fails as the scenario has it, and the first
one prints as JSON what becomes of its next call.
"""

import json
import os
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sa_softmax import reference
from sa_softmax.backends.jax.distributed import ring_attention


def stopped() -> None:
    """Not even heartbeats; whoever lets the process continue only has it stop again."""
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)


FAILURES = {
    "killed": lambda: os._exit(1),
    "hanging": lambda: time.sleep(600),  # alive, but it never makes the call
    "stopped": stopped,
}


def main(scenario: str, rank: int, address: str, heartbeat: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, rank, heartbeat_timeout_seconds=heartbeat)
    mesh = Mesh(np.array(jax.devices()), ("sequence",))
    place = NamedSharding(mesh, PartitionSpec(None, "sequence", None))
    rng = np.random.default_rng(0)
    whole = [rng.standard_normal((2, 8, 4), np.float32) for _ in range(4)]
    arrays = [jax.make_array_from_callback(x.shape, place, x.__getitem__) for x in whole]

    @jax.jit
    def step(do: jax.Array, *qkv: jax.Array) -> tuple[jax.Array, ...]:
        attend = lambda *qkv: ring_attention(*qkv, mesh=mesh, axis_name="sequence", is_causal=True)  # noqa: E731
        o, vjp = jax.vjp(attend, *qkv)
        return (o, *vjp(do))

    results = step(*arrays)
    do, *qkv = (x.astype(np.float64) for x in whole)
    gradients = reference.sa_attention_vjp(*qkv, do, is_causal=True)
    expected = (reference.sa_attention(*qkv, is_causal=True), *gradients)
    for got, due in zip(results, expected, strict=False):
        (part,) = got.addressable_shards
        np.testing.assert_allclose(part.data, due[part.index], rtol=0, atol=2e-6 * max(1, abs(due).max()))

    if rank == 1:
        FAILURES[scenario]()
    start = time.monotonic()
    try:
        jax.block_until_ready(step(*arrays))
        error = None
    except jax.errors.JaxRuntimeError as raised:
        error = str(raised)
    print(json.dumps({"error": error, "seconds": time.monotonic() - start}), flush=True)
    os._exit(0)  # the runtime would wait for the other one


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
