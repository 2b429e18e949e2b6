"""The benchmarks of ipo_ext; run from the root of the repository, as benchmarks/README.md shows."""
