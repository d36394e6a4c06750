"""What the three nodes share: devices, the NBD protocol, the data link, the wire contracts and the command line."""

import os

# Nodes start commands and other processes, which exec at once. Without this, which gRPC reads when it is imported, it
# prepares for each fork and writes a line about it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

__version__ = "0.1.0"
