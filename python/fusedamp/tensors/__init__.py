"""How a tensor lies in memory, which part of it is on this rank, and where many tensors lie."""
