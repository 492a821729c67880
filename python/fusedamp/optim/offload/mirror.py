"""An optimizer on the host whose groups and parameters mirror those on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ...tensors.shards import local
from ..core.batch import Group
from ..core.optimizer import FusedOptimizer
from ..core.params import check_aliasing, check_place
from .buckets import Bucket, Twin, fill
from .link import Link


class Mirror:
    """``host``, an optimizer without groups so far, and the twin of each parameter that it gets.

    ``watch`` is called with each new parameter, and returns a handle with ``remove``, or None.
    """

    def __init__(
        self,
        host: FusedOptimizer,
        new_link: Callable[[torch.device], Link],
        watch: Callable[[Tensor], Any],
    ) -> None:
        self.host, self._new_link, self._watch = host, new_link, watch
        self.twins: dict[Tensor, Twin] = {}
        self.by_home: dict[Tensor, Twin] = {}
        self.buckets: list[Bucket] = []
        self._links: dict[torch.device, Link] = {}
        self._unchecked = True  # whether parameters got memory since the last aliasing check

    def homes(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Return the host's parameters of ``params``, new ones if necessary."""
        homes = []
        for param in params:
            if (twin := self.twins.get(param)) is None:
                twin = self.twins[param] = Twin(param, self._watch(param))
                self.by_home[twin.home] = twin
            homes.append(twin.home)
        return homes

    def match(self, groups: list[Group]) -> None:
        """Make the host's groups those of the device, which a program may have changed."""
        others = self.host.param_groups
        homes = [self.homes(group["params"]) for group in groups]
        if [list(map(id, some)) for some in homes] != [list(map(id, other["params"])) for other in others]:
            others[:] = [{"params": some} for some in homes]
            self.host._forget()
            self.drop_unused()
        for group, other in zip(groups, others, strict=True):
            for name in other.keys() - group.keys():
                del other[name]
            other.update((name, value) for name, value in group.items() if name != "params")

    def drop_unused(self) -> None:
        """Drop twins of parameters that left the groups and have no state."""
        used = {id(home) for other in self.host.param_groups for home in other["params"]}
        used |= set(map(id, vars(self.host)["state"]))
        for twin in [twin for twin in self.twins.values() if id(twin.home) not in used]:
            del self.twins[twin.param], self.by_home[twin.home]
            if twin.handle is not None:
                twin.handle.remove()
            if twin.bucket is not None:
                self._empty()

    def take_options(self, groups: list[Group]) -> None:
        """Make the options of ``groups`` those of the host's groups."""
        for group, other in zip(groups, self.host.param_groups, strict=True):
            options = {**other, "params": group["params"]}
            group.clear()
            group.update(options)

    def place(self, needed: Iterable[Twin]) -> None:
        """Give memory on the host to the parameters in ``needed``, and to all that may get a gradient."""
        needed = set(needed)
        if any(twin.bucket is not None and twin.has_moved() for twin in needed):
            self._empty()
        new = [t for t in self.twins.values() if t.bucket is None and (t in needed or _may_train(t.param))]
        if new:
            # Gradients are finished in about the reverse order of the parameters.
            self.buckets += fill(reversed(new), self._link)
            self._unchecked = True

    def _empty(self) -> None:
        self.buckets = []
        for twin in self.twins.values():
            twin.bucket = None

    def check_aliasing(self) -> None:
        """Raise if two parameters with memory on the host share memory on the device."""
        if self._unchecked:
            placed = [local(twin.param) for bucket in self.buckets for twin in bucket.twins]
            check_aliasing("[Offloaded]", placed)
            self._unchecked = False

    def _link(self, device: torch.device) -> Link:
        if device not in self._links:
            self._links[device] = self._new_link(device)
        return self._links[device]


def _may_train(param: Tensor) -> bool:
    """True if ``param`` can have memory before its first gradient."""
    try:
        check_place(local(param))
    except ValueError:
        return False  # the step raises it if there is a gradient
    return param.requires_grad
