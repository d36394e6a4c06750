#!/usr/bin/env bash
# Every test, in two processes side by side: those that run whole clusters wait more than they work.
#
#   run-tests.sh PYTEST [OPTION …]
#
# The first process writes here, the second into a file that is shown when both have ended.
set -uo pipefail

log=$(mktemp)
trap 'rm -f "$log"' EXIT

"$@" tests/cluster tests/conformance tests/fuzz tests/golden tests/simulation tests/unit >"$log" 2>&1 &
rest=$!
"$@" tests/peers
peers=$?
wait "$rest"
others=$?
cat "$log"
[ "$peers" = 0 ] && [ "$others" = 0 ]
