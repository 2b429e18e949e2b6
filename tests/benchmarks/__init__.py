"""The benchmarks compare equal work, count right and write what they say."""
