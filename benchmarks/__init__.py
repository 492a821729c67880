"""The benchmark of the optimizer phase. ``python benchmarks/run.py --help``."""
