# SPDX-License-Identifier: Apache-2.0
# Sourced by scripts that must run on a bare machine: installs what is missing and reuses what is there.
#   setup_system    compilers and libraries from Debian (where this is root; else says what to install)
#   setup_venv DIR  a virtual environment with torch; afterwards $VENV_PYTHON runs it
# PYTHON=... names the interpreter to start from (default: python3).

TORCH_REQUIREMENT="torch==2.11.0"
DEBIAN_PACKAGES=(g++ cmake ninja-build ccache libhwy-dev liburing-dev nlohmann-json3-dev libgtest-dev
  openssh-server openssh-client pdsh iproute2 openmpi-bin mpich)  # the second line: jobs on several hosts

say() { printf '\n== %s\n' "$*"; }

_python_of() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10 /usr/bin/python3; do
    [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$candidate" && return
  done
  echo "Python >= 3.10 is needed and none was found" >&2
  return 1
}

setup_system() {
  local missing=() package base
  base="$(_python_of 2>/dev/null || true)"
  if [ -z "$base" ]; then missing+=(python3 python3-venv python3-dev); base=none; fi
  # A Python of Debian's lacks these two by default; one from elsewhere brings them.
  if [ "$base" != none ] && ! "$base" -c 'import venv, ensurepip' 2>/dev/null; then missing+=(python3-venv); fi
  if [ "$base" != none ] && ! "$base" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))'; then
    missing+=(python3-dev)
  fi
  if ! command -v dpkg-query >/dev/null; then
    echo "Not a Debian system: expecting these (or their like) to be installed: ${DEBIAN_PACKAGES[*]}"
    return 0
  fi
  for package in "${DEBIAN_PACKAGES[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  if [ "$(id -u)" -ne 0 ]; then
    echo "Not root; missing packages: sudo apt-get install ${missing[*]}"
    return 0
  fi
  say "Debian packages: ${missing[*]}"
  if ! DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  fi
}

setup_venv() {
  local directory="$1"
  VENV_PYTHON="$(pwd)/$directory/bin/python"
  if ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    say "virtual environment $directory"
    rm -rf "$directory"
    "$(_python_of)" -m venv "$directory"
  fi
  if ! "$VENV_PYTHON" -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").split("+")[0] != "'"${TORCH_REQUIREMENT#*==}"'")' 2>/dev/null; then
    say "$TORCH_REQUIREMENT"
    "$VENV_PYTHON" -m pip install --quiet "$TORCH_REQUIREMENT"
  fi
  # cmake and ninja, where the system has none that work
  command -v cmake >/dev/null && cmake --version >/dev/null 2>&1 || "$VENV_PYTHON" -m pip install --quiet 'cmake>=3.24'
  command -v ninja >/dev/null && ninja --version >/dev/null 2>&1 || "$VENV_PYTHON" -m pip install --quiet ninja
  export PATH="$(pwd)/$directory/bin:$PATH"
}
