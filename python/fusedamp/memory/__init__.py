"""Estimates of training memory before training, and packed parameter buffers."""
