"""Copies of a package with one deliberate fault each, to prove that a test would notice it."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Mutant:
    """In `file`, `good` is replaced by `bad`. A rare one names the seed that showed it, to be tried first."""

    name: str
    file: str
    good: str
    bad: str
    seed: int = 0


@contextlib.contextmanager
def imported(mutant: Mutant, package: ModuleType, folder: Path) -> Iterator[ModuleType]:
    """The package, which imports its own modules relatively, under another name. folder: empty, for the copy."""
    assert package.__file__ is not None
    name = f"{package.__name__.rpartition('.')[2]}_with_a_fault"
    copy = folder / name
    shutil.copytree(Path(package.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / mutant.file).read_text()
    assert source.count(mutant.good) == 1, f"the fault {mutant.name!r} does not apply any more"
    (copy / mutant.file).write_text(source.replace(mutant.good, mutant.bad))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == name]:
            del sys.modules[loaded]
