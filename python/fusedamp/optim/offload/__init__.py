"""Optimizers whose masters, states and update are on the host: buffers, copies, and the optimizer."""
