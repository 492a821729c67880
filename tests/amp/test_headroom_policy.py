"""GradScaler(policy="headroom"): on every route the scale follows the rule, fed with the largest gradient."""

import random
import warnings

import pytest
import torch
from counted import Loop
from fusedamp import GradScaler, numerics
from headroom_model import INF, exponent_of_quotient, follow, fused, give_gradients, headroom, params_of
from on_device import DEVICE
from torch import nn


def with_a_hook(params):
    optimizer = fused(params)
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


MAKERS = {
    "fused": fused,
    "hook": with_a_hook,
    "torch's": lambda params: torch.optim.AdamW(params, lr=1e-6),
    "torch's fused": lambda params: torch.optim.AdamW(params, lr=1e-6, fused=True),
}
WAYS = {
    "step": lambda scaler, optimizer: None,
    "clip": lambda scaler, optimizer: scaler.clip_grad_norm_(optimizer, 1.0),
    "clip by another norm": lambda scaler, optimizer: scaler.clip_grad_norm_(optimizer, 1.0, INF),
    "clip twice": lambda scaler, optimizer: [scaler.clip_grad_norm_(optimizer, 1.0, p) for p in (2.0, 1.0)],
    "unscale": lambda scaler, optimizer: scaler.unscale_(optimizer),
    "clip and unscale": lambda scaler, optimizer: (
        scaler.clip_grad_norm_(optimizer, 1.0),
        scaler.unscale_(optimizer),
    ),
    "unscale and clip": lambda scaler, optimizer: (
        scaler.unscale_(optimizer),
        scaler.clip_grad_norm_(optimizer, 1.0),
    ),
    "grad_scale by hand": lambda scaler, optimizer: setattr(optimizer, "grad_scale", torch.tensor(4.0)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", MAKERS)
def test_every_route_follows_the_rule(make, way):
    if (way, make) == ("grad_scale by hand", "torch's"):
        pytest.skip("it does not read grad_scale")
    if way == "clip and unscale" and make != "fused":
        pytest.skip("clipping unscales")
    params = params_of()
    scaler, model = follow(headroom(growth_interval=100), [MAKERS[make](params)], params, WAYS[way])
    assert model.state()[0][:4] == scaler._headroom.save()[:4]
    assert list(model.ring) == scaler._headroom.save()[4:]
    assert len(model.ring) > 200


@pytest.mark.parametrize("bits", [0, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, "mixed"], ids=str)
def test_gradients_of_every_dtype(dtype, bits):
    dtypes = [torch.float16, torch.float32, torch.float64] if dtype == "mixed" else [dtype] * 3
    params = params_of(dtypes)
    follow(headroom(headroom_bits=bits), [fused(params)], params, WAYS["step"])


@pytest.mark.parametrize("way", ["step", "clip", "unscale"])
def test_the_largest_of_all_optimizers_counts(way):
    params = params_of()
    makers = (fused, MAKERS["torch's fused"], MAKERS["torch's"])
    optimizers = [make([param]) for make, param in zip(makers, params, strict=True)]
    follow(headroom(), optimizers, params, WAYS[way])


def test_sparse_complex_and_strided_gradients():
    table, wave, image = (
        nn.Parameter(torch.ones(5, 2)),
        nn.Parameter(torch.ones(3, dtype=torch.complex64)),
        nn.Parameter(torch.ones(1, 3, 2, 2).to(memory_format=torch.channels_last)),
    )
    optimizer, scaler = torch.optim.SGD([table, wave, image], lr=0.1), headroom(init_scale=4.0)
    scaler.scale(torch.ones(()))
    # Two parts of one row make 12; only the sum counts.
    table.grad = torch.sparse_coo_tensor([[1, 1]], torch.full((2, 2), 6.0), (5, 2))
    wave.grad, image.grad = torch.full((3,), 3.0 + 9.0j), torch.full_like(image, -2.0)
    scaler.step(optimizer)
    scaler.update()
    assert scaler._headroom.save()[4:] == [1]  # 12 / 4 = 3


def test_zeros_and_missing_gradients_leave_the_scale():
    params = params_of()
    optimizer, scaler = fused(params), headroom(init_scale=1000.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)  # no gradients: nothing is updated
    scaler.update()
    assert (scaler.get_scale(), scaler._headroom.save()) == (1000.0, [0] * 4)
    for param in params[:2]:
        param.grad = torch.zeros_like(param)
    scaler.step(optimizer)
    scaler.update()
    assert (scaler.get_scale(), scaler._headroom.save()) == (512.0, [0, 1, 0, 64])


@pytest.mark.parametrize("make", [fused, MAKERS["torch's fused"]])
def test_gradients_of_an_earlier_step_do_not_count(make):
    params = params_of()
    optimizers, scaler = [make(params[:1]), make(params[1:])], headroom(init_scale=1.0)
    scaler.scale(torch.ones(()))
    for step in range(4):
        params[0].grad = None if step % 2 else torch.full_like(params[0], 8.0 * scaler.get_scale())
        params[1].grad = torch.full_like(params[1], 2.0 * scaler.get_scale())
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    assert scaler._headroom.save()[4:] == [3, 1, 3, 1]


def test_unknown_gradients_are_not_kept():
    """A subclass that unscales by its own means tells flags, but no largest gradient."""

    class Own(GradScaler):
        def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
            torch._foreach_mul_([p.grad for g in optimizer.param_groups for p in g["params"]], inv_scale)
            return {found_inf.device: found_inf}

    params = params_of()
    optimizer, scaler = fused(params), Own(DEVICE, policy="headroom")
    scaler.scale(torch.ones(()))
    give_gradients(random.Random(0), params, scaler.get_scale(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    assert (scaler.get_scale(), scaler._headroom.save()) == (2.0**16, [0, 1, 0, 64])


def test_a_found_inf_set_by_hand_is_no_overflow():
    params = params_of()
    optimizer, scaler = fused(params), headroom()
    scaler.scale(torch.ones(()))
    give_gradients(random.Random(0), params, scaler.get_scale(), 0.25)
    optimizer.found_inf = 1.0
    scaler.step(optimizer)
    assert scaler.last_step_skipped
    scaler.update()
    assert scaler._headroom.save() == [0, 1, 0, 64, -2]


def test_changed_gradients_are_read_again_before_the_step():
    params = params_of()
    optimizer, scaler = fused(params), headroom(init_scale=1.0)
    scaler.scale(torch.ones(()))
    for _ in range(4):  # from the third on by addresses
        give_gradients(random.Random(0), params, scaler.get_scale(), 0.25)
        scaler.clip_grad_norm_(optimizer, 1.0)
        params[1].grad.mul_(8.0).fill_(2.0 * scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    assert scaler._headroom.save()[4:] == [1] * 4


def test_three_ops_and_the_maximum():
    params = params_of()
    optimizer, scaler = fused(params), headroom()
    scaler.scale(torch.ones(()))
    for step in range(4):
        give_gradients(random.Random(step), params, scaler.get_scale(), 0.1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            scaler.step(optimizer)
            scaler.update()
    names = [event.name for event in seen.events()]
    wanted = ["_check_numerics", "_planned_step_", "update_scale_headroom_"]
    assert [name for name in names if name.startswith("fusedamp::")] == [f"fusedamp::{n}" for n in wanted]
    others = {name for name in names if name.startswith("aten::")}
    views = {"aten::select", "aten::slice", "aten::as_strided", "aten::new_empty", "aten::empty"}
    assert others <= views | {
        "aten::amax",
        "aten::fill_",
        "aten::empty_strided",
    }  # amax fills its result first


def test_weights_have_the_bits_of_the_same_scales():
    """The policy changes scales, and nothing else: in FP32 any power of two gives the same weights."""
    found = []
    for make in (headroom, lambda: GradScaler(DEVICE)):
        params = params_of()
        optimizer, scaler = fused(params, master_weights="auto"), make()
        scaler.scale(torch.ones(()))
        for step in range(100):
            torch.manual_seed(step)
            for param in params:
                param.grad = torch.randn(param.shape) * scaler.get_scale()
            scaler.clip_grad_norm_(optimizer, 1.0)
            scaler.step(optimizer)
            scaler.update()
        found.append((params, scaler.get_scale()))
    (ours, ours_scale), (plain, plain_scale) = found
    assert ours_scale < plain_scale
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


# With a watch ----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Its first layer's output has a gradient 2^10 times as large as any of the weights'."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.second(self.first(x))


def watched_scales(activations, steps=4, watched=True):
    torch.manual_seed(0)
    model = Net()
    optimizer, scaler = fused(model.parameters()), headroom(init_scale=2.0**14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if watched:
            numerics.watch(optimizer, scaler, updates=False, activations=model if activations else None)
    scales, weights = [], []
    for step in range(steps):
        optimizer.zero_grad()
        # Inputs are small and so are the weights' gradients: those of activations lead.
        x = torch.full((1, 3), 2.0**-12)
        with torch.no_grad():
            model.second.weight.fill_(1.0)
        loss = (model.first(x) * 2.0**4).sum() + 0 * model.second(torch.zeros(1, 3)).sum()
        scaler.scale(loss).backward()
        model.first.bias.grad.mul_(2.0**-12)
        if step % 2:
            scaler.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        weights.append(scaler._headroom.save()[4:])
    return scales, weights[-1]


def test_a_watch_of_activations_bounds_the_scale():
    assert watched_scales(False) == watched_scales(False, watched=False) == ([2.0**14] * 4, [-8] * 4)
    scales, kept = watched_scales(True)
    assert kept == [4] * 4
    assert scales == [2.0**9] * 4  # 15 - 4 - 2


def test_activations_that_overflow_alone_bring_the_scale_down():
    """Other code repaired the gradient before it reached the weights: no step is skipped."""
    model = nn.Linear(3, 1)
    optimizer, scaler = fused(model.parameters()), headroom(init_scale=2.0**14)
    numerics.watch(optimizer, scaler, updates=False, activations=model)
    for expected in (2.0**11, 2.0**8):  # they count as 2^16: 15 - (16 - 14) - 2, 15 - (16 - 11) - 2
        optimizer.zero_grad()
        output = model(torch.ones(1, 3))
        output.register_hook(lambda grad: grad.nan_to_num(posinf=1.0))
        scaler.scale((output * torch.inf).sum()).backward()
        scaler.step(optimizer)
        assert not scaler.last_step_skipped
        scaler.update()
        assert scaler.get_scale() == expected


@pytest.mark.parametrize("drive", ["fused", "clip", "unscale", "hook"])
def test_watch_and_policy_read_in_the_same_checks(drive):
    loop = Loop(drive, fused, [torch.float16, torch.float32, torch.bfloat16], bad=(4, 5))
    loop.scaler = headroom(init_scale=8.0, growth_interval=3)
    with numerics.watch(loop.optimizer, loop.scaler, every=2, model=loop.model) as watch:
        for _ in range(9):
            loop.step()
        records, rows = watch.poll(), watch.trajectory().tolist()
    assert [record.step for record in records] == [2, 4, 6, 8]
    for record in records:
        loop.check(record)
    good = [(largest, scale) for _, scale, skipped, largest in rows if not skipped]
    kept = [exponent_of_quotient(largest, scale) for largest, scale in good]
    assert loop.scaler._headroom.save()[4:] == kept
    assert len(kept) == 7


def test_activations_of_other_ranks_need_a_group(monkeypatch):
    from fusedamp.amp import gradient_checks

    monkeypatch.setattr(gradient_checks, "is_distributed", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"watch of activations, which differ over ranks; expected a process"
    ):
        watched_scales(True)
    watched_scales(False)


def test_compiled_updates():
    scaler, other = headroom(), headroom()
    for each, update in ((scaler, scaler.update), (other, torch.compile(other.update, backend="eager"))):
        params = params_of()
        optimizer = fused(params)
        each.scale(torch.ones(()))
        for step in range(5):
            give_gradients(random.Random(step), params, each.get_scale(), 0.1)
            each.step(optimizer)
            update()
    assert other.state_dict() == scaler.state_dict()


@pytest.mark.parametrize("way", ["step", "clip", "unscale"])
def test_in_inference_mode(way):
    params = params_of()
    optimizer, scaler = fused(params), headroom()
    with torch.inference_mode():
        scaler.scale(torch.ones(()))
    for step in range(4):
        give_gradients(random.Random(step), params, scaler.get_scale(), 0.1)
        with torch.inference_mode() if step % 2 else torch.no_grad():
            WAYS[way](scaler, optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert scaler._headroom.save() == [0, 4, 4, 64, *[-4] * 4]  # it waits to grow
