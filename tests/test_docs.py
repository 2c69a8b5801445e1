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


@pytest.mark.parametrize("framework", ["torch", "jax", "mlx", "numpy"])
def test_the_use_of_each_framework_in_the_readme_runs(framework: str) -> None:
    pytest.importorskip(framework)
    own = [block for block in blocks(README) if re.search(rf"^import {framework}\b", block, re.MULTILINE)]
    (code,) = [block for block in own if "sa_softmax" in block and "class Adapter" not in block]
    names: dict[str, object] = {}
    exec(code, names)
    if framework == "numpy":
        assert np.array_equal(names["y"][1], np.zeros(3))  # type: ignore[index]
        assert names["dbias"] is None


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
    (row,) = re.findall(rf"^\| {path.stem}\b.*$", README, re.MULTILINE)
    assert f"| {report['counts']['passed']} |" in row
