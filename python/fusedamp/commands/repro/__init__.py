"""Published effects of 16-bit training, shown again in minutes: loss scaling, masters, stalls."""
