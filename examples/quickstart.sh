#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh clone to a trained model: sets up what is missing, builds, installs into .venv and trains the example GPT.
#   bash examples/quickstart.sh [configuration] [arguments of examples/gpt/train.py]
# A second run reuses .venv/ and build/.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/environment.sh

config="${1:-configs/zero3.json}"
shift || true

setup_system
setup_venv .venv

# Without a GPU two processes share the CPU; with GPUs there is one process for each.
ranks=(--num_gpus 2)
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then ranks=(); else export DS_CUDA="${DS_CUDA:-0}"; fi

say "building and installing"
DS_BUILD_DIR="${DS_BUILD_DIR:-build/package}" "$VENV_PYTHON" -m pip install --quiet '.[examples]'

say "training with $config"
.venv/bin/deepspeed "${ranks[@]}" examples/gpt/train.py --deepspeed "$config" "$@"
