"""Tests of `python -m ipo_ext mismatch`."""
