"""Sharded tensors: two processes give what one gives, whatever is sharded, gradients included."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import VARIANTS

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("this build of PyTorch has no torch.distributed", allow_module_level=True)

PROCESSES = 2


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Each process runs this file as a script, and asserts."""
    command = [sys.executable, __file__, str(tmp_path / "store")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES, "\n".join(said)
    assert all("checked" in words for words in said)


def test_importing_the_backend_leaves_torch_distributed_tensor_alone() -> None:
    code = "import sys, sa_softmax.backends.torch; sys.exit('torch.distributed.tensor' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def main(store: str, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    mesh = torch.distributed.init_device_mesh("cpu", (PROCESSES,))
    counts = [check(mesh) for check in (rows, rows_under_masks, attention, second_derivatives, compiled)]
    torch.distributed.destroy_process_group()
    print("checked", *counts)


def randn(*shape: int, seed: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(f: Any, tensors: dict[str, Any], shardings: dict[str, Any], mesh: Any, expected: Any = None) -> None:
    """f and the gradients of sum(g * f) on plain tensors and on those sharded as ``shardings`` says (None: plain)."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    def results(inputs: dict[str, Any]) -> list[Any]:
        y = f(**inputs)
        if expected is not None and isinstance(y, DTensor):
            assert y.placements == (expected,), (y.placements, expected)
        g = randn(*y.shape, seed=9)
        g = distribute_tensor(g, mesh, y.placements) if isinstance(y, DTensor) else g
        leaves = [x for x in inputs.values() if x.requires_grad]
        full = [y, *torch.autograd.grad(y, leaves, g)]
        return [x.full_tensor() if isinstance(x, DTensor) else x for x in full]

    def leaf(name: str, x: Any, sharding: Any) -> Any:
        x = x.detach() if sharding is None else distribute_tensor(x.detach(), mesh, [sharding])
        return x.requires_grad_(x.is_floating_point() and sharding is not None)

    plain = results({name: x.detach().requires_grad_(x.is_floating_point() and shardings[name] is not None)
                     for name, x in tensors.items()})  # fmt: skip
    sharded = results({name: leaf(name, x, shardings[name]) for name, x in tensors.items()})
    for a, b in zip(sharded, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def rows(mesh: Any) -> int:
    from torch.distributed.tensor import Replicate, Shard

    from sa_softmax.backends.torch import sa_softmax

    x = randn(3, 4, 5, seed=1)  # 3 and 5 do not divide into two
    count = 0
    for variant, axis, sharding in itertools.product(VARIANTS, (0, -1), (Shard(0), Shard(1), Shard(-1), Replicate())):
        cut = isinstance(sharding, Shard) and sharding.dim % 3 == axis % 3
        expected = Replicate() if cut or sharding == Replicate() else Shard(sharding.dim % 3)

        def f(x: Any, axis: int = axis, variant: str = variant) -> Any:
            return sa_softmax(x, axis=axis, variant=variant)

        compare(f, {"x": x}, {"x": sharding}, mesh, expected)
        count += 1
    return count


def rows_under_masks(mesh: Any) -> int:
    from torch.distributed.tensor import Replicate, Shard

    from sa_softmax.backends.torch import sa_softmax

    x = randn(3, 4, 5, seed=1)
    count = 0
    for shape in ((3, 4, 5), (4, 1), (5,), (3, 1, 5)):
        where = randn(*shape, seed=2) > -0.5
        for of_where in (None, Replicate(), Shard(0)):
            for of_x in (Shard(0), Shard(2), Replicate()):
                compare(sa_softmax, {"x": x, "where": where}, {"x": of_x, "where": of_where}, mesh)
                count += 1
    where = randn(4, 5, seed=2) > -0.5
    y = sa_softmax(x, where=torch.distributed.tensor.distribute_tensor(where, mesh, [Shard(0)]))  # plain x
    assert torch.equal(y.full_tensor(), sa_softmax(x, where=where))
    return count


def attention(mesh: Any) -> int:
    from torch.distributed.tensor import Replicate, Shard

    from sa_softmax.backends.torch import sa_attention

    q, k, v = randn(2, 4, 3, 5, seed=1), randn(2, 2, 6, 5, seed=2), randn(2, 2, 6, 7, seed=3)
    narrow = {"q": q, "k": k[:, :1], "v": v[:, :1]}  # one key head cannot be shared out
    mask = randn(2, 1, 3, 6, seed=4) > -1
    count = 0

    def check(tensors: dict[str, Any], sharding: Any, expected: Any, others: Any = None, **options: Any) -> None:
        nonlocal count
        shardings = dict.fromkeys(tensors, sharding) | {name: others for name in tensors if name in ("bias", "mask")}
        compare(lambda **tensors: sa_attention(**tensors, **options), tensors, shardings, mesh, expected)
        count += 1

    qkv = {"q": q, "k": k, "v": v}
    causal = {"is_causal": True, "q_offset": 2}
    for variant in VARIANTS:
        for sharding, expected in ((Shard(0), Shard(0)), (Shard(1), Shard(1)), (Shard(2), Replicate())):
            check(qkv, sharding, expected, variant=variant, **causal)
    for shape in ((2, 4, 3, 6), (4, 1, 6), (1, 6), (2, 1, 3, 6)):
        bias = randn(*shape, seed=5)
        for sharding in (Shard(0), Shard(1)):
            check(qkv | {"bias": bias, "mask": mask}, sharding, sharding, Replicate())
    check(qkv | {"mask": mask}, Shard(1), Shard(1), None)
    for sharding, expected in ((Shard(1), Shard(1)), (Shard(2), Replicate())):
        check(qkv, sharding, expected, window_size=(1, 1), q_offset=2)
    check(narrow, Replicate(), Replicate(), **causal)
    compare(sa_attention, narrow, {"q": Shard(1), "k": Replicate(), "v": Shard(0)}, mesh, Replicate())
    return count + 1


def second_derivatives(mesh: Any) -> int:
    from torch.distributed.tensor import Shard, distribute_tensor

    from sa_softmax.backends.torch import sa_softmax

    x, g, t = (randn(4, 5, seed=seed) for seed in (1, 2, 3))

    def gradient_of_gradient(x: Any, g: Any, t: Any) -> Any:
        (dx,) = torch.autograd.grad(sa_softmax(x), x, g, create_graph=True)
        return torch.autograd.grad(dx, x, t)[0]

    rows = [distribute_tensor(a, mesh, [Shard(0)]) for a in (x, g, t)]
    sharded = gradient_of_gradient(rows[0].requires_grad_(), *rows[1:]).full_tensor()
    torch.testing.assert_close(sharded, gradient_of_gradient(x.requires_grad_(), g, t), rtol=1e-12, atol=1e-12)
    return 1


def compiled(mesh: Any) -> int:
    from torch.distributed.tensor import Shard, distribute_tensor

    from sa_softmax.backends.torch import sa_softmax

    x = randn(4, 5, seed=1)
    f = torch.compile(sa_softmax, fullgraph=True, backend="aot_eager")
    sharded = f(distribute_tensor(x, mesh, [Shard(1)])).full_tensor()
    torch.testing.assert_close(sharded, sa_softmax(x), rtol=1e-12, atol=1e-12)
    return 1


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
