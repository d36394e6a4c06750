#!/usr/bin/env bash
# Puts the programs in place that a make target starts beside Python, by Debian packages.
#
#   system-tools.sh demo | test | bench
#
# As root on Debian or Ubuntu it installs what is missing, and only that. Anywhere else it says what is missing and goes
# on: the tests that need a missing program leave themselves out and say so.
set -euo pipefail

# program:package; a program that is already there, from wherever, is not installed again.
demo_tools=(mke2fs:e2fsprogs)
test_tools=(
  "${demo_tools[@]}"
  etcd:etcd-server
  fio:fio
  fusermount3:fuse3
  fstrim:util-linux
  ip:iproute2
  losetup:mount
  nbdcopy:libnbd-bin
  nbdfuse:nbdfuse
  nbdkit:nbdkit
  qemu-io:qemu-utils
  strace:strace
  systemd-analyze:systemd
)
bench_tools=("${test_tools[@]}" qemu-storage-daemon:qemu-system-common borg:borgbackup restic:restic)
docker_tools=(dockerd:docker.io debootstrap:debootstrap)

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

has_engine() { command -v docker >/dev/null && docker info >/dev/null 2>&1; }
has_compose() { docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null; }
can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
is_packaged() { apt-cache show "$1" >/dev/null 2>&1; }

case ${1:-} in
  demo) wanted=("${demo_tools[@]}") ;;
  test) wanted=("${test_tools[@]}") ;;
  bench) wanted=("${bench_tools[@]}") ;;
  *) echo "usage: system-tools.sh demo | test | bench" >&2; exit 2 ;;
esac
if [ "$1" = test ] && ! has_engine; then
  wanted+=("${docker_tools[@]}")
fi

missing_programs=() packages=()
for entry in "${wanted[@]}"; do
  if ! command -v "${entry%%:*}" >/dev/null; then
    missing_programs+=("${entry%%:*}")
    packages+=("${entry##*:}")
  fi
done
needs_compose=no
if [ "$1" = test ] && ! has_compose; then
  needs_compose=yes
  missing_programs+=("docker compose")
fi
[ ${#missing_programs[@]} -gt 0 ] || exit 0

if ! can_install; then
  echo "Missing here: ${missing_programs[*]}. Only root on Debian or Ubuntu installs them by itself;" >&2
  echo "what needs them is left out, each with its reason. Their Debian packages: ${packages[*]}" >&2
  exit 0
fi

export DEBIAN_FRONTEND=noninteractive
# A package source that cannot be reached is no reason to stop: the install below decides whether enough was there.
apt-get update -q || echo "apt-get update had errors; trying with what it got" >&2
if [ "$needs_compose" = yes ]; then
  # Debian 12 has the Python one, Ubuntu and later Debians the Go plugin.
  if is_packaged docker-compose-v2; then packages+=(docker-compose-v2); else packages+=(docker-compose); fi
fi
# In Debian 12 nbdfuse is still part of libnbd-bin.
is_packaged nbdfuse || packages=("${packages[@]/#nbdfuse/libnbd-bin}")
apt-get install -q -y --no-install-recommends "${packages[@]}"
