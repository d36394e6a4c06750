"""URIs of exports, read and written."""

from __future__ import annotations

import pytest

from stillpoint.errors import InvalidRequest
from stillpoint.nbd.uri import NbdUri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://host:1234/vol1", NbdUri("vol1", host="host", port=1234)),
        ("nbd://127.0.0.1:10809/", NbdUri("", host="127.0.0.1")),
        ("nbd://[::1]:10809/vol1%40s1", NbdUri("vol1@s1", host="::1")),
        ("nbd+unix:///a%20b?socket=/run/nbd.sock", NbdUri("a b", socket_path="/run/nbd.sock")),
    ],
)
def test_uris_are_read_and_written(text: str, uri: NbdUri) -> None:
    assert NbdUri.parse(text) == uri
    assert NbdUri.parse(str(uri)) == uri


def test_the_port_may_be_left_out_and_the_at_sign_may_be_plain() -> None:
    assert NbdUri.parse("nbd://host") == NbdUri("", host="host")
    assert NbdUri.parse("nbd://host/vol1@s1") == NbdUri("vol1@s1", host="host")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "vol1",
        "http://host/",
        "nbd:///vol1",
        "nbd://host:port/x",
        "nbd://host:99999/x",
        "nbd+unix:///x",
        "nbd://[::1",
    ],
)
def test_what_is_no_uri_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        NbdUri.parse(text)
    assert "\n" not in str(raised.value)
