"""Restores from a bare repository, in a directory or bucket, with no node running and nothing written to it.

    python -m backupnode.rescue REPOSITORY                        list the backups
    python -m backupnode.rescue REPOSITORY BACKUP TARGET|-        restore one, to a file, device, nbd:// URI or stdout
    options: --force  --differences  --verify  --passphrase-file FILE  --key-file FILE  --recovery-form FILE
    for a bucket, s3://BUCKET/PREFIX: --s3-endpoint URL  --s3-region NAME  --s3-credentials-file FILE

The directory may be mounted read-only and may lack everything but the file `repository`, `manifests/` and `packs/`. A
node may have it open; a collection that runs meanwhile can only end this with an error.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from stillpoint.errors import StillpointError
from stillpoint.target import StreamTarget, open_target

from .opening import add_options, secret_of, storage_of
from .progress import Progress
from .repository import BackupReader, ReadOnlyRepository, parse_backup_id
from .restore import restore


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m backupnode.rescue", description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("backup", nargs="?")
    parser.add_argument("target", nargs="?", help="a file, a block device, an nbd:// URI, or - for stdout")
    parser.add_argument(
        "--force", action="store_true", help="overwrite a file that exists or a device that is not empty"
    )
    parser.add_argument(
        "--differences", action="store_true", help="the target holds an older state: overwrite only what differs"
    )
    parser.add_argument("--verify", action="store_true", help="read everything back before it counts as complete")
    options = parser.parse_intermixed_args(arguments)
    if options.backup is not None and options.target is None:
        parser.error("a backup needs a target")
    try:
        repository = ReadOnlyRepository(storage_of(options), secret_of(options))
        if options.backup is None:
            _list(repository)
        else:
            reader = repository.open(parse_backup_id(options.backup))
            asyncio.run(_restore(reader, options))
    except (StillpointError, OSError) as error:
        print(f"backupnode.rescue: {error}", file=sys.stderr)
        return 1
    return 0


def _list(repository: ReadOnlyRepository) -> None:
    listing = repository.list()
    for record in listing.backups:
        print(f"{record.id}\t{record.origin.volume}\t{record.origin.size}")
    for backup in listing.damaged:
        print(f"{backup}\tdamaged")


async def _restore(reader: BackupReader, options: argparse.Namespace) -> None:
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        if options.target == "-":
            await restore(reader, StreamTarget(sys.stdout.buffer), pool, _ignore)
            return
        opened = await open_target(
            options.target,
            size=reader.record.origin.size,
            force=options.force,
            differences=options.differences,
            verify=options.verify,
        )
        await restore(reader, opened, pool, _ignore)
    print(f"{options.target}: restored {reader.record.id}", file=sys.stderr)


def _ignore(_: Progress) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
