"""A data node without data, as a process beside a real failover agent: `python -m tests.support.failover_node`.

It reports what the lines on its stdin say, and prints each order. `hang` makes its data path stop proving itself;
`deaf` makes it go on serving whatever it is told.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from uuid import UUID

from stillpoint.errors import PeerUnavailable
from stillpoint.failover.member import CopyState, Readiness
from stillpoint.failover.messages import AskPledges, Order, VolumeReport
from stillpoint.failover.node_link import AgentLink


class Node:
    def __init__(self, volume: UUID) -> None:
        self.volume = volume
        self.copy = CopyState(promotable=False, epoch=0, first=False)
        self.lost: tuple[str, ...] = ()
        self.ready: dict[str, Readiness] = {}
        self.hangs = False
        self.deaf = False
        self.link: AgentLink | None = None
        self.pledges: AskPledges | None = None
        self.served = False

    async def report(self) -> tuple[VolumeReport, ...]:
        while self.hangs:
            await asyncio.sleep(0.01)
        assert self.link is not None
        serving = self.link.may_serve(self.volume) or (self.deaf and self.served)
        self.served = self.served or serving
        return (VolumeReport(self.volume, self.copy, serving, self.lost, self.ready),)

    def ordered(self, order: Order) -> None:
        say(
            part=order.part.value,
            epoch=order.epoch,
            left_s=order.serves_until_s - time.monotonic(),
            awaited=sorted(order.awaited),
        )

    def ask_pledges(self, wanted: AskPledges) -> None:
        self.pledges = wanted
        say(pledges_of=sorted(wanted.nodes), epoch=wanted.epoch)

    async def obey(self, line: str) -> None:
        assert self.link is not None
        match json.loads(line):
            case {"copy": copy}:
                self.copy = CopyState(**copy)
            case {"ready": node}:
                self.ready, self.lost = {node: Readiness(True, True, True, True)}, ()
            case {"lost": node}:
                self.ready, self.lost = {}, (node,)
            case {"pledge": epoch}:
                say(pledge=await self.link.pledge(self.volume, epoch=epoch))
            case {"pledged": node}:
                assert self.pledges is not None
                self.link.pledged(self.pledges, node)
            case {"hand_over": to}:
                self.link.hand_over(self.volume, to)
            case "serving?":
                say(serving=self.link.may_serve(self.volume))
            case "hang":
                self.hangs = True
            case "deaf":
                self.deaf = True
        self.link.changed()


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


async def main(path: Path, volume: UUID) -> None:
    node = Node(volume)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    try:
        async with AgentLink.open(path, node, report_every_s=0.05) as link:
            node.link = link
            say(here=True)
            while line := await lines.readline():
                await node.obey(line.decode())
    except* PeerUnavailable as gone:
        say(gone=str(gone.exceptions[0]))
        # It goes on as long as it was told.
        while line := await lines.readline():
            await node.obey(line.decode())


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), UUID(sys.argv[2])))
