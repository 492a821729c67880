"""A callback of the Hugging Face Trainer: ``Trainer(..., callbacks=[NumericsCallback(every=50)])``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .loggers import Continued
from .watch import Watch, watch

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ImportError(
        "fusedamp.numerics.transformers needs transformers, which is not installed here: "
        'pip install "fusedamp[integrations]"'
    ) from error


class NumericsCallback(TrainerCallback):
    """Watches the trainer's optimizer, and adds its records to ``trainer.state.log_history``, or to
    ``logger``.

    Steps are those of the trainer, and skipped ones count.

    Args:
        every: distance of recorded steps, as of ``fusedamp.numerics.watch``.
        logger: an object with ``log(step, values)``, such as ``fusedamp.numerics.loggers.wandb(run)``.
        factory: what makes a watch, called as ``factory(optimizer, scaler, every=every, model=model,
        **options)``. options: other arguments of ``fusedamp.numerics.watch``.
    Attributes:
        watch: the watch, for ``table()`` and ``plot()``; None before training.
    """

    def __init__(
        self, every: int = 50, *, logger: Any = None, factory: Callable[..., Watch] = watch, **options: Any
    ) -> None:
        self._logger, self._factory = logger, factory
        self._options = {"every": every, **options}
        self.watch: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        options = {"model": kwargs.get("model"), **self._options}
        self.watch = self._factory(
            optimizer, getattr(optimizer, "scaler", None), **options
        )  # Accelerate's wrapper
        logger = _History(state) if self._logger is None else self._logger
        self.watch.log_to(Continued(logger, state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watch is not None:
            self.watch.remove()


class _History:
    def __init__(self, state: Any) -> None:
        self._state = state

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._state.log_history.append({"step": step, **values})
