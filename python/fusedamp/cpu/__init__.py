"""The places of torch.cpu's names."""

from . import amp

__all__ = ["amp"]
