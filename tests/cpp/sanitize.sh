#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the C++ tests that need no torch under sanitizers.
#
#   tests/cpp/sanitize.sh [SANITIZERS [FOLDER...]]      default: address,undefined, of io offload platform checkpoint
#   tests/cpp/sanitize.sh thread
#   tests/cpp/sanitize.sh address,undefined device      the CUDA kernels, run on the host
#
# Builds into build/sanitize-SANITIZERS. What the kernel does between an io_uring entry and its answer ThreadSanitizer is told by
# csrc/io/kernel_order.h, so a thread that touches the memory of a transfer that is under way is found as well.
set -euo pipefail
cd "$(dirname "$0")/../.."
sanitizers=${1:-address,undefined}
shift || true
folders=("$@")
[ $# -gt 0 ] || folders=(io offload platform checkpoint)
where="build/sanitize-$sanitizers"
mkdir -p "$where"
cmake -S . -B "$where" -G Ninja -DDS_TORCH=OFF -DDS_TESTS=ON -DDS_CUDA=0 -DDS_SANITIZE="$sanitizers" >"$where/cmake.log"
cmake --build "$where" --target "${folders[@]/#/test_}"
export UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
ctest --test-dir "$where" --output-on-failure --tests-regex "^($(IFS='|'; echo "${folders[*]}"))\$"
