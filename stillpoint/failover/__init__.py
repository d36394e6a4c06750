"""Automatic failover of a volume on etcd: pure decisions (lease, in-sync set, member), and the agent. See README.md."""

from . import in_sync_set, lease, member

__all__ = ["in_sync_set", "lease", "member"]
