"""Base class of all fused optimizers: the step over groups and devices, state, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ... import ops
from ...ops.checks import at
from ...ops.inputs import AmpInputs, GradientTable, begin_step, end_step, inputs_on
from ...tensors.layout import gradient_of, round_robin
from ...tensors.shards import local
from ..state import checkpoint, formats
from ..state.formats import Storage, name_dtypes
from ..state.saved import Entry, taken_from_checkpoint
from ..state.spec import State, StateSpec, complete, completing, resolved
from .batch import Batch, Group
from .options import Bounds, SeenOptions, check_common, draws, is_compressed, seeds
from .params import check_aliasing, check_distinct, check_dtype, check_place
from .plan import Plan
from .slot import Mode, Slot


class FusedOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose step is one op call per group and device.

    The gradient of a parameter is ``param.grad``, or, if that is None, ``param.main_grad`` (an FP32 buffer
    that some trainers accumulate into and zero themselves). Its dtype may differ. It is never modified.

    State is created at the first step: ``step`` (FP32, 0-d), the states of the algorithm and, for 16-bit
    parameters, ``master``; in FP32 (FP64 for FP64 parameters), in the parameter's layout and placement.

    With fusedamp's scaler, gradients are scaled inside ``step``, but not for step pre-hooks, wrappers or an
    overridden ``step``. ``step`` reads the attributes ``found_inf`` and ``grad_scale`` as torch's fused
    optimizers do.
    """

    _fusedamp_fused = True  # fusedamp.GradScaler uses its fused step
    _amp: AmpInputs | None = None  # set by the scaler around one step
    op: str  # the step op, if it does not depend on options
    hyper: tuple[str, ...] = ()  # options that are the op's hyper-parameters, in order; pairs count as two
    bounds: dict[str, Bounds] = {}  # of options that not all optimizers have
    states: tuple[StateSpec, ...] = ()  # all possible states, in the op's order
    can_compress: bool = True  # whether masters and states may have fewer bits than FP32
    _slots: dict[int, Slot]  # by id of the parameter; cleared when ``state`` is accessed
    _unchecked: bool  # whether slots were created since the last aliasing check
    _stepped: list[Slot]  # of the last step
    _plan: Plan | None = None  # cached op calls of the last step
    _turn: int  # step counter, to detect a parameter that occurs twice
    _accesses: int = 0  # how often ``state`` was accessed
    _own_seed: int | None = None  # of groups without a rounding_seed
    _in_parts: Callable[[list[Batch]], Iterable[Batch]] | None = None  # splits a step into smaller calls
    _chosen = staticmethod(lambda g, group: enumerate(group["params"]))  # what a step steps

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = formats.spelled_out(cls)  # type: ignore[attr-defined]

    def __init__(self, params: ParamsT, defaults: Group, storage: Storage | None = None) -> None:
        self._forget()
        defaults = formats.with_storage(type(self).__name__, defaults, storage or {})
        self._check_group(f"[{type(self).__name__}]", defaults)
        super().__init__(params, defaults)

    @property
    def state(self) -> Any:
        """A dict of dicts by parameter, as in torch. It may be modified: the next step checks all of it. No
        other references to its tensors are held, so removed tensors are freed."""
        own = vars(self)
        if "state" not in own:  # a wrapper that forwards missing attributes needs this error
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'state'")
        self._count_access()
        return own["state"]

    @state.setter
    def state(self, value: Any) -> None:
        self._count_access()
        vars(self)["state"] = value

    def _count_access(self) -> None:
        self._accesses += 1
        self._slots, self._stepped = {}, []
        if self._plan is not None:
            self._plan.let_go()

    # What an optimizer defines ------------------------------------------------------------

    def _check_group(self, where: str, group: Group) -> None:
        """Raise if an option of ``group`` is invalid. ``where`` is the prefix of the message."""
        check_common(where, group)
        for name, bounds in self.bounds.items():
            bounds.check(where, name, group[name])
        if is_compressed(group) and not self.can_compress:
            raise ValueError(
                f"{where} master_weights is {group['master_weights']!r}, state_dtype "
                f"{group['state_dtype']!r} and stochastic_rounding {group['stochastic_rounding']}; expected "
                f"FP32 masters and states, the only formats of {type(self).__name__}. Leave them out, or "
                "use fusedamp.optim.AdamW."
            )

    def _op(self, group: Group) -> tuple[str, dict[str, Any]]:
        """Return the step op and its hyper-parameters by name, in its order."""
        hyper = {}
        for name in self.hyper:
            value = group[name]
            if isinstance(value, (tuple, list)):
                hyper[name + "[0]"], hyper[name + "[1]"] = value
            else:
                hyper[name] = value
        return self._op_name(group), hyper

    def _op_name(self, group: Group) -> str:
        return self.op

    def _check_param(self, param: Tensor, group: Group) -> None:
        """Raise if ``param`` is unsupported with the options of ``group``, on any device."""
        check_dtype(param)

    def _check_calls(self, batches: list[Batch]) -> None:
        """Raise any error that a later one of ``batches`` could cause after the first has stepped."""
        if len(batches) > 1:
            ops.check_steps([batch.call() for batch in batches])

    def _launch(self, batches: list[Batch]) -> None:
        """Update the parameters of ``batches``; all errors were raised before."""
        for batch in batches:
            batch.launch(self)

    def _is_joint(self, param: Tensor, group: Group) -> bool:
        """True if the update of ``param`` needs other ranks."""
        return False

    def _takes_part(self, param: Tensor, group: Group) -> bool:
        """True if the step updates ``param``; a missing gradient then counts as zeros."""
        return gradient_of(param) is not None

    def _densified(self, grad: Tensor) -> Tensor:
        raise RuntimeError(
            f"{type(self).__name__} does not support sparse gradients, please consider SparseAdam instead"
        )

    # The step -----------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns the result of ``closure``.

        Args:
            closure: reevaluates the model and returns the loss, with gradients enabled.
        Raises: ValueError naming group and parameter, before anything is updated.  Cost: no host sync.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() or not self._repeat():
            # States must also be usable outside of inference mode.
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
                self._step()
        end_step(self)
        return loss

    _fusedamp_step = step  # the scaler compares it with ``step`` to detect overrides

    def _repeat(self) -> bool:
        """Repeat the last step with new gradients; False if anything else changed."""
        plan, amp = self._plan, self._amp
        if plan is None:
            return False
        checked = amp is not None and amp.table is not None and amp.table is plan.gradients
        if not (checked or plan.matches(self)) or not plan.is_ready(self):
            return False
        begin_step(self)
        plan.step(self)
        return True

    # Compiled callers run it eagerly: a trace would freeze the caches.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _step(self) -> None:
        begin_step(self)
        for g, group in enumerate(self.param_groups):
            if not self._seen.has(g, group):
                name_dtypes(group)
                self._check_group(self._where(g), group)
                self._seed(group)
                self._seen.add(g, group)
        before, self._plan = self._stepped, None
        batches = self._prepare()  # all checks precede any update
        self._check_calls(batches)
        for some in [batches] if self._in_parts is None else ([part] for part in self._in_parts(batches)):
            self._launch(some)
        # Building a plan costs more than a step without one, so the second identical step in a row builds it.
        self._stepped = [slot for batch in batches for slot in batch.slots]
        if before and before == self._stepped and self._in_parts is None:
            self._plan = self._remember(batches)
            if self._plan:  # it replaces them
                self._slots, self._stepped = {}, []

    def _remember(self, batches: list[Batch]) -> Plan | None:
        for batch in batches:
            own = all(slot.param.grad is grad for slot, grad in zip(batch.slots, batch.grads, strict=True))
            if not own or any(slot.target is not slot.param for slot in batch.slots):
                return None
        try:
            return Plan(self, batches)
        except ValueError:  # a tensor that a plan does not support
            return None

    def _gradient_table(self, versioned: bool) -> GradientTable | None:
        """Return the next step's gradients for the scaler; None if it differs from the last step."""
        plan = self._plan
        if plan is None or plan.gradients is None or not plan.matches(self, versioned):
            return None
        return plan.gradients

    def _specs(self, group: Group) -> tuple[StateSpec, ...]:
        """Return the states that ``group`` uses with its current options."""
        return tuple([spec for spec in self.states if spec.when is None or spec.when(group)])

    def _states_of(self, param: Tensor, group: Group) -> list[State]:
        """Return the states that a step needs for ``param``; raises if it cannot be stepped."""
        self._check_param(param, group)
        check_place(local(param))
        return resolved(self._specs(group), param, group, self.defaults)

    def _mode(self, group: Group) -> Mode:
        return Mode(
            self._specs(group),
            self._op_name(group),
            group["master_weights"],
            group["state_dtype"],
            group["stochastic_rounding"],
            group["rounding_seed"],
        )

    def _prepare(self) -> list[Batch]:
        calls: list[Batch] = []
        known, state = self._slots, vars(self)["state"]
        self._turn += 1
        position = 0  # of a group's first parameter in the optimizer; seeds random numbers reproducibly
        for key in [key for key, slot in known.items() if state.get(slot.param) is not slot.entry]:
            del known[key]  # its state was removed or replaced
        round_robin(list(self._missing_states(self._takes_part)))
        for g, group in enumerate(self.param_groups):
            mode = self._mode(group)
            seeds, position = ((mode.rounding_seed or 0) << 32) + position, position + len(group["params"])
            batches: dict[tuple[str, bool], Batch] = {}
            for i, param in self._chosen(g, group):
                if not self._takes_part(param, group):
                    continue
                if (grad := gradient_of(param)) is None:
                    grad = torch.zeros_like(param)
                if grad.shape != param.shape and param.grad is None:
                    raise ValueError(
                        f"{self._where(g)} params[{i}] has a main_grad of shape {list(grad.shape)}; "
                        f"expected {list(param.shape)}, like the parameter. Use a view of that shape."
                    )
                if grad.layout is not torch.strided:
                    grad = self._densified(grad)
                slot = known.get(id(param))
                try:
                    if slot is not None and slot.turn == self._turn:
                        raise ValueError("is in the optimizer twice; expected it once. Remove the second.")
                    if slot is None or not slot.holds(state.get(param), mode):
                        self._unchecked |= slot is None or slot.reusable
                        slot = Slot(param, state[param], mode, self._states_of(param, group))
                        known[id(param)] = slot
                    grad = slot.paired(grad)
                except (ValueError, TypeError) as error:
                    raise type(error)(f"{self._where(g)} params[{i}] {error}") from error
                slot.turn, slot.seed = self._turn, seeds + i
                if (batch := batches.get(slot.key)) is None:
                    batch = batches[slot.key] = Batch(
                        group, mode.names, mode.op, self._scalars(group, [slot.target])
                    )
                    calls.append(batch)
                batch.slots.append(slot)
                batch.grads.append(grad)
        if self._unchecked:
            present = {id(param) for group in self.param_groups for param in group["params"]}
            self._slots = {key: slot for key, slot in known.items() if key in present}
            check_aliasing(f"[{type(self).__name__}]", [slot.source for slot in self._slots.values()])
            self._unchecked = False
        return calls

    def _missing_states(self, wanted: Callable[[Tensor, Group], bool]) -> Iterator[Iterator[None]]:
        """Yield generators that create the missing states of ``wanted`` parameters, one tensor at a time."""
        state = vars(self)["state"]
        for g, group in enumerate(self.param_groups):
            for i, param in self._chosen(g, group):
                if not state.get(param) and wanted(param, group):
                    yield self._making_state(f"{self._where(g)} params[{i}]", group, param, state[param])

    def _making_state(self, where: str, group: Group, param: Tensor, entry: Entry) -> Iterator[None]:
        with at(where):
            yield from completing(param, entry, self._states_of(param, group))

    def _seed(self, group: Group) -> None:
        """Set the seed of ``group`` to this optimizer's if it has none and needs one."""
        if group["rounding_seed"] is None and draws(group):
            if self._own_seed is None:
                self._own_seed = next(seeds) % 2**31
            group["rounding_seed"] = self._own_seed

    def _forget(self) -> None:
        self._slots, self._stepped, self._plan, self._seen = {}, [], None, SeenOptions()
        self._unchecked = True
        self._turn = 0

    def _where(self, index: int) -> str:
        return f"[{type(self).__name__}] group {index}:"

    def _scalars(self, group: Group, params: list[Tensor]) -> dict[str, Any]:
        amp, numbers = inputs_on(self, params[0].device), self._numbers(group, params[0].device)
        return numbers | dict(inv_scale=amp.inv_scale, clip_coef=amp.clip_coef, found_inf=amp.found_inf)

    def _numbers(self, group: Group, device: torch.device) -> dict[str, Any]:
        """Return the arguments of the step op that follow from the options of ``group``."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.device != device:
            lr = lr.to(device)
        op, hyper = self._op(group)
        return ops.step_scalars(
            op, device, lr, hyper, group["maximize"], stochastic_rounding=group["stochastic_rounding"]
        )

    @torch.no_grad()
    def planned_state(self, param: Tensor, group: Group) -> Entry:
        """Return the state that the first step would create for ``param`` with the options of ``group``.

        Tensors are on the meta device; for a DTensor, this rank's shard. Allocates and changes nothing.
        Raises: ValueError if the options or the parameter are invalid.
        """
        meta, entry = torch.empty_like(local(param), device="meta"), Entry()
        where = f"[{type(self).__name__}]"
        name_dtypes(group)
        self._check_group(where, group)
        with at(f"{where} a parameter"):
            self._check_param(meta, group)
            complete(meta, entry, resolved(self._specs(group), meta, group, self.defaults))
        return entry

    # Groups and checkpoints ---------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group as in torch; checks the options, and raises for a repeated parameter (torch warns)."""
        if isinstance(param_group, dict):
            where = self._where(len(self.param_groups))
            name_dtypes(param_group)
            self._check_group(where, {**self.defaults, **param_group})
            params = param_group["params"]
            if not isinstance(params, (Tensor, set)):
                param_group["params"] = params = list(params)
                check_distinct(where, [p[1] if isinstance(p, tuple) else p for p in params])
        super().add_param_group(param_group)
        if not all(param.is_meta for param in self.param_groups[-1]["params"]):  # else it is only an estimate
            self._seed(self.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, with plain tensors and options.

        An 8-bit state is saved as ``exp_avg`` (int8, or uint8 if it is never negative), ``exp_avg_scale``,
        and its size and memory order; a split master's remainder as bytes, ``master`` (uint8, [..., 2]).
        :meth:`load_state_dict` raises if they were cast or resized. No tensor is copied.
        """
        with checkpoint.plainly(self):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict()`` of this class or of its ``torch.optim`` counterpart; copies.

        A missing ``master`` is created from the weights at the next step. Storage options except
        ``rounding_seed`` are not loaded. Options that this optimizer does not have are kept in the group,
        with a warning if they would change its steps.
        Raises: ValueError naming the invalid state, before anything is loaded; for another library's layout
            it names :func:`fusedamp.checkpoints.convert`.
        """
        with checkpoint.converting(self), torch.inference_mode(False):
            super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = list(state.get("defaults", vars(self).get("defaults", ())))  # torch adds "differentiable"
        super().__setstate__(state)
        if "differentiable" not in names:
            self.defaults.pop("differentiable", None)
        name_dtypes(self.defaults)
        self._forget()
        for group in self.param_groups:
            name_dtypes(group)
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        for param, entry in vars(self)["state"].items():
            for spec in self.states if isinstance(entry, dict) else ():
                # From a pickle of a version that stored 8-bit states as several tensors.
                taken_from_checkpoint(entry, spec.name, spec.nonnegative, param)
