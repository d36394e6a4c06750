"""What the three nodes share: devices, the NBD protocol, the data link, the wire contracts and the command line."""

__version__ = "0.1.0"
