"""An optimizer whose masters, states and update are on the host."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from ...ops.checks import at, flag
from ...ops.inputs import AmpInputs, DeviceInputs, begin_step, end_step, inputs_on
from ...tensors.blocks import split_over
from ...tensors.layout import gradient_of, placed_like
from ...tensors.shards import is_distributed, is_dtensor, is_flattened, local
from ..core.batch import Batch, Group
from ..core.optimizer import FusedOptimizer
from ..core.params import check_distinct, check_place
from ..core.parts import overrides_step
from ..state import checkpoint
from .buckets import Bucket, Twin
from .entries import Entries, place_states, shards_of
from .link import link_to
from .mirror import Mirror

_HOST = torch.device("cpu")


class Offloaded(torch.optim.Optimizer):
    """An optimizer of :mod:`fusedamp.optim` whose masters, states and update are on the host.

    The device keeps weights and gradients. Per step and 16-bit parameter, 2 bytes of gradient cross to the
    host and 2 bytes of weight cross back; the host steps its own copy of the weights. Results are those of
    ``optimizer_class`` without offload, bit for bit for elementwise optimizers.

    Gradients are copied in buckets of about 32 MiB as the backward pass finishes them. A gradient that is
    modified afterwards, according to its version counter, is copied again in the step: by a second backward
    pass, by ``scaler.unscale_`` or by torch's clipping. ``scaler.clip_grad_norm_`` modifies none. See
    :meth:`last_micro_batch` for gradient accumulation. If several ranks hold plain parameters
    (DistributedDataParallel), all gradients are copied in the step, because they are reduced after the
    backward pass. DTensors (FSDP2) are copied as shards.

    ``step`` updates each bucket on the host as it arrives, and copies its weights back while the next one is
    updated. The host waits for the gradients, the device for the last weights.

    Weights that are modified on the device between steps are copied to the host in the next step, and masters
    follow them as in any optimizer of fusedamp. Modifications are detected by version counters and by new
    memory: writes through ``.data``, which change neither, must be followed by :meth:`reload_weights`. The
    same holds for gradients: write to them through ``.data`` only after ``last_micro_batch(False)``.

    Args:
        optimizer_class: a class of :mod:`fusedamp.optim`; Muon, Adafactor, LAMB, LARS and NovoGrad need whole
            tensors, so no DTensors.
        params: parameters or groups, as for ``optimizer_class``. Those that get no gradient use no memory.
        options: arguments of ``optimizer_class``.
    State: of ``optimizer_class``, on the host, keyed by the parameters. Checkpoints are the same with and
        without offload.
    Raises: TypeError for another class; ValueError for unsupported options or parameters. RuntimeError for a
        step inside of CUDA graph capture.
    Cost: on the host 14 bytes per BF16 parameter for AdamW with ``master_weights="split"``, 10 with BF16
        states, 8.1 with 8-bit states, 16 with FP32 masters. The host waits once per step.
    Source: Ren et al. 2021, arXiv:2101.06840 (ZeRO-Offload), for the division between device and host.
    """

    _fusedamp_fused = True  # fusedamp.GradScaler uses its fused step
    _amp: AmpInputs | None = None  # set by the scaler around one step
    _new_link = staticmethod(link_to)

    def __init__(self, optimizer_class: type[FusedOptimizer], params: ParamsT, **options: Any) -> None:
        _check_class(optimizer_class)
        # Its checks of the options, its defaults and its seed do not depend on parameters.
        host = optimizer_class([Parameter(torch.empty(0, device=_HOST))], **options)
        host.param_groups.clear()
        self._start(host)
        super().__init__(params, dict(host.defaults))

    def _start(self, host: FusedOptimizer) -> None:
        self.states = host.states  # for checkpoints
        me = weakref.ref(self)
        self._mirror = Mirror(host, self._new_link, partial(_watch, me))
        self._is_last = True  # whether the gradients of this backward pass are copied as they are finished
        self._lock = threading.Lock()  # several devices have several backward threads

    @property
    def state(self) -> Any:
        """The state of each parameter, on the host; a mapping of dicts as in torch. It may be modified."""
        return Entries(self._mirror)

    @state.setter
    def state(self, value: Any) -> None:
        self._mirror.host.state = defaultdict(dict)
        self.state.update(value)

    # Gradients ----------------------------------------------------------------------------

    def last_micro_batch(self, is_last: bool = True) -> AbstractContextManager[Any]:
        """Say whether the next backward passes are the last ones before the step.

        False: they copy no gradient, which saves the traffic; results are the same. True, the default: each
        copies its gradients as they are finished. Takes effect at once; at the end of a ``with`` block the
        previous value returns, and after each step True::

            for index, batch in enumerate(micro_batches):
                with optimizer.last_micro_batch(index == len(micro_batches) - 1):
                    loss(model, batch).backward()
        """
        stack = ExitStack()
        stack.callback(setattr, self, "_is_last", self._is_last)
        self._is_last = flag("[Offloaded.last_micro_batch]", "is_last", is_last)
        return stack

    def reload_weights(self) -> None:
        """Copy all weights from the device in the next step: after writes through ``.data``, which change no
        version counter."""
        for twin in self._mirror.twins.values():
            twin.seen = None

    def _arrive(self, param: Tensor) -> None:
        twin = self._mirror.twins.get(param)
        # DistributedDataParallel reduces plain gradients after this hook, without a version counter.
        is_final = is_dtensor(param) or not is_distributed()
        if twin is None or not self._is_last or not is_final or _is_capturing(param):
            return
        with self._lock:
            if twin.bucket is None:
                self._mirror.place(())
            bucket = twin.bucket
            if bucket is None or not bucket.arrive(twin):
                return
            grads = [twin.param.grad for twin in bucket.twins]
            if all(map(_can_fetch, bucket.twins, grads)):  # else the step does, or raises
                bucket.fetch(grads)

    # The step -----------------------------------------------------------------------------

    def _gradient_table(self, versioned: bool) -> None:
        """Return None: a scaler checks the gradients on the device, one by one."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, on the host; returns the result of ``closure``.

        Args:
            closure: reevaluates the model and returns the loss, with gradients enabled.
        Raises: ValueError naming group and parameter, before anything is updated. RuntimeError during CUDA
            graph capture.
        Cost: the host waits for the gradients, and with a scaler for its flag, 12 bytes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            self._step()
        end_step(self)
        return loss

    _fusedamp_step = step  # the scaler compares it with ``step`` to detect overrides

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _step(self) -> None:
        begin_step(self)
        host = self._mirror.host
        self._mirror.match(self.param_groups)
        try:
            grads = self._gradients()
            self._fetch(grads)
            inputs = self._inputs(grads)
            skips = inputs.found_inf is not None and bool(inputs.found_inf != 0)
            host._amp = AmpInputs({_HOST: inputs}, host)
            host._in_parts = partial(self._in_buckets, skips=skips)
            host._step()
        finally:
            host._amp = host._in_parts = None
            self._is_last = True
            for bucket in self._mirror.buckets:
                if bucket.stored is not None:
                    bucket.link.follow(bucket.stored)
                bucket.forget()
        for group, other in zip(self.param_groups, host.param_groups, strict=True):
            group["rounding_seed"] = other["rounding_seed"]  # it is set when an option starts to need it

    def _gradients(self) -> dict[Twin, Tensor]:
        """Return all gradients, checked; replaces those whose placements differ from their parameter's."""
        found = {}
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                twin = self._mirror.twins[param]
                twin.home.main_grad = None
                if (grad := gradient_of(param)) is not None:
                    with at(f"[Offloaded] group {g}: params[{i}]"):
                        found[twin] = self._checked(twin, grad, group)
        return found

    def _checked(self, twin: Twin, grad: Tensor, group: Group) -> Tensor:
        param, source = twin.param, local(twin.param)
        if _is_capturing(param):
            raise RuntimeError(
                "[Offloaded.step] a CUDA graph is being captured; expected none, as the host's update cannot "
                "be part of a graph. Capture forward and backward only, and call step() after the replay."
            )
        if twin.bucket is None or twin.has_moved():
            check_place(source)
        if source is not param or is_flattened(param):
            # Its twin is a plain tensor, which the host's optimizer would accept.
            host = self._mirror.host
            host._states_of(param, group)
            if host._is_joint(param, group) or (split_over(param) and group["state_dtype"] == "int8"):
                raise ValueError(
                    f"is a DTensor of shape {list(param.shape)}, for {type(host).__name__} with state_dtype "
                    f"{group['state_dtype']!r}; expected a rule for elements without 8-bit states, as the "
                    "host has the shard alone. Use AdamW with BF16 states, or leave Offloaded out."
                )
        if grad.layout is not torch.strided:
            grad = self._mirror.host._densified(grad)
        if grad.shape != param.shape or local(grad).device != source.device:
            raise ValueError(
                f"has a gradient of shape {list(grad.shape)} on {grad.device}; expected {list(param.shape)} "
                f"on {source.device}, like the parameter. Use a view of that shape, there."
            )
        return placed_like(grad, param) if source is not param or local(grad) is not grad else grad

    def _fetch(self, grads: dict[Twin, Tensor]) -> None:
        """Queue the copies of gradients that the backward pass has not copied; wait for modified weights."""
        self._mirror.place(grads)
        self._mirror.check_aliasing()
        readings = []
        for bucket in self._mirror.buckets:
            here = [grads.get(twin) for twin in bucket.twins]
            present = [twin for twin in bucket.twins if twin in grads]
            if not present:
                continue
            if not bucket.has(here):
                bucket.fetch(here)
            if modified := {twin for twin in present if not twin.is_current()}:
                readings.append(bucket.read_weights(modified))
            for index, twin in enumerate(bucket.twins):
                # Not .grad, which must have the weight's dtype.
                twin.home.main_grad = bucket.gradient(index) if twin in grads else None
        for reading in readings:  # a first step makes the masters of them
            reading.wait()

    def _inputs(self, grads: Iterable[Twin]) -> DeviceInputs:
        """Return what a scaler passed to this step, on the host. All devices have the same values."""
        devices = dict.fromkeys(local(twin.param).device for twin in grads)
        inputs = [inputs_on(self, device) for device in devices]
        here = inputs[0] if inputs else DeviceInputs()
        given = [value for value in (here.inv_scale, here.clip_coef, here.found_inf) if value is not None]
        if not given:
            return here
        values = iter(torch.stack([value.reshape(()) for value in given]).to(_HOST))  # all are FP32
        return DeviceInputs(
            inv_scale=None if here.inv_scale is None else next(values),
            clip_coef=None if here.clip_coef is None else next(values),
            found_inf=None if here.found_inf is None else next(values),
        )

    def _in_buckets(self, batches: list[Batch], skips: bool) -> Iterator[Batch]:
        """Yield the calls of each bucket when it has arrived, and send its weights back after them."""
        calls: dict[Bucket, dict[int, Batch]] = {}
        for index, batch in enumerate(batches):
            for slot, grad in zip(batch.slots, batch.grads, strict=True):
                bucket = self._mirror.by_home[slot.param].bucket
                assert bucket is not None
                parts = calls.setdefault(bucket, {})
                if index not in parts:
                    parts[index] = replace(batch, slots=[], grads=[])
                parts[index].slots.append(slot)
                parts[index].grads.append(grad)
        for bucket in self._mirror.buckets:
            if bucket in calls:
                bucket.land()
                mine = list(calls[bucket].values())
                yield from mine
                if not skips:
                    bucket.store({self._mirror.by_home[slot.param] for part in mine for slot in part.slots})

    # Groups and checkpoints ---------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group as in torch; checks the options, and raises for a repeated parameter (torch warns)."""
        if isinstance(param_group, dict) and not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = params = list(param_group["params"])
            where = f"[Offloaded] group {len(self.param_groups)}:"
            check_distinct(where, [p[1] if isinstance(p, tuple) else p for p in params])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._mirror.match(self.param_groups[:-1])  # their options may have changed since the last step
        try:
            homes = self._mirror.homes(group["params"])
            self._mirror.host.add_param_group({**group, "params": homes})
        except BaseException:
            self.param_groups.pop()
            self._mirror.drop_unused()
            raise
        self._mirror.take_options(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of ``optimizer_class``, with tensors on the host; those of a DTensor's state
        are DTensors of its mesh. No tensor is copied."""
        hook = self.register_state_dict_post_hook(place_states, prepend=True)
        try:
            with checkpoint.plainly(self):
                return super().state_dict()
        finally:
            hook.remove()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict()`` as ``optimizer_class`` does, of that class, of this one or of torch's;
        copies, to the host.

        Raises: ValueError naming the invalid state, before anything is loaded.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._mirror.match(self.param_groups)
        self._mirror.host.load_state_dict(shards_of(self.param_groups, state_dict))
        self._mirror.take_options(self.param_groups)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "optimizer_class": type(self._mirror.host),
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "state": dict(self.state),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        host = state["optimizer_class"].__new__(state["optimizer_class"])
        host.__setstate__(
            {"defaults": dict(state["defaults"]), "state": defaultdict(dict), "param_groups": []}
        )
        self._start(host)
        super().__setstate__({name: state[name] for name in ("defaults", "param_groups")})
        self._mirror.match(self.param_groups)
        self.state = state["state"]


def _check_class(optimizer_class: Any) -> None:
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, FusedOptimizer)):
        raise TypeError(
            f"[Offloaded] optimizer_class is {optimizer_class!r}; expected a class of fusedamp.optim. Pass "
            "the class first, then the parameters: Offloaded(fusedamp.optim.AdamW, model.parameters())."
        )
    if overrides_step(optimizer_class):
        raise TypeError(
            f"[Offloaded] optimizer_class {optimizer_class.__name__} overrides step; expected the step of "
            "fusedamp.optim, whose calls are made bucket by bucket. Override step in a subclass of Offloaded."
        )


def _watch(optimizer: weakref.ref[Offloaded], param: Tensor) -> Any:
    """Call ``_arrive`` when a backward pass has finished the gradient of ``param``."""
    if not param.requires_grad:
        return None

    def hook(param: Tensor) -> None:
        if (alive := optimizer()) is not None:
            alive._arrive(param)

    return param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _is_capturing(param: Tensor) -> bool:
    return param.is_cuda and torch.cuda.is_current_stream_capturing()


def _can_fetch(twin: Twin, grad: Tensor | None) -> bool:
    """True if ``grad`` can be copied within the backward pass: it is final and needs no conversion."""
    param = twin.param
    if twin.has_moved():
        return False
    if grad is None:  # a main_grad is written without a version counter, by later backward passes too
        return gradient_of(param) is None
    return (
        grad.layout is torch.strided
        and grad.shape == param.shape
        and local(grad).device == local(param).device
        and getattr(grad, "placements", None) == getattr(param, "placements", None)
    )
