#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Calls every operator, and the optimizers' updates, with random arguments under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   tests/fuzz/operators.sh [SECONDS] [SEED]      default: 120 seconds, seed from the clock
#
# Builds into build/sanitize (about ten minutes the first time) and leaves the package's own modules alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-python3}"
where="$(pwd)/build/sanitize"
mkdir -p "$where/package"
cp -r --no-target-directory deepspeed "$where/package/deepspeed"
rm -f "$where"/package/deepspeed/*.so
cmake -S . -B "$where" -G Ninja -DDS_CUDA=0 -DDS_TESTS=OFF -DDS_SANITIZE=address,undefined -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
  -DDS_PYTHON_OUTPUT_DIR="$where/package/deepspeed" >"$where/cmake.log"
cmake --build "$where" --target _core _C
# The interpreter is not instrumented: the sanitizer's runtime must be there before it. Its memory is not ours to call leaked.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 DS_ACCELERATOR=cpu OMP_NUM_THREADS=2 \
  PYTHONPATH="$where/package"
"$PYTHON" tests/fuzz/operators.py --seconds "${1:-120}" --seed "${2:-$(date +%s)}"
"$PYTHON" tests/fuzz/steps.py --seconds "$(("${1:-120}" / 4))" --seed "${2:-$(date +%s)}"
