"""Records: derived figures against NumPy on the gradients themselves, edge cases, refusals."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from fusedamp.numerics import bins
from fusedamp.numerics.record import SUMMARY, Record, percent
from gradient_records import histogram, record, run


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def gradients(seed=0):
    """FP16 values of all binades, signs and zeros; sizes that are odd, one, and none."""
    random = np.random.default_rng(seed)
    wide = [np.exp2(random.uniform(-30, 16, size)) * random.choice((-1, 0, 1), size) for size in (1001, 1, 7)]
    return [g.astype(np.float16).astype(np.float64) for g in (*wide, np.zeros(5), np.zeros((0, 3)))]


def test_edges():
    edges = bins.bin_edges()
    assert edges.dtype == torch.float64
    assert edges.shape == (64,)
    assert edges[:3].tolist() == [0, 0, 2.0**-40]
    assert edges[61:].tolist() == [2.0**19, 2.0**20, math.inf]
    assert all(edges[bins.bin_of(e)] == 2.0**e for e in range(-40, 21))


def test_edges_bound_their_bins():
    """A value at an edge is in its bin, and the one below it in the bin before."""
    edges = bins.bin_edges().numpy()
    for i in range(2, 63):
        assert histogram([edges[i]])[i] == 1
        assert histogram([np.nextafter(edges[i], 0)])[i - 1] == 1
    assert histogram([0.0, -0.0])[0] == 2
    assert histogram([5e-324])[1] == 1
    assert histogram([np.inf, -np.inf, np.nan])[63] == 3


def test_edges_with_a_default_device():
    with torch.device("meta"):
        assert bins.bin_edges().device.type == "cpu"


def test_shares_equal_numpys():
    scale, stored = 2.0**3, gradients()
    r = record([s / scale for s in stored], scale=scale)
    for i, s in enumerate(np.abs(g.reshape(-1)) for g in stored):
        assert r.zeros[i] == (np.mean(s == 0) if s.size else 0)
        assert r.subnormal[i] == (np.mean((s > 0) & (s < 2.0**-14)) if s.size else 0)
        for exponent in (-40, -25, -14, 0, 20):
            nonzero = s[s != 0]
            assert r.below(exponent)[i] == (np.mean(nonzero < 2.0**exponent) if nonzero.size else 0)
        expected = math.log2(65504 / s.max()) if s.size and s.max() else math.inf
        assert r.headroom_bits[i].item() == pytest.approx(expected, abs=1e-13)
    assert r.overflows.tolist() == [0] * 5


def test_summary_is_of_all_elements():
    stored = gradients()
    r = record(
        stored, updates=[(10, 5, 3.0, 30.0), (0, 0, 0.0, 1.0), (7, 7, 4.0, 40.0), (0, 0, 0, 0), (0, 0, 0, 0)]
    )
    every = np.abs(np.concatenate([g.reshape(-1) for g in stored]))
    found = r.summary()
    assert tuple(found) == SUMMARY
    assert all(type(value) is float for value in found.values())
    assert found["zeros_percent"] == pytest.approx(100 * np.mean(every == 0), rel=1e-15)
    assert found["subnormal_percent"] == pytest.approx(
        100 * np.mean((every > 0) & (every < 2.0**-14)), rel=1e-15
    )
    assert found["headroom_bits"] == pytest.approx(math.log2(65504 / every.max()), abs=1e-13)
    assert found["lost_updates_percent"] == pytest.approx(100 * 12 / 17, rel=1e-15)
    assert found["update_ratio"] == pytest.approx(5 / math.sqrt(2501), rel=1e-15)
    assert r.lost_updates.tolist() == [0.5, 0, 1, 0, 0]
    assert r.update_ratio.tolist() == [0.1, 0, 0.1, 0, 0]


def test_weights_of_zero_that_moved():
    r = record([np.ones(3)], updates=[(3, 0, 2.0, 0.0)])
    assert r.update_ratio.tolist() == [math.inf]
    assert r.summary()["update_ratio"] == math.inf


def test_no_parameters():
    r = record([])
    assert r.summary() == dict(zip(SUMMARY, (1.0, 0.0, math.inf, 0.0, 0.0), strict=False))
    assert r.zeros.shape == r.headroom_bits.shape == r.below(0).shape == (0,)
    assert str(r) == "step 1: scale 1, 0 % zeros, 0 % subnormal"
    assert record([], updates=[]).summary()["update_ratio"] == 0


def test_all_zero():
    r = record([np.zeros(4)], updates=[(0, 0, 0.0, 0.0)])
    assert r.headroom_bits.tolist() == [math.inf]
    assert r.zeros.tolist() == [1]
    assert r.below(-25).tolist() == r.lost_updates.tolist() == r.update_ratio.tolist() == [0]
    assert "headroom" not in str(r)


def test_skipped_with_inf_and_nan():
    r = record([np.ones(4), [1.0, np.inf], [np.nan]], step=50, scale=65536.0, skipped=True)
    assert r.overflows.tolist() == [4, 2, 1], "1 times the scale overflows, too"
    assert r.headroom_bits.tolist() == [-math.inf] * 3
    assert r.moved is r.lost_updates is r.update_ratio is None
    assert set(r.summary()) == set(SUMMARY[:5])
    assert r.summary()["skipped"] == 1
    assert str(r) == (
        "step 50: skipped, inf or NaN in layer0.weight and 2 more, scale 65536, 0 % zeros, 0 % subnormal"
    )


def test_headroom_beyond_the_range_of_quotients():
    """65504 / 5e-324 overflows, and FP64 gradients may exceed FP16's ceiling."""
    r = record([[5e-324], [2.0**1000]], dtype=np.float64)
    assert r.headroom_bits[0].item() == pytest.approx(math.log2(65504) + 1074, abs=1e-12)
    assert r.headroom_bits[1].item() == pytest.approx(math.log2(65504) - 1000, abs=1e-12)


def test_one_line():
    r = record(
        [[0.0, 1.0, 2.0**-15], [8.0]], step=100, scale=1024.0, updates=[(2, 1, 1.0, 100.0), (1, 1, 0, 1.0)]
    )
    expected = "step 100: scale 1024, 25.0 % zeros, 0 % subnormal, headroom 3.0 bits (layer1.weight), "
    assert str(r) == expected + "66.7 % of updates lost without masters, update / weight 1.0e-02"
    assert repr(r) == f"<Record of 2 parameters, {r}>"


def test_a_default_device_changes_nothing():
    r = record(gradients())
    expected = r.summary()
    with torch.device("meta"):
        assert r.summary() == expected


def test_frozen():
    r = record([np.ones(2)])
    with pytest.raises(dataclasses.FrozenInstanceError):
        r.step = 2
    assert r != record([np.ones(2)]), "compared by identity: tensors have no single truth"


def test_runs_are_made():
    """What other tests draw and print."""
    for kind in ("healthy", "overflow", "underflow", "bf16"):
        records, trajectory = run(kind)
        assert len(records) == 12
        assert trajectory.shape == (600, 4)
        assert any(r.skipped for r in records) == (kind == "overflow")


LONG, DOUBLE = torch.int64, torch.float64


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"step": 0}, ValueError, "step is 0; expected a whole number from 1"),
        ({"step": "1"}, TypeError, "step is '1'"),
        ({"scale": -1.0}, ValueError, "scale is -1.0; expected a finite number from 0"),
        ({"scale": math.nan}, ValueError, "scale is nan"),
        ({"scale": math.inf}, ValueError, "scale is inf"),
        ({"skipped": 1}, TypeError, "skipped is 1; expected True or False"),
        ({"skipped": True}, ValueError, "a skipped step updates nothing"),
        ({"names": ["a", "b"]}, TypeError, "names is a list; expected a tuple"),
        ({"names": ("a",)}, ValueError, r"numel is torch.int64 \[2\] on cpu; expected torch.int64 \[1\]"),
        ({"numel": None}, TypeError, "numel is a NoneType; expected a tensor"),
        ({"numel": [3, 3]}, TypeError, "numel is a list; expected a tensor"),
        (
            {"numel": torch.tensor([3, 4])},
            ValueError,
            r"histogram\[1\] is of 3 elements; expected numel\[1\], 4",
        ),
        ({"histogram": torch.zeros(2, 63, dtype=LONG)}, ValueError, r"histogram is torch.int64 \[2, 63\]"),
        ({"histogram": torch.zeros(2, 64)}, ValueError, "histogram is torch.float32"),
        ({"largest": torch.zeros(2)}, ValueError, "largest is torch.float32"),
        ({"norm": torch.zeros(2, dtype=DOUBLE, device="meta")}, ValueError, "on meta; expected"),
        ({"moved": None}, ValueError, "moved is None; expected all of moved, lost"),
        (
            {"lost": torch.tensor([1, 3])},
            ValueError,
            r"lost\[1\] is 3; expected a number from 0 to moved\[1\], 2",
        ),
        ({"lost": torch.tensor([-1, 0])}, ValueError, r"lost\[0\] is -1"),
        ({"update_norm": torch.zeros(3, dtype=DOUBLE)}, ValueError, r"update_norm is torch.float64 \[3\]"),
    ],
)
def test_refusals(change, error, words):
    r = record([np.ones(3), np.ones(3)], updates=[(2, 1, 1.0, 1.0)] * 2)
    with pytest.raises(error, match=words):
        dataclasses.replace(r, **change)


def test_negative_counts_are_refused():
    r = record([np.ones(3)])
    counts = r.histogram.clone()
    counts[0, 5], counts[0, 6] = 1, -1
    with pytest.raises(ValueError, match=r"histogram\[0\]"):
        dataclasses.replace(r, histogram=counts)


@pytest.mark.parametrize("exponent", [-41, 21, 0.5, "2"])
def test_below_refuses(exponent):
    with pytest.raises((TypeError, ValueError), match=r"\[Record.below\] exponent is"):
        record([np.ones(1)]).below(exponent)


def test_fields():
    assert [f.name for f in dataclasses.fields(Record)][:4] == ["step", "scale", "skipped", "names"]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0"),
        (1e-9, "<.01"),
        (0.0001, "0.01"),
        (0.09994, "9.99"),
        (0.09999, "10.0"),
        (0.5, "50.0"),
        (0.9999, ">99"),
        (1.0, "100"),
        (None, ""),
        (math.nan, ""),
    ],
)
def test_percent(share, text):
    assert percent(share) == text
