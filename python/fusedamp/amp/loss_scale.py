"""The loss scale: initialization, scaling, updates and checkpoints. grad_scaler.py has the methods that
involve optimizers.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import abc, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state

from .. import ops
from ..tensors.shards import all_reduce_, reduce_
from . import limits
from .flags import PerDevice, combine, largest_of, lasting, on, reduced
from .floor import FloorWatch
from .headroom import Headroom, checked_saved
from .limits import MIN_SCALE


def _like(mapping: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return ``values`` as a mapping of the type of ``mapping``, which has the same keys; ``values`` itself
    if that fails."""
    if type(mapping) is dict:
        return values
    try:
        if not isinstance(mapping, dict):
            return type(mapping)(values)  # type: ignore[call-arg]
        made = copy.copy(mapping)  # keeps attributes such as a default factory; items are copied
        made.update(values)
        return made
    except Exception:  # third-party classes may raise anything
        return values


class LossScale(torch.amp.GradScaler):
    """torch's scaler with bounds, hysteresis and checks; :class:`fusedamp.GradScaler` documents the
    arguments.
    """

    # Class attributes, so that scalers unpickled from torch's class have them too.
    _min_scale: float = MIN_SCALE
    _max_scale: float = math.inf
    _hysteresis: int = 1
    _hysteresis_refill: str = "growth"
    _on_floor: str = "warn"
    _init_hysteresis_tracker: int | None = None  # None: the full budget
    _hysteresis_tracker: Tensor | None = None
    _process_group: Any = None
    _headroom: Headroom | None = None  # of the policy "headroom"

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        min_scale: float = MIN_SCALE,
        max_scale: float = math.inf,
        hysteresis: int = 1,
        hysteresis_refill: Literal["growth", "good_step"] = "growth",
        on_floor: Literal["warn", "raise"] = "warn",
        process_group: Any = None,
        policy: Literal["overflow", "headroom"] = "overflow",
        headroom_bits: int = 2,
    ) -> None:
        floor, ceiling, budget = limits.check_limits(
            min_scale, max_scale, hysteresis, hysteresis_refill, on_floor
        )
        bits = limits.check_policy(policy, headroom_bits, floor, ceiling, budget, hysteresis_refill)
        if enabled:  # torch compares these without checking that they are numbers
            limits.number("growth_factor", growth_factor), limits.number("backoff_factor", backoff_factor)
            limits.check_device(device)
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        if self._enabled:  # otherwise torch does not check its arguments either
            self._growth_factor = limits.check_growth_factor(growth_factor)
            self._backoff_factor = limits.check_backoff_factor(backoff_factor)
            self._growth_interval = limits.check_interval(growth_interval)
            self._init_scale = limits.check_init_scale(init_scale, floor, ceiling)
            if bits is not None:
                limits.need_unused_factors(self._growth_factor, self._backoff_factor)
        self._min_scale, self._max_scale = floor, ceiling
        self._hysteresis, self._hysteresis_refill = budget, hysteresis_refill
        self._on_floor = on_floor
        self._headroom = None if bits is None else Headroom(bits)
        limits.need_group("GradScaler", process_group)
        self._process_group = process_group
        self._start_watching()

    def _start_watching(self) -> None:
        """Reset what is not saved: at construction and after unpickling."""
        self._floor = FloorWatch()
        self._warned = False

    # torch's methods are on Dynamo's skip list and would break the graph; these overrides are traced.
    def _lazy_init_scale_growth_tracker(self, dev: torch.device | str) -> None:
        if self._growth_tracker is not None:
            raise AssertionError("_growth_tracker initialized before _scale")
        if (
            torch.device(dev).type == "cuda"
            and not torch.compiler.is_compiling()
            and torch.cuda.is_current_stream_capturing()
        ):
            raise RuntimeError(
                "[GradScaler.scale] the scale is not on the device yet; expected it before graph capture, as "
                "each replay would reset it. Call scaler.scale() once before capturing."
            )
        with lasting():
            self._scale = torch.full((), self._init_scale, dtype=torch.float32, device=dev)
            self._growth_tracker = torch.full((), self._init_growth_tracker, dtype=torch.int32, device=dev)
        # A graph that captured their creation would reset them in each replay.
        self._hysteresis_budget(torch.device(dev))
        if self._headroom is not None:
            self._headroom.place(dev)

    def _check_scale_growth_tracker(self, funcname: str) -> tuple[Tensor, Tensor]:
        if self._scale is None and self._process_group is not None:
            # Other ranks scale the loss: the first stages of a pipeline have none.
            self._lazy_init_scale_growth_tracker(self._device)
        return super()._check_scale_growth_tracker(funcname)

    def _agree_over_group_(self, state: dict[str, Any]) -> None:
        """Combine the overflow flags of all ranks of the process group in place, and the largest gradients if
        the policy needs them; collective, no sync."""
        if self._process_group is None:
            return
        assert self._scale is not None
        flags, device = state["found_inf_per_device"], self._scale.device
        largest = None if self._headroom is None else largest_of(state.get("largest", {}).values(), device)
        agreed, largest = reduced(
            combine(flags.values(), device), largest, lambda both: reduce_(both, self._process_group, "max")
        )
        if largest is not None:
            state["largest"] = {device: largest}
        flags.setdefault(device, agreed)  # of a rank without gradients
        for where, flag in flags.items():
            flag.copy_(on(agreed, where))

    @overload
    def scale(self, outputs: Tensor) -> Tensor: ...
    @overload
    def scale(self, outputs: list[Tensor]) -> list[Tensor]: ...
    @overload
    def scale(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]: ...
    @overload
    def scale(self, outputs: Iterable[Tensor]) -> Iterable[Tensor]: ...
    @overload
    def scale(self, outputs: Mapping[Any, Any]) -> Mapping[Any, Any]: ...

    def scale(self, outputs: Tensor | Mapping[Any, Any] | Iterable[Tensor]) -> Any:
        """Multiply a tensor, or each in a nested list, tuple, mapping or other iterable, by the scale.

        Mappings keep their type if it can be constructed or copied (dict, model outputs); otherwise a dict is
        returned. Traceable by ``torch.compile``. A disabled scaler returns ``outputs`` itself.
        """
        if not self._enabled:
            return outputs
        return self._scaled(outputs, {})

    def _scaled(self, outputs: Any, copies: PerDevice) -> Any:
        if isinstance(outputs, Tensor):
            if self._scale is None:
                self._lazy_init_scale_growth_tracker(outputs.device)
            assert self._scale is not None
            if outputs.device not in copies:
                copies[outputs.device] = on(self._scale, outputs.device)
            return outputs * copies[outputs.device]
        if isinstance(outputs, abc.Mapping):
            return _like(outputs, {key: self._scaled(value, copies) for key, value in outputs.items()})
        if isinstance(outputs, abc.Iterable) and not isinstance(outputs, (str, bytes)):
            scaled = (self._scaled(value, copies) for value in outputs)
            if isinstance(outputs, (list, tuple)):
                return type(outputs)(*scaled) if hasattr(outputs, "_fields") else type(outputs)(scaled)
            return scaled
        raise ValueError("outputs must be a Tensor or an iterable of Tensors")

    def _inverse(self) -> Tensor:
        assert self._scale is not None
        return self._scale.double().reciprocal().float()  # an FP32 division may be imprecise on the device

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Update the scale in place for the next iteration: from the overflow flags of the steps, or to
        ``new_scale``.

        ``new_scale`` is a finite number > 0 or a tensor of 1 element; it is clamped to min_scale..max_scale.
        Any other number raises. A tensor on an accelerator is checked there: if its value is not finite or
        not > 0, the scale is unchanged. An iteration in which only fused optimizers without gradients stepped
        leaves the scale unchanged.
        """
        if not self._enabled:
            return
        scale, growth_tracker = self._check_scale_growth_tracker("update")
        stuck = False
        if new_scale is not None:
            self._set_scale(limits.new_scale_value(new_scale, torch.device(self._device).type))
        elif (found := self._found_in_all(scale.device)) is not None:
            found_inf, largest = found
            rule: dict[str, Any] = dict(
                growth_interval=self._growth_interval, min_scale=self._min_scale, max_scale=self._max_scale
            )
            if self._headroom is not None and largest is not None:
                stuck = self._floor.stuck(scale, found_inf, self._min_scale, Headroom.LARGEST_BACKOFF)
                self._headroom.update(scale, found_inf, largest, **rule)
            else:
                stuck = self._floor.stuck(scale, found_inf, self._min_scale, self._backoff_factor)
                ops.update_scale_(
                    scale,
                    growth_tracker,
                    found_inf,
                    growth_factor=self._growth_factor,
                    backoff_factor=self._backoff_factor,
                    hysteresis_tracker=self._hysteresis_budget(scale.device),
                    hysteresis=self._hysteresis,
                    refill_on_good_step=self._hysteresis_refill == "good_step",
                    **rule,
                )
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        if stuck:
            self._complain_about_floor()

    def _set_scale(self, value: float | Tensor) -> None:
        assert self._scale is not None
        if isinstance(value, Tensor):
            value = value.to(self._scale)
            bounded = value.clamp(self._min_scale, self._max_scale)
            self._scale.copy_(torch.where(value.isfinite() & (value > 0), bounded, self._scale))
        else:
            self._scale.fill_(min(max(value, self._min_scale), self._max_scale))
        self._floor.forget()

    def _found_in_all(self, device: torch.device) -> tuple[Tensor, Tensor | None] | None:
        """Return the overflow flag over all optimizers, and the largest gradient if the policy needs it."""
        states = list(self._per_optimizer_states.values())
        flags = [flag for state in states for flag in state["found_inf_per_device"].values()]
        if not flags:
            if any(state["stage"] is OptState.STEPPED for state in states):
                return None  # no optimizer had a gradient
            raise AssertionError("No inf checks were recorded prior to update.")
        found_inf, largest = combine(flags, device), None
        if self._headroom is not None:
            values = [value for state in states for value in state.get("largest", {}).values()]
            largest = largest_of(values, device)
        sharded_over = {state.get("sharded_over", ()): None for state in states}
        if len(sharded_over) > 1:  # optimizers on different meshes: without this, ranks' scales diverge
            every = dict.fromkeys(dim for dims in sharded_over for dim in dims)
            return reduced(found_inf, largest, lambda both: all_reduce_(both, every, "max"))
        return found_inf, largest

    def _describe_overflow(self) -> str:
        raise NotImplementedError

    def _hysteresis_budget(self, device: torch.device) -> Tensor | None:
        if self._hysteresis > 1 and self._hysteresis_tracker is None:
            left = self._init_hysteresis_tracker
            left = self._hysteresis if left is None else left
            with lasting():
                self._hysteresis_tracker = torch.full((), left, dtype=torch.int32, device=device)
        return self._hysteresis_tracker

    def _complain_about_floor(self) -> None:
        if self._warned and self._on_floor == "warn":
            return
        self._warned = True
        message = (
            f"[GradScaler] gradients overflow with the scale at its floor (min_scale {self._min_scale!r}), "
            "and every such step is skipped. The loss or the model is not finite, or min_scale is too big. "
            f"Latest overflow: {self._describe_overflow()}"
        )
        if self._on_floor == "raise":
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=3)

    def set_growth_factor(self, new_factor: float) -> None:
        """Set the factor as torch's method does; ValueError for less than 1."""
        factor = limits.check_growth_factor(new_factor)
        if self._headroom is not None:
            limits.need_unused_factors(factor, 0.5)
        super().set_growth_factor(factor)

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set the factor as torch's method does; ValueError outside 0..1."""
        factor = limits.check_backoff_factor(new_factor)
        if self._headroom is not None:
            limits.need_unused_factors(2.0, factor)
        super().set_backoff_factor(factor)

    def set_growth_interval(self, new_interval: int) -> None:
        """Set the interval as torch's method does; ValueError for less than 1."""
        super().set_growth_interval(limits.check_interval(new_interval))

    def _hysteresis_left(self) -> int | None:
        tracker = self._hysteresis_tracker
        return self._init_hysteresis_tracker if tracker is None else int(tracker.item())

    def state_dict(self) -> dict[str, Any]:
        """Return torch's five entries, ``_hysteresis_tracker`` if the hysteresis is more than 1, and with the
        policy "headroom" its state, ``_headroom``: a list of whole numbers. Syncs the host.
        """
        state = super().state_dict()
        if state and self._hysteresis > 1:
            left = self._hysteresis_left()
            state["_hysteresis_tracker"] = self._hysteresis if left is None else left
        if state and self._headroom is not None:
            state["_headroom"] = self._headroom.save()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this scaler or of torch's. Its scale is clamped to ``min_scale``..``max_scale``,
        which are not part of a state. Without ``_headroom``, that policy starts from scratch, at this scale.

        Raises: RuntimeError for an empty state, KeyError for an incomplete one, TypeError or ValueError for
            an invalid scale, factor or count; then nothing is changed.
        """
        if not self._enabled:
            return
        if state_dict:
            state_dict = limits.checked_state(state_dict, self._min_scale, self._max_scale)
        saved = [] if self._headroom is None else checked_saved(state_dict.get("_headroom", []))
        super().load_state_dict(state_dict)
        left = state_dict.get("_hysteresis_tracker")
        left = None if left is None else min(left, self._hysteresis)
        self._init_hysteresis_tracker = left
        if self._hysteresis_tracker is not None:
            self._hysteresis_tracker.fill_(self._hysteresis if left is None else left)
        if self._headroom is not None:
            self._headroom.load(saved)
        self._floor.forget()

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            raise TypeError(
                "[GradScaler] has a process_group, which can't be copied or pickled; expected one scaler per "
                "process. Save state_dict(), and load it into a new scaler with its process_group."
            )
        state = super().__getstate__()
        state["_init_hysteresis_tracker"], state["_hysteresis_tracker"] = self._hysteresis_left(), None
        del state["_floor"], state["_warned"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_watching()
