"""Hostile input: what peers and disks may hand us, mutated from what they really do.

`test_*.py` feed a fixed number of inputs made from a seed that they print; STILLPOINT_FUZZ_SEED repeats a run, and
STILLPOINT_FUZZ_SCALE=10 makes it ten times as long. `guided.py` (`make fuzz`) searches without end, led by coverage.
"""
