"""The read pass in backward: results are those of the read pass in step, bit for bit; nothing stale counts.

Two equal worlds run the same program, one attached; and a record tells which gradients were read when.
"""

import math

import pytest
import torch
from attach_worlds import OPTIMIZERS, World, record_reads
from cases import bits
from fusedamp import GradScaler, optim
from on_device import DEVICE


@pytest.fixture
def reads(monkeypatch):
    return record_reads(monkeypatch)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("min_numel", [0, 10])
def test_same_course_as_without(make, clip, min_numel):
    """Weights, states, norms, skips, reports and scales over good and bad iterations, bit for bit."""
    worlds = [World(attached, make, min_numel=min_numel) for attached in (True, False)]
    for factor in (1.0, math.inf, 2.0, math.nan, 1.0, 1e30, 0.5):
        outcomes = []
        for world in worlds:
            world.optimizer.zero_grad()
            world.backward(factor)
            outcomes.append(world.finish(clip))
        assert outcomes[0] == outcomes[1]
        assert worlds[0].everything() == worlds[1].everything()


@pytest.mark.parametrize("norm_type", [0.0, 1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("min_numel", [0, 10])
def test_every_norm_without_a_read_pass_in_step(norm_type, min_numel, reads):
    """Also where only some were read in backward, in whose midst the others have their places."""
    worlds = [World(True, norm_type=norm_type, min_numel=min_numel), World(False)]
    outcomes = []
    for world in worlds:
        world.backward()
        in_backward = len(reads)
        outcomes.append(world.finish(0.5, norm_type))
        if world is worlds[0]:
            small = [p.grad.data_ptr() for p in world.params if p.numel() < min_numel]
            assert in_backward == 5 - len(small)
            assert reads[in_backward:] == ([small] if small else [])
            reads.clear()
    assert outcomes[0] == outcomes[1]
    assert worlds[0].everything() == worlds[1].everything()


def test_another_norm_is_read_in_step(reads):
    """Findings of one norm must not stand for another; without clipping any norm will do."""
    worlds = [World(attached) for attached in (True, False)]
    for world in worlds:
        world.backward()
    assert worlds[0].finish(0.5, 1.0) == worlds[1].finish(0.5, 1.0)
    world = World(True, norm_type=1.0)
    world.backward()
    reads.clear()
    world.finish()
    assert reads == []


CHANGES = {  # and which of the five gradients must be read again
    "nothing": (lambda w: None, []),
    "written in place": (lambda w: w.params[0].grad.mul_(4), [0]),
    "several written": (lambda w: torch._foreach_mul_([p.grad for p in w.params[1:4]], 4), [1, 2, 3]),
    "a NaN written": (lambda w: w.params[3].grad[69_999].fill_(math.nan), [3]),
    "replaced": (lambda w: setattr(w.params[4], "grad", w.params[4].grad * 4), [4]),
    "replaced by what takes its address": (lambda w: refill(w.params[0]), [0]),
    "removed": (lambda w: setattr(w.params[3], "grad", None), []),
    "accumulated": (lambda w: w.backward(), []),
    "accumulated in part": (lambda w: w.backward(without=(0, 2)), []),
    "accumulated by hand": (lambda w: w.params[0].grad.add_(w.params[0].grad), [0]),
    "accumulated to an overflow": (lambda w: w.backward(math.inf), []),
    "zeroed in place": (lambda w: w.optimizer.zero_grad(set_to_none=False), range(5)),
    "zeroed and computed": (lambda w: (w.optimizer.zero_grad(set_to_none=False), w.backward(2.0)), []),
    "freed and computed": (lambda w: (w.optimizer.zero_grad(), w.backward(2.0)), []),
    "freed and computed in part": (lambda w: (w.optimizer.zero_grad(), w.backward(without=(3, 4))), []),
    "clipped by torch": (lambda w: torch.nn.utils.clip_grad_norm_(w.params[4:], 0.1), [4]),
    "scale set": (lambda w: w.scaler.update(8.0), range(5)),
    "scale written": (lambda w: w.scaler._scale.mul_(2), range(5)),
    "scale replaced": (lambda w: setattr(w.scaler, "_scale", torch.tensor(8.0)), range(5)),
    "scaler loaded": (lambda w: w.scaler.load_state_dict(w.scaler.state_dict()), range(5)),
    "unscaled": (lambda w: w.scaler.unscale_(w.optimizer), []),
    "detached": (lambda w: w.scaler.detach(w.optimizer), range(5)),
    "replaced as a parameter": (lambda w: swap(w), [0]),
}


def refill(param):
    """A gradient with other values that has all the old one's traits: memory, version, maybe the id."""
    values = param.grad.detach() * 4
    param.grad = param.grad.data  # a new tensor over the same memory, with a version counter of its own
    param.grad.data.copy_(values)


def swap(world):
    """As trainers that shard parameters do."""
    new = (world.params[0].detach() * 2).requires_grad_()
    new.grad = world.params[0].grad * 4
    world.params[0] = world.optimizer.param_groups[0]["params"][0] = new


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_backward_is_read_again_and_nothing_else(change, clip, reads):
    """Guards against stale findings: those of each gradient that is no longer what its hook saw."""
    act, again = CHANGES[change]
    worlds = [World(attached, lambda p: optim.SGD(p, lr=0.1)) for attached in (True, False)]
    outcomes = []
    for world in worlds:
        world.backward()
        act(world)
        reads.clear()
        outcomes.append(world.finish(clip))
        if world is worlds[0]:
            assert reads == ([[world.params[i].grad.data_ptr() for i in again]] if again else [])
    assert outcomes[0] == outcomes[1]
    assert worlds[0].everything() == worlds[1].everything()


def test_late_and_missing_gradients(reads):
    """A parameter that gets its first gradient late, one that got it by hand, and one that has none."""
    worlds = [World(attached) for attached in (True, False)]
    for without in ((0, 3), (3,), ()):
        outcomes = []
        for world in worlds:
            world.optimizer.zero_grad()
            world.backward(without=without)
            if 3 in without:
                world.params[4].grad = torch.full_like(world.params[4], 3.0)
            outcomes.append(world.finish(0.5))
        assert outcomes[0] == outcomes[1]
        assert worlds[0].everything() == worlds[1].everything()


def test_parameters_that_come_and_go(reads):
    """A group added later is read in step once, and in backward from then on; who left has no hooks."""
    world = World(True)
    late = torch.ones(4, requires_grad=True)
    world.optimizer.add_param_group({"params": [late]})
    world.params.append(late)
    counts = []
    for _ in range(2):
        world.optimizer.zero_grad()
        reads.clear()
        world.backward()
        counts.append(len(reads))
        reads.clear()
        world.finish()
        counts.append(len(reads))
    assert counts == [5, 1, 6, 0]
    gone = world.params.pop(0)
    world.optimizer.param_groups[0]["params"].pop(0)
    world.finish()
    assert not gone._post_accumulate_grad_hooks


@pytest.mark.parametrize("second_attached", [True, False])
def test_optimizers_that_share_a_parameter(second_attached):
    """Each has findings of its own; what one step consumed, the other still has."""
    results = []
    for attached in (True, False):
        params = [torch.full((4,), float(i + 1)).requires_grad_() for i in range(3)]
        first, second = optim.SGD(params[:2], lr=0.1), optim.AdamW(params[1:], lr=0.1)
        scaler = GradScaler(DEVICE, init_scale=8.0)
        if attached:
            scaler.attach(first, min_numel=0)
            if second_attached:
                scaler.attach(second, norm_type=1.0, min_numel=0)
        for factor in (1.0, math.inf, 2.0):
            for optimizer in (first, second):
                optimizer.zero_grad()
            scaler.scale(sum((p * p).sum() for p in params) * factor).backward()
            for optimizer in (first, second):
                scaler.clip_grad_norm_(optimizer, 0.5)
                scaler.step(optimizer)
                results.append(scaler.last_step_skipped.item())
            scaler.update()
        results.append([bits(p) for p in params] + [scaler.get_scale()])
    assert results[: len(results) // 2] == results[len(results) // 2 :]


def test_gradients_that_no_hook_can_read(reads):
    """Sparse, strided with gaps or transposed, complex: left to the step, which sees their overflows."""
    table = torch.nn.Embedding(5, 2, sparse=True)
    wide = torch.ones(3, 4, requires_grad=True)
    wave = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    flat = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([wide, wave, flat, *table.parameters()], lr=0.1, fused=False)
    scaler = GradScaler(DEVICE, init_scale=2.0)
    scaler.attach(optimizer, min_numel=0)
    index = torch.tensor([1, 1, 3])
    weights = torch.ones(4, 3).t()
    loss = table(index).sum() + (wide * weights).sum() + wave.real.sum() + flat.sum()
    wide.register_hook(lambda grad: weights * grad)
    scaler.scale(loss).backward()
    assert len(reads) == 1 + wide.grad.is_contiguous()
    flags = scaler._check_inf_per_device(optimizer)
    assert [flag.item() for flag in flags.values()] == [0.0]
    table.weight.grad._values()[0, 0] = math.inf
    flags = scaler._check_inf_per_device(optimizer)
    assert [flag.item() for flag in flags.values()] == [1.0]


def test_hooks_of_others_that_write_gradients():
    """One that runs after ours and writes the gradient, one that moves it away."""
    worlds = [World(attached, lambda p: optim.SGD(p, lr=0.1)) for attached in (True, False)]
    outcomes = []
    for world in worlds:
        world.params[0].register_post_accumulate_grad_hook(mend)
        world.params[3].register_post_accumulate_grad_hook(move)
        world.backward(math.inf)
        world.params[1].grad = world.params[2].grad = world.params[4].grad = None
        outcomes.append(world.finish(0.5))
        assert not outcomes[-1][1], "both hooks have mended the overflow"
    assert outcomes[0] == outcomes[1]
    assert worlds[0].everything() == worlds[1].everything()


def mend(param):
    param.grad.nan_to_num_(posinf=1.0, neginf=-1.0)


def move(param):
    param.main_grad, param.grad = param.grad.float().nan_to_num_(posinf=1.0, neginf=-1.0), None


@pytest.mark.parametrize("compiled", ["model", "autograd"])
def test_compiled_backward(compiled, reads):
    """Hooks that a trace froze would find nothing, or the same for ever."""
    if compiled == "autograd":
        compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    results = []
    for attached in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = optim.AdamW(model.parameters(), lr=0.1)
        scaler = GradScaler(DEVICE, init_scale=4.0)
        if attached:
            scaler.attach(optimizer, min_numel=0)
        forward = torch.compile(model, backend="aot_eager") if compiled == "model" else model
        for factor in (1.0, math.inf, 2.0):
            optimizer.zero_grad()
            loss = scaler.scale(forward(torch.ones(2, 4)).square().sum() * factor)
            reads.clear()
            if compiled == "autograd":
                with compiled_autograd._enable(torch.compile(backend="eager")):
                    loss.backward()
            else:
                loss.backward()
            assert len(reads) == 2 * attached
            scaler.clip_grad_norm_(optimizer, 0.5)
            scaler.step(optimizer)
            assert len(reads) == 2 if attached else 1
            results.append(scaler.last_step_skipped.item())
            scaler.update()
        results.append([bits(p) for p in model.parameters()])
    assert results[:4] == results[4:]
    assert results[:3] == [False, True, False]


@pytest.mark.filterwarnings("ignore:Using backward")
def test_higher_derivatives_are_left_alone():
    """Gradients that are differentiated again; the hooks' read is no part of their graph."""
    world = World(True, dtypes=[torch.float32] * 5)
    loss = world.scaler.scale(sum((p**3).sum() for p in world.params))
    loss.backward(create_graph=True)
    assert world.params[0].grad.requires_grad
    assert not world.finish(0.5)[1]
