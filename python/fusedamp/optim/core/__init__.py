"""Common parts of all optimizers: the step, its options, and caches between steps."""
