"""Reproduces published effects of 16-bit training in minutes: loss scaling, masters, stalled updates."""
