"""Memory for payloads."""

from __future__ import annotations

import numpy as np


def uninitialised(size: int) -> memoryview:
    """A writable buffer of `size` bytes with anything in it: the caller fills all of it.

    `bytearray(size)` would write zeroes over every byte first, which costs as much as receiving them.
    """
    return np.empty(size, np.uint8).data
