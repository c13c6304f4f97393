#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# On a machine with a GPU: builds with CUDA, runs tests/gpu, then the benchmarks of operators, inside 10 minutes, and leaves one
# results file. Needs nvcc, cmake, ninja, python3 with torch and pytest; no network: the header libraries come from .third_party/, packed by
# tests/gpu/pack.sh on a machine that has them.
#
#   tests/gpu/run.sh [RESULTS_FILE] [arguments for pytest]     default: build/gpu/results.txt
#
# Exit code 0: built, every test passed, every benchmark ran (a missed bar is printed, not an error).
set -uo pipefail
cd "$(dirname "$0")/../.."
results="${1:-build/gpu/results.txt}"
shift || true
PYTHON="${PYTHON:-python3}"
begin=$SECONDS
mkdir -p build/gpu "$(dirname "$results")"
: >"$results"
say() { printf '\n== %s (at %d s)\n' "$*" "$((SECONDS - begin))" | tee -a "$results"; }
left() { echo $((600 - 20 - (SECONDS - begin))); }   # seconds until the end, less what writing it all down takes
keep() { tee -a "$results"; }

say "machine"
{ nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader; nvcc --version | tail -n 1; } | keep
"$PYTHON" -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)' | keep

say "build"
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}"
third_party="$(pwd)/.third_party/usr"
if ! { cmake -S . -B build/gpu -G Ninja -DDS_CUDA=1 -DDS_TORCH=ON -DDS_TESTS=OFF -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
         -DCMAKE_PREFIX_PATH="$third_party" -DFETCHCONTENT_FULLY_DISCONNECTED="${DS_OFFLINE:-OFF}" &&
       timeout "$(left)" cmake --build build/gpu --target _core _C; } >build/gpu/build.log 2>&1; then
  tail -n 60 build/gpu/build.log | keep
  say "the build failed"
  exit 1
fi
export LD_LIBRARY_PATH="$third_party/lib:$third_party/lib/x86_64-linux-gnu:${LD_LIBRARY_PATH:-}" PYTHONPATH="$(pwd)"

status=0
say "tests"
timeout --kill-after=10 "$(left)" "$PYTHON" -m pytest -q --color=no -p no:cacheprovider "${@:-tests/gpu}" 2>&1 | keep || status=1
bench() {  # NAME [arguments]
  local name="$1"
  shift
  [ "$(left)" -gt 20 ] || { say "$name $*: left out"; status=1; return; }
  say "$name --device cuda $*"
  timeout --kill-after=5 "$(left)" "$PYTHON" "tests/bench/$name.py" --device cuda --rounds 5 "$@" 2>&1 | keep || status=1
}
for name in norms softmax activations rope cross_entropy quantize optimizers; do bench "$name"; done
# torch.compile takes seconds a case: one size of each.
bench norms --compiled --only x4096
bench softmax --compiled --only "rows of 4096"
bench activations --compiled --only swiglu
bench rope --compiled --only "bshd half"
say "end, status $status"
exit "$status"
