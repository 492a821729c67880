"""What all optimizers share: the step, its options, and what is remembered between steps."""
