"""What is known of the gradients and updates of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.checks import count, number
from .bins import BINS, HIGHEST, LARGEST, LOWEST, NORMAL, NOT_FINITE, TINY, ZERO, bin_of

# The figures of `Record.summary`. The last two are absent without updates.
SUMMARY = (
    "scale",
    "skipped",
    "headroom_bits",
    "zeros_percent",
    "subnormal_percent",
    "lost_updates_percent",
    "update_ratio",
)
COUNTS = ("numel", "histogram", "moved", "lost")  # int64; the other tensors are FP64
UPDATES = ("moved", "lost", "update_norm", "weight_norm")  # None without updates


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Record:
    """Counts and norms of one step, for the n parameters that had a gradient. All tensors are on the CPU.

    Gradients count as they are stored, multiplied by ``scale``; only ``norm`` is of unscaled gradients. A
    zero may be an underflow, or a unit that does nothing: a record cannot tell. Where the scale changes
    between two records, the jump in ``zeros`` is underflow.

    Without updates ``moved``, ``lost``, ``update_norm`` and ``weight_norm`` are None: if the step was
    skipped, or if the optimizer does not count them.

    Raises: TypeError or ValueError, naming the field, if a type, shape, dtype or device differs, if a
    histogram does not add up to ``numel``, or if more updates are lost than moved.
    """

    step: int  #: counted from 1, as in ``overflow_report()``
    scale: float  #: the loss scale
    skipped: bool  #: whether the step was skipped
    names: tuple[str, ...]  #: n names of parameters
    numel: Tensor  #: int64 ``[n]``: elements
    histogram: Tensor  #: int64 ``[n, 64]``: elements of each bin; see :func:`bin_edges`
    largest: Tensor  #: FP64 ``[n]``: the largest magnitude, scaled; inf if an element is inf or NaN
    norm: Tensor  #: FP64 ``[n]``: unscaled
    moved: Tensor | None = None  #: int64 ``[n]``: elements whose FP32 weight changes
    lost: Tensor | None = None  #: int64 ``[n]``: those that a 16-bit weight without a master would lose
    update_norm: Tensor | None = None  #: FP64 ``[n]``: of new minus old weight
    weight_norm: Tensor | None = None  #: FP64 ``[n]``: of the old weight

    def __post_init__(self) -> None:
        count("[Record]", "step", self.step, "which step of the optimizer this is")
        scale = number("[Record]", "scale", self.scale)
        if not 0 <= scale < float("inf"):
            raise ValueError(f"[Record] scale is {scale}; expected a finite number from 0")
        if not isinstance(self.skipped, bool):
            raise TypeError(f"[Record] skipped is {self.skipped!r}; expected True or False")
        if not isinstance(self.names, tuple) or not all(isinstance(name, str) for name in self.names):
            raise TypeError(f"[Record] names is a {type(self.names).__name__}; expected a tuple of texts")
        n = len(self.names)
        shapes = {"numel": (n,), "histogram": (n, BINS), "largest": (n,), "norm": (n,)}
        absent = [name for name in UPDATES if getattr(self, name) is None]
        if absent and len(absent) < len(UPDATES):
            raise ValueError(f"[Record] {absent[0]} is None; expected all of {', '.join(UPDATES)}, or none")
        if self.skipped and not absent:
            raise ValueError("[Record] moved is a tensor; expected None, as a skipped step updates nothing")
        for name, shape in (shapes if absent else shapes | dict.fromkeys(UPDATES, (n,))).items():
            dtype = torch.int64 if name in COUNTS else torch.float64
            _check(name, getattr(self, name), shape, dtype)
        self._check_sums()

    def _check_sums(self) -> None:
        wrong = (self.histogram < 0).any(1) | (self.histogram.sum(1) != self.numel)
        for i in wrong.nonzero().flatten().tolist():
            got, numel = self.histogram[i].sum().item(), self.numel[i].item()
            raise ValueError(f"[Record] histogram[{i}] is of {got} elements; expected numel[{i}], {numel}")
        if self.moved is not None and self.lost is not None:
            wrong = (self.lost < 0) | (self.lost > self.moved)
            for i in wrong.nonzero().flatten().tolist():
                got, most = self.lost[i].item(), self.moved[i].item()
                raise ValueError(
                    f"[Record] lost[{i}] is {got}; expected a number from 0 to moved[{i}], {most}"
                )

    @property
    def overflows(self) -> Tensor:
        """int64 ``[n]``: elements that are inf or NaN."""
        return self.histogram[:, NOT_FINITE]

    @property
    def zeros(self) -> Tensor:
        """FP64 ``[n]``: the share of elements that are ±0; 0 for a parameter without elements."""
        return share(self.histogram[:, ZERO], self.numel)

    @property
    def subnormal(self) -> Tensor:
        """FP64 ``[n]``: the share of elements that are not 0 and below 2^-14, FP16's least normal number, for
        every dtype; 0 for a parameter without elements."""
        return share(self.histogram[:, TINY : bin_of(NORMAL)].sum(1), self.numel)

    @property
    def headroom_bits(self) -> Tensor:
        """FP64 ``[n]``: log2(65504 / largest), the bits below FP16's ceiling; inf if all elements are 0,
        -inf if one is inf or NaN."""
        return headroom(self.largest)

    @property
    def lost_updates(self) -> Tensor | None:
        """FP64 ``[n]``: lost / moved; 0 where nothing moved. None without updates."""
        return None if self.lost is None or self.moved is None else share(self.lost, self.moved)

    @property
    def update_ratio(self) -> Tensor | None:
        """FP64 ``[n]``: update_norm / weight_norm; 0 where nothing moved, inf where weights were 0 and
        moved. None without updates."""
        if self.update_norm is None or self.weight_norm is None:
            return None
        return share(self.update_norm, self.weight_norm)

    def below(self, exponent: int) -> Tensor:
        """Return the share of non-zero elements whose magnitude is below 2^exponent, FP64 ``[n]``; 0 if there
        are none.

        For FP32 and BF16 gradients, ``below(-25)`` is the share that FP16 would flush to zero.

        Args:
            exponent: a whole number from -40 to 20.
        """
        exponent = count("[Record.below]", "exponent", exponent, "a power of two", LOWEST, HIGHEST)
        small = self.histogram[:, TINY : bin_of(exponent)].sum(1)
        return share(small, self.numel - self.histogram[:, ZERO])

    def summary(self) -> dict[str, float]:
        """Return the figures of all parameters together, as plain numbers.

        ``scale``, ``skipped`` (0 or 1), ``headroom_bits`` (the least), ``zeros_percent``,
        ``subnormal_percent`` (of all elements), and with updates ``lost_updates_percent`` (of all that
        moved) and ``update_ratio`` (of the norms over all parameters). Without elements headroom is inf,
        and shares are 0.
        """
        numel = self.numel.sum()
        least = min(self.headroom_bits.tolist(), default=math.inf)
        subnormal = self.histogram[:, TINY : bin_of(NORMAL)].sum()
        values = [float(self.scale), float(self.skipped), least]
        values += [100 * share(part, numel).item() for part in (self.histogram[:, ZERO].sum(), subnormal)]
        if self.lost is not None and self.moved is not None:
            values.append(100 * share(self.lost.sum(), self.moved.sum()).item())
        if self.update_norm is not None and self.weight_norm is not None:
            values.append(share(self.update_norm.norm(), self.weight_norm.norm()).item())
        return dict(zip(SUMMARY, values, strict=False))

    def __str__(self) -> str:
        at, found = f"step {self.step}: ", self.summary()
        percents = {name: percent(value / 100) for name, value in found.items() if name.endswith("percent")}
        text = f"scale {self.scale:g}, {percents['zeros_percent']} % zeros"
        text += f", {percents['subnormal_percent']} % subnormal"
        if culprits := [name for name, n in zip(self.names, self.overflows.tolist(), strict=True) if n]:
            more = f" and {len(culprits) - 1} more" if len(culprits) > 1 else ""
            text = f"inf or NaN in {culprits[0]}{more}, {text}"
        elif found["headroom_bits"] < math.inf:
            least = self.names[int(self.headroom_bits.argmin())]
            text += f", headroom {found['headroom_bits']:.1f} bits ({least})"
        if "update_ratio" in found:
            text += f", {percents['lost_updates_percent']} % of updates lost without masters"
            text += f", update / weight {found['update_ratio']:.1e}"
        return at + ("skipped, " if self.skipped else "") + text

    def __repr__(self) -> str:
        return f"<Record of {len(self.names)} parameters, {self}>"


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole in FP64, and 0 for 0 / 0."""
    found = part.double() / whole.double()
    return found.masked_fill((part == 0) & (whole == 0), 0.0)


def headroom(largest: Tensor) -> Tensor:
    """Return log2(65504 / largest); inf for 0, -inf for inf. The quotient itself may overflow."""
    return math.log2(LARGEST) - largest.log2()


def percent(part: float | None) -> str:
    """Return a share in percent, in at most 4 characters. Only 0 is shown as 0, and only all as 100."""
    if part is None or math.isnan(part):
        return ""
    value = 100 * part
    if value in (0, 100):
        return f"{value:.0f}"
    if value < 0.01:
        return "<.01"
    return ">99" if value > 99.9 else f"{value:.2f}" if value < 9.995 else f"{value:.1f}"


def _check(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"[Record] {name} is a {type(value).__name__}; expected a tensor")
    if value.shape != shape or value.dtype != dtype or value.device.type != "cpu":
        got = f"{value.dtype} {list(value.shape)} on {value.device}"
        raise ValueError(f"[Record] {name} is {got}; expected {dtype} {list(shape)} on cpu")
