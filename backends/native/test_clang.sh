#!/usr/bin/env bash
# Builds the kernels with Clang and runs their tests; the build shadows the installed one from a throwaway folder:
#
#     PYTHON=.venv/bin/python backends/native/test_clang.sh
#
# CXX may name another compiler.
set -euo pipefail
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
CXX=${CXX:-clang++} "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" \
    "$root/backends/native"
PYTHONPATH="$folder:$root" "$python" -m pytest -q -n 2 -p no:cacheprovider \
    "$root"/tests/test_{kernels,native,native_attention,torch_kernels}.py
