"""What is imported when, which backend gets which array, and that registry, folders, packaging and __all__ agree."""

import ast
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import array_api_compat
import numpy as np
import pytest
from support import array_backends, backends, to_framework

import sa_softmax
from sa_softmax import _api
from sa_softmax.backends import REGISTRY, Entry, array_api, get

ROOT = Path(__file__).parents[1]
FRAMEWORKS = {entry.array_module.partition(".")[0] for entry in REGISTRY} - {"numpy"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules_on_disk() -> dict[str, Path]:
    """Every module of the distribution by its dotted name."""
    modules = {}
    for package, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            if "native" not in inside:  # a distribution of its own
                modules[".".join([package, *inside]).removesuffix(".__init__")] = path
    return modules


def third_party_modules_after(code: str) -> set[str]:
    """The top-level modules outside the standard library that a fresh interpreter holds after running ``code``."""
    report = (
        "import sys\nbefore = set(sys.modules)\n" + code + "\n"
        "top = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(top - sys.stdlib_module_names))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


# Imports.


def test_importing_the_package_imports_numpy_and_array_api_compat_only() -> None:
    assert third_party_modules_after("import sa_softmax") == {"sa_softmax", "numpy", "array_api_compat"}


@pytest.mark.parametrize("entry", array_backends())
def test_an_array_is_recognised_without_importing_another_framework(entry: Entry) -> None:
    own = entry.array_module.partition(".")[0]
    make = {
        "numpy": "numpy.ones(3)",
        "torch": "torch.ones(3)",
        "jax": "jax.numpy.ones(3)",
        "mlx": "mlx.core.ones(3)",
        "array_api": "array_api_strict.ones(3)",
    }[entry.name]
    loaded = third_party_modules_after(
        f"import {entry.array_module}\nimport sa_softmax\n"
        f"y = sa_softmax.sa_softmax({make})\n"
        f"assert isinstance(y, {entry.array_module}.{entry.array_class})"
    )
    assert own in loaded
    assert loaded & FRAMEWORKS <= {own}


# Dispatch.


@pytest.mark.parametrize("entry", array_backends())
def test_an_array_goes_to_the_backend_that_owns_it(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    module, received = entry.load(), []
    for name in ("sa_softmax", "sa_attention"):
        monkeypatch.setattr(
            module, name, lambda *arrays, name=name, **options: received.append((name, arrays, options))
        )
    x = to_framework(entry.name, np.ones((1, 2, 2)))
    sa_softmax.sa_softmax(x, axis=0, variant="product", where=None)
    sa_softmax.sa_attention(x, x, x, is_causal=True, q_offset=2, scale=3.0)
    (first, softmax_arrays, softmax_options), (second, attention_arrays, attention_options) = received
    assert (first, second) == ("sa_softmax", "sa_attention")
    assert all(array is x for array in softmax_arrays + attention_arrays)
    assert softmax_options == {"axis": 0, "variant": "product", "where": None}
    assert attention_options == {
        "variant": "normalized", "bias": None, "mask": None, "is_causal": True, "q_offset": 2, "scale": 3.0,
    }  # fmt: skip


class _Unknown:
    """An array of an array-API library that the registry does not know."""

    def __array_namespace__(self, api_version: str | None = None) -> ModuleType:
        raise AssertionError("dispatch asks for no namespace")


def test_an_array_of_any_other_array_api_library_goes_to_array_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entry, "installed", lambda self: self.name == "numpy")  # array-api-strict is not needed
    monkeypatch.setattr(array_api, "sa_softmax", lambda x, **options: x)
    x = _Unknown()
    assert sa_softmax.sa_softmax(x) is x


def test_cupy_arrays_go_to_array_api(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = ModuleType("cupy")
    cupy.ndarray = type("ndarray", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    x = cupy.ndarray()  # type: ignore[attr-defined]
    assert array_api_compat.is_cupy_array(x)
    monkeypatch.setattr(array_api, "sa_softmax", lambda x, **options: x)
    assert sa_softmax.sa_softmax(x) is x


class _Alien:
    pass


@pytest.mark.parametrize(
    "x", [[1.0, 2.0], 1.0, None, "x", _Alien()], ids=["list", "float", "None", "str", "unknown class"]
)
def test_what_is_no_array_is_refused_by_name(x: Any) -> None:
    name = f"{type(x).__module__}.{type(x).__qualname__}"
    for argument, call in (("x", sa_softmax.sa_softmax), ("q", lambda q: sa_softmax.sa_attention(q, q, q))):
        with pytest.raises(TypeError) as caught:
            call(x)
        message = str(caught.value)
        assert message.startswith(f"{argument} must be an array of a supported framework")
        assert f"got {name}." in message
        assert "numpy.asarray" in message
        for entry in REGISTRY:
            assert (f"{entry.array_module}.{entry.array_class}" in message) is (entry.array_class is not None)


# The registry.


def test_get_finds_every_entry_and_lists_them_for_an_unknown_name() -> None:
    for entry in REGISTRY:
        assert get(entry.name) is entry
    with pytest.raises(ValueError, match="unknown backend 'tensorflow'") as caught:
        get("tensorflow")
    for entry in REGISTRY:
        assert entry.name in str(caught.value)
    assert "module:attribute" in str(caught.value)


@pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.name)
def test_a_missing_framework_is_named_with_the_extra_that_installs_it(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = entry.array_module.partition(".")[0]
    absent = ModuleNotFoundError(f"No module named {package!r}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib, "import_module", mock.Mock(side_effect=absent))
    assert not entry.installed()
    for use in (entry.load, entry.adapter):
        with pytest.raises(ImportError) as caught:
            use()
        message = str(caught.value)
        assert f"backend {entry.name!r} needs {package}, which is not installed" in message
        assert f"pip install '{f'sa-softmax[{entry.extra}]' if entry.extra else package}'" in message


def test_a_module_that_an_installed_framework_lacks_is_named_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ModuleNotFoundError("No module named 'numpy.absent'")
    monkeypatch.setattr(importlib, "import_module", mock.Mock(side_effect=absent))
    with pytest.raises(ModuleNotFoundError, match=r"numpy\.absent"):
        get("numpy").load()


def test_with_numpy_and_array_api_compat_alone_the_package_works() -> None:
    others = sorted(FRAMEWORKS | {"ml_dtypes", "rich", "typer", "safetensors", "onnx", "onnxruntime", "mpmath"})
    code = (
        f"import sys\nfor name in {others}: sys.modules[name] = None\n"
        "import numpy, sa_softmax\n"
        "sa_softmax.sa_softmax(numpy.ones(3)), sa_softmax.sa_attention(*numpy.ones((3, 1, 2, 2)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_owned_by_a_framework_that_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in REGISTRY:
        monkeypatch.delitem(sys.modules, entry.array_module, raising=False)
        assert not entry.owns(np.ones(3))


def test_the_registry_lists_the_folders_that_have_an_adapter() -> None:
    folder = Path(importlib.import_module("sa_softmax.backends").__path__[0])
    assert sorted(path.parent.name for path in folder.glob("*/adapter.py")) == sorted(entry.name for entry in REGISTRY)


@pytest.mark.parametrize("entry", array_backends())
@pytest.mark.parametrize("name", _api.__all__)
def test_every_backend_has_the_public_signature(entry: Entry, name: str) -> None:
    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    backend = entry.load()
    assert name in backend.__all__
    public, own = parameters(getattr(_api, name)), parameters(getattr(backend, name))
    besides = [parameter for parameter in own if parameter not in public]  # window_size in PyTorch, for one
    assert [parameter for parameter in own if parameter not in besides] == public
    for _, kind, default in besides:
        assert kind is inspect.Parameter.KEYWORD_ONLY
        assert default is not inspect.Parameter.empty


@pytest.mark.parametrize("entry", backends())
def test_every_adapter_carries_its_registry_name(entry: Entry) -> None:
    assert entry.adapter().name == entry.name


# Packaging.


def test_the_version_is_written_twice_and_alike() -> None:
    assert sa_softmax.__version__ == PYPROJECT["project"]["version"]


def test_every_extra_of_the_registry_exists_and_is_in_all() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    for entry in REGISTRY:
        if entry.extra is not None:
            assert entry.extra in extras
            assert entry.extra in extras["all"][0].partition("[")[2].rstrip("]").split(",")


def test_the_packages_are_the_folders_on_disk() -> None:
    packages = [name for name, path in modules_on_disk().items() if path.name == "__init__.py"]
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(packages)


# Public names.


@pytest.mark.parametrize(
    "name", [name for name in sorted(modules_on_disk()) if not any(part.startswith("_") for part in name.split("."))]
)
def test_all_lists_the_public_definitions(name: str) -> None:
    path = modules_on_disk()[name]
    body = ast.parse(path.read_text()).body
    if not body:
        pytest.skip("empty")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("sa_softmax"):
            raise
        pytest.skip(f"needs {missing.name}")
    operations = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = {
        node.id
        for node in ast.walk(ast.Module(body, []))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    listed = set(module.__all__)
    assert len(listed) == len(module.__all__)
    assert {name for name in operations if not name.startswith("_")} <= listed
    assert all(hasattr(module, name) for name in listed)
    if path.name != "__init__.py":  # a package re-exports, a module lists its own
        assert listed <= operations | assigned
