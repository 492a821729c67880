"""The loss scaler: torch.amp.GradScaler's interface, with every decision made on the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from ..ops.inputs import AmpInputs, DeviceInputs, refuse_freed, step_with, stepping_in_backward, times
from ..ops.observers import observer_of
from ..tensors.layout import gradient_of
from ..tensors.shards import is_distributed, local, refuse_flattened
from . import routes
from .check import Check, CheckByParts, Clip
from .clip import check_norm, check_ranks, clip_grad_norm_
from .flags import combine, has_value, no_overflow, on
from .gradient_checks import ByHand, GradientChecks
from .gradients import Gradients
from .limits import need_group
from .overflow import params_of

_BY_HAND = ("found_inf", "grad_scale")
_NO_CLOSURE = "Closure use is not currently supported if GradScaler is enabled."


class GradScaler(GradientChecks):
    """Drop-in for :class:`torch.amp.GradScaler` that accepts gradients of any dtype and never syncs the host.

    Arguments, methods, errors and scale updates are the same as torch's. With a :mod:`fusedamp.optim`
    optimizer, :meth:`step` checks the gradients and passes 1/scale, the clip coefficient and the overflow
    flag to one fused step. This needs no host sync, can be captured in a CUDA graph, and **leaves the
    gradients scaled** (call :meth:`unscale_` first to read them). Other optimizers are called as torch's
    scaler calls them.

    If any gradient of an optimizer is not finite before or after unscaling, its step changes nothing.

    The fused step is used only if ``optimizer.step`` is fusedamp's own method on that object. Step pre-hooks
    (own and global), subclasses that override ``step``, wrappers and a replaced ``step`` get unscaled,
    clipped gradients, and are not called in a skipped step. Post-hooks keep the fused step and see scaled
    gradients. ``optimizer.found_inf`` and ``optimizer.grad_scale`` set by hand apply to one step, as with
    torch's fused optimizers. A nonzero ``found_inf`` also skips the step, without changing the scale.
    ``grad_scale`` also divides the gradients; a result that is not finite counts as an overflow.

    Args:
        device, init_scale, growth_factor, backoff_factor, growth_interval, enabled: as torch's.
        min_scale: lower bound of the scale; the default only keeps 1/scale finite.
        max_scale: upper bound of the scale.
        hysteresis: number of overflows until the scale is lowered; each further one lowers it again until the
            budget is refilled. With more than 1, a skipped step need not lower ``get_scale()``.
        hysteresis_refill: event that refills the budget: ``"growth"`` of the scale, or any ``"good_step"``.
        on_floor: reaction of :meth:`update` to an overflow while the scale is at ``min_scale``: ``"warn"``
            once, or ``"raise"`` a RuntimeError. Both name the parameters. On CUDA a later update reacts; a
            captured graph does not.
        process_group: ranks that skip and change the scale together, for models whose gradients differ over
            ranks that no DTensor names: pipeline stages, experts, FSDP1 shards, plain shards; or replicas
            that may disagree. Each rank must call :meth:`unscale_` and :meth:`step` equally often, in the
            same order. Each step, or the :meth:`unscale_` or clipping over ranks before it, then reduces
            one flag of 4 bytes on the device. A rank that scaled no loss has the same scale. ``found_inf``
            and ``grad_scale`` are set by hand on all of these ranks or on none. Not part of
            :meth:`state_dict`; such a scaler cannot be pickled. Before ``init_process_group``,
            ``torch.distributed.group.WORLD`` is None.
        policy: how the scale moves. ``"overflow"``, as torch's: it grows until gradients overflow.
            ``"headroom"``: it follows the largest gradient of all optimizers in the last 512 good steps, by
            the rule of :func:`fusedamp.ops.update_scale_headroom_`. It comes down before gradients overflow,
            and is always a power of two: another scale is rounded down at its first update. It sees
            gradients of weights only, not of activations (but see :func:`fusedamp.numerics.watch`), and none
            that other code has unscaled (an overridden ``unscale_`` or ``_unscale_grads_``). Where ranks
            reduce the overflow flag, they reduce the largest gradient with it, in 16 bytes. Ranks with
            different gradients must be known, as shards of DTensors or by ``process_group``: an all-reduce
            of ``found_inf`` by other code is not enough. Factors and hysteresis must be the defaults.
        headroom_bits: with that policy, how many bits the largest gradients stay below 2^16; 0 to 14.

    Raises: AssertionError where torch raises it, ValueError or TypeError for other bad arguments,
        RuntimeError for parameters that FSDP1 shards over several ranks, without ``process_group``.
    """

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale in place, and apply a deferred clipping.

        Like torch's, but for gradients of every dtype. Uncoalesced sparse gradients, expanded gradients and
        DTensors whose placements differ from their parameter's are replaced; all others are modified in
        place.
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
        self._agree_over_group_(state)
        state["read"] = None
        state["stage"] = OptState.UNSCALED

    def clip_grad_norm_(
        self,
        optimizer: Optimizer,
        max_norm: float | Tensor,
        norm_type: float = 2.0,
        *,
        process_group: Any = None,
    ) -> Tensor:
        """Clip the unscaled gradients of ``optimizer`` by their total norm; returns this norm. No sync.

        With a fusedamp optimizer and scaled gradients, this only reads the gradients. The clipping is
        deferred to the step, which reuses the gradient check (or to :meth:`unscale_`, if called first). If
        gradients or scale change in between, according to each gradient's identity and version counter, the
        step checks and clips again. Writes through ``.data`` and raw collectives change no version counter
        and must precede this call. Gradients created in inference mode have no version counter and are
        checked again. With any other optimizer, or after :meth:`unscale_`, the gradients are unscaled if
        necessary and clipped in place.

        Args:
            max_norm: a number, or a tensor of 1 element that is read on the device.
            norm_type: p of the p-norm, >= 0, or inf.
            process_group: the ranks that together hold the model, as in :func:`fusedamp.clip_grad_norm_`; the
                scaler then needs one as well. Gradients must then stay as they are until the step.
        Returns: the norm as :func:`fusedamp.clip_grad_norm_` does; inf or NaN if this step is an overflow.
        """
        norm_type = check_norm("GradScaler.clip_grad_norm_", max_norm, norm_type)
        need_group("GradScaler.clip_grad_norm_", process_group)
        if self._enabled:
            if process_group is not None and self._process_group is None:
                raise RuntimeError(
                    "[GradScaler.clip_grad_norm_] got a process_group, and the scaler has none; expected "
                    "both, as an overflow on another rank must also skip this rank's step. Pass "
                    "process_group to GradScaler as well."
                )
            self._check_scale_growth_tracker("clip_grad_norm_")
            state = self._per_optimizer_states[id(optimizer)]
            if state["stage"] is OptState.STEPPED:
                raise RuntimeError("clip_grad_norm_() is being called after step().")
            self._refuse_freed("clip_grad_norm_", optimizer)
            check_ranks("GradScaler.clip_grad_norm_", params_of(optimizer), process_group)
            if state["stage"] is OptState.READY:
                if self._is_fused(optimizer) and not self._overrides("unscale_", "_unscale_grads_"):
                    clip = Clip(max_norm, norm_type, process_group)
                    if state.get("read") is None and process_group is None:
                        check = self._check(optimizer, state, clip, keep=True)
                        if check is not None:
                            return check.found.norm
                    self._current_read(optimizer, state)
                    return self._clip_later(optimizer, state, clip)
                self.unscale_(optimizer)
        return clip_grad_norm_(params_of(optimizer), max_norm, norm_type, process_group=process_group)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step ``optimizer`` if all gradients are finite; ``*args`` and ``**kwargs`` are passed to its
        ``step``.

        A fusedamp optimizer's own ``step`` is always called once and skips on the device: post-hooks and LR
        schedulers count it, and :attr:`last_step_skipped` tells if it was skipped. An optimizer without
        gradients is not an error. An optimizer whose step is wrapped or has pre-hooks, and any other
        optimizer without AMP support, is called only if the host read no overflow. torch's fused optimizers
        get ``grad_scale`` and ``found_inf`` (at most 1: they step at 2). torch's fused SGD takes the host
        path until its momentum buffers exist, because a skipped step would leave them uninitialized.

        Returns: the result of ``optimizer.step``; None if it was not called.
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
            if self._process_group is not None:
                raise RuntimeError(
                    f"[GradScaler.step] {type(optimizer).__name__}.step takes the scaler itself, and the "
                    "scaler has a process_group; expected a step without the argument grad_scaler, as this "
                    "one may skip without asking other ranks. Remove the argument."
                )
            return super().step(optimizer, *args, **kwargs)
        observer = observer_of(optimizer)
        if observer is None:
            return self._step_on_route(optimizer, state, args, kwargs)
        observer.begin()
        try:
            result = self._step_on_route(optimizer, state, args, kwargs)
        except BaseException:
            observer.abort()
            raise
        observer.end(self._last_found_inf, self._scale)
        return result

    def _step_on_route(
        self, optimizer: Optimizer, state: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> float | None:
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
            if self._divide(optimizer, state, by_hand[1]) is not None:
                self._agree_over_group_(state)
            self._combined_flag(optimizer, state)
            self._skip_by_hand(by_hand[0])
            result = self._maybe_opt_step(optimizer, state, *args, **kwargs)
        state["stage"] = OptState.STEPPED
        state["read"] = None
        return result

    def _refuse_freed(self, method: str, optimizer: Optimizer) -> None:
        if stepping_in_backward:
            refuse_freed(f"GradScaler.{method}", params_of(optimizer))

    def _refuse_flattened(self, method: str, optimizer: Optimizer) -> None:
        self._refuse_freed(method, optimizer)
        # Methods that override these may know FSDP1's ranks.
        if (
            self._process_group is None
            and is_distributed()
            and not self._overrides("unscale_", "_unscale_grads_")
        ):
            refuse_flattened(f"GradScaler.{method}", params_of(optimizer))

    def _is_fused(self, optimizer: Optimizer) -> bool:
        return routes.is_ours(optimizer) and not self._overrides("_maybe_opt_step")

    def _overrides(self, *names: str) -> bool:
        """True if a subclass or an assignment replaced one of these methods."""
        for name in names:  # a loop, as this is called four times per iteration
            if getattr(getattr(self, name), "__func__", None) is not getattr(GradScaler, name):
                return True
        return False

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
        for name in _BY_HAND:  # set by hand for one step, as with torch's scaler
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
        self._agree_over_group_(state)
        flag = self._last_found_inf = combine(state["found_inf_per_device"].values(), device)
        log, positions = self._overflow_log(optimizer, device), check.table.positions
        here = DeviceInputs(found.inv_scale, check.clip_coef, flag, log.of_step(positions, found.counts))
        inputs = AmpInputs({device: here}, optimizer, check.table)
        result: float | None = step_with(inputs, args, kwargs)
        if not inputs.logged:  # the step differed from the last one, so it was not logged
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
        if by_hand[1] is not None:  # the user's factor, combined with ours
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
        """Return the skip flag over all devices, and the gradient check, which is None for gradients that
        were unscaled before.
        """
        read = None
        if state["stage"] is OptState.READY and self._overrides("unscale_", "_unscale_grads_"):
            self.unscale_(optimizer)  # overriding methods may reduce the flags over ranks
        if ready := state["stage"] is OptState.READY:
            read = self._current_read(optimizer, state)
            if read is None:
                self._check_inf_per_device(optimizer)
                read = state["read"]
        seen = self._divide(optimizer, state, by_hand[1])
        if seen is not None or (ready and not state.get("agreed")):
            self._agree_over_group_(state)
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
