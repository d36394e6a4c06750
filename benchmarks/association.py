"""What each form of association map costs: putting records, finding one, finding ranges, memory.

    python -m benchmarks.association [--dir DIR] [--entries N …]

Records of random blocks of a volume ten times as large as they are many, put 256 at a time as a stage of 16 MiB does;
lookups by another opener of the file, as in the export process. Ratios matter, not figures.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from standby.cow.association import AssociationMap
from standby.cow.association_forms import FORMS, create_map, open_map
from standby.cow.mapped_file import PAGE_SIZE

_BATCH = 256
_PUT_S_MAX = 20.0  # a form that is slower fills the rest in one go
_LOOK_S = 0.5
_SHARE = 10


def measure(folder: Path, form: str, entries: int) -> str:
    choose = np.random.default_rng(1)
    block_count = entries * _SHARE
    blocks = choose.permutation(block_count)[:entries]
    path = folder / f"{form}.map"
    records = create_map(form, path, generation=1, block_count=block_count)
    put, slowest, seconds = _put(records, blocks)
    reader = open_map(path)
    one = _rate(lambda at: reader.lookup(int(blocks[at % entries]), 1))
    sixteen = _rate(lambda at: reader.lookup(at * 7919 % (block_count - 16), 16))
    many = _rate(lambda at: reader.lookup(at * 7919 % max(1, block_count - 4096), min(4096, block_count)))
    used = path.stat().st_blocks * 512 - PAGE_SIZE
    started = time.perf_counter()
    for _ in records.pieces():
        pass
    walked = time.perf_counter() - started
    reader.close()
    records.close()
    path.unlink()
    return (
        f"{entries:>10,} {form:>9}  put {put / seconds:>11,.0f}/s, slowest {1000 * slowest:>7.1f} ms"
        f"  one {one:>9.1f} µs  16 {sixteen:>9.1f} µs  4096 {many:>9.1f} µs  walk {walked:>6.3f} s"
        f"  {used / entries:>6.1f} bytes a record"
    )


def _put(records: AssociationMap, blocks: np.ndarray[tuple[int], np.dtype[np.int64]]) -> tuple[int, float, float]:
    """How many records were put in batches, the longest batch and all of them, in seconds; the rest is put at once."""
    slowest = 0.0
    started = time.perf_counter()
    position = 0
    while position < len(blocks) and time.perf_counter() - started < _PUT_S_MAX:
        before = time.perf_counter()
        _put_batch(records, blocks[position : position + _BATCH])
        slowest = max(slowest, time.perf_counter() - before)
        position += _BATCH
    seconds = time.perf_counter() - started
    _put_batch(records, blocks[position:])
    return min(position, len(blocks)), slowest, seconds


def _put_batch(records: AssociationMap, blocks: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    batch = np.sort(blocks)
    records.put_many(batch, (batch * 128 + 8192).astype(np.uint64), np.zeros(len(batch), dtype=np.uint32))


def _rate(look: Callable[[int], object]) -> float:
    """Microseconds of one lookup."""
    count = 0
    started = time.perf_counter()
    while time.perf_counter() - started < _LOOK_S:
        for _ in range(10):
            look(count)
            count += 1
    return 1e6 * (time.perf_counter() - started) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--entries", type=int, nargs="+", default=[10**3, 10**5, 10**7])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="association-", dir=arguments.dir) as folder:
        for entries in arguments.entries:
            for form in FORMS:
                print(measure(Path(folder), form, entries), flush=True)


if __name__ == "__main__":
    main()
