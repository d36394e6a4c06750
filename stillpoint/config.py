"""YAML files into frozen dataclasses, and the words that configuration and command line share: sizes and addresses.

A field's type says what its YAML may be: str, int, float, bool, Path, Address, Enum, a tuple of these, an optional one,
or another dataclass. A size may be written with its unit ("64MiB") wherever the field is called `…size` or `…bytes`.
An unknown key is an error that names the nearest known one, so that a typing mistake never becomes a silent default.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import ipaddress
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import yaml

from .errors import ConfigError, InvalidRequest

T = TypeVar("T")

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(B|[KMGT](?:i?B)?)?\s*$", re.IGNORECASE)
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


class NbdTls(enum.Enum):
    """Whether NBD clients must use TLS on a listener of a node that has certificates."""

    AUTO = "auto"
    """They must, except on loopback."""
    ALLOW = "allow"
    """They may. In plaintext anybody who reaches the port reads and writes."""
    REQUIRE = "require"


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """The section `tls` of a node's configuration. Without it a node listens on loopback only.

    directory: holds ca-cert.pem, cert.pem and key.pem, as `standbyctl pki issue` makes them.
    """

    directory: Path
    nbd: NbdTls = NbdTls.AUTO


@dataclass(frozen=True, slots=True)
class Address:
    """A host and TCP port. Port 0 means any free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"{text!r} is not an address of the form host:port")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_size(text: str | int) -> int:
    """Bytes of "64MiB", "1.5 GiB", "4096" or 4096. Units are binary; "64M" and "64MB" mean "64MiB" too."""
    if isinstance(text, int):
        if text < 0:
            raise InvalidRequest(f"{text} is not a size")
        return text
    match = _SIZE.match(text)
    if match is None:
        raise InvalidRequest(f"{text!r} is not a size; write a number of bytes or a number with KiB, MiB, GiB or TiB")
    number, unit = match.group(1), (match.group(2) or "")[:1].upper()
    size = float(number) * _UNITS[unit] if "." in number else int(number) * _UNITS[unit]
    if size != int(size):
        raise InvalidRequest(f"{text!r} is not a whole number of bytes")
    return int(size)


def format_size(size: int | float) -> str:
    """For people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size == int(size) else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.0f} TiB" if size == int(size) else f"{size:.1f} TiB"


def check_name(name: str, what: str) -> str:
    """The name, or InvalidRequest. Names become parts of file names and export names, so little is allowed in them."""
    if not _NAME.match(name):
        raise InvalidRequest(
            f"{name[:80]!r} is no {what} name: use 1 to 64 letters, digits, '.', '_', '-', the first a letter or digit"
        )
    return name


def is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


def load_config(path: Path, into: type[T]) -> T:
    """The file as an instance of the dataclass `into`. Raises ConfigError, naming the file and the key."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first_line = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: {first_line}") from None
    return _build(into, document if document is not None else {}, where=str(path))


def _build(into: type[T], document: object, *, where: str) -> T:
    if not isinstance(document, dict):
        raise ConfigError(f"{where}: expected keys and values, found {document!r}")
    hints = typing.get_type_hints(into)
    fields = {field.name: field for field in dataclasses.fields(into)}  # type: ignore[arg-type]
    values: dict[str, object] = {}
    for key, value in document.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            raise ConfigError(f"{where}: unknown key {str(key)!r}; did you mean {near[0]!r}?")
        values[key] = _convert(hints[key], value, key=key, where=where)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}: the key {name!r} is missing")
    try:
        return into(**values)
    except InvalidRequest as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(hint: Any, value: object, *, key: str, where: str) -> object:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = next(argument for argument in typing.get_args(hint) if argument is not type(None))
        return _convert(inner, value, key=key, where=where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: {key} must be a list")
        item_hint = typing.get_args(hint)[0]
        return tuple(_convert(item_hint, item, key=key, where=where) for item in value)
    try:
        return _convert_plain(hint, value, key=key, where=where)
    except (InvalidRequest, ValueError, TypeError) as error:
        if isinstance(error, ConfigError) and str(error).startswith(where):
            raise
        raise ConfigError(f"{where}: {key}: {error}") from None


def _convert_plain(hint: Any, value: object, *, key: str, where: str) -> object:
    if dataclasses.is_dataclass(hint) and hint is not Address:
        return _build(typing.cast("type[object]", hint), value, where=f"{where}: {key}")
    if hint is Address and isinstance(value, str):
        return Address.parse(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            known = ", ".join(str(member.value) for member in hint)
            raise InvalidRequest(f"{value!r} is not one of {known}") from None
    if hint is int and key.endswith(("size", "bytes")) and isinstance(value, str | int) and not isinstance(value, bool):
        return parse_size(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        return value
    raise InvalidRequest(f"expected {getattr(hint, '__name__', hint)}, found {value!r}")
