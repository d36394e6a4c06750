"""The standby: holds the mirrors, takes the snapshots, and exports them as virtual devices."""
