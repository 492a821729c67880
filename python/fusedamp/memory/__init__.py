"""Bytes of weights, gradients, masters and states, before training."""
