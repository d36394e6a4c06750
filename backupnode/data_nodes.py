"""The data nodes that a backup may come from, and which of them to ask for a volume: roles change hands.

The standby of a volume comes first, so that a backup does not load the node that serves it. Only where no standby has a
copy that is whole does it come from the one that serves it: after a promotion that may be all there is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from stillpoint.errors import NotFound, StillpointError

from .standby_client import Copy, StandbyClient

logger = logging.getLogger(__name__)

# A node that lives answers at once; one that does not must not hold up a backup from the other.
_ASK_TIMEOUT_S: Final = 5.0


class DataNodes:
    """One or more, in the order of the configuration."""

    def __init__(self, nodes: Sequence[StandbyClient]) -> None:
        assert nodes, "a backup node without a data node"
        self.all = nodes

    async def holding(self, volume: str, *, snapshot: str = "") -> StandbyClient:
        """The best to back the volume up from; with the snapshot, if one is named. A single one is not even asked.

        Raises NotFound, or what a node that cannot be reached raised when no other has the volume.
        """
        if len(self.all) == 1:
            return self.all[0]
        answers = await asyncio.gather(*(self._ask(node, volume) for node in self.all))
        ranked = sorted(
            ((rank(copy), number) for number, copy in enumerate(answers) if isinstance(copy, Copy)),
        )
        usable = [self.all[number] for value, number in ranked if value < _UNUSABLE]
        if not usable:
            for answer in answers:
                if isinstance(answer, StillpointError):
                    raise answer
            raise NotFound(f"no data node has a whole copy of volume {volume}")
        if snapshot:
            for node in usable:
                if any(each == (volume, snapshot) for each in await node.list_snapshots()):
                    return node
        if ranked[0][0] == _SERVING:
            logger.warning("volume %s has no standby, so it is backed up from the node that serves it", volume)
        return usable[0]

    async def staged_bytes(self) -> int:
        """The most of any node. Raises what a node raised when none answers."""
        answers = await asyncio.gather(*(node.staged_bytes() for node in self.all), return_exceptions=True)
        told = [answer for answer in answers if isinstance(answer, int)]
        if told:
            return max(told)
        failure = answers[0]
        assert isinstance(failure, BaseException)
        raise failure

    async def _ask(self, node: StandbyClient, volume: str) -> Copy | StillpointError | None:
        try:
            return await node.copy_of(volume, timeout_s=_ASK_TIMEOUT_S)
        except StillpointError as error:
            return error


_SERVING: Final = 2
_UNUSABLE: Final = 3


def rank(copy: Copy) -> int:
    """The least is the best: a standby that had every write, one that is behind, the one that serves, none."""
    if not copy.consistent:
        return _UNUSABLE
    if copy.serves:
        return _SERVING
    return 0 if copy.up_to_date else 1
