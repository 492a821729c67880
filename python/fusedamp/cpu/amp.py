"""torch.cpu.amp's name for the loss scaler."""

from ..amp.cpu import GradScaler

__all__ = ["GradScaler"]
