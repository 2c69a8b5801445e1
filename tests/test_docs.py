"""The code in README and guides runs and does what the text says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sa_softmax import conformance

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "write-a-backend.md").read_text()


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_adapter_of_the_guide_conforms() -> None:
    (code,) = [block for block in blocks(GUIDE) if "class Adapter" in block]
    names: dict[str, object] = {}
    exec(code, names)
    report = conformance.run(names["Adapter"]())  # type: ignore[operator]
    assert report.ok, [result for result in report.results if result.status == "failed"][:3]
    assert report.count("passed") > 500


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
    assert report["counts"]["failed"] == report["counts"]["expected"] == len(report["problems"]) == 0
    (row,) = re.findall(rf"^\| {path.stem} .*$", README, re.MULTILINE)
    assert f"| {report['counts']['passed']} |" in row


PAGES = {
    "start": ("torch", "jax", "mlx", "onnxscript", "onnxruntime", "sa_softmax_native"),
    "migrate": ("torch",),
    "numerics": ("numpy",),
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


def test_the_start_page_counts_the_cases() -> None:
    assert f"runs {len(conformance.cases())} cases" in (ROOT / "docs" / "start.md").read_text()
