"""The configuration as its README shows it."""

from __future__ import annotations

import re
from pathlib import Path

from backupnode.config import BackupNodeConfig
from stillpoint.config import load_config

README = Path(__file__).resolve().parents[3] / "backupnode" / "README.md"


def test_the_configuration_in_the_readme_is_one_that_the_node_takes(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    path = tmp_path / "backup.yaml"
    path.write_text(shown)
    config = load_config(path, BackupNodeConfig)
    defaults = BackupNodeConfig(state_dir=config.state_dir)
    (schedule,) = config.schedules
    assert schedule.label == "nightly" and schedule.before == ("/usr/local/bin/freeze", "vol1")
    # What it calls defaults are the defaults.
    assert (schedule.retries, schedule.hook_timeout_s, schedule.full) == (3, 300, False)
    for name in ("node", "listen", "standby", "compression_level", "rate_limit", "behind_bytes", "restore_test"):
        assert getattr(config, name) == getattr(defaults, name), name
    assert config.notify.mail == defaults.notify.mail and config.notify.when is defaults.notify.when
