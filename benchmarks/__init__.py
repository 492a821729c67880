"""The benchmark of optimizer steps. ``python benchmarks/run.py --help``."""
