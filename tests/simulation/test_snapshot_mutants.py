"""Deliberate faults in copies of the real engine: each must be caught by the crash histories, or they prove nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import standby.cow
from tests.simulation.cow_history import History
from tests.support.mutants import Mutant, imported

_HISTORIES_MAX = 400


MUTANTS = (
    Mutant(
        "in-place write before the pre-image is durable",
        "preserver.py",
        "            store.synchronize()\n",
        "            pass\n",
    ),
    Mutant(
        "a trim does not count as a write",
        "write_stream.py",
        "            self._volume.births.array[first : last + 1] = self._current\n            change",
        "            if not change.is_trim:\n"
        "                self._volume.births.array[first : last + 1] = self._current\n"
        "            change",
    ),
    Mutant(
        "a delete frees a record that the previous snapshot still needs",
        "retiring.py",
        "moves = born.astype(np.int64) <= heir",
        "moves = born.astype(np.int64) < heir",
    ),
    Mutant(
        "a delete does not hand records to the previous snapshot",
        "retiring.py",
        "volume.maps[heir].put_many(blocks[moves], addresses[moves], born[moves])",
        "pass",
    ),
    Mutant(
        "a block born in the newest snapshot's generation is not preserved",
        "preserver.py",
        "durable = born.astype(np.int64) <= targets.durable_to",
        "durable = born.astype(np.int64) < targets.durable_to",
    ),
    Mutant(
        "the hot path takes a block of the newest snapshot's generation for new",
        "write_stream.py",
        "if born > self._newest and not marked:",
        "if born >= self._newest and not marked:",
    ),
    Mutant(
        "recovery does not take new births from the log",
        "recovery.py",
        "            births.raise_to(part.blocks, part.new_birth)\n",
        "            pass\n",
    ),
    Mutant(
        "births that cannot be proven are believed",
        "recovery.py",
        "    if state.boot not in (None, boot):\n",
        "    if False:\n",
    ),
    Mutant(
        "a write overtakes a staged one",
        "write_stream.py",
        "            if born > self._newest and not marked:",
        "            if born > self._newest:",
    ),
    Mutant(
        "marks of staged blocks are never looked at",
        "write_stream.py",
        "if not self._marks.any(first, last) and self._preserve_at_once(first, last):",
        "if self._preserve_at_once(first, last):",
    ),
    Mutant(
        "a snapshot is answered before the mirror is flushed",
        "engine.py",
        "            await self.flush()\n            await self._run(self._volume.births.synchronize)",
        "            await self.commit()\n            await self._run(self._volume.births.synchronize)",
    ),
    Mutant(
        "a snapshot is answered before the birth map is flushed",
        "engine.py",
        "            await self.flush()\n            await self._run(self._volume.births.synchronize)",
        "            await self.flush()",
    ),
    Mutant(
        "a snapshot is answered before it is durable",
        "engine.py",
        "                await self._run(lambda: self._append_created(snapshot))\n",
        "",
    ),
    Mutant(
        "a slot is reused before the deletion is durable",
        "retiring.py",
        '        self._leave("")\n        try:\n            await self._run(',
        '        self._leave("")\n        await self._dissolve()\n        await self._free()\n        try:\n'
        "            await self._run(",
    ),
    Mutant(
        "a torn last batch is believed",
        "logged_store.py",
        "if batch.sequence > durable and not self._is_intact(batch):",
        "if False:",
    ),
    Mutant(
        "the superblock points to records that are not durable",
        "logged_store.py",
        "            self.device.flush()\n            self.device.write(offset,",
        "            self.device.write(offset,",
        seed=367,
    ),
    Mutant(
        "slots change hands without a mark",
        "logged_store.py",
        '        """Before slots change hands: say durably that every record so far is durable."""\n',
        "        return\n",
    ),
    Mutant(
        "compaction drops records that are needed",
        "logged_store.py",
        'records = records[record_log.owners(records["born"], records["to"], generations()) != -1]',
        'records = records[np.isin(records["to"], generations())]',
    ),
    Mutant(
        "changed extents are off by one",
        "changed.py",
        "as_of > base",
        "as_of > base + 1",
    ),
    Mutant(
        "changed extents forget the births in records",
        "changed.py",
        "            np.copyto(as_of, born, where=addresses != NOT_PRESERVED)\n",
        "            pass\n",
    ),
    Mutant(
        "a hash does not find the last block of a range",
        "hash_map.py",
        "np.arange(first + 1, first + 1 + count)",
        "np.arange(first + 1, first + count)",
    ),
    Mutant(
        "an ordered map forgets the smaller tables it merges",
        "ordered_map.py",
        "merged = joined([*parts, entries])\n",
        "merged = joined([*parts[1:], entries])\n        total = len(merged.blocks)\n",
    ),
    Mutant(
        "an unordered map counts an entry too few",
        "unordered_map.py",
        "self._words[_COUNT] = end",
        "self._words[_COUNT] = end - 1",
    ),
    Mutant(
        "a store that grows does not carry its records over",
        "logged_store.py",
        "records in _needed(self._read_batches(), self._live):",
        "records in () if device_size else _needed(self._read_batches(), self._live):",
    ),
    Mutant(
        "memory is taken for durable",
        "volume.py",
        "if (store := self.store_of(generation)) and store.durable]",
        "if (store := self.store_of(generation))]",
    ),
    Mutant(
        "a stage spans a cut",
        "engine.py",
        "        self._close_stage()\n        volume.publish()\n        return PendingSnapshot(snapshot)",
        "        volume.publish()\n        return PendingSnapshot(snapshot)",
    ),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_deliberate_fault_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    with imported(mutant, standby.cow, tmp_path) as mutated:
        for seed in (mutant.seed, *range(_HISTORIES_MAX)):
            try:
                History(mutated, seed).run()
            except Exception as error:  # noqa: BLE001 - whatever it breaks, it was caught
                print(f"caught by seed {seed}: {type(error).__name__}: {error}")
                return
    pytest.fail(f"not caught by {_HISTORIES_MAX} histories")
