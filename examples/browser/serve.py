"""Serve the page that runs the character model in a browser, on this machine only.

    python examples/browser/serve.py [MODEL] [--port 8000]

MODEL is what `make demo` exported: demo-output/char_model.onnx. The first call installs onnxruntime-web next to this
file with npm; after that nothing is fetched from anywhere.
"""

import argparse
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

HERE = Path(__file__).resolve().parent
ORT = HERE / "node_modules" / "onnxruntime-web" / "dist"


class Handler(SimpleHTTPRequestHandler):
    """This folder, with onnxruntime-web under /ort/ and the model as /char_model.onnx."""

    # Of its own, as systems disagree: browsers refuse modules and wasm under another type.
    extensions_map: ClassVar = {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css",
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
        "": "application/octet-stream",
    }

    def __init__(self, *args: Any, model: Path, **options: Any) -> None:
        self.model = model
        super().__init__(*args, **options)

    def translate_path(self, path: str) -> str:
        if path == "/char_model.onnx":
            return str(self.model)
        self.directory, path = (str(ORT), path[4:]) if path.startswith("/ort/") else (str(HERE), path)
        return super().translate_path(path)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")  # a model exported again shows at the next reload
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        """Quiet; errors reach the browser."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve the page that runs the character model in a browser.")
    parser.add_argument("model", nargs="?", type=Path, default=Path("demo-output/char_model.onnx"))
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0 takes a free one")
    args = parser.parse_args()
    if not args.model.is_file():
        return failed(f"{args.model} must be an .onnx file; it does not exist. `make demo` exports one")
    if not ORT.is_dir():
        npm = shutil.which("npm")
        if npm is None:
            return failed("the page needs onnxruntime-web, which comes with npm; npm was not found. Install Node.js")
        subprocess.run([npm, "ci", "--no-audit", "--no-fund"], cwd=HERE, check=True, stdout=sys.stderr)
    server = ThreadingHTTPServer(("127.0.0.1", args.port), partial(Handler, model=args.model.resolve()))
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0


def failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
