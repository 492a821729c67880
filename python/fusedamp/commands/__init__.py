"""``python -m fusedamp``."""
