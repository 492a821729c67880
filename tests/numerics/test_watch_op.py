"""The private op that writes a step into rings: what it writes, and what it refuses."""

import math

import fusedamp  # noqa: F401 - loads the ops
import pytest
import torch
from on_device import DEVICE

LIST = ["clock", "due", "steps", "numbers", "bins", "trajectory", "extremes", "histogram", "squares"]


def arguments(n=3, history=2, length=4):
    def zeros(*shape, dtype=torch.float64):
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    return dict(
        clock=torch.tensor([4, 0], device=DEVICE),
        due=torch.ones((), dtype=torch.int32, device=DEVICE),
        steps=zeros(history, 4),
        numbers=zeros(history, n, 6),
        bins=zeros(history, n, 64, dtype=torch.int64),
        trajectory=zeros(length, 4),
        extremes=torch.arange(3.0 * n, dtype=torch.float64, device=DEVICE).view(n, 3),
        histogram=torch.arange(64 * n, device=DEVICE).view(n, 64),
        squares=torch.arange(1.0, n + 1, dtype=torch.float64, device=DEVICE),
        updates=torch.arange(4.0 * n, dtype=torch.float64, device=DEVICE).view(n, 4) + 10,
        scale=torch.full((), 8.0, device=DEVICE),
        found_inf=torch.zeros((), device=DEVICE),
        every=2,
    )


def record(given):
    given = dict(given)
    torch.ops.fusedamp._record_(*[given.pop(name) for name in LIST], **given)


@pytest.mark.parametrize("skipped", [0.0, 1.0, math.nan])
@pytest.mark.parametrize("advance", [True, False])
def test_a_due_step(skipped, advance):
    given = arguments()
    given["found_inf"].fill_(skipped)
    record(given | {"advance": advance})
    bad = float(skipped != 0)
    slot = 4 // 2 % 2
    assert given["trajectory"][3].tolist() == [4, 8, bad, 6]
    assert given["steps"][slot].tolist() == [4, 8, bad, 1 - bad]
    assert torch.equal(given["bins"][slot], given["histogram"])
    for i, row in enumerate(given["numbers"][slot].tolist()):
        updates = [0.0] * 4 if bad else given["updates"][i].tolist()
        assert row == [given["extremes"][i, 0].item(), given["squares"][i].item(), *updates]
    for name in ("steps", "numbers", "bins"):
        assert not given[name][1 - slot].any()
    assert given["clock"].tolist() == [4 + advance, 0]
    assert given["due"].item() == (0 if advance else 1)


def test_a_step_that_is_not_due_writes_the_trajectory_alone():
    for only_due, largest in ((False, 6.0), (True, math.nan)):
        given = arguments()
        given["due"].zero_()
        given["clock"][0] = 5
        record(given | {"only_due": only_due, "scale": None, "found_inf": None, "updates": None})
        row = given["trajectory"][0].tolist()
        assert row[:3] == [5, 1, 0]
        assert row[3] == largest or math.isnan(largest)
        assert math.isnan(row[3]) == only_due
        assert not any(given[name].any() for name in ("steps", "numbers", "bins"))
        assert given["clock"][0] == 6
        assert given["due"] == 1


def test_without_tensors_it_only_counts():
    given = arguments(n=0) | {"updates": None}
    record(given)
    assert given["steps"][0].tolist() == [4, 8, 0, 0]
    assert given["trajectory"][3].tolist() == [4, 8, 0, 0]
    assert given["clock"][0] == 5
    record(arguments() | {"trajectory": None})


WRONG = {
    "clock": (lambda t: t[:1], r"clock is int64 of shape \[1\]; expected contiguous int64 \[2\]"),
    "due": (lambda t: t.long(), r"due is int64 of shape \[\]; expected contiguous int32 \[\]"),
    "steps": (
        lambda t: t[:, :3],
        r"steps is float64 of shape \[2, 3\]; expected contiguous float64 \[2, 4\]",
    ),
    "numbers": (
        lambda t: t[:1],
        r"numbers is float64 of shape \[1, 3, 6\]; expected contiguous float64 \[2, 3, 6\]",
    ),
    "bins": (
        lambda t: t.int(),
        r"bins is int32 of shape \[2, 3, 64\]; expected contiguous int64 \[2, 3, 64\]",
    ),
    "trajectory": (
        lambda t: t.T,
        r"trajectory is float64 of shape \[4, 4\]; expected contiguous float64 \[4, 4\]",
    ),
    "extremes": (lambda t: t.float(), r"extremes is float32 of shape \[3, 3\]; expected contiguous float64"),
    "histogram": (
        lambda t: t[:2],
        r"histogram is int64 of shape \[2, 64\]; expected contiguous int64 \[3, 64\]",
    ),
    "squares": (
        lambda t: t[:, None],
        r"squares is float64 of shape \[3, 1\]; expected contiguous float64 \[3\]",
    ),
    "updates": (
        lambda t: t[:, :3],
        r"updates is float64 of shape \[3, 3\]; expected contiguous float64 \[3, 4\]",
    ),
    "scale": (lambda t: t.double(), r"scale is float64 of shape \[\]; expected one float32 element"),
    "found_inf": (
        lambda t: t.repeat(2),
        r"found_inf is float32 of shape \[2\]; expected one float32 element",
    ),
    "every": (lambda n: 0, r"every is 0 and steps has 2 rows; expected 1 or more"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused_and_changes_nothing(name):
    spoil, message = WRONG[name]
    given = arguments()
    before = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(RuntimeError, match=rf"\[_record_\] {message}"):
        record(given | {name: spoil(given[name])})
    with pytest.raises(RuntimeError, match=r"shares memory"):
        record(given | {"squares": given["steps"].view(-1)[:3]})
    assert all(torch.equal(given[k], v) for k, v in before.items())
