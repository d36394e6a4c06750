"""Whether answers may leave a volume: what happens to writes while no standby is in sync.

Invariants
- While `closed`, no write or flush is answered as done, unless every standby that it waited for has it; an error may be
  answered. Those that cannot be answered are withheld: they were made here, and are marked for whoever lacks them.
- While `refusing`, writes and flushes get EIO, and those that arrive are not made at all.
- What is withheld is answered once, when the last reason to withhold it is gone.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable

from stillpoint.nbd.constants import Errno

from .requests import Request, answer_if_done


class LossPolicy(enum.Enum):
    """What writers see when no standby is in sync."""

    CONTINUE = "continue"  # nothing; what they write is remembered for the standby
    SUSPEND = "suspend"  # they wait until one is, or an operator lets them go on
    ERROR = "error"  # EIO


# The reason of the policy itself, beside those of others.
_NO_STANDBY = "no standby is in sync"


class Gate:
    """One volume's. Everything runs on the loop."""

    def __init__(self, policy: LossPolicy, *, opened: Callable[[], None]) -> None:
        """`opened`: flushes may go on."""
        self._policy = policy
        self._opened = opened
        self._alone = True
        self._excused = False  # an operator let writers go on, until a standby is in sync again
        self._reasons: dict[str, None] = {}
        self._refusals: dict[str, None] = {}
        self._withheld: list[Request] = []
        self._ended = False
        self.closed = False
        self.refusing = False
        self._judge()

    @property
    def policy(self) -> LossPolicy:
        return self._policy

    @property
    def reasons(self) -> list[str]:
        """Why answers are withheld, or writers refused, for status."""
        return [*self._reasons, *self._refusals]

    @property
    def withheld_count(self) -> int:
        return len(self._withheld)

    # --- what changes it

    def set_policy(self, policy: LossPolicy) -> None:
        """At once, for what waits already too."""
        self._policy, self._excused = policy, False
        self._judge()

    def excuse(self) -> None:
        """Let writers go on without a standby until one has been in sync again."""
        self._excused = self._alone
        self._judge()

    def standbys_changed(self, *, alone: bool) -> None:
        """alone: none is in sync now."""
        self._alone = alone
        self._excused = self._excused and alone
        self._judge()

    def _judge(self) -> None:
        acts = self._alone and not self._excused
        self.refusing = self._ended or bool(self._refusals) or (acts and self._policy is LossPolicy.ERROR)
        if acts and self._policy is LossPolicy.SUSPEND:
            self.suspend(_NO_STANDBY)
        else:
            self.resume(_NO_STANDBY)

    def suspend(self, reason: str) -> None:
        """Withhold answers until `resume` is called with the same words."""
        if not self._ended:
            self._reasons[reason] = None
            self.closed = True

    def refuse(self, reason: str) -> None:
        """Writers get EIO, those whose answers are withheld too, until `allow` is called with the same words."""
        self._refusals[reason] = None
        self._judge()

    def allow(self, reason: str) -> None:
        self._refusals.pop(reason, None)
        self._judge()

    def resume(self, reason: str) -> None:
        """One reason less. Calling it for one that is not there does no harm."""
        self._reasons.pop(reason, None)
        if self.closed and not self._reasons:
            self.closed = False
            self._release()

    def end(self) -> None:
        """The volume closes: what is withheld gets an error, as does everything from now on.

        Call it before waiting until clients have their answers, and `clients_gone` once they have.
        """
        self._ended = self.refusing = True
        self._reasons.clear()
        self.closed = False
        for request in self._withheld:
            request.errno = request.errno or Errno.ESHUTDOWN
        self._release()

    def clients_gone(self) -> None:
        """Only the volume itself flushes now."""
        self.refusing = False

    def _release(self) -> None:
        if self.refusing:
            for request in self._withheld:
                request.errno = request.errno or Errno.EIO
        withheld, self._withheld = self._withheld, []
        answer_if_done(withheld)
        self._opened()

    # --- requests

    def withhold(self, request: Request) -> None:
        """It waits for the gate too."""
        request.remaining += 1
        self._withheld.append(request)

    def failed(self, request: Request) -> None:
        """It has an error for an answer, which promises nothing: the gate does not hold it up."""
        if request in self._withheld:
            self._withheld.remove(request)
            answer_if_done([request])

    def settle(self, requests: Iterable[Request]) -> None:
        """They waited for a standby that is gone: answer them, or let them wait for the gate in its stead."""
        if self.closed:
            requests = list(requests)
            self._withheld += [request for request in requests if not request.errno]
            answer_if_done([request for request in requests if request.errno])
            return
        if self.refusing:
            requests = list(requests)
            for request in requests:
                request.errno = request.errno or Errno.EIO
        answer_if_done(requests)
