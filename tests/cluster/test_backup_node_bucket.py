"""The whole node with its repository in a bucket: killed, started again, and kept out while another one has it."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.backup_node import ROOT, Node, output_of, with_node
from tests.support.s3 import new_bucket, s3_service


def test_a_node_works_on_a_bucket_and_is_there_again_at_once_when_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = someone\naws_secret_access_key = secret\n")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)

    async def body(node: Node) -> None:
        source = random.Random(1)
        first, image = await node.back_up(), bytes(node.image)
        node.change(source)
        second = await node.back_up()
        assert second.base == first.id and second.received_bytes < first.received_bytes / 2
        await node.kill()
        await node.start()
        assert await node.list_ids() == [first.id, second.id]
        assert await node.read(first.id) == image
        assert await node.read(second.id) == node.image
        node.change(source)
        third = await node.back_up()
        assert third.base == second.id
        assert await node.stop() == 0
        # From the bare bucket, with no node.
        rescue = [sys.executable, "-m", "backupnode.rescue", location, "--s3-endpoint", url]
        rescue += ["--s3-credentials-file", str(tmp_path / "credentials")]
        assert [line.split("\t")[0] for line in (await output_of(*rescue)).decode().splitlines()] == [
            first.id,
            second.id,
            third.id,
        ]
        assert await output_of(*rescue, third.id, "-") == node.image
        with_wrong_url = [*rescue[:3], f"{location}-elsewhere", *rescue[4:]]
        failed = await asyncio.to_thread(subprocess.run, with_wrong_url, cwd=ROOT, capture_output=True, text=True)
        assert failed.returncode == 1 and "is not a repository" in failed.stderr

    with s3_service() as url:
        location = f"s3://{new_bucket(url, 'bucket')}/backups"
        config = (
            f"repository: {location}\ns3: {{ endpoint: '{url}', credentials_file: '{tmp_path / 'credentials'}' }}\n"
        )
        with_node(tmp_path, body, config=config)
