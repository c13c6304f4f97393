#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything from a fresh clone: sets up, builds, runs ctest and pytest. Arguments go to pytest (default: all CPU tests).
# A second run reuses .venv/ and build/.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/environment.sh

setup_system
setup_venv .venv

results=()
failed=0
part() {  # part NAME COMMAND...: runs it, remembers how it went
  local name="$1" begin=$SECONDS
  shift
  say "$name"
  if "$@"; then results+=("$name: passed ($((SECONDS - begin)) s)"); else results+=("$name: FAILED ($((SECONDS - begin)) s)"); failed=1; fi
}
finish() {
  echo
  printf '%s\n' "${results[@]}"
  exit "$failed"
}

# The folders below LibTorch, without torch and without Python; here nvcc, where there is one, compiles the CUDA kernels too.
torch_free() {
  cmake -S . -B build/torch-free -G Ninja -DDS_TORCH=OFF -DDS_CUDA=AUTO >build/torch-free.log || { cat build/torch-free.log; return 1; }
  grep -E 'CUDA|downloading' build/torch-free.log || true
  cmake --build build/torch-free && ctest --test-dir build/torch-free --output-on-failure -j 2
}

# The package itself, by pip and its isolated build; the C++ tests of what stands on torch are built in the same directory.
package() {
  DS_BUILD_DIR=build/package DS_CUDA="${DS_CUDA:-0}" DS_CMAKE_ARGS="-DDS_TESTS=ON" \
    "$VENV_PYTHON" -m pip install --quiet --editable '.[test]' || return 1
  cmake --build build/package --target torch_tests && ctest --test-dir build/package -L torch --no-tests=error --output-on-failure -j 2
}

run_pytest() { OMP_NUM_THREADS=1 timeout --kill-after=10 2700 "$VENV_PYTHON" -m pytest -q "$@"; }

# Tests of faults mostly wait for time to pass: they run beside the others, and say how they went behind them.
python_tests() {
  [ $# -eq 0 ] || { run_pytest "$@"; return; }
  run_pytest tests/faults >build/faults.log 2>&1 &
  local faults=$! ok=0
  trap "kill $faults 2>/dev/null || true" EXIT  # when the script is stopped
  run_pytest tests/unit tests/parity tests/compat tests/bench || ok=1
  wait "$faults" || ok=1
  trap - EXIT
  cat build/faults.log
  return "$ok"
}

mkdir -p build
part "ctest without torch" torch_free
part "ctest with torch" package
[ "$failed" -eq 0 ] || finish
part "pytest" python_tests "$@"
finish
