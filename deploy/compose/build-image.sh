#!/usr/bin/env bash
# Builds the container image: the wheels first, out here where the package index is, then the image, which needs none.
#
#   IMAGE=stillpoint:latest BASE_IMAGE=python:3.12-slim-bookworm PYTHON=.venv/bin/python build-image.sh
#
# The dependencies are fetched for the Python and the processor of the base image, whatever this machine's are.
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=deploy/compose
image=${IMAGE:-stillpoint:latest}
base=${BASE_IMAGE:-$(sed -n 's/^ARG BASE_IMAGE=//p' "$folder/Dockerfile")}
python=${PYTHON:-.venv/bin/python}

asked=$(docker run --rm --network none "$base" \
  python3 -c 'import platform, sys; print("%d.%d" % sys.version_info[:2], platform.machine())')
read -r version machine <<<"$asked"

# Made aside and then exchanged, so that a build that was interrupted leaves nothing half-filled.
wheels=$(mktemp -d "$folder/wheels.XXXXXX")
trap 'rm -rf "$wheels" build' EXIT
chmod 0755 "$wheels"
# What an earlier build left here would go into the wheel, files deleted since included.
rm -rf build
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" .
"$python" -m pip download --quiet --dest "$wheels/dependencies" --only-binary :all: --python-version "$version" \
  --platform "manylinux_2_28_$machine" --platform "manylinux_2_17_$machine" --platform "manylinux2014_$machine" \
  "$wheels"/stillpoint-*.whl
rm "$wheels"/dependencies/stillpoint-*.whl
rm -rf "$folder/wheels"
mv "$wheels" "$folder/wheels"

docker build --network none --build-arg "BASE_IMAGE=$base" --tag "$image" "$folder"
