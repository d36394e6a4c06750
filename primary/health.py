"""Whether the volumes are really served: each is read and flushed on the way that clients' requests take."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from stillpoint.canary import Probe

from .node import PrimaryNode


def probes(node: PrimaryNode) -> Mapping[str, Probe]:
    return {name: functools.partial(volume.probe) for name, volume in node.volumes.items()}
