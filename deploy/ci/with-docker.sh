#!/usr/bin/env bash
# Runs a command with a Docker engine at hand.
#
#   with-docker.sh COMMAND [ARGUMENT …]
#
# When an engine answers already, that one is used. Otherwise root gets one of this project's own, with its own socket
# and its own data folder, so that nothing of the machine's usual engine is touched. It is shared by runs that overlap
# and the last one to end stops it. Images stay in the data folder: the next run finds its base image there.
# Where no engine can be had, the command runs all the same: the tests that need one leave themselves out.
set -euo pipefail

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
data=${STILLPOINT_ENGINE_DATA:-/var/lib/stillpoint-test-engine}
run=${STILLPOINT_ENGINE_RUN:-/run/stillpoint-test-engine}

if command -v docker >/dev/null && docker info >/dev/null 2>&1; then
  exec "$@"
fi
if [ "$(id -u)" != 0 ] || ! command -v docker >/dev/null || ! command -v dockerd >/dev/null; then
  echo "No Docker engine answers and none can be started here: what needs one is left out" >&2
  exec "$@"
fi

mkdir -p "$data" "$run"
export DOCKER_HOST=unix://$run/docker.sock
exec 8>"$run/users.lock" 9>"$run/change.lock"

answers() { docker info >/dev/null 2>&1; }
# A process that only waits to be reaped, which some machines never do for orphans, is not running.
runs() { [ -n "$1" ] && grep -q '^State:[[:space:]]*[^ZX]' "/proc/$1/status" 2>/dev/null; }
engine_pid() { cat "$run/docker.pid" 2>/dev/null || true; }

# $1: a folder searched for iptables before all others, or nothing.
try_start() {
  echo "Starting a Docker engine; its log is $run/dockerd.log" >&2
  PATH=${1:+$1:}$PATH setsid dockerd --data-root "$data" --exec-root "$run/exec" --pidfile "$run/docker.pid" \
    --host "$DOCKER_HOST" >"$run/dockerd.log" 2>&1 8>&- 9>&- </dev/null &
  local engine=$!
  for _ in $(seq 120); do
    answers && return 0
    kill -0 "$engine" 2>/dev/null || return 1
    sleep 0.5
  done
  kill "$engine" 2>/dev/null
  wait "$engine" 2>/dev/null
  return 1
}

# Kernels differ in which of the two iptables they serve; the machine's own choice comes first.
start() {
  runs "$(engine_pid)" || rm -f "$run/docker.pid"
  try_start "" && return
  local legacy
  if legacy=$(command -v iptables-legacy); then
    mkdir -p "$run/bin"
    ln -sf "$legacy" "$run/bin/iptables"
    try_start "$run/bin" && return
  fi
  echo "The Docker engine does not start:" >&2
  tail -n 20 "$run/dockerd.log" >&2
  return 1
}

# What a run that was killed left behind. Nobody else uses an engine that has only just been started. Untagged images
# stay for a week: among them are the layers that make the next build short.
tidy() {
  local left
  left=$(docker ps --all --quiet)
  [ -z "$left" ] || docker rm --force --volumes $left >/dev/null
  docker network prune --force >/dev/null
  docker volume prune --force >/dev/null
  docker image prune --force --filter until=168h >/dev/null
}

stop() {
  local engine
  engine=$(engine_pid)
  runs "$engine" || return 0
  kill "$engine"
  for _ in $(seq 120); do
    runs "$engine" || return 0
    sleep 0.5
  done
  echo "The Docker engine does not stop; its process is $engine" >&2
}

# Every run holds users.lock shared; whoever gets it alone is the last. change.lock keeps a start from meeting a stop.
leave() {
  flock 9
  flock -u 8
  if flock -n -x 8; then stop; fi
  flock -u 9
}

flock 9
flock -s 8
trap leave EXIT
answers || { start && tidy; } || unset DOCKER_HOST
flock -u 9
status=0
"$@" 8>&- 9>&- || status=$?
exit "$status"
