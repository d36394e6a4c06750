"""The forms of association maps by name, and opening one of any form: its magic says which it is."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from stillpoint.errors import DataCorrupt

from . import array_map
from .array_map import ArrayMap
from .association import AssociationMap
from .hash_map import HashMap
from .ordered_map import OrderedMap
from .unordered_map import UnorderedMap

FORM_DEFAULT: Final = "array"  # what `benchmarks/association.py` measures to be best
_FORMS: Final[dict[str, type[ArrayMap | HashMap | OrderedMap | UnorderedMap]]] = {
    "array": ArrayMap,
    "hash": HashMap,
    "ordered": OrderedMap,
    "unordered": UnorderedMap,
}
FORMS: Final = tuple(_FORMS)
_MAGICS: Final[dict[bytes, type[ArrayMap | HashMap | OrderedMap | UnorderedMap]]] = {
    array_map.MAGIC: ArrayMap,
    HashMap.magic: HashMap,
    OrderedMap.magic: OrderedMap,
    UnorderedMap.magic: UnorderedMap,
}


def create_map(form: str, path: Path, *, generation: int, block_count: int) -> AssociationMap:
    """An empty map of one of FORMS. Takes the same time whatever the volume's size. Raises OSError."""
    return _FORMS[form].create(path, generation=generation, block_count=block_count)


def open_map(path: Path) -> AssociationMap:
    """For a reader. Raises OSError, DataCorrupt."""
    with open(path, "rb") as file:
        magic = file.read(8)
    form = _MAGICS.get(magic)
    if form is None:
        raise DataCorrupt(f"{path}: is no association map")
    return form.open(path)
