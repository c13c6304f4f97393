#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copies the Debian packages' header libraries into .third_party/ (git-ignored, about 5 MB), for tests/gpu/run.sh on a machine
# without them and without a network.
set -euo pipefail
cd "$(dirname "$0")/../.."
rm -rf .third_party
for package in libhwy-dev libhwy1 nlohmann-json3-dev liburing-dev; do
  dpkg-query -L "$package" | grep -E '^/usr/(include|lib|share/cmake)/' | while read -r path; do
    if [ -f "$path" ] || [ -L "$path" ]; then
      mkdir -p ".third_party$(dirname "$path")"
      cp -P "$path" ".third_party$path"
    fi
  done
done
du -sh .third_party
