"""Inputs that are almost right: recorded ones, changed in the ways that break parsers."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Final, Literal

SEED_VARIABLE: Final = "STILLPOINT_FUZZ_SEED"
SCALE_VARIABLE: Final = "STILLPOINT_FUZZ_SCALE"
_SIZE_MAX: Final = 1 << 18
# Where lengths, counts and offsets go wrong.
_EDGES: Final = (0, 1, 2, 7, 255, 256, 4095, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1)


def fuzz_seed() -> int:
    """The one asked for, else a new one. Printed, so that a failed run can be repeated."""
    seed = int(os.environ.get(SEED_VARIABLE, "") or random.SystemRandom().randrange(1 << 32))
    print(f"{SEED_VARIABLE}={seed}", file=sys.stderr)
    return seed


def scaled(count: int) -> int:
    return int(count * float(os.environ.get(SCALE_VARIABLE, "") or 1))


class Mutator:
    """Endless inputs from a corpus; the same ones for the same seed."""

    def __init__(self, corpus: Sequence[bytes], randomness: random.Random) -> None:
        assert corpus
        self._corpus = corpus
        self._random = randomness

    def inputs(self, count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield self.mutated(self._random.choice(self._corpus))

    def mutated(self, original: bytes) -> bytes:
        data = bytearray(original)
        for _ in range(self._random.choice((1, 1, 1, 2, 3, 6))):
            self._change(data)
        return bytes(data[:_SIZE_MAX])

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """As a network may deliver it: whole, or cut anywhere."""
        if self._random.random() < 0.6:
            yield data
            return
        start = 0
        while start < len(data):
            end = start + self._random.choice((1, 2, 17, 64, 4096))
            yield data[start:end]
            start = end

    def _change(self, data: bytearray) -> None:
        rng = self._random
        if not data:
            data += rng.randbytes(rng.randrange(1, 64))
            return
        at = rng.randrange(len(data))
        match rng.randrange(9):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2:
                self._put_number(data, at)
            case 3:
                del data[at:]
            case 4:
                del data[at : at + rng.randrange(1, 32)]
            case 5:
                data[at:at] = rng.randbytes(rng.randrange(1, 32))
            case 6:  # again
                end = at + rng.randrange(1, 64)
                data[at:at] = data[at:end] * rng.randrange(1, 20)
            case 7:  # the end of another
                other = rng.choice(self._corpus)
                data[at:] = other[rng.randrange(len(other) + 1) :]
            case 8:
                end = at + rng.randrange(1, 16)
                data[at:end] = bytes([rng.choice((0, 0xFF, 0x7F, 0x80))]) * (end - at)

    def _put_number(self, data: bytearray, at: int) -> None:
        rng = self._random
        size = rng.choice((2, 4, 4, 8, 8))
        at -= at % rng.choice((1, size))
        order: Literal["little", "big"] = rng.choice(("little", "big"))
        if rng.random() < 0.4:  # one more or less than it was
            old = int.from_bytes(data[at : at + size], order)
            value = old + rng.choice((-1, 1))
        else:
            value = rng.choice(_EDGES) + rng.choice((-1, 0, 1))
        data[at : at + size] = (value % (1 << (8 * size))).to_bytes(size, order)
