"""The data link's listener under pressure."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time

import uvloop

from stillpoint.link.tcp import DataLinkListener
from stillpoint.link.tokens import Tokens
from stillpoint.nbd.listen import listen_tcp


def test_a_process_out_of_descriptors_waits_instead_of_turning_in_circles() -> None:
    async def main() -> None:
        listener = DataLinkListener(listen_tcp("127.0.0.1", 0), Tokens())
        client = socket.socket()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        held = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
            try:
                while True:  # whatever numbers are free below
                    held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                pass
            client.connect(("127.0.0.1", listener.port))
            began = time.process_time()
            await asyncio.sleep(0.3)
            assert time.process_time() - began < 0.1
        finally:
            for descriptor in held:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with client:
            client.sendall(b"garbage" * 100)
            client.settimeout(0)
            for _ in range(100):  # accepted in the end, and refused for what it said
                await asyncio.sleep(0.05)
                try:
                    assert client.recv(1) == b""
                    break
                except BlockingIOError:
                    continue
                except ConnectionResetError:
                    break
            else:
                raise AssertionError("the connection was never taken")
        listener.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
