"""PyTorch's transformations of the operators, on each device with kernels.

``interpreted_triton.py`` runs this file again, with the Triton kernels in the place of the CPU's.
"""

# ruff: noqa: E402
from collections.abc import Iterator
from typing import Any

import pytest
from support import VARIANTS

torch = pytest.importorskip("torch")

from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from sa_softmax import reference
from sa_softmax.backends.torch import implementation, sa_attention, sa_softmax

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]

INF = float("inf")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROWS = [[0.3, -1.2, 2.0, 0.7, -0.4], [-1.0, 2.0, -1.0, 2.0, 2.0], [0.0] * 5, [-INF, 1.0, -3.0, -3.0, 0.0], [-INF] * 5]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if implementation(request.param) == "composition":
        pytest.skip(f"no kernels on {request.param}; on the CPU they are those of sa-softmax-native")
    yield request.param
    torch._dynamo.reset()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def x(device: str) -> Tensor:
    return torch.tensor(ROWS, device=device)


@pytest.fixture
def where(device: str) -> Tensor:
    return torch.tensor([True, False, True, True, True], device=device)


def upstream(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)


def expected(x: Tensor, where: Tensor | None, variant: str) -> tuple[Tensor, Tensor]:
    """Value and gradient by the reference, in float64."""
    options = {"variant": variant, "where": None if where is None else where.cpu().numpy()}
    x64, g64 = x.detach().cpu().double().numpy(), upstream(x).cpu().double().numpy()
    y, dx = reference.sa_softmax(x64, **options), reference.sa_softmax_vjp(x64, g64, **options)
    return torch.as_tensor(y), torch.as_tensor(dx)


def assert_close(a: Tensor, b: Tensor, ulps: float = 64) -> None:
    bound = ulps * torch.finfo(a.dtype).eps
    torch.testing.assert_close(a.detach().cpu().double(), b.cpu().double(), rtol=bound, atol=bound)


def graph_of(f: Any, *args: Any) -> list[str]:
    """The operators of the forward graph that a compiler gets, in order."""
    seen: list[str] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compiler)
    with torch.no_grad():
        torch.compile(f, fullgraph=True, backend=backend)(*args)
    return seen


def test_operators_obey_opcheck(x: Tensor, where: Tensor, variant: str) -> None:
    for w in (None, where):
        for operator, args in (("row", (x,)), ("row_vjp", (x, upstream(x)))):
            torch.library.opcheck(getattr(torch.ops.sa_softmax, operator).default, (*args, w, 1, variant))


def test_a_compiler_sees_the_kernel(x: Tensor, where: Tensor, variant: str) -> None:
    nodes = graph_of(lambda x, w: sa_softmax(x, where=w, variant=variant), x, where)
    assert nodes.count("sa_softmax.row.default") == 1
    assert all("softmax" not in node for node in nodes if node != "sa_softmax.row.default")


def test_compiled_value_and_gradient(x: Tensor, where: Tensor, variant: str) -> None:
    f = torch.compile(lambda x: sa_softmax(x, where=where, variant=variant), fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    y = f(x)
    dx = torch.autograd.grad(y, x, upstream(x))[0]
    for a, b in zip((y, dx), expected(x, where, variant), strict=True):
        assert_close(a, b)


def test_export_keeps_one_node(x: Tensor, variant: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sa_softmax(x, variant=variant)

    program = torch.export.export(Model(), (x,))
    nodes = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert nodes == ["sa_softmax.sa_softmax.default"]
    assert_close(program.module()(x), expected(x, None, variant)[0])


def test_func_grad_and_vmap(x: Tensor, where: Tensor, variant: str) -> None:
    g = upstream(x)
    y, dx = expected(x, where, variant)
    gradient = torch.func.grad(lambda x, g: (sa_softmax(x, where=where, variant=variant) * g).sum())
    assert_close(gradient(x, g), dx)
    assert_close(torch.func.vmap(gradient)(x, g), dx)
    masks = where.expand(x.shape)
    rows = torch.func.vmap(lambda x, w: sa_softmax(x, where=w, variant=variant), in_dims=1, out_dims=1)
    assert_close(rows(x[:, None], masks[:, None])[:, 0], y)


def test_tangents(x: Tensor, where: Tensor, variant: str) -> None:
    t = upstream(x)
    y, dy = torch.func.jvp(lambda x: sa_softmax(x, where=where, variant=variant), (x,), (t,))
    x64, t64 = x.cpu().double().numpy(), t.cpu().double().numpy()
    right = reference.sa_softmax_jvp(x64, t64, variant=variant, where=where.cpu().numpy())
    assert_close(y, expected(x, where, variant)[0])
    assert_close(dy, torch.as_tensor(right))


def test_double_backward(device: str, variant: str) -> None:
    x = torch.tensor(ROWS[:2], dtype=torch.float64, device=device)[:, [0, 1, 2]] + torch.tensor([0, 0.1, 0.25]).to(
        device
    )
    assert torch.autograd.gradgradcheck(lambda x: sa_softmax(x, variant=variant), x.requires_grad_())


def test_checkpointing_and_autocast(x: Tensor, variant: str) -> None:
    x.requires_grad_()
    y = checkpoint(lambda x: sa_softmax(x, variant=variant), x, use_reentrant=False)
    for a, b in zip((y, *torch.autograd.grad(y, x, upstream(x))), expected(x, None, variant), strict=True):
        assert_close(a, b)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert sa_softmax(x, variant=variant).dtype == torch.float32
        q = torch.randn(1, 2, 3, 4, device=x.device)
        assert sa_attention(q, q, q, variant=variant).dtype == torch.bfloat16


def test_float16_and_bfloat16_are_rounded_once(x: Tensor, where: Tensor, variant: str) -> None:
    truncates = "interpreter" in implementation(x.device)  # Triton's, to bfloat16
    for dtype in (torch.float16, torch.bfloat16):
        narrow = x.to(dtype).requires_grad_()
        y = sa_softmax(narrow, where=where, variant=variant)
        dx = torch.autograd.grad(y, narrow, upstream(narrow))[0]
        for a, b in zip((y, dx), expected(narrow, where, variant), strict=True):
            assert a.dtype == dtype
            assert_close(a, b, ulps=1.01 if dtype == torch.bfloat16 and truncates else 0.51)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA; not run on a GPU yet")
def test_cuda_graph(variant: str) -> None:
    for n in (5, 70000):  # one kernel, and two with a workspace
        x = torch.randn(3, n, device="cuda", requires_grad=True)
        g = torch.randn_like(x)

        def step(x: Tensor = x, g: Tensor = g) -> tuple[Tensor, Tensor]:
            y = sa_softmax(x, variant=variant)
            return y, torch.autograd.grad(y, x, g)[0]

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            x.normal_()
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace_method. is deprecated:DeprecationWarning")
def test_the_short_way_is_taken_by_plain_tensors_alone(x: Tensor, where: Tensor, variant: str) -> None:
    """What the dispatcher would resolve first, a view that is negated lazily, must not reach a kernel as it lies."""
    from sa_softmax.backends.torch._kernels import direct

    plain = x.device.type == "cpu"
    assert (direct("row", x, where) is not None) is plain
    negated = torch.complex(x, -x).conj().imag  # x, in memory -x
    assert negated.is_neg()
    assert direct("row", negated, where) is None
    torch.testing.assert_close(sa_softmax(negated, variant=variant), sa_softmax(x, variant=variant))
    leaf = x.clone().requires_grad_()
    assert direct("row", leaf, where) is None
    with torch.no_grad():
        assert (direct("row", leaf, where) is not None) is plain
    traced = torch.jit.trace(lambda x: sa_softmax(x, variant=variant), x)
    torch.testing.assert_close(traced(2 * x), sa_softmax(2 * x, variant=variant))
    batched = torch.func.vmap(lambda row: sa_softmax(row, variant=variant))(x)
    torch.testing.assert_close(batched, sa_softmax(x, variant=variant))
