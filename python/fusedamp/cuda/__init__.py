"""The places of torch.cuda's names."""

from . import amp

__all__ = ["amp"]
