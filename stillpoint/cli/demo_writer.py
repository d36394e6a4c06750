"""The demonstration's writer and witness: it rewrites the changing file's blocks, one at a time, and remembers each.

Because it writes serially, the volume's content at any instant is the image with the first k writes applied, for some k
between the writes answered and the writes begun. `find_instant` reads k out of a restored image; `apply` then makes the
content that the whole image must equal, bit for bit.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .demo_image import BLOCK_SIZE, read_record, record


class Volume(Protocol):
    """What the writer needs of an NBD client."""

    async def write(self, offset: int, data: bytes) -> None: ...


@dataclass(slots=True)
class Writer:
    """`slots` are the offsets it may write to. Write number n went to slot `history[n - 1]`."""

    slots: tuple[int, ...]
    seed: int = 0
    history: list[int] = field(default_factory=list)
    answered: int = 0  # writes

    @property
    def begun(self) -> int:
        return len(self.history)

    async def run(self, volume: Volume, stop: asyncio.Event) -> None:
        choices = random.Random(self.seed)
        while not stop.is_set():
            slot = choices.randrange(len(self.slots))
            # Noted before it is sent: a write whose answer never came may have happened.
            self.history.append(slot)
            await volume.write(self.slots[slot], record(self.begun, slot))
            self.answered = self.begun

    def apply(self, image: Path, count: int) -> None:
        """Put the first `count` writes into an image that has none of them."""
        last = {slot: number for number, slot in enumerate(self.history[:count], start=1)}
        with image.open("r+b") as file:
            for slot, number in last.items():
                file.seek(self.slots[slot])
                file.write(record(number, slot))


def find_instant(restored: Path, slots: tuple[int, ...]) -> int:
    """The number of the newest write that the restored image shows; 0 for none.

    It only says which content to expect; that the image has exactly this content is for the comparison to prove.
    """
    newest = 0
    with restored.open("rb") as file:
        for offset in slots:
            file.seek(offset)
            found = read_record(file.read(BLOCK_SIZE).ljust(BLOCK_SIZE, b"\0"))
            if found is not None:
                newest = max(newest, found[0])
    return newest
