"""The code in README and guides runs and does what the text says."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sa_softmax import conformance

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "write-a-backend.md").read_text()


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_adapter_of_the_guide_conforms(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, *others = blocks(GUIDE)
    module = ModuleType("my_backend")
    exec(adapter, vars(module))
    monkeypatch.setitem(sys.modules, "my_backend", module)
    names = dict(vars(module))
    for code in others:
        exec(code, names)
    report = names["report"]
    assert report.ok, [result for result in report.results if result.status == "failed"][:3]
    assert report.count("passed") > 500
    assert names["failure"] is None
    assert names["error"] == report.worst().error


NEEDED = {
    "PyTorch": ("torch",),
    "Transformers": ("torch", "transformers"),
    "JAX": ("jax",),
    "MLX": ("mlx",),
    "NumPy": ("numpy",),
    "ONNX": ("torch", "onnxscript", "onnxruntime", "sa_softmax_native"),
}


def test_every_block_of_use_is_run() -> None:
    use = README.partition("## Use")[2].partition("## Conformance")[0]
    assert re.findall(r"^\*\*(\w+)\*\*", use, re.MULTILINE) == list(NEEDED)
    assert len(blocks(use)) == len(NEEDED) + 1  # the first shows the signatures


@pytest.mark.parametrize("framework", NEEDED)
def test_the_use_of_each_framework_in_the_readme_runs(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in NEEDED[framework]:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    code, *_ = blocks(README.partition(f"**{framework}**")[2])
    names: dict[str, object] = {}
    exec(code, names)
    if framework == "NumPy":
        assert np.array_equal(names["y"][1], np.zeros(3))  # type: ignore[index]
        assert names["dbias"] is None
    if framework == "ONNX":
        assert "computes what it should" in capsys.readouterr().out


def test_the_readme_counts_what_is_there() -> None:
    assert f"with {len(conformance.cases())} cases" in README
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", README + GUIDE.replace("../", "")):
        assert (ROOT / link).exists() or (ROOT / "docs" / link).exists(), link


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "conformance").glob("*.json")), ids=lambda path: path.stem)
def test_the_committed_reports_are_of_this_suite_and_the_readme_tells_their_counts(path: Path) -> None:
    report = json.loads(path.read_text())
    assert report["golden_sha256"] == conformance.golden.digest()
    assert [result["id"] for result in report["results"]] == [case.id for case in conformance.cases()]
    assert report["counts"]["failed"] == len(report["problems"]) == 0
    (row,) = re.findall(rf"^\| {path.stem} .*$", README, re.MULTILINE)
    assert f"| {report['counts']['passed']} |" in row
    expects = path.with_suffix(".expect").exists()
    assert (report["counts"]["expected"] > 0) is expects
    assert (f"| {report['counts']['expected']} not run: " in row) is expects


PAGES = {
    "start": ("torch", "jax", "mlx", "onnxscript", "onnxruntime", "sa_softmax_native"),
    "migrate": ("torch",),
    "numerics": ("numpy",),
    "performance": ("torch",),
}
"""The pages whose blocks run here, in order and in one namespace, and what they import."""

ELSEWHERE = {
    "distributed": "distributed_cases",
    "export": "test_onnx_export",
    "jax": "test_jax_layers",
    "mlx": "test_mlx",
    "transformers": "architecture_matrix",
    "write-a-backend": "test_docs",
}
"""The pages whose blocks another file runs, beside the tests of what they are about."""


# PyTorch's own, where it compiles.
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in PAGES[page]:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks((ROOT / "docs" / f"{page}.md").read_text()):
        exec(block, names)


def test_every_page_with_blocks_is_run_somewhere() -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md") if blocks(path.read_text())}
    assert pages == PAGES.keys() | ELSEWHERE.keys()
    for page, file in ELSEWHERE.items():
        assert f"{page}.md" in (ROOT / "tests" / f"{file}.py").read_text(), f"tests/{file}.py must run docs/{page}.md"


# Public names.

DOCUMENTED = [
    *re.findall(r"^\.\. automodule:: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE),
    "sa_softmax_native",
]


def used(code: str) -> set[tuple[str, str]]:
    """The module and the name of all that ``code`` imports, and of the attributes that it takes of what it imports."""
    found, modules = set(), {}
    for node in ast.walk(ast.parse(code)):  # statements before what they hold
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found.add((str(node.module), alias.name))
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            found.add((modules[node.value.id], node.attr))
    return found


def test_what_counts_as_an_example() -> None:
    code = "import a, b as c\nfrom d import e, f as g\na.x, c.y, e.z(g), g.h, other.i\n"
    assert used(code) == {("a", "x"), ("b", "y"), ("d", "e"), ("d", "f"), ("d.e", "z"), ("d.f", "h")}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_name_has_an_example(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as missing:
        pytest.skip(str(missing))
    pages = [README, *(path.read_text() for path in (ROOT / "docs").glob("*.md"))]
    shown = {of for page in pages for of in used("".join(blocks(page)))}
    public = {(name, each) for each in module.__all__ if each != "__version__"}
    assert public <= shown, f"no Python block of README.md or docs/*.md shows {sorted(public - shown)}"


def test_the_start_page_counts_the_cases() -> None:
    assert f"runs {len(conformance.cases())} cases" in (ROOT / "docs" / "start.md").read_text()
