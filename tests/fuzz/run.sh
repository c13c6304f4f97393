#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# run.sh [SECONDS [TARGET...]]: builds the fuzzers with clang (libFuzzer, address and undefined-behaviour sanitizers) and lets each run that long.
# Targets: safetensors_header, manifest. A crash leaves its input in build/fuzz/TARGET/ and ends the script with an error.
set -euo pipefail
seconds=${1:-60}
shift || true
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${FUZZ_BUILD:-$root/build/fuzz}
targets=("${@:-}")
[ -n "${targets[0]}" ] || targets=(safetensors_header manifest)

sources() {
  case $1 in
    safetensors_header) echo csrc/io/{safetensors,safetensors_header,file_engine,thread_engine,uring_engine}.cpp csrc/platform/{cpu,env,file,memory}.cpp ;;
    manifest) echo csrc/checkpoint/{manifest,base64}.cpp csrc/plan/pieces.cpp csrc/io/crc32c.cpp csrc/platform/cpu.cpp ;;
    *) echo "unknown target $1" >&2; exit 2 ;;
  esac
}

for target in "${targets[@]}"; do
  mkdir -p "$out/$target/corpus"
  cd "$root"
  shopt -s nullglob
  # shellcheck disable=SC2046
  ${CXX:-clang++} -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Icsrc ${FUZZ_FLAGS:-} \
    tests/fuzz/"${target}"_fuzz.cpp $(sources "$target") -lpthread -o "$out/$target/fuzz"
  cp -n tests/fuzz/corpus/"$target"/* "$out/$target/corpus/" 2>/dev/null || true
  (cd "$out/$target" && nice -n 19 ./fuzz -max_total_time="$seconds" -max_len=16384 -rss_limit_mb=2048 -timeout=10 -print_final_stats=1 \
    -dict="$root/tests/fuzz/$target.dict" corpus)
done
