"""Memory: guard elements around every buffer, every misalignment, and every dense order of dimensions."""

import pytest
import torch
from fusedamp import ops
from on_device import DEVICE, SUMS
from op_calls import BORDERS, DTYPES, HALVES, VARIANTS, StepCall, guarded, same_bits, scalar, step_call
from test_ops_stats import CHUNK_ROUNDINGS

CHANNELS_LAST = dict(shape=(3, 5, 4, 7), change=lambda t: t.contiguous(memory_format=torch.channels_last))
LAYOUTS = {
    "channels_last": CHANNELS_LAST,
    "channels_last_3d": dict(
        shape=(2, 3, 4, 5, 3), change=lambda t: t.contiguous(memory_format=torch.channels_last_3d)
    ),
    "transposed": dict(shape=(37, 41), change=lambda t: t.t().contiguous().t()),
    "permuted": dict(shape=(6, 11, 13), change=lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
    "ones": dict(shape=(1, 9, 1), change=lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0)),
}


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("variant", VARIANTS)
def test_misaligned_steps_touch_only_their_elements(variant, offset):
    """Views 0 to 7 elements off alignment: the same bits as aligned tensors, and nothing around them is
    written."""
    shapes = [(n,) for n in BORDERS if n < 2000] + [(), (0,)]
    for dtypes, masters in ((DTYPES, False), (HALVES, True)):
        aligned = step_call(variant, shapes, dtypes, masters=masters)
        intact = []

        def move(t, intact=intact):
            view, guards = guarded(t, (offset + len(intact)) % 8 if offset else 0)
            intact.append(guards)
            return view

        shifted = aligned.map(move, move)
        aligned.run()
        shifted.run()
        written = StepCall.tensors if DEVICE == "cpu" else StepCall.exact_tensors  # sums in another order
        assert all(same_bits(a, b) for a, b in zip(written(aligned), written(shifted), strict=True))
        for a, b in zip(aligned.tensors(), shifted.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=SUMS, atol=SUMS)
        assert all(guards() for guards in intact), "written outside of a tensor"


@pytest.mark.parametrize("offset", range(8))
def test_misaligned_unscale_and_stats(offset):
    """As above; on the CPU the norms of shifted tensors have the same bits too."""
    random = torch.Generator().manual_seed(0)
    aligned = [torch.randn(n, generator=random).to(dtype) for n in (*BORDERS, 0) for dtype in DTYPES]
    shifted, intact = zip(*(guarded(t, offset) for t in aligned), strict=True)
    inv_scale, inv_intact = guarded(scalar(0.3), offset)
    found_inf, found_intact = guarded(scalar(0.0), offset)
    expected, stats = ops.grad_stats(aligned, scalar(0.3)), ops.grad_stats(shifted, inv_scale)
    rounded = 0.0 if DEVICE == "cpu" else CHUNK_ROUNDINGS * 2.0**-24
    for a, b in zip(expected, stats, strict=True):
        torch.testing.assert_close(a, b, rtol=rounded, atol=0.0)
    ops.unscale_(aligned, scalar(0.3), torch.zeros(()))
    ops.unscale_([*shifted, torch.tensor([float("inf")])], inv_scale, found_inf)
    assert found_inf.item() == 1.0
    assert all(same_bits(a, b) for a, b in zip(aligned, shifted, strict=True))
    assert all(guards() for guards in (*intact, inv_intact, found_intact))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_orders_of_dimensions(variant, layout):
    """Element (i, j, ...) of a tensor gets the same bits in whatever order of memory it lies."""
    shape, change = LAYOUTS[layout]["shape"], LAYOUTS[layout]["change"]
    for dtypes, masters in ((DTYPES, False), (HALVES, True)):
        plain = step_call(variant, [shape] * 2, dtypes, masters=masters)
        ordered = plain.map(change)
        before = [t.stride() for t in ordered.tensors()]
        plain.run()
        ordered.run()
        pairs = zip(plain.exact_tensors(), ordered.exact_tensors(), strict=True)
        assert all(same_bits(a, b) for a, b in pairs)
        for a, b in zip(plain.tensors(), ordered.tensors(), strict=True):  # sums in another order
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
        assert [t.stride() for t in ordered.tensors()] == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_orders_of_dimensions_unscale_and_stats(layout):
    shape, change = LAYOUTS[layout]["shape"], LAYOUTS[layout]["change"]
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ordered, found_inf = change(g.clone()), torch.zeros(())
    stats = ops.grad_stats([ordered], scalar(0.5), float("inf"))
    assert stats.total.item() == (g * 0.5).abs().max().item()
    ops.unscale_([ordered], scalar(0.5), found_inf)
    assert torch.equal(ordered, g * 0.5)


def test_sizes_of_one_pair_with_any_stride():
    """The stride of a dimension of size 1 says nothing; torch gives channels_last tensors odd ones."""
    call = step_call("adamw", [(4, 1, 3)], torch.float32)
    expected = call.clone()
    call.grads[0] = call.grads[0].as_strided((4, 1, 3), (3, 17, 1))
    expected.run()
    call.run()
    assert same_bits(call.params[0], expected.params[0])


def test_grads_may_share_memory():
    """Gradients are only read, so two weights may have the same one."""
    call = step_call("sgd", [(600,), (600,)], torch.float32)
    call.grads[1] = call.grads[0]
    expected = call.clone()
    expected.run()
    call.run()
    assert same_bits(call.params[1], expected.params[1])
