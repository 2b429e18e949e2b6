"""Mutations by standard operators of the Python layer and of what the CPU runs of csrc."""
