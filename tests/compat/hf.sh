#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Hugging Face on this library: makes an environment with transformers, accelerate, peft and trl beside it, runs tests/compat/test_hf_*.py
# there, trains the whole matrix beside plain Trainer and writes docs/compatibility.md.
#   tests/compat/hf.sh            everything (about 15 minutes on two cores)
#   tests/compat/hf.sh -k bf16    arguments go to pytest; the matrix is left out
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/environment.sh

setup_system
setup_venv .venv-hf
DS_BUILD_DIR=build/hf DS_CUDA="${DS_CUDA:-0}" "$VENV_PYTHON" -m pip install --quiet --editable '.[test,hf]'

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
"$VENV_PYTHON" -m pytest -q tests/compat/test_hf_*.py "$@"
if [ $# -eq 0 ]; then
  "$VENV_PYTHON" -m torch.distributed.run --nproc-per-node 2 -m tests.compat.hf.matrix build/hf-matrix.json 2>build/hf-matrix.log | grep '^cell'
  "$VENV_PYTHON" -m tests.compat.hf.table build/hf-matrix.json docs/compatibility.md
fi
