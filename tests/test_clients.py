"""The same .onnx files in every client: onnxruntime with and without our kernels, onnx.reference, Node.js and wasm."""

import json
from collections.abc import Iterator
from pathlib import Path

import client_table
import javascript
import numpy as np
import pytest
from client_table import CLIENTS, DOCUMENT, FILES, File, Run

from sa_softmax import conformance


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, File]:
    folder = tmp_path_factory.mktemp("clients")
    return {name: make(folder) for name, make in FILES.items()}


@pytest.fixture(scope="module", params=CLIENTS)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    try:
        with client_table.opened(request.param) as run:
            yield run
    except javascript.Missing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("name", FILES)
def test_client_agrees_with_the_reference(run: Run, made: dict[str, File], name: str) -> None:
    file = made[name]
    assert file.difference(run(file.path, file.inputs)) <= file.tolerance


@pytest.mark.parametrize("name", FILES)
def test_tolerance_tells_right_from_wrong(made: dict[str, File], name: str) -> None:
    """Zeros, NaN, another shape and, where there are two outputs, the other variant are far outside of it."""
    file = made[name]
    assert file.difference(file.expected) == 0
    outputs = list(file.expected.values())
    wrong = [[0 * y for y in outputs], [y * np.nan for y in outputs], [y[None] for y in outputs]]
    if len(outputs) == 2:
        wrong.append(outputs[::-1])
    for each in wrong:
        assert file.difference(dict(zip(file.expected, each, strict=True))) > 10 * file.tolerance


@pytest.mark.parametrize(
    ("client", "expect"),
    [("onnxruntime-node", None), ("onnxruntime-web", javascript.FOLDER / "expect-onnxruntime-web.txt")],
)
def test_client_conforms(client: str, expect: Path | None, tmp_path: Path) -> None:
    try:
        with client_table.opened(client) as run:
            report = conformance.run(client_table.ClientAdapter(client, run, tmp_path), expect=expect)
    except javascript.Missing as missing:
        pytest.skip(str(missing))
    assert report.ok, [report.problems, [result for result in report.results if result.status == "failed"]]
    assert report.count("passed") > 2000


def test_document_is_about_these_files_and_versions() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert head == ["file", *CLIENTS, "tolerance"]
    assert [row[0] for row in rows] == list(FILES)
    for _, *differences, tolerance in rows:
        assert all(float(each) <= float(tolerance) for each in differences if each != "not installed")
    pinned = json.loads((javascript.FOLDER / "package.json").read_text(encoding="utf-8"))["dependencies"]
    for package in ("onnxruntime-node", "onnxruntime-web"):
        assert f"{package} {pinned[package]}" in text
