"""The page of examples/browser in headless Chromium: what it writes is what onnxruntime in Python writes."""

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import client_table
import javascript
import numpy as np
import onnx
import onnxruntime
import pytest
from client_table import ALPHABET

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "examples" / "browser"
LENGTH = 280  # of what the page writes
PROMPT = "A value é is"  # é: not in the alphabet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("browser") / "char_model.onnx"
    client_table.save_onnx(client_table.char_model(), ALPHABET, path)
    return path


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    """Where serve.py serves the model; it installs onnxruntime-web first, if need be."""
    if shutil.which("npm") is None:
        pytest.skip("needs Node.js and npm")
    command = [sys.executable, str(PAGE / "serve.py"), str(model), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        yield url
        server.terminate()


def written(model: Path, prompt: str) -> str:
    """What the model goes on with, the likeliest character each time, in onnxruntime."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    alphabet, context = metadata["alphabet"], int(metadata["context"])
    indices = [alphabet.index(character) for character in prompt if character in alphabet]
    for _ in range(LENGTH):
        logits = session.run(None, {session.get_inputs()[0].name: np.array([indices[-context:]])})[0]
        indices.append(int(logits[0, -1].argmax()))
    return "".join(alphabet[i] for i in indices[-LENGTH:])


def test_file_describes_itself(model: Path) -> None:
    metadata = {each.key: each.value for each in onnx.load(model).metadata_props}
    assert metadata["context"] == "128"
    assert metadata["alphabet"] == ALPHABET
    assert metadata["description"].startswith("character transformer with SA attention (normalized), 4")


def test_page_in_chromium(url: str, model: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    picture = tmp_path / "page.png"
    browser = subprocess.run(
        [javascript.node(), "browser.mjs", chromium, url, PROMPT, str(picture)],
        cwd=javascript.FOLDER, capture_output=True, text=True,
    )  # fmt: skip
    assert browser.returncode == 0, browser.stderr
    seen = json.loads(browser.stdout)
    assert seen["errors"] == []
    assert all(request.startswith(url) for request in seen["requests"])
    lengths = seen["lengths"]  # at each look
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 5
    expected = written(model, PROMPT)
    assert len(set(expected)) > 20
    assert seen["text"] == expected
    assert int(seen["rate"]) > 0
    assert "SA attention (normalized)" in seen["model"]
    assert "é" in seen["status"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("", "text/html; charset=utf-8"),
        ("style.css", "text/css"),
        ("page.js", "text/javascript"),
        ("ort/ort.wasm.bundle.min.mjs", "text/javascript"),
        ("ort/ort-wasm-simd-threaded.wasm", "application/wasm"),
        ("char_model.onnx", "application/octet-stream"),
    ],
)
def test_server_gives_types(url: str, path: str, kind: str) -> None:
    with urllib.request.urlopen(url + path) as response:
        assert response.headers["Content-Type"] == kind


@pytest.mark.parametrize("path", ["nothing", "../char_model.py", "ort/../../../../package.json", "%2e%2e/demo.py"])
def test_server_gives_nothing_else(url: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url + path)


def test_server_without_a_model(tmp_path: Path) -> None:
    command = [sys.executable, str(PAGE / "serve.py"), str(tmp_path / "none.onnx")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "make demo" in done.stderr


def test_page_and_clients_use_one_version() -> None:
    pins = [
        json.loads((folder / "package.json").read_text(encoding="utf-8"))["dependencies"]["onnxruntime-web"]
        for folder in (PAGE, javascript.FOLDER)
    ]
    assert pins[0] == pins[1]
