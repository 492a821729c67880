"""What mixed precision does to gradients and updates: counts from the step itself, tables, plots, loggers."""

from . import loggers
from .bins import bin_edges
from .record import Record
from .watch import Watch, watch

__all__ = ["Record", "Watch", "bin_edges", "loggers", "watch"]
