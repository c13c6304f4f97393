#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds with CUDA and runs tests/gpu. For a machine that has nvcc, cmake, ninja, python3 with torch and pytest, and perhaps no
# network: then the header libraries come from .third_party/, packed by tests/gpu/pack.sh on a machine that has them.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-python3}"
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}"

third_party="$(pwd)/.third_party/usr"
cmake -S . -B build/gpu -G Ninja -DDS_CUDA=1 -DDS_TORCH=ON -DDS_TESTS=OFF -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
  -DCMAKE_PREFIX_PATH="$third_party" -DFETCHCONTENT_FULLY_DISCONNECTED="${DS_OFFLINE:-OFF}"
cmake --build build/gpu --target _core _C ds_cuda_kernels
export LD_LIBRARY_PATH="$third_party/lib:$third_party/lib/x86_64-linux-gnu:${LD_LIBRARY_PATH:-}"
PYTHONPATH="$(pwd)" exec timeout --kill-after=10 1200 "$PYTHON" -m pytest -q "${@:-tests/gpu}"
