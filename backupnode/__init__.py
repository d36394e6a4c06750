"""The backup node: pulls snapshots from the standby into a repository, keeps them provably whole, and restores them."""
