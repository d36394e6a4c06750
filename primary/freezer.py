"""`python -m primary.freezer`: holds one freeze, in a process of its own, so that it ends whatever the primary does.

Stdin: one line of JSON, {"limit_s": seconds, "hooks": [{"name", "freeze": [word, …], "thaw": [word, …]}, …]}; the
freeze lasts until stdin ends. Stdout: one line of JSON, {"frozen": true} or {"error": text}, and at the end another,
{"thawed": whether stdin ended before the limit, "errors": [text, …]}.

Invariants
- Every hook whose freeze was begun is thawed, in reverse order, also if its freeze failed or hung.
- That happens when stdin ends, so when the primary dies too, and at the latest when the limit is over; the limit counts
  from the beginning of the first freeze. A hook that still runs then is killed with all its processes.
- No signal that can be caught ends it before.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

_THAW_S: Final = 10.0
_THAW_TRIES: Final = 3
_THAW_PAUSE_S: Final = 0.5


def run(words: Sequence[str], *, timeout_s: float) -> str:
    """Run a hook; what went wrong, or nothing."""
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr, start_new_session=True
        )
    except OSError as error:
        return f"{words[0]}: {error.strerror}"
    try:
        code = process.wait(timeout=max(timeout_s, 0))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"{words[0]} had not finished in time"
    return f"{words[0]} ended with {code}" if code else ""


def thaw(hook: dict[str, Any]) -> str:
    """Run it again when it fails: a volume that stays frozen is the worst that can happen."""
    failure = ""
    for attempt in range(_THAW_TRIES):
        if attempt:
            time.sleep(_THAW_PAUSE_S)
        failure = run(hook["thaw"], timeout_s=_THAW_S)
        if not failure:
            return ""
    return f"{hook['name']}: {failure}"


def hold(limit_s: float, hooks: Sequence[dict[str, Any]]) -> None:
    ends = time.monotonic() + limit_s
    begun: list[dict[str, Any]] = []
    in_time = False
    try:
        for hook in hooks:
            begun.append(hook)
            failure = run(hook["freeze"], timeout_s=ends - time.monotonic())
            if failure:
                say({"error": f"{hook['name']}: {failure}"})
                return
        say({"frozen": True})
        in_time = bool(select.select([sys.stdin], [], [], max(ends - time.monotonic(), 0))[0])
    finally:
        failures = [failure for hook in reversed(begun) if (failure := thaw(hook))]
        say({"thawed": in_time, "errors": failures})


def say(answer: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the primary is gone
        print(json.dumps(answer), flush=True)


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    wanted = json.loads(sys.stdin.readline())
    hold(wanted["limit_s"], wanted["hooks"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
