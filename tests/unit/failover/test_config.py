"""What an agent's configuration may be, and how it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillpoint.config import Address, load_config
from stillpoint.errors import ConfigError
from stillpoint.failover.config import EtcdTls, FailoverConfig
from stillpoint.failover.lease import LeaseTimes


def _load(tmp_path: Path, text: str) -> FailoverConfig:
    (tmp_path / "agent.yaml").write_text(text)
    return load_config(tmp_path / "agent.yaml", FailoverConfig)


def test_defaults_and_names(tmp_path: Path) -> None:
    config = _load(tmp_path, "{node: a, socket: /run/a.sock, etcd: ['10.0.0.1:2379', '[::1]:2379'], cluster: c}")
    assert config.etcd == (Address("10.0.0.1", 2379), Address("::1", 2379))
    assert (config.prefix, config.times, config.tls) == ("/stillpoint/c", LeaseTimes(), None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{node: a, socket: /s, etcd: []}", "at least one endpoint"),
        ("{node: a, socket: /s, etcd: ['x:1'], times: {ttl_s: 4}}", "too short"),
        ("{node: a, socket: /s, etcd: ['x:1'], ttl: 4}", "ttl"),
        ("{node: a, socket: /s, etcd: ['x']}", "host:port"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        _load(tmp_path, text)
    assert "\n" not in str(refused.value)


def test_certificates_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="cannot use"):
        EtcdTls(tmp_path / "ca.pem").context()
    with pytest.raises(ConfigError, match="go together"):
        EtcdTls(tmp_path / "ca.pem", certificate=tmp_path / "c.pem").context()
