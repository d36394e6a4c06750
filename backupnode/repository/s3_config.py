"""How the service of a bucket is reached."""

from __future__ import annotations

import configparser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillpoint.errors import ConfigError


@dataclass(frozen=True, slots=True)
class S3Config:
    """Where the service is; what is left out comes from the usual `AWS_…` variables of the environment.

    endpoint: an http:// or https:// URL; "": Amazon's. credentials_file: in the format of `~/.aws/credentials`; its
    profile `default` is taken.
    """

    endpoint: str = ""
    region: str = ""
    credentials_file: Path | None = None

    def options(self) -> dict[str, Any]:
        """Raises ConfigError."""
        options: dict[str, Any] = {}
        if self.endpoint:
            # Buckets in the path: names of hosts such as BUCKET.HOST need a DNS that knows them.
            options |= {"endpoint": self.endpoint, "virtual_hosted_style_request": False}
        if self.region or self.endpoint:
            options["region"] = self.region or "us-east-1"
        if self.credentials_file is not None:
            options |= _credentials(self.credentials_file)
        return options


def _credentials(path: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text())
        section = parser["default"]
        keys = {"access_key_id": section["aws_access_key_id"], "secret_access_key": section["aws_secret_access_key"]}
    except (OSError, configparser.Error, KeyError) as error:
        raise ConfigError(f"{path}: the credentials of the repository's storage cannot be read: {error}") from None
    if "aws_session_token" in section:
        keys["token"] = section["aws_session_token"]
    return keys
