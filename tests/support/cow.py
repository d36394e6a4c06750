"""A snapshot engine on files in a folder, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from standby.cow import SnapshotEngine, StoreDirectory, VirtualDevice, open_virtual_device
from stillpoint.devices import BlockDevice, FileDevice

T = TypeVar("T")

KIB = 1 << 10
MIB = 1 << 20


class Rig:
    """One volume: `mirror` may be wrapped, `store_device` replaces the default store's file."""

    def __init__(
        self,
        folder: Path,
        *,
        size: int = MIB,
        block_size: int = 4 * KIB,
        store_size: int = 64 * MIB,
        wrap_mirror: Callable[[BlockDevice], BlockDevice] | None = None,
        wrap_store: Callable[[BlockDevice], BlockDevice] | None = None,
        **options: Any,
    ) -> None:
        self.folder = folder
        self.size = size
        self.block_size = block_size
        self.store_size = store_size
        self.wrap_mirror = wrap_mirror or (lambda device: device)
        self.wrap_store = wrap_store or (lambda device: device)
        self.options = options
        self.mirror_path = folder / "mirror"
        self.store_path = folder / "stores" / "default.store"
        FileDevice.create(self.mirror_path, size).close()
        self._open_devices()
        state = folder / "state"
        self.engine = SnapshotEngine.create(
            state, "volume", self.mirror, self.stores, block_size=block_size, **self._all_options()
        )

    def _all_options(self) -> dict[str, Any]:
        return {"mirror_paths": [self.mirror_path], **self.options}

    def _open_devices(self) -> None:
        self.mirror = self.wrap_mirror(FileDevice(self.mirror_path))
        self.stores = StoreDirectory(self.folder / "stores", default_size=self.store_size, open_file=self._open_store)

    def _open_store(self, definition: Any, create: bool) -> BlockDevice:
        path = Path(definition.paths[0])
        return self.wrap_store(FileDevice.create(path, definition.size) if create else FileDevice(path))

    def reopen(self) -> None:
        """After the engine was closed, or as if its process had been killed."""
        self.stores.close()
        self.mirror.close()
        self._open_devices()
        self.engine = SnapshotEngine.open(self.folder / "state", self.mirror, self.stores, **self._all_options())

    async def snapshot(self, name: str, store: str | None = None) -> None:
        await self.engine.finish(self.engine.cut(name, store))

    def device(self, name: str) -> VirtualDevice:
        return open_virtual_device(self.engine.describe(), name)

    def image(self, name: str) -> bytes:
        device = self.device(name)
        try:
            return read(device, 0, device.size)
        finally:
            device.close()

    async def close(self) -> None:
        await self.engine.close()
        self.stores.close()
        self.mirror.close()


def read(device: BlockDevice, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    device.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def run(main: Callable[[], Awaitable[T]]) -> T:
    async def body() -> T:
        return await main()

    return asyncio.run(body())
