"""torch.cuda.amp's name for the loss scaler."""

from ..amp.cuda import GradScaler

__all__ = ["GradScaler"]
