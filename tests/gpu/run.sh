#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# On a machine with a GPU: builds with CUDA, runs tests/gpu and the benchmarks of operators, inside 10 minutes, and leaves one results file,
# written as it goes: what is cut off loses nothing. First whether the operators are right, then the benchmarks with bars, then what takes long.
# Needs nvcc, cmake, ninja, python3 with torch and pytest; no network: the header libraries come from .third_party/, packed by
# tests/gpu/pack.sh on a machine that has them.
#
#   tests/gpu/run.sh [RESULTS_FILE] [arguments for pytest]     default: build/gpu/results.txt; with arguments only those tests are run
#
# Exit code 0: built, every test passed, every benchmark ran (a missed bar is printed, not an error).
set -uo pipefail
cd "$(dirname "$0")/../.."
results="${1:-build/gpu/results.txt}"
shift || true
PYTHON="${PYTHON:-python3}"
export PYTHONUNBUFFERED=1
begin=$SECONDS
mkdir -p build/gpu "$(dirname "$results")"
: >"$results"
say() { printf '\n== %s (at %d s)\n' "$*" "$((SECONDS - begin))" | tee -a "$results"; }
left() { echo $((600 - 20 - (SECONDS - begin))); }   # seconds until the end, less what writing it all down takes
at_most() { local rest; rest="$(left)"; echo $((rest < $1 ? (rest > 1 ? rest : 1) : $1)); }
keep() { tee -a "$results"; }
status=0

say "machine"
{ nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader; nvcc --version | tail -n 1; nproc; } 2>&1 | keep
"$PYTHON" -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)' 2>&1 | keep

say "build"
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}"
third_party="$(pwd)/.third_party/usr"
[ -d "$third_party" ] || echo "no .third_party/: the header libraries must be installed, or come from the network (tests/gpu/pack.sh packs them)" | keep
if ! { cmake -S . -B build/gpu -G Ninja -DDS_CUDA=1 -DDS_TORCH=ON -DDS_TESTS=OFF -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
         -DCMAKE_PREFIX_PATH="$third_party" -DFETCHCONTENT_FULLY_DISCONNECTED="${DS_OFFLINE:-OFF}" &&
       timeout "$(at_most 600)" cmake --build build/gpu --target _core _C -- -k 0; } >build/gpu/build.log 2>&1; then
  { grep -E -A3 'FAILED|error:' build/gpu/build.log | head -n 200; tail -n 40 build/gpu/build.log; } | keep
  say "the build failed"
  exit 1
fi
export LD_LIBRARY_PATH="$third_party/lib:$third_party/lib/x86_64-linux-gnu:${LD_LIBRARY_PATH:-}" PYTHONPATH="$(pwd)"

run_pytest() { timeout --kill-after=10 "$1" "$PYTHON" -m pytest -q --color=no -p no:cacheprovider "${@:2}" 2>&1; }

if [ "$#" -gt 0 ]; then
  say "tests $*"
  run_pytest "$(at_most 600)" "$@" | keep || status=1
  say "end, status $status"
  exit "$status"
fi

# A file, a process: after an illegal access a process can do nothing more on the GPU, and the others go on.
say "tests of operators, side by side"
declare -A running
for name in normalization softmax rope activations optimizers cross_entropy in_place quantizer; do
  run_pytest "$(at_most 180)" "tests/gpu/test_$name.py" >"build/gpu/test_$name.txt" &
  running[$name]=$!
done
for name in normalization softmax rope activations optimizers cross_entropy in_place quantizer; do
  code=0
  wait "${running[$name]}" || { code=$?; status=1; }   # 124, 137: it ran out of time
  say "test_$name.py, exit code $code"
  head -c 20000 "build/gpu/test_$name.txt" | keep
  [ "$(wc -c <"build/gpu/test_$name.txt")" -le 20000 ] || tail -n 3 "build/gpu/test_$name.txt" | keep
done

bench() {  # SECONDS_AT_MOST NAME [arguments]
  local most="$1" name="$2"
  shift 2
  [ "$(left)" -gt 20 ] || { say "$name $*: left out"; status=1; return; }
  say "$name --device cuda $*"
  timeout --kill-after=5 "$(at_most "$most")" "$PYTHON" "tests/bench/$name.py" --device cuda --rounds 5 "$@" 2>&1 | keep || status=1
}
for name in optimizers norms softmax rope activations cross_entropy; do bench 60 "$name"; done
# torch.compile takes seconds a case: one dtype and size of each.
bench 60 norms --compiled --only "bf16 32768x4096"
bench 40 softmax --compiled --only "bfloat16 large rows of 4096"
bench 40 activations --compiled --only "bfloat16 swiglu"
bench 40 rope --compiled --only "bfloat16 bshd half"

say "tests of offloading, checkpointing, groups"
if [ "$(left)" -gt 30 ]; then
  run_pytest "$(at_most 600)" --maxfail=5 tests/gpu/test_comm_backends.py tests/gpu/test_checkpointing.py tests/gpu/test_offload.py | keep || status=1
else
  say "left out"
  status=1
fi
bench 40 quantize
say "end, status $status"
exit "$status"
