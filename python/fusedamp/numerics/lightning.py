"""A Lightning callback: ``Trainer(callbacks=[NumericsCallback(every=50)])``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .loggers import Continued
from .watch import Watch, watch

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as error:
    raise ImportError(
        "fusedamp.numerics.lightning needs lightning, which is not installed here: "
        'pip install "fusedamp[integrations]"'
    ) from error


class NumericsCallback(Callback):
    """Watches the trainer's optimizers, and logs their records to the trainer's loggers.

    Steps are those of the trainer. With several optimizers, names are ``numerics/optimizer 0/scale`` and so
    on.

    Args:
        every: distance of recorded steps, as of ``fusedamp.numerics.watch``.
        logger: an object with ``log(step, values)``, instead of the trainer's loggers.
        factory: what makes a watch, called as ``factory(optimizer, scaler, every=every, model=module,
        **options)``. options: other arguments of ``fusedamp.numerics.watch``.
    Attributes:
        watches: a watch for each optimizer, for ``table()`` and ``plot()``; of the last ``fit``.
    """

    def __init__(
        self, every: int = 50, *, logger: Any = None, factory: Callable[..., Watch] = watch, **options: Any
    ) -> None:
        self._logger, self._factory = logger, factory
        self._options = {"every": every, **options}
        self.watches: list[Watch] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        logger = _Loggers(trainer) if self._logger is None else self._logger
        options = {"model": pl_module, **self._options}
        several = len(trainer.optimizers) > 1
        self.watches = [self._factory(each, trainer.scaler, **options) for each in trainer.optimizers]
        for i, made in enumerate(self.watches):
            made.log_to(Continued(logger, trainer.global_step, f"optimizer {i}" if several else ""))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for each in self.watches:
            each.remove()


class _Loggers:
    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self._trainer.loggers:
            logger.log_metrics(dict(values), step)
