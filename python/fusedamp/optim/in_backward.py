"""Steps within the backward pass, which free each gradient as soon as it was used."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from ..ops.inputs import stepping_in_backward
from ..ops.observers import observer_of
from ..tensors.shards import is_distributed, is_dtensor, local
from .core.optimizer import FusedOptimizer
from .core.params import check_aliasing
from .core.parts import Singles, overrides_step

_WHERE = "[step_in_backward]"


class BackwardSteps:
    """Handle of :func:`step_in_backward`; :meth:`remove` ends it."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._singles = Singles()
        self._stepped: set[int] = set()  # ids of the parameters stepped since the last optimizer.step()
        self._lock = threading.Lock()  # several devices have several backward threads
        params = [param for group in optimizer.param_groups for param in group["params"]]
        self._handles = [
            param.register_post_accumulate_grad_hook(self._arrive) for param in params if param.requires_grad
        ]
        self._handles.append(optimizer.register_step_post_hook(self._end_step))
        self._optimizer = weakref.ref(optimizer)  # the hooks must not outlive it
        stepping_in_backward.add(optimizer)

    def remove(self) -> None:
        """Step in ``optimizer.step()`` again; further calls have no effect."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if (optimizer := self._optimizer()) is not None:
            stepping_in_backward.discard(optimizer)

    def _end_step(self, *_: Any) -> None:
        self._stepped.clear()

    def _arrive(self, param: Tensor) -> None:
        optimizer, grad = self._optimizer(), param.grad
        if optimizer is None or grad is None:
            return
        with self._lock:
            if (place := self._singles.find(optimizer.param_groups, param)) is None:
                return
            where = f"{_WHERE} group {place[0]} params[{place[1]}]"
            self._check(where, param, grad)
            if optimizer._is_joint(param, optimizer.param_groups[place[0]]):
                raise RuntimeError(
                    f"{where} is sharded, and {type(optimizer).__name__} needs the whole tensor; expected a "
                    "rule for elements, as ranks may reach its step at different times. Use the optimizer "
                    "without step_in_backward, or one such as AdamW."
                )
            self._singles.step(optimizer, param, place)
            self._stepped.add(id(param))
            if grad.is_cuda:  # FSDP2 makes it on one stream and steps on another
                local(grad).record_stream(torch.cuda.current_stream(grad.device))
            param.grad = None

    def _check(self, where: str, param: Tensor, grad: Tensor) -> None:
        if id(param) in self._stepped:
            raise RuntimeError(
                f"{where} got a second gradient before optimizer.step(); expected one per step, and has been "
                "updated with the first. Call optimizer.step() in each iteration; for gradient accumulation, "
                "or a weight shared by several re-entrant checkpoints, use the optimizer without "
                "step_in_backward."
            )
        if is_distributed() and not is_dtensor(param):
            raise RuntimeError(
                f"{where} is a plain parameter on several ranks; expected DTensors (fully_shard), whose "
                "gradients are reduced before they arrive. With DistributedDataParallel use the optimizer "
                "without step_in_backward."
            )
        if grad.requires_grad:
            raise RuntimeError(
                f"{where} has a gradient with a graph (create_graph=True); expected a final one, as it is "
                "freed. Use the optimizer without step_in_backward for higher derivatives."
            )


def step_in_backward(optimizer: FusedOptimizer) -> BackwardSteps:
    """Update each parameter within the backward pass, as soon as its gradient is complete, and free the
    gradient.

    At the peak this saves the gradients: 2 bytes per BF16 parameter, 4 per FP32 one. The loop stays as it
    is::

        steps = fusedamp.optim.step_in_backward(optimizer)
        for batch in data:
            loss(model, batch).backward()  # updates the weights
            optimizer.step()  # ends the iteration
            schedule.step()

    ``optimizer.step()`` updates the parameters that still have a gradient (of groups added later, or set by
    hand), runs its hooks, and lets LR schedulers count. The results are those of the optimizer without this
    and ``zero_grad()``, bit for bit (``set_to_none=False`` leaves zeros, which are gradients). Activation
    checkpointing, tied weights, FSDP2, groups and checkpoints work.

    Post-accumulate hooks that you register later find ``param.grad`` None; register them before.

    Args:
        optimizer: an optimizer of :mod:`fusedamp.optim`, not Offloaded.
    Returns: a handle with ``remove()``, which need not be kept. It ends with the optimizer. A copy of the
        optimizer steps in ``step()``.
    Raises: TypeError or ValueError for another optimizer, or for parameters that share memory. In a backward
        pass, a RuntimeError: for a second gradient before ``optimizer.step()`` (gradient accumulation, or a
        weight shared by re-entrant checkpoints; the first one was applied), for plain parameters on several
        ranks (DistributedDataParallel), for shards in rules that need whole tensors, and for
        ``create_graph=True``. ``fusedamp.GradScaler`` and ``fusedamp.clip_grad_norm_`` raise, as they come
        too late; torch's scaler raises, but its ``clip_grad_norm_`` finds no gradient and returns 0.
    Cost: one op call per parameter; no host sync.
    Source: Lv et al. 2023, arXiv:2306.09782 (LOMO), for SGD.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"{_WHERE} optimizer is {type(optimizer).__name__}; expected an optimizer of fusedamp.optim that "
            "steps on the device. Offloaded copies gradients in the backward pass and frees none."
        )
    if overrides_step(type(optimizer)):
        raise TypeError(
            f"{_WHERE} {type(optimizer).__name__} overrides step; expected the step of fusedamp.optim, which "
            "is made parameter by parameter. Use the class without that override."
        )
    if optimizer in stepping_in_backward:
        raise ValueError(
            f"{_WHERE} optimizer steps in the backward pass already; expected one handle. Call its remove()."
        )
    if observer_of(optimizer) is not None:
        raise ValueError(
            f"{_WHERE} optimizer is watched (numerics.watch); expected a step in which all gradients are "
            "still there. Call the watch's remove()."
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    check_aliasing(_WHERE, list(map(local, params)))
    return BackwardSteps(optimizer)
