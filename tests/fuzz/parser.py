"""What a parser under test is.

Every parser of bytes that another process or a disk made is a function that must take any bytes. It returns, or raises
an operating error. Anything else, such as a KeyError, is a defect: it would end a connection's task or a node's start
with a traceback, and nobody has thought about what it leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stillpoint.errors import StillpointError


@dataclass(frozen=True)
class Parser:
    """feed raises one of `refusals` or nothing. seeds: inputs that it takes.

    A checksum hides what is behind it; `repaired` gives the same bytes with it made right, as whoever means harm would.
    """

    seeds: Sequence[bytes]
    feed: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...] = (StillpointError,)
    repaired: Callable[[bytes], bytes] | None = None
