#!/usr/bin/env bash
# Prints the name of a base image that our image can be built on here, making one when there is none.
#
# In this order: $BASE_IMAGE; the Dockerfile's default when the engine has it; one made of this machine's own Debian or
# Ubuntu release, by debootstrap from the package source apt uses, for places with no image registry; else the default.
set -euo pipefail

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
default=$(sed -n 's/^ARG BASE_IMAGE=//p' "$(dirname "$0")/../compose/Dockerfile")

has_image() { docker image inspect "$1" >/dev/null 2>&1; }
setting() { (. /etc/os-release && echo "${!1:-}"); }

if [ -n "${BASE_IMAGE:-}" ]; then
  echo "$BASE_IMAGE"
  exit
fi
if has_image "$default" || [ "$(id -u)" != 0 ] || ! command -v debootstrap >/dev/null; then
  echo "$default"
  exit
fi

release=$(setting VERSION_CODENAME)
image=stillpoint-base:$release
if has_image "$image"; then
  echo "$image"
  exit
fi

# What apt downloads from, and through, is this machine's business: it is asked, never written down.
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' "Codename: $release" | head -n 1)
[ -n "$mirror" ] || { echo "apt has no package source for $release; run apt-get update" >&2; exit 1; }
eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
[ -z "${http_proxy:-}" ] || export http_proxy
[ -z "${https_proxy:-}" ] || export https_proxy

components=main
[ "$(setting ID)" != ubuntu ] || components=main,universe
root=$(mktemp -d /var/tmp/stillpoint-base.XXXXXX)
trap 'rm -rf --one-file-system "$root"' EXIT
echo "Making the base image $image" >&2
debootstrap --variant=minbase --components="$components" --include=python3,python3-venv \
  "$release" "$root/tree" "$mirror" >"$root/log" 2>&1 || { tail -n 20 "$root/log" >&2; exit 1; }
tar -C "$root/tree" --exclude=./var/cache/apt --exclude=./var/lib/apt/lists --exclude=./usr/share/doc \
  --exclude=./usr/share/locale --exclude=./usr/share/man -c . | docker import - "$image" >/dev/null
echo "$image"
