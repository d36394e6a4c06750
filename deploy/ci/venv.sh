#!/usr/bin/env bash
# Makes the virtual environment a checkout works in, with the project installed so that edits take effect at once.
#
#   venv.sh FOLDER
#
# $PYTHON names the interpreter; without it the first of python3, python3.13, 3.12, 3.11 that is at least 3.11 is taken.
set -euo pipefail
folder=$1

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if is_new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  echo "no Python of at least 3.11 found; set PYTHON to one" >&2
  exit 1
}

# Debian keeps the part of the standard library that fills a new environment in a package of its own.
ensure_venv_module() {
  "$1" -c 'import ensurepip, venv' 2>/dev/null && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    apt-get update -q || echo "apt-get update had errors; trying with what it got" >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "python$version-venv"
  else
    echo "$1 cannot make virtual environments: install the package python3-venv" >&2
    exit 1
  fi
}

if ! is_new_enough "$folder/bin/python" || ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  ensure_venv_module "$python"
  "$python" -m venv --clear "$folder"
fi
"$folder/bin/python" -m pip install --quiet --editable '.[dev]'
