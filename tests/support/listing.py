"""Sparse binary files as short text, for golden files: those 16 bytes that are not all zeroes, one a line."""

from __future__ import annotations


def listing(data: bytes) -> bytes:
    rows = ((at, data[at : at + 16]) for at in range(0, len(data), 16))
    return b"%08x\n" % len(data) + b"".join(b"%08x %s\n" % (at, row.hex().encode()) for at, row in rows if any(row))


def from_listing(text: bytes) -> bytes:
    size, *lines = text.decode().splitlines()
    data = bytearray(int(size, 16))
    for at, row in (line.split() for line in lines):
        data[int(at, 16) : int(at, 16) + 16] = bytes.fromhex(row)
    return bytes(data)
