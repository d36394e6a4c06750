"""Configuration files and the words for sizes and addresses."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stillpoint.config import Address, check_name, format_size, load_config, parse_size
from stillpoint.errors import ConfigError, InvalidRequest


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Listen:
    grpc: Address
    nbd: Address | None = None


@dataclass(frozen=True, slots=True)
class Example:
    listen: Listen
    state_dir: Path = Path("/nowhere")
    queue_size: int = 7
    colour: Colour = Colour.RED
    paths: tuple[Path, ...] = field(default=())
    timeout_s: float = 1.5


def load(tmp_path: Path, text: str) -> Example:
    file = tmp_path / "example.yaml"
    file.write_text(text)
    return load_config(file, Example)


def test_a_whole_file_becomes_a_dataclass(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        'listen: {grpc: "a:1", nbd: "[::1]:2"}\nstate_dir: /x\nqueue_size: 64MiB\n'
        "colour: blue\npaths: [/a, /b]\ntimeout_s: 3",
    )
    assert config == Example(
        Listen(Address("a", 1), Address("::1", 2)), Path("/x"), 64 << 20, Colour.BLUE, (Path("/a"), Path("/b")), 3.0
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("listen: {grpc: 'a:1'}\nstate_dri: /x", "unknown key 'state_dri'; did you mean 'state_dir'?"),
        ("listen: {grcp: 'a:1'}", "unknown key 'grcp'; did you mean 'grpc'?"),
        ("state_dir: /x", "the key 'listen' is missing"),
        ("listen: {grpc: 'nocolon'}", "not an address"),
        ("listen: {grpc: 'a:99999'}", "not an address"),
        ("listen: {grpc: 'a:1'}\nqueue_size: 3 miles", "is not a size"),
        ("listen: {grpc: 'a:1'}\ncolour: green", "'green' is not one of red, blue"),
        ("listen: {grpc: 'a:1'}\npaths: /a", "paths must be a list"),
        ("listen: {grpc: 'a:1'}\ntimeout_s: soon", "expected float"),
        ("[1, 2]", "expected keys and values"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert says in str(caught.value)
    assert "example.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml", Example)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("1KiB", 1024),
        ("64 MiB", 64 << 20),
        ("1.5GiB", 3 << 29),
        ("2T", 2 << 40),
        ("3gb", 3 << 30),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1.5", "12 parsecs", "0x10", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_size(text)


def test_sizes_are_written_for_people() -> None:
    assert [format_size(n) for n in (0, 1023, 1024, 1536, 64 << 20, 5 << 39)] == [
        "0 B", "1023 B", "1 KiB", "1.5 KiB", "64 MiB", "2.5 TiB",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a" * 65, "nul\0", "späce", "a b", "a@b"])
def test_names_that_could_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name, "volume")
