"""When to look for an acknowledgement again and again, instead of sleeping until the system says that it is there.

Going to sleep and being woken costs a lone write more than everything else here. Looking for the answer holds up the
node's other work and takes a processor, so it is only done while processors are free and one connection alone has been
writing, one request at a time, and only as long as it pays: each time nothing came within the limit, it is left alone
for longer.

A pure rule: it is told what happens and says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Requests in a row that one connection must have made alone.
_ALONE_COUNT = 32
# Requests that are left alone after the first time in vain; twice as many after each further one.
_REST_FIRST, _REST_MAX = 16, 8192
# How often to see whether processors are free, and how many requests to leave alone when they are not.
_LOOK_COUNT, _REST_CROWDED = 64, 1024
_LOAD = Path("/proc/loadavg")


class Spin:
    """One for a whole node: its volumes share the loop."""

    def __init__(self, limit_s: float, *, crowded_machine: Callable[[], bool]) -> None:
        """limit_s: how long to look, at most; 0: never. crowded_machine: whether no processor is free."""
        self.limit_s = limit_s
        self._crowded_machine = crowded_machine
        self._client: object = None
        self._alone = 0
        self._rest = self._rest_next = 0

    def pays(self, client: object) -> bool:
        """A write of this client is the only one that waits. Whether to look for its acknowledgement."""
        if client is not self._client:
            self._client, self._alone = client, 0
            return False
        self._alone += 1
        if self._alone < _ALONE_COUNT or not self.limit_s:
            return False
        if self._rest:
            self._rest -= 1
            return False
        if self._alone % _LOOK_COUNT == 0 and self._crowded_machine():
            self._rest = _REST_CROWDED
            return False
        return True

    def crowded(self) -> None:
        """More than one write waits."""
        self._alone = 0

    def done(self, *, came: bool) -> None:
        """It was looked for."""
        if came:
            self._rest_next = 0
        else:
            self._rest = self._rest_next = min(max(2 * self._rest_next, _REST_FIRST), _REST_MAX)


def no_processor_is_free() -> bool:
    """Whether more wants to run now than there are processors; what asks is one of them."""
    try:
        running = int(_LOAD.read_text(encoding="ascii").split()[3].split("/")[0])
    except (OSError, ValueError, IndexError):
        return True
    return running > len(os.sched_getaffinity(0))
