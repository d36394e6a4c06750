"""Changes what opens an encrypted repository. A node may have it open meanwhile.

    python -m backupnode.keys list REPOSITORY
    python -m backupnode.keys add REPOSITORY --new-passphrase-file FILE | --new-key-file FILE
    python -m backupnode.keys remove REPOSITORY KEY
    python -m backupnode.keys recovery-form REPOSITORY > FILE      to be printed and locked away
    options, of what opens it now: --passphrase-file FILE  --key-file FILE  --recovery-form FILE

To change a passphrase: add the new one, then remove the old one. All of them open the same master key.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stillpoint.errors import ConfigError, StillpointError

from .opening import add_options, secret_in, secret_of, storage_of
from .repository.keyring import Keyring


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m backupnode.keys", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("list", "what opens it"),
        ("add", "let another passphrase or key file open it"),
        ("remove", "one opens it no more; the last one stays"),
        ("recovery-form", "print what opens it when all else is lost"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        add_options(command)
        if name == "add":
            new = command.add_mutually_exclusive_group(required=True)
            new.add_argument("--new-passphrase-file", type=Path)
            new.add_argument("--new-key-file", type=Path)
        elif name == "remove":
            command.add_argument("key", help="as `list` shows it")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (StillpointError, OSError) as error:
        print(f"backupnode.keys: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    opener = secret_of(options)
    if opener is None:
        raise ConfigError("name what opens the repository now: --passphrase-file, --key-file or --recovery-form")
    keyring = Keyring(storage_of(options), opener)
    if options.command == "recovery-form":
        print(keyring.recovery_form)
        return
    if options.command == "add":
        new = secret_in(key_file=options.new_key_file, passphrase_file=options.new_passphrase_file)
        assert new is not None
        entry = keyring.add(new)
        print(f"key {entry.id} added", file=sys.stderr)
    elif options.command == "remove":
        keyring.remove(options.key)
        print(f"key {options.key} removed", file=sys.stderr)
    for entry in keyring.entries:
        print(f"{entry.id}\t{entry.kind}")


if __name__ == "__main__":
    sys.exit(main())
