"""Options that name a repository and what opens it, for commands that work on one without a node."""

from __future__ import annotations

import argparse
from pathlib import Path

from .repository import S3Config, Secret, storage_at
from .repository.storage import Storage


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", help="a folder, or s3://BUCKET/PREFIX")
    parser.add_argument("--passphrase-file", type=Path)
    parser.add_argument("--key-file", type=Path)
    parser.add_argument("--recovery-form", type=Path, help="a file that holds it")
    parser.add_argument("--s3-endpoint", default="", help="of a bucket elsewhere than at Amazon")
    parser.add_argument("--s3-region", default="")
    parser.add_argument("--s3-credentials-file", type=Path, help="default: the AWS_… variables of the environment")


def storage_of(options: argparse.Namespace) -> Storage:
    """Raises ConfigError."""
    return storage_at(options.repository, S3Config(options.s3_endpoint, options.s3_region, options.s3_credentials_file))


def secret_of(options: argparse.Namespace) -> Secret | None:
    """Raises OSError for a file that cannot be read."""
    if options.recovery_form is not None:
        return Secret(recovery=options.recovery_form.read_text())
    return secret_in(key_file=options.key_file, passphrase_file=options.passphrase_file)


def secret_in(*, key_file: Path | None, passphrase_file: Path | None) -> Secret | None:
    """A passphrase ends with its line. Raises OSError."""
    if key_file is not None:
        return Secret(key_file=key_file.read_bytes())
    if passphrase_file is not None:
        return Secret(passphrase=passphrase_file.read_bytes().rstrip(b"\r\n"))
    return None
