"""Memory layout of tensors, local shards of DTensors, and bulk access to addresses."""
