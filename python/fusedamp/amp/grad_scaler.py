"""The loss scaler: the contract of torch.amp.GradScaler, with every decision taken on the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from ..ops.inputs import AmpInputs, DeviceInputs, step_with, times
from ..tensors.layout import gradient_of
from ..tensors.shards import is_distributed, local, refuse_flattened
from . import routes
from .check import Check, CheckByParts
from .clip import check_norm, clip_grad_norm_
from .gradient_checks import ByHand, GradientChecks
from .gradients import Gradients, combine, has_value, no_overflow, on
from .overflow import params_of

_BY_HAND = ("found_inf", "grad_scale")
_NO_CLOSURE = "Closure use is not currently supported if GradScaler is enabled."


class GradScaler(GradientChecks):
    """Drop-in for :class:`torch.amp.GradScaler` that takes gradients of any dtype and never waits for the
    device.

    Arguments, methods, errors and the course of the scale are torch's. With a :mod:`fusedamp.optim` optimizer
    :meth:`step` reads the gradients once and then hands 1/scale, the clip coefficient and the overflow flag
    to one fused step: the host never waits, it may all be captured in a CUDA graph, and **the gradients are
    left scaled** (call :meth:`unscale_` first if you want to read them). Any other optimizer is driven as
    torch's scaler does.

    If any gradient of an optimizer is not finite before or after unscaling, its step changes nothing at all.

    The fused step is taken only where ``optimizer.step`` is fusedamp's own on that object. Step pre-hooks
    (own and global), subclasses with a ``step`` of their own, wrappers and a replaced ``step`` get unscaled,
    clipped gradients, and are not called in a skipped step. Post-hooks keep the fused step and see scaled
    gradients. ``optimizer.found_inf`` and ``optimizer.grad_scale`` set by hand are obeyed for one step, as by
    torch's fused optimizers: it is skipped too where ``found_inf`` is not 0, which leaves the scale alone;
    gradients are divided by ``grad_scale`` too, and where this makes one infinite, it is an overflow.

    Args:
        device, init_scale, growth_factor, backoff_factor, growth_interval, enabled: as torch's.
        min_scale: the scale never falls below; the default only keeps 1/scale finite.
        max_scale: the scale never rises above.
        hysteresis: how many overflows it takes to lower the scale; further ones lower it each, until the
            budget is refilled. With more than 1, a skipped step need not lower ``get_scale()``.
        hysteresis_refill: what refills the budget: ``"growth"`` of the scale, or any ``"good_step"``.
        on_floor: what :meth:`update` does about an overflow while the scale is at ``min_scale``: ``"warn"``
            once, or ``"raise"`` a RuntimeError. Both name the parameters. On CUDA a later update does it; in
            a captured graph nothing does.

    Raises: AssertionError where torch does, ValueError or TypeError for other bad arguments, RuntimeError for
        parameters that FSDP1 shards over several ranks (use fully_shard, or torch's ShardedGradScaler).
    """

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale in place, at once; a clipping that was put off is done here too.

        Like torch's, but for gradients of every dtype. Sparse gradients that are not coalesced, expanded ones
        and DTensors placed otherwise than their parameter are replaced, any others are written in place.
        """
        if not self._enabled:
            return
        self._check_scale_growth_tracker("unscale_")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.UNSCALED:
            raise RuntimeError(
                "unscale_() has already been called on this optimizer since the last update()."
            )
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("unscale_() is being called after step().")
        self._refuse_flattened("unscale_", optimizer)
        read = self._current_read(optimizer, state)  # with the clip coefficient in FP64
        inv_scale = self._inverse()
        found_inf = no_overflow(inv_scale.device)
        state["found_inf_per_device"] = self._unscale_grads_(optimizer, inv_scale, found_inf, False)
        if read is not None and read.clip_coef is not None:
            Gradients(params_of(optimizer)).multiply_(read.clip_coef)
        state["read"] = None
        state["stage"] = OptState.UNSCALED

    def clip_grad_norm_(
        self, optimizer: Optimizer, max_norm: float | Tensor, norm_type: float = 2.0
    ) -> Tensor:
        """Clip the unscaled gradients of ``optimizer`` by their total norm, and return this norm; no sync.

        With a fusedamp optimizer whose gradients are still scaled, they are only read: the clip coefficient
        goes into the step, which uses the same read pass (or into :meth:`unscale_`, if that comes first). If
        gradients or scale change in between, which the identity and version counter of each gradient tell,
        the step reads and clips the new ones; writes through ``.data`` and raw collectives move no version
        counter and must come before this call. Gradients made in inference mode have none and are read
        again. Otherwise the gradients are unscaled, unless they are, and
        clipped in place.

        Args:
            max_norm: a number, or a tensor of 1 element that is read on the device.
            norm_type: p of the p-norm, >= 0, or inf.
        Returns: the norm as :func:`fusedamp.clip_grad_norm_` does; inf or NaN if this step is an overflow.
        """
        norm_type = check_norm("GradScaler.clip_grad_norm_", max_norm, norm_type)
        if self._enabled:
            self._check_scale_growth_tracker("clip_grad_norm_")
            state = self._per_optimizer_states[id(optimizer)]
            if state["stage"] is OptState.STEPPED:
                raise RuntimeError("clip_grad_norm_() is being called after step().")
            refuse_flattened("GradScaler.clip_grad_norm_", params_of(optimizer))
            if state["stage"] is OptState.READY:
                if self._is_fused(optimizer) and not self._overrides("unscale_", "_unscale_grads_"):
                    if state.get("read") is None:
                        check = self._check(optimizer, state, (max_norm, norm_type), keep=True)
                        if check is not None:
                            return check.found.norm
                    self._current_read(optimizer, state)
                    return self._clip_later(optimizer, state, max_norm, norm_type)
                self.unscale_(optimizer)
        return clip_grad_norm_(params_of(optimizer), max_norm, norm_type)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step ``optimizer`` unless a gradient is not finite; ``*args`` and ``**kwargs`` go to its ``step``.

        A fusedamp optimizer's own ``step`` is called in any case, once, and skips on the device: post-hooks
        and LR schedulers count it, :attr:`last_step_skipped` tells. It is no error if it has no gradients.
        One with anything before its step, and any other optimizer without AMP support of its own, is called
        only if the host read no overflow. torch's fused optimizers get ``grad_scale`` and
        ``found_inf`` (never above 1: at 2 they step); torch's fused SGD is called the host's way until it has
        its momentum buffers, since it would make them uninitialised in a skipped step.

        Returns: what ``optimizer.step`` returns; None where it was not called.
        Raises: RuntimeError if a fused step did not run on ``optimizer``, or ran on another object.
        """
        if not self._enabled:
            unscaled: float | None = optimizer.step(*args, **kwargs)
            return unscaled
        if "closure" in kwargs:
            raise RuntimeError(_NO_CLOSURE)
        self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        self._refuse_flattened("step", optimizer)
        if routes.is_legacy(optimizer):
            return super().step(optimizer, *args, **kwargs)
        by_hand = routes.by_hand(optimizer)
        if self._is_fused(optimizer):
            result = self._step_fused(optimizer, state, by_hand, args, kwargs)
        elif routes.takes_found_inf(optimizer):
            result = self._step_torch_fused(optimizer, state, by_hand, args, kwargs)
        else:
            if state["stage"] is OptState.READY:
                self.unscale_(optimizer)
            if not state["found_inf_per_device"] and not routes.is_fusedamps(optimizer):
                raise AssertionError("No inf checks were recorded for this optimizer.")
            self._divide(optimizer, state, by_hand[1])
            self._combined_flag(optimizer, state)
            self._skip_by_hand(by_hand[0])
            result = self._maybe_opt_step(optimizer, state, *args, **kwargs)
        state["stage"] = OptState.STEPPED
        state["read"] = None
        return result

    def _refuse_flattened(self, method: str, optimizer: Optimizer) -> None:
        # What replaces these methods may know FSDP1's ranks.
        if is_distributed() and not self._overrides("unscale_", "_unscale_grads_"):
            refuse_flattened(f"GradScaler.{method}", params_of(optimizer))

    def _is_fused(self, optimizer: Optimizer) -> bool:
        return routes.is_ours(optimizer) and not self._overrides("_maybe_opt_step")

    def _overrides(self, *names: str) -> bool:
        """Whether a subclass or an assignment put something in the place of our methods."""
        return any(
            getattr(getattr(self, name), "__func__", None) is not getattr(GradScaler, name) for name in names
        )

    def _step_fused(
        self,
        optimizer: Optimizer,
        state: dict[str, Any],
        by_hand: ByHand,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> float | None:
        if args and args[0] is not None:
            raise RuntimeError(_NO_CLOSURE)
        if (check := self._current_check(optimizer, state, by_hand)) is not None:
            return self._step_checked(optimizer, state, check, args, kwargs)
        flag, read = self._found_inf(optimizer, state, by_hand)
        inv_scale = clip_coef = None
        if read is None:
            devices = {local(p).device for p in params_of(optimizer) if gradient_of(p) is not None}
        else:
            devices = set(read.gradients.by_device)
            inv_scale = read.inv_scale
            clip_coef = None if read.clip_coef is None else read.clip_coef.float()
        per_device = {
            device: DeviceInputs(
                inv_scale=None if inv_scale is None else on(inv_scale, device),
                clip_coef=None if clip_coef is None else on(clip_coef, device),
                found_inf=on(flag, device),
            )
            for device in devices
        }
        result: float | None = step_with(AmpInputs(per_device, optimizer), args, kwargs)
        for name in _BY_HAND:  # set by hand, for one step, as with torch's scaler
            vars(optimizer).pop(name, None)
        return result

    def _step_checked(
        self,
        optimizer: Optimizer,
        state: dict[str, Any],
        check: Check,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> float | None:
        assert self._scale is not None
        device, found = self._scale.device, check.found
        flag = self._last_found_inf = combine(state["found_inf_per_device"].values(), device)
        log, positions = self._overflow_log(optimizer, device), check.table.positions
        here = DeviceInputs(found.inv_scale, check.clip_coef, flag, log.of_step(positions, found.counts))
        inputs = AmpInputs({device: here}, optimizer, check.table)
        result: float | None = step_with(inputs, args, kwargs)
        if not inputs.logged:  # the step was another one than the last, and took the longer way
            log.next_step()
            log.record_counts(positions, found.counts, flag)
        return result

    def _step_torch_fused(
        self,
        optimizer: Optimizer,
        state: dict[str, Any],
        by_hand: ByHand,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> float | None:
        flag, read = self._found_inf(optimizer, state, by_hand)
        assert self._scale is not None
        grad_scale = None if read is None else self._scale
        if by_hand[1] is not None:  # a user's factor, on top of ours
            grad_scale = times(grad_scale, by_hand[1], self._scale.device)
        given = {name: vars(optimizer)[name] for name in _BY_HAND if name in vars(optimizer)}
        vars(optimizer).update(grad_scale=grad_scale, found_inf=flag.clamp(max=1))
        try:
            result: float | None = optimizer.step(*args, **kwargs)
            given = {}
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
            vars(optimizer).update(given)
        return result

    def _found_inf(
        self, optimizer: Optimizer, state: dict[str, Any], by_hand: ByHand
    ) -> tuple[Tensor, CheckByParts | None]:
        """The flag to skip over all devices, and the gradient check behind it unless gradients were unscaled
        before.
        """
        read = None
        if state["stage"] is OptState.READY and self._overrides("unscale_", "_unscale_grads_"):
            self.unscale_(optimizer)  # what replaces them may reduce the flags over ranks
        if state["stage"] is OptState.READY:
            read = self._current_read(optimizer, state)
            if read is None:
                self._check_inf_per_device(optimizer)
                read = state["read"]
        seen = self._divide(optimizer, state, by_hand[1])
        flag = self._combined_flag(optimizer, state)
        log = self._overflows[optimizer]
        if seen is not None:
            log.record(*seen, flag)
        elif read is not None:
            log.record(read.gradients, read.stats, flag)
        elif flag.device.type != "cpu":
            log.record_uncounted(Gradients(params_of(optimizer)), flag)
        elif has_value(flag) and flag.item():
            self._record_now(optimizer, flag)
        return self._skip_by_hand(by_hand[0]), read

    def _maybe_opt_step(
        self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        if any(has_value(flag) and flag.item() for flag in optimizer_state["found_inf_per_device"].values()):
            assert self._last_found_inf is not None
            self._record_now(optimizer, self._last_found_inf)
            return None
        result: float | None = optimizer.step(*args, **kwargs)
        return result
