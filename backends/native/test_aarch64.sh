#!/usr/bin/env bash
# Compiles the kernels and the fuzz target for 64-bit ARM, and runs the target in an emulator, as fuzz/fuzz.cpp says:
#
#     backends/native/test_aarch64.sh [count] [seed]
#
# Needs CMake, a cross compiler and qemu; installs nothing.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$root/build/aarch64
missing=
for tool in cmake aarch64-linux-gnu-g++ qemu-aarch64; do
    command -v "$tool" >/dev/null || missing+=" $tool"
done
if [ -n "$missing" ]; then
    echo "not found:$missing. On Debian: apt-get install cmake make g++-aarch64-linux-gnu qemu-user" >&2
    exit 1
fi
cmake -S "$root/backends/native" -B "$folder" -DSA_SOFTMAX_FUZZ=ON -DCMAKE_SYSTEM_NAME=Linux \
    -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
cmake --build "$folder" --target fuzz
qemu-aarch64 -L /usr/aarch64-linux-gnu "$folder/fuzz" "$@"
