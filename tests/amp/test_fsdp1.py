"""FSDP1 on 2 gloo ranks: with a process group as one process; without, calls after which ranks would diverge
raise, and torch's ShardedGradScaler works."""

import copy
import math
from functools import partial

import fusedamp
import pytest
import torch
from cases import BY_NAME, COMPOSED
from fusedamp import GradScaler, optim
from ranks import agreed, needs_gloo, rank, spawned
from torch import nn

pytestmark = needs_gloo
WORLD = 2
WHOLE = [BY_NAME[name] for name in ("lamb", "lars", "novograd")] + COMPOSED


def model(**options):
    """A model with one weight; each rank has half of it."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = nn.Linear(4, 1, bias=False)
    nn.init.ones_(net.weight)
    return FullyShardedDataParallel(net, device_id=torch.device("cpu"), **options)


def backward(net, scaler, bad=False):
    """With ``bad`` the gradient of rank 1's shard alone is infinite."""
    x = torch.ones(1, 4)
    if bad:
        x[0, 3] = math.inf
    scaler.scale(net(x).nan_to_num(posinf=1.0).sum() if not bad else net(x).sum()).backward()


FORMATS = {
    "fp32": {},
    "split": {"master_weights": "split"},
    "bf16 states": {"state_dtype": "bfloat16", "rounding_seed": 1},
    "int8": {"master_weights": "split", "state_dtype": "int8", "rounding_seed": 1},
}


def scalers(**options):
    net = model(**options)
    params = list(net.parameters())
    for make in (optim.AdamW, torch.optim.SGD, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)):
        scaler, optimizer = GradScaler("cpu", init_scale=4.0), make(params, lr=0.1)
        optimizer.zero_grad()
        backward(net, scaler)
        before = (
            [copy.deepcopy(p.detach()) for p in params],
            [p.grad.clone() for p in params if p.grad is not None],
        )
        for name, args in {"unscale_": (), "clip_grad_norm_": (1.0,), "step": ()}.items():
            wanted = rf"\[GradScaler\.{name}\] parameter 0 .* by FSDP1; .* process_group, .* fully_shard"
            with pytest.raises(RuntimeError, match=wanted):
                getattr(scaler, name)(optimizer, *args)
        with pytest.raises(RuntimeError, match=r"\[clip_grad_norm_\] parameter 0 .* FSDP1"):
            fusedamp.clip_grad_norm_(params, 1.0)
        after = [p.detach() for p in params], [p.grad for p in params if p.grad is not None]
        for old, new in zip([*before[0], *before[1]], [*after[0], *after[1]], strict=True):
            assert torch.equal(old, new)
        assert not optimizer.state


def way_out():
    """torch's ShardedGradScaler, and one that is ours as well, with an elementwise optimizer."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    class Both(ShardedGradScaler, GradScaler):
        pass

    for cls in (ShardedGradScaler, Both):
        net = model()
        scaler, optimizer = cls("cpu", init_scale=4.0), optim.SGD(net.parameters(), lr=0.25)
        for bad in (False, True):
            optimizer.zero_grad()
            backward(net, scaler, bad)
            scaler.step(optimizer)
            scaler.update()
            weights = [p.detach().tolist() for p in net.parameters() if p.numel()]
            assert all(set(values) == {0.75} for values in weights)
            assert agreed(scaler.get_scale()) == (2.0 if bad else 4.0)


def whole_tensors(**options):
    net = model(**options)
    params = list(net.parameters())
    backward(net, GradScaler("cpu", enabled=False))
    before = [copy.deepcopy(p.detach()) for p in params]
    for case in WHOLE:
        name = case.ours.__name__
        if all(p.grad is None for p in params):
            return  # this rank holds nothing
        with pytest.raises(
            ValueError, match=rf"\[{name}\] group 0: params\[0\] of shape .* FSDP1; expected the whole"
        ):
            case.ours(params, **case.options).step()
        assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def as_one_process(**options):
    """Equal to one process on the whole model, with clipping by the norm over all shards."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    net = FullyShardedDataParallel(copy.deepcopy(reference), device_id=torch.device("cpu"), **options)
    scaler = GradScaler("cpu", init_scale=4.0, growth_interval=2, process_group=torch.distributed.group.WORLD)
    one = GradScaler("cpu", init_scale=4.0, growth_interval=2)
    ours, theirs = (optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.0) for m in (net, reference))
    world = torch.distributed.group.WORLD
    torch.manual_seed(1)
    for step in range(5):
        x = torch.randn(8, 4)
        norms = []
        for m, s, o, group in (
            (net, scaler, ours, world),
            (reference, one, theirs, None),
        ):
            o.zero_grad()
            s.scale(m(x).pow(2).sum()).backward()
            if step == 3:  # in one rank's shard alone
                with_grad = [p for p in m.parameters() if p.grad is not None and p.grad.numel()]
                if m is reference or rank() == 0:
                    with_grad[0].grad.view(-1)[0] = math.nan
            norms.append(s.clip_grad_norm_(o, 1.0, process_group=group).item())
            s.step(o)
            s.update()
        assert agreed(scaler.last_step_skipped.item()) == (step == 3)
        assert agreed(scaler.get_scale()) == one.get_scale()
        if step != 3:
            assert agreed(norms[0]) == pytest.approx(norms[1], rel=1e-5)
    with FullyShardedDataParallel.summon_full_params(net):
        for p, q in zip(net.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.flatten()[: q.numel()], q.flatten(), rtol=1e-4, atol=1e-5)


def checkpoints(options):
    """FSDP1 joins and cuts states by elements: checkpoints hold FP32 numbers, and training resumes."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    def made():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).bfloat16()
        net = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
        return net, optim.AdamW(net.parameters(), lr=0.01, **options)

    def train(net, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            net(torch.full((2, 6), 1.0 + step).bfloat16()).float().pow(2).sum().backward()
            optimizer.step()

    net, optimizer = made()
    train(net, optimizer, range(3))
    kinds = StateDictType.FULL_STATE_DICT, StateDictType.SHARDED_STATE_DICT
    for kind in kinds:
        with FullyShardedDataParallel.state_dict_type(net, kind):
            saved = FullyShardedDataParallel.optim_state_dict(net, optimizer)
            weights = copy.deepcopy(net.state_dict())
        for entry in saved["state"].values():
            for name in ("master", "exp_avg", "exp_avg_sq"):
                assert entry[name].dtype == torch.float32
            assert not {n for n in entry if n.endswith(("_scale", "_numel", "_order"))}
        again, after = made()
        with FullyShardedDataParallel.state_dict_type(again, kind):
            again.load_state_dict(weights)
            after.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(again, after, saved))
        train(again, after, [5])
        if kind is kinds[-1]:
            train(net, optimizer, [5])
            for p, q in zip(again.parameters(), net.parameters(), strict=True):
                if options.get("state_dtype") == "int8":  # quantized again
                    torch.testing.assert_close(p, q, rtol=2**-7, atol=2**-7)
                else:
                    assert torch.equal(p, q)


SCENARIOS = {
    "scalers": (scalers, {}),
    "scalers, original parameters": (scalers, {"use_orig_params": True}),
    "torch's scaler": (way_out, {}),
    "whole tensors": (whole_tensors, {}),
    "whole tensors, original parameters": (whole_tensors, {"use_orig_params": True}),
    "as one process": (as_one_process, {}),
    "as one process, original parameters": (as_one_process, {"use_orig_params": True}),
    **{f"checkpoints, {name}": (checkpoints, {"options": options}) for name, options in FORMATS.items()},
}


ranks, test_on_two_ranks = spawned(
    {WORLD: {name: partial(body, **options) for name, (body, options) in SCENARIOS.items()}}
)


def test_one_process_may_step_what_is_marked():
    """With one rank there is nothing to diverge from; but optimizers that need whole tensors still raise for
    flat ones."""
    param = torch.ones(3, requires_grad=True)
    param._fsdp_flattened = True
    scaler, optimizer = GradScaler("cpu", init_scale=4.0), optim.SGD([param], lr=0.25)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    assert param.tolist() == [0.75] * 3
    for case in WHOLE:
        with pytest.raises(ValueError, match="FSDP1"):
            case.ours([param], **case.options).step()
    assert param.tolist() == [0.75] * 3
