"""The file server: exports volumes over NBD and mirrors every write to the standby."""
