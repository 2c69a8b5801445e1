"""The kernels of sa-softmax-native behind NumPy and PyTorch: which run where, how exact they are, threads and forks."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from support import FLOATS, numpy_dtype, variants

from sa_softmax import reference

c_api: Any = pytest.importorskip("sa_softmax_native.c_api", reason="needs pip install ./backends/native")

from sa_softmax.backends import numpy as door  # noqa: E402
from sa_softmax.backends.numpy import _native  # noqa: E402

Array = np.ndarray[Any, Any]

if door.functions is reference:
    pytest.skip("SA_SOFTMAX_IMPLEMENTATION=composition", allow_module_level=True)


def randn(*shape: int, dtype: str = "float32", seed: int = 0, scale: float = 3) -> Array:
    return np.asarray(scale * np.random.default_rng(seed).standard_normal(shape)).astype(numpy_dtype(dtype))


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


# Which implementation runs.


def test_the_kernels_run_and_say_so() -> None:
    assert door.implementation() == f"native {c_api.instruction_set()}"
    assert door.functions is _native


@pytest.mark.parametrize(
    ("environment", "code", "expected"),
    [
        ({"SA_SOFTMAX_IMPLEMENTATION": "composition"}, "", "reference composition"),
        ({"SA_SOFTMAX_IMPLEMENTATION": "native"}, "", "native native"),
        ({"SA_SOFTMAX_IMPLEMENTATION": "fast"}, "", "must be 'native' or 'composition'; got 'fast'"),
        ({"SA_SOFTMAX_IMPLEMENTATION": "native"}, "sys.modules['sa_softmax_native'] = None", "pip install sa-softmax"),
        ({}, "sys.modules['sa_softmax_native'] = None", "reference composition"),
        ({"SA_SOFTMAX_INSTRUCTION_SET": "x87"}, "", "must name what this processor runs"),
        ({"SA_SOFTMAX_NUM_THREADS": "0"}, "", "SA_SOFTMAX_NUM_THREADS must be an integer of at least 1; got '0'"),
    ],
)
def test_choices_by_environment(environment: dict[str, str], code: str, expected: str) -> None:
    pytest.importorskip("torch")
    ran = python(
        f"import sys; {code}\nfrom sa_softmax.backends import numpy, torch\n"
        "print(numpy.implementation().split()[0], torch.implementation('cpu').split()[0])",
        **environment,
    )
    assert expected in (ran.stdout if ran.returncode == 0 else ran.stderr)


CHECK_LEVEL = """
import sys
from sa_softmax.conformance import execute
from sa_softmax.backends import numpy as door
from sa_softmax.backends.numpy.adapter import Adapter
if door.implementation() != "native " + sys.argv[1]:
    sys.exit(door.implementation() + " ran")
groups = "row.corner row.ties row.where row.layout row.independence attention.shape attention.causal".split()
ran = [
    result for result in execute(Adapter(), progress=lambda cases: [c for c in cases if c.id.split("/")[0] in groups])
]
failed = [result for result in ran if result.status != "passed"]
print(len(ran), "cases,", len(failed), "failed", *failed[:3], sep=" ")
sys.exit(bool(failed) or len(ran) < 1000)
"""


@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4+amx", "generic"])
def test_every_instruction_set_conforms_and_is_exact(level: str) -> None:
    """The proof that it ran is part of the check."""
    environment = os.environ | {"SA_SOFTMAX_INSTRUCTION_SET": level, "SA_SOFTMAX_IMPLEMENTATION": "native"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)

    ran = run("-c", CHECK_LEVEL, level)
    if "must name what this processor runs" in ran.stderr:
        pytest.skip(f"this processor or build has no {level}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    ran = run("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "ulp or layouts or place")
    assert ran.returncode == 0, ran.stdout


# Exactness.


@variants
@pytest.mark.parametrize("n", [5, 16, 100, 1024, 5000, 70000])
def test_values_are_within_8_ulp_at_any_scale(n: int, variant: str) -> None:
    """ULP of the exact value, in float64: 29 bits more, and x - max is exact there."""
    for scale in (1e-3, 1e-1, 1, 10, 100, 1e3):
        x = randn(16, n, seed=n, scale=scale)
        exact = reference.sa_softmax(x.astype(np.float64), variant=variant)
        y = door.sa_softmax(x, variant=variant)
        # Where p is below the normal numbers, 0 is right (D5).
        size = np.abs(x) if variant == "product" else 1
        counted = np.abs(exact) > 4 * float(np.finfo(np.float32).tiny) * np.maximum(1, size)
        ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        assert (np.abs(y - exact) <= 8 * ulp)[counted].all(), scale


@pytest.mark.parametrize("n", [33, 100])
def test_a_gradient_that_is_finite_stays_so_where_the_range_is_tiny(n: int) -> None:
    """g / R alone overflows; g / R p does not."""
    x, g = randn(4, n), 10 * randn(4, n, seed=1)
    x *= np.float32(1.5e-38) / np.abs(x).max()
    exact = reference.sa_softmax_vjp(x.astype(np.float64), g.astype(np.float64))
    representable = np.abs(exact) < np.finfo(np.float32).max
    assert representable.mean() > 0.5
    assert (np.abs(g) / np.ptp(x, axis=-1, keepdims=True).astype(np.float64) > np.finfo(np.float32).max).any()
    dx = _native.sa_softmax_vjp(x, g)
    # The scores themselves are near the smallest normal number, so a is known to a few bits only if it is flushed.
    np.testing.assert_allclose(dx[representable], exact[representable], rtol=1e-3, atol=1e-3 * np.abs(exact).max())


# Layouts, and the bits of a row wherever it lies.


def unaligned(x: Array) -> Array:
    """A field of packed records."""
    records = np.zeros(x.shape, np.dtype([("flag", np.uint8), ("x", x.dtype)]))
    records["x"] = x
    return records["x"]


LAYOUTS: dict[str, Any] = {
    "transposed": lambda x: np.asfortranarray(x),
    "reversed": lambda x: x[:, ::-1].copy()[:, ::-1],
    "strided": lambda x: np.repeat(np.repeat(x, 2, 0), 3, 1)[::2, ::3],
    "rows apart": lambda x: np.repeat(x, 2, 0)[::2],
    "offset": lambda x: np.concatenate([x[:, :1], x], 1)[:, 1:],
    "unaligned": unaligned,
    "read only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


@variants
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits(layout: str, dtype: str, variant: str) -> None:
    x, g = randn(7, 37, dtype=dtype), randn(7, 37, dtype=dtype, seed=1)
    where = np.random.default_rng(2).random(x.shape) < 0.7
    laid = LAYOUTS[layout]
    assert np.array_equal(laid(x), x)
    for mask, laid_mask in ((None, None), (where, laid(where))):
        for axis in (0, 1):
            options: dict[str, Any] = {"axis": axis, "variant": variant}
            y = door.sa_softmax(x, where=mask, **options)
            np.testing.assert_array_equal(door.sa_softmax(laid(x), where=laid_mask, **options), y)
            dx = _native.sa_softmax_vjp(x, g, where=mask, **options)
            np.testing.assert_array_equal(_native.sa_softmax_vjp(laid(x), laid(g), where=laid_mask, **options), dx)


@variants
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1000, 1024])
def test_bits_do_not_depend_on_place_or_size(n: int, dtype: str, variant: str) -> None:
    """The large array is written past the caches, on several threads; one row is not."""
    rows = (1 << 23) // (n * numpy_dtype(dtype).itemsize) + 2
    x = np.resize(randn(50, n, dtype=dtype), (rows, n))
    g = np.resize(randn(50, n, dtype=dtype, seed=1), (rows, n))
    y, dx = door.sa_softmax(x, variant=variant), _native.sa_softmax_vjp(x, g, variant=variant)
    for i in (0, 1, 33, rows - 1):
        row = slice(i, i + 1)
        assert door.sa_softmax(x[row], variant=variant).tobytes() == y[row].tobytes()
        assert _native.sa_softmax_vjp(x[row], g[row], variant=variant).tobytes() == dx[row].tobytes()
    assert y[:50].tobytes() == y[50:100].tobytes()
    assert dx[:50].tobytes() == dx[50:100].tobytes()


def test_subclasses_come_back_as_arrays_and_broadcast_ones_whole() -> None:
    class Tagged(np.ndarray[Any, Any]):
        pass

    x = randn(3, 5)
    y = door.sa_softmax(x.view(Tagged))
    assert type(y) is np.ndarray
    repeated = door.sa_softmax(np.broadcast_to(x[0], (4, 5)))
    np.testing.assert_array_equal(repeated, np.repeat(y[:1], 4, 0))


def test_attention_takes_a_bias_in_the_compute_dtype_and_any_offset() -> None:
    q, k, v = (randn(2, 6, 8, dtype="float16", seed=i, scale=1) for i in range(3))
    bias = randn(6, 6, seed=3)
    for offset in (0, 2, 2**70, -(2**70)):
        options: dict[str, Any] = {"bias": bias, "is_causal": True, "q_offset": offset}
        o = door.sa_attention(q, k, v, **options)
        clipped = reference.sa_attention(q, k, v, bias=bias, is_causal=True, q_offset=max(-6, min(offset, 6)))
        np.testing.assert_allclose(o.astype(float), clipped.astype(float), rtol=2e-3, atol=1e-3)


# Short calls, which leave out what is not needed for contiguous rows.


def test_contiguous_rows_take_the_short_way_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from sa_softmax.backends.torch import sa_softmax as torch_softmax

    if c_api.short_calls is None:
        pytest.skip("built without Python's headers")
    answers: list[list[Array]] = []
    for calls in (c_api.short_calls, None):
        monkeypatch.setattr(c_api, "short_calls", calls)
        with monkeypatch.context() as patched:
            if calls is not None:  # whatever the general way is made of is not reached
                patched.delattr(c_api, "_row")
            answers.append([])
            for shape in ((1,), (7,), (1, 128), (3, 50), (2, 3, 200), (300, 100)):
                for variant in ("normalized", "product"):
                    for dtype in ("float16", "float32", "float64"):
                        x = randn(*shape, dtype=dtype)
                        answers[-1] += [door.sa_softmax(x, variant=variant)]
                        answers[-1] += [torch_softmax(torch.from_numpy(x), variant=variant).numpy()]
                    half = torch.from_numpy(randn(*shape)).bfloat16()
                    answers[-1] += [torch_softmax(half, variant=variant).view(torch.int16).numpy()]
    assert len(answers[0]) == 84
    for short, general in zip(*answers, strict=True):
        assert short.dtype == general.dtype
        np.testing.assert_array_equal(short, general)


def test_what_is_not_contiguous_takes_the_general_way() -> None:
    x = randn(40, 60)
    frozen = x.copy()
    frozen.flags.writeable = False
    others = {
        "strided": x[:, ::2],
        "transposed": x.T,
        "reversed": x[:, ::-1],
        "repeated": np.broadcast_to(x[0], (3, 60)),
        "unaligned": np.frombuffer(b"." + x.tobytes(), "float32", offset=1).reshape(x.shape),
        "read only": frozen,
        "swapped": x.astype(">f4"),
        "empty": x[:0],
        "empty rows": x[:, :0],
        "bfloat16": x.astype(numpy_dtype("bfloat16")),
    }
    for name, array in others.items():
        if name == "swapped":
            with pytest.raises(TypeError):
                door.sa_softmax(array)
            continue
        y = door.sa_softmax(array)
        assert (y.dtype, y.shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(y, door.sa_softmax(array.copy(), axis=array.ndim - 1), err_msg=name)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@variants
def test_the_shortest_way_is_taken_by_contiguous_plain_tensors_alone(variant: str) -> None:
    torch = pytest.importorskip("torch")
    from torch._subclasses import FakeTensorMode
    from torch.autograd import forward_ad

    from sa_softmax.backends.torch import _kernels, _row, sa_softmax

    if _kernels.short_row is None:
        pytest.skip("built without Python's headers")

    def short(x: Any, variant: Any = variant) -> Any:
        return _row.short(x, -1, variant)

    def general(x: Any) -> Any:
        return sa_softmax(x, variant=variant, where=torch.ones((), dtype=torch.bool))

    x = torch.randn(3, 40)
    for like in (x, x.double(), x.half(), x.bfloat16(), x[0], x[:, None], x.as_strided((3, 1), (1, 7))):
        torch.testing.assert_close(short(like), general(like), rtol=0, atol=0)
    negated, leaf = torch.complex(x, -x).conj().imag, x.clone().requires_grad_()
    others = x.T, x[:, ::2], negated, leaf, torch.nn.Parameter(x), x.long(), x.sum(), x.to("meta"), x.numpy(), None
    assert [short(other) for other in others] == [None] * len(others)
    strange = (  # to DLPack some of them are like any other tensor
        torch._neg_view(x),
        torch._efficientzerotensor((3, 40)),
        torch._to_functional_tensor(x),
        x.to_sparse(),
        x.to_mkldnn(),
        x.to(torch.float8_e4m3fn),
        x.to(torch.complex64),
        x[:0],
    )
    assert [short(other) for other in strange] == [None] * len(strange)
    assert short(x, "Normalized") is None
    assert short(x, None) is None
    with torch.no_grad():
        assert torch.equal(short(leaf), general(x))

    seen: list[Any] = []

    def look(x: Any) -> Any:
        seen.append(short(x))
        return x

    torch.func.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    torch.jit.trace(look, x, check_trace=False)  # which would call it once more, not traced
    with forward_ad.dual_level():
        look(x)
    with FakeTensorMode():
        look(torch.empty(3, 4))
    assert len(seen) >= 5
    assert set(seen) == {None}

    objects = x, leaf, x.dtype, variant, _kernels.short_row
    before = [sys.getrefcount(each) for each in objects]
    for _ in range(1000):
        short(x), short(leaf), short(x.T)
    assert [sys.getrefcount(each) for each in objects] == before


def test_wrong_short_calls_are_refused() -> None:
    if c_api.short_calls is None:
        pytest.skip("built without Python's headers")
    x, y = randn(3, 4), randn(3, 4)
    rows_of_buffers, rows_at = c_api.short_calls.rows_of_buffers, c_api.short_calls.rows_at
    for arguments, error in (
        ((2, 0, 1, x), "5 arguments; got 4"),
        ((2, 0, 1, x, y[:2]), "y must have the size of x"),
        ((2, 0, 0, x, y), r"threads must be at least 1, or below 0 after sa_softmax_use_openmp\(\); got 0"),
        ((2, 7, 1, x, y), "variant must be"),
        ((9, 0, 1, x, y), "dtype must be"),
        (("2", 0, 1, x, y), "integer"),
        ((2, 0, 1, x, [1]), "bytes-like"),
        ((2, 0, 1, x, y.tobytes()), "not writable"),
    ):
        with pytest.raises((TypeError, ValueError, BufferError), match=error):
            rows_of_buffers(*arguments)
    with pytest.raises(ValueError, match="must have data"):
        rows_at(2, 0, 1, 12, 4, 0, y.ctypes.data)
    with pytest.raises(TypeError, match="7 arguments; got 0"):
        rows_at()


# Errors of the C interface.


def test_wrong_calls_of_the_c_interface_are_refused() -> None:
    x = randn(3, 4)

    def array(shape: tuple[int, ...] = (3, 4), strides: tuple[int, ...] = (4, 1)) -> Any:
        return c_api.array(x.ctypes.data, shape, strides)

    for message, arguments in {
        r"threads must be at least 1, or below 0 after sa_softmax_use_openmp\(\); got 0": (
            0,
            array(),
            None,
            array(),
            0,
        ),
        "axis must be in": (2, array(), None, array(), 1),
        "x must be given": (0, None, None, array(), 1),
        "y must have the shape of x": (0, array(), None, array((4, 3)), 1),
        "must not repeat along an axis": (0, array(), None, array(strides=(0, 1)), 1),
        "must not have a negative length": (0, array((-3, 4)), None, array((-3, 4)), 1),
        "must have data": (0, c_api.array(0, (3, 4), (4, 1)), None, array(), 1),
    }.items():
        with pytest.raises(ValueError, match=message):
            c_api.row("float32", "normalized", *arguments)


# Threads and processes.


def test_many_callers_at_once_and_any_thread_count_give_the_same_bits() -> None:
    x = randn(500, 700)
    expected = door.sa_softmax(x)

    def call(threads: int) -> bool:
        y = np.empty_like(x)
        arrays = [c_api.array(a.ctypes.data, a.shape, (700, 1)) for a in (x, y)]
        c_api.row("float32", "normalized", 1, arrays[0], None, arrays[1], threads)
        return y.tobytes() == expected.tobytes()

    with ThreadPoolExecutor(8) as callers:
        assert all(callers.map(call, [1, 2, 3, 8, 64] * 12))


FORKS = """
import os, threading
import numpy as np
from sa_softmax.backends import numpy as door
x = np.random.default_rng(0).standard_normal((500, 700)).astype(np.float32)
expected = door.sa_softmax(x).tobytes()
stop = threading.Event()
def hammer():
    while not stop.is_set():
        door.sa_softmax(x)
for _ in range(2):
    threading.Thread(target=hammer, daemon=True).start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        same = all(door.sa_softmax(x).tobytes() == expected for _ in range(3))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
assert door.sa_softmax(x).tobytes() == expected
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_children_of_busy_threads_compute() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS],
        env=os.environ | {"SA_SOFTMAX_NUM_THREADS": "4"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


PYTORCHS_THREADS = """
import os, torch
from sa_softmax.backends.torch import sa_attention, sa_softmax
torch.set_num_threads(3)
x, q = torch.randn(4000, 300), torch.randn(4, 300, 16)

def results():
    with torch.no_grad():
        return [y.numpy().tobytes() for y in (sa_softmax(x), sa_softmax(x, axis=0), sa_attention(q, q, q))]

torch.softmax(x, -1)
threads = len(os.listdir("/proc/self/task"))
expected = results()
print(len(os.listdir("/proc/self/task")) - threads)
child = os.fork()
if child == 0:
    os._exit(results() != expected)
assert os.waitpid(child, 0)[1] == 0
torch.set_num_threads(1)
assert results() == expected
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for the threads in /proc")
def test_tensors_are_computed_on_the_threads_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("this PyTorch has other threads")
    ran = python(PYTORCHS_THREADS)
    assert (ran.returncode, ran.stdout) == (0, "0\n"), ran.stderr


def test_threads_of_openmp_need_a_runtime() -> None:
    ran = python(
        "from sa_softmax_native import c_api\nx = c_api.array(1, (0,), (1,))\n"
        "try: c_api.row('float32', 'product', 0, x, None, x, -2)\nexcept ValueError as error: print(error)"
    )
    assert ran.stdout == "threads must be at least 1, or below 0 after sa_softmax_use_openmp(); got -2\n"


def test_an_idle_pool_does_not_spin_and_does_not_hold_up_the_exit() -> None:
    ran = python(
        "import time, numpy as np\nfrom sa_softmax.backends import numpy as door\n"
        "door.sa_softmax(np.ones((500, 700), np.float32))\n"
        "before = time.process_time(); time.sleep(1); print(time.process_time() - before)",
        SA_SOFTMAX_NUM_THREADS="4",
    )
    assert float(ran.stdout) < 0.2


# PyTorch.


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@variants
def test_operators_of_torch_meet_its_contract(variant: str) -> None:
    torch = pytest.importorskip("torch")
    from torch.library import opcheck

    from sa_softmax.backends import torch as torch_door

    assert torch_door.implementation("cpu") == door.implementation()
    x, where = torch.randn(3, 4, 5), torch.rand(4, 1) > 0.3
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    operators = torch.ops.sa_softmax
    checks = ("test_schema", "test_faketensor")
    for given in (x, x.mT, x[:, ::2], x[:1].expand(3, 4, 5)):
        mask = where[:: 4 // given.shape[1]] if given.shape[1] in (2, 4) else None
        opcheck(operators.row, (given, mask, 1, variant), test_utils=checks)
        opcheck(operators.row_vjp, (given, torch.randn(given.shape), mask, 2, variant), test_utils=checks)
    compiled: list[str] = []

    def show(graph: Any, _: Any) -> Any:
        compiled.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(lambda x: torch_door.sa_softmax(x, variant=variant), backend=show, fullgraph=True)(x)
    assert "sa_softmax.row.default" in compiled or "sa_softmax.row" in compiled
    o = torch_door.sa_attention(q, k, v, variant=variant)
    np.testing.assert_allclose(
        o.numpy(), reference.sa_attention(q.numpy(), k.numpy(), v.numpy(), variant=variant), rtol=1e-4, atol=1e-4
    )
    with torch.inference_mode():
        assert torch.equal(torch_door.sa_softmax(x, variant=variant), torch.ops.sa_softmax.row(x, None, 2, variant))
