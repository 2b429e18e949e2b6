"""What all benchmarks share: providers, the runner, clocks, tables, results files, drawing.

The benchmarks import the harness, which imports none of them.
"""
