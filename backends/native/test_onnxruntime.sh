#!/usr/bin/env bash
# Runs tests/test_native.py under other releases of onnxruntime than the installed one:
#
#     PYTHON=.venv/bin/python backends/native/test_onnxruntime.sh 1.19.2 1.32.0
#
# The release shadows the installed one from a throwaway folder; sa-softmax-native must be installed.
set -euo pipefail
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for release in "$@"; do
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder/$release" \
        "onnxruntime==$release"
    echo "onnxruntime $release"
    PYTHONPATH="$folder/$release:$root" "$python" -m pytest -q -p no:cacheprovider "$root/tests/test_native.py"
done
