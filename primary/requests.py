"""What waits inside a volume: a client's write or flush, until everything that its answer promises has happened."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter

from stillpoint.nbd.export import Replier
from stillpoint.traffic import Latency


class Request:
    """A write or flush that waits. It is answered when `remaining` falls to 0."""

    __slots__ = ("began", "cookie", "errno", "latency", "remaining", "replier")

    def __init__(self, replier: Replier, cookie: int, began: float, latency: Latency) -> None:
        """began: when its batch had arrived; how long it took from there goes to `latency`."""
        self.replier = replier
        self.cookie = cookie
        self.began = began
        self.latency = latency
        self.remaining = 0  # standbys, and anything else, that it waits for
        self.errno = 0


class PartedReplier:
    """For a change that is made in parts: answers once, when all are answered, with the first error."""

    def __init__(self, replier: Replier, count: int) -> None:
        self._replier = replier
        self._remaining = count
        self._errno = 0

    def reply(self, cookie: int, errno: int) -> None:
        self._errno = self._errno or errno
        self._remaining -= 1
        if not self._remaining:
            self._replier.reply(cookie, self._errno)


def answer(requests: Iterable[Request]) -> None:
    """Those of one batch are observed together: looking for the right bucket costs more than the rest."""
    now = perf_counter()
    count, began, latency = 0, 0.0, None
    for request in requests:
        if request.began != began or request.latency is not latency:
            if latency is not None:
                latency.observe(now - began, count)
            count, began, latency = 0, request.began, request.latency
        count += 1
        request.replier.reply(request.cookie, request.errno)
    if latency is not None:
        latency.observe(now - began, count)


def answer_if_done(requests: Iterable[Request]) -> None:
    """Each of them has one thing less to wait for."""
    done = []
    for request in requests:
        request.remaining -= 1
        if not request.remaining:
            done.append(request)
    if done:
        answer(done)
