"""Gradient checks of a loss scaler: one result per optimizer, stored until the step."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from .. import ops
from ..ops.inputs import Number, divided, flag_on
from ..ops.observers import Reader, observer_of
from ..tensors.shards import is_distributed, reduce_
from .check import Check, CheckByParts, Clip, check
from .flags import PerDevice, combine, lasting, on
from .gradients import Gradients, Stamp, gradients_of
from .headroom import LargestGradient
from .loss_scale import LossScale
from .overflow import OverflowLog, OverflowReport, params_of

ByHand = tuple[Number | None, Number | None]  # found_inf and grad_scale
Stats = dict[torch.device, ops.GradStats]


class GradientChecks(LossScale):
    """A loss scale with gradient checks; base class of :class:`fusedamp.GradScaler`."""

    def _start_watching(self) -> None:
        super()._start_watching()
        self._last_found_inf: Tensor | None = None
        self._overflows: weakref.WeakKeyDictionary[Optimizer, OverflowLog] = weakref.WeakKeyDictionary()
        self._largest: weakref.WeakKeyDictionary[Optimizer, LargestGradient] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_last_found_inf"], state["_overflows"], state["_largest"]
        return state

    def _overrides(self, *names: str) -> bool:
        """True if a subclass or an assignment replaced one of fusedamp's methods."""
        raise NotImplementedError

    def _reader(self, optimizer: Optimizer) -> Reader | None:
        """Return what reads along in checks of gradients."""
        watch = observer_of(optimizer)
        if self._headroom is None:
            return watch
        if (reader := self._largest.get(optimizer)) is None:
            reader = self._largest[optimizer] = LargestGradient()
        reader.watch = watch
        return reader

    def _take_largest(self, optimizer: Optimizer, state: dict[str, Any]) -> PerDevice | None:
        """Store the largest gradient of the check that was just made, and return it; None if the policy needs
        none."""
        if self._headroom is None:
            return None
        alone = self._process_group is None and is_distributed()
        state["largest"] = found = self._largest[optimizer].take(alone)
        return found

    def _check_inf_per_device(self, optimizer: Optimizer) -> PerDevice:  # type: ignore[override]
        """Check the gradients without modifying them; the flags are set if an element is not finite before or
        after unscaling."""
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        state = self._per_optimizer_states[id(optimizer)]
        norm_type = state.get("norm_type", 2.0)
        gradients = Gradients(params_of(optimizer), magnitudes=norm_type != 2)
        inv_scale = self._inverse()
        with lasting():
            stats = gradients.stats(inv_scale, norm_type, self._reader(optimizer))
            largest = self._take_largest(optimizer, state)
        stamp = Stamp([scale, *gradients.originals])
        state["read"] = CheckByParts(gradients, stats, inv_scale, norm_type, stamp)
        state["sharded_over"] = gradients.sharded_over
        flags = gradients.agree_({device: stat.found_inf for device, stat in stats.items()}, largest)
        state["found_inf_per_device"] = flags
        return flags

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> PerDevice:
        gradients = Gradients(params_of(optimizer))
        state, largest = self._per_optimizer_states[id(optimizer)], None
        with lasting():
            if (reader := self._reader(optimizer)) is not None:
                gradients.stats(inv_scale, reader=reader)
                largest = self._take_largest(optimizer, state)
            flags = {device: on(found_inf, device).clone() for device in gradients.by_device}
        for device, bucket in gradients.by_device.items():
            ops.unscale_(bucket.tensors, on(inv_scale, device), flags[device])
        gradients.write_back()
        state["sharded_over"] = gradients.sharded_over
        return gradients.agree_(flags, largest)

    def _current_read(self, optimizer: Optimizer, state: dict[str, Any]) -> CheckByParts | None:
        """Return the gradient check of an earlier clip_grad_norm_; repeat it with its clipping if gradients
        or scale changed.
        """
        read = state.get("read")
        if isinstance(read, Check) or (
            read is not None and not read.stamp.matches([self._scale, *gradients_of(params_of(optimizer))])
        ):
            if any(clip.process_group is not None for clip in read.clips):
                raise RuntimeError(
                    "[GradScaler] gradients or scale changed after clip_grad_norm_ with process_group; "
                    "expected them unchanged until the step, as this rank cannot measure the others' again. "
                    "Change them before, or call unscale_ before clip_grad_norm_."
                )
            state["read"] = None
            for clip in read.clips:
                self._clip_later(optimizer, state, clip)
        return state.get("read")

    def _check(
        self, optimizer: Optimizer, state: dict[str, Any], clip: Clip | None, keep: bool
    ) -> Check | None:
        """Check plain gradients with one op; None if several operations are needed."""
        assert self._scale is not None
        if self._overrides("_check_inf_per_device"):
            return None
        found = check(optimizer, self._scale, clip, keep, self._reader(optimizer))
        if found is not None:
            with lasting():
                self._take_largest(optimizer, state)
            state["read"], state["sharded_over"] = found, ()
            state["found_inf_per_device"] = {self._scale.device: found.found.found_inf}
        return found

    def _current_check(self, optimizer: Optimizer, state: dict[str, Any], by_hand: ByHand) -> Check | None:
        """Return the check for this step: that of an earlier clip_grad_norm_ if it is still valid."""
        assert self._scale is not None
        if state["stage"] is not OptState.READY or by_hand != (None, None):
            return None
        read = state.get("read")
        if read is None:
            if self._overrides("unscale_", "_unscale_grads_"):
                return None
            return self._check(optimizer, state, None, keep=False)
        if not isinstance(read, Check):
            return None
        if read.still_holds(optimizer, self._scale):
            return read
        state["read"] = None
        found = self._check(optimizer, state, read.clip, keep=False)
        if found is None:
            state["read"] = read  # the check by parts applies its deferred clipping
        return found

    def _clip_later(self, optimizer: Optimizer, state: dict[str, Any], clip: Clip) -> Tensor:
        earlier = read = state.get("read")
        if read is None or read.norm_type != clip.norm_type:
            state["norm_type"] = clip.norm_type
            names = ("found_inf_per_device", "largest")
            over_ranks: dict[str, Any] = {name: state[name] for name in names if name in state}
            self._check_inf_per_device(optimizer)
            read = state["read"]
            if state.get("agreed"):
                state.update(over_ranks)
            if earlier is not None:
                read.clips, read.clip_coef = earlier.clips, earlier.clip_coef
        if clip.process_group is None:
            read.gradients.need_known_ranks("GradScaler.clip_grad_norm_")
        elif not state.get("agreed"):
            # Before the norm, as on ranks whose optimizers need unscaled gradients: unscale_ does it there.
            self._agree_over_group_(state)
            state["agreed"] = True
        norm: Tensor = read.clip(clip)
        return norm

    def _divide(
        self, optimizer: Optimizer, state: dict[str, Any], grad_scale: Number | None
    ) -> tuple[Gradients, Stats] | None:
        """Check the gradients as divided by the scale and by the user's ``grad_scale``; a result that is not
        finite is an overflow.
        """
        if grad_scale is None:
            return None
        assert self._scale is not None
        read, factor = state.get("read"), None
        gradients = Gradients(params_of(optimizer)) if read is None else read.gradients
        if read is not None:
            factor = read.inv_scale
            if read.clip_coef is not None:  # NaN if a gradient is not finite, which is flagged already
                factor = factor * read.clip_coef.float().nan_to_num(nan=0.0)
        stats = gradients.stats(divided(factor, grad_scale, self._scale.device))
        flags = state["found_inf_per_device"]
        for device, flag in gradients.agree_({d: stat.found_inf for d, stat in stats.items()}).items():
            flags[device] = combine([flag, *([flags[device]] if device in flags else [])], device)
        return gradients, stats

    def _skip_by_hand(self, found_inf: Number | None) -> Tensor:
        """Combine the skip flag of this step with the user's ``found_inf``, which is not an overflow: the
        scale stays. With a process group, all ranks combine theirs."""
        assert self._last_found_inf is not None
        if found_inf is not None:
            device = self._last_found_inf.device
            self._last_found_inf = combine([self._last_found_inf, flag_on(device, found_inf)], device)
            if self._process_group is not None:
                reduce_(self._last_found_inf, self._process_group, "max")
        return self._last_found_inf

    def _combined_flag(self, optimizer: Optimizer, state: dict[str, Any]) -> Tensor:
        """Combine the flags of all devices on the scale's device, and start the step in the overflow log."""
        assert self._scale is not None
        flag = combine(state["found_inf_per_device"].values(), self._scale.device)
        self._last_found_inf = flag
        self._overflow_log(optimizer, flag.device).next_step()
        return flag

    def _overflow_log(self, optimizer: Optimizer, device: torch.device) -> OverflowLog:
        if (log := self._overflows.get(optimizer)) is None:
            log = self._overflows[optimizer] = OverflowLog(optimizer, device)
        return log

    def _steps_of(self, optimizer: Optimizer) -> int:
        """Return how often ``optimizer`` was stepped; syncs the host."""
        log = self._overflows.get(optimizer)
        return 0 if log is None else log.count()

    def _record_now(self, optimizer: Optimizer, flag: Tensor) -> None:
        gradients = Gradients(params_of(optimizer))
        self._overflows[optimizer].record(gradients, gradients.stats(None), flag)

    @property
    def last_step_skipped(self) -> Tensor:
        """True if the latest :meth:`step` was skipped: a 0-d bool tensor on the scale's device; no sync.

        Replays of a CUDA graph that captured the step update its source.
        """
        return torch.tensor(False) if self._last_found_inf is None else self._last_found_inf != 0

    def _describe_overflow(self) -> str:
        return str(self.overflow_report())

    def overflow_report(self, optimizer: Optimizer | None = None) -> OverflowReport:
        """Return the latest overflow of ``optimizer`` (default: the latest of any optimizer).

        The report has the step and, per parameter, the number of inf, NaN and too large elements. Syncs the
        host. Gradients unscaled by an explicit :meth:`unscale_` on CUDA are counted only now, so call this
        before ``zero_grad``; in-place clipping has turned their inf into NaN.
        """
        if optimizer is not None:
            log = self._overflows.get(optimizer)
            return OverflowReport() if log is None else log.report()
        reports = [log.report() for log in self._overflows.values()]
        return max(reports, key=lambda report: report.step, default=OverflowReport())
