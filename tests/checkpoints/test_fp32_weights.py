"""FP32 weights out of 16-bit training: exact masters, ties, buffers, missing masters, and no side effects."""

import copy

import pytest
import torch
from cases import kept
from fusedamp import optim
from fusedamp.checkpoints import fp32_state_dict
from torch import nn

HALVES = (torch.float16, torch.bfloat16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.kernel = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.frozen.requires_grad_(False)


def trained(dtype, steps=3, **options):
    """Return a model with 16-bit weights, an FP32 twin of equal gradients, and both optimizers."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    twin = copy.deepcopy(net).float()
    pairs = []
    for model, extra in ((net, options), (twin, {})):
        chosen = [p for p in model.parameters() if p.requires_grad]
        optimizer = optim.AdamW(chosen, lr=1e-3, **extra)
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            for p in chosen:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype).to(p.dtype)
            optimizer.step()
        pairs.append((model, optimizer))
    return pairs


@pytest.mark.parametrize("master_weights", ["fp32", "split"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_masters_are_exact(dtype, master_weights):
    """Guards the values: those of the FP32 run, which for BF16 a split master keeps bit for bit."""
    (net, optimizer), (twin, _) = trained(dtype, master_weights=master_weights)
    found, wanted = fp32_state_dict(net, optimizer), twin.state_dict()
    assert list(found) == list(wanted)
    # A split FP16 master has a spacing of 2^-39 below 2^-16: each of 3 steps rounds by half of it.
    atol = 3 * 2.0**-40 if (dtype, master_weights) == (torch.float16, "split") else 0
    for name, value in found.items():
        if "running" in name or "num_batches" in name:
            assert value.dtype == net.state_dict()[name].dtype
            assert torch.equal(value, net.state_dict()[name])
        else:
            assert value.dtype == torch.float32
            assert type(value) is torch.Tensor
            assert not value.requires_grad
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=atol)
    assert found["head.weight"] is found["embed.weight"]
    assert found["kernel"].is_contiguous(memory_format=torch.channels_last)
    Net().load_state_dict(found)


@pytest.mark.parametrize("options", [{}, {"master_weights": "split"}], ids=str)
def test_changes_nothing(options):
    (net, optimizer), _ = trained(torch.bfloat16, **options)
    weights = copy.deepcopy(net.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    accesses = optimizer._accesses
    found = fp32_state_dict(net, optimizer)
    assert optimizer._accesses == accesses  # the next step repeats the last one
    for name, value in found.items():
        if value.dtype == torch.float32 and weights[name].dtype != torch.float32:
            value.fill_(7)  # new memory
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    for key, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, state["state"][key][k]) for k, v in kept(entry).items())


def test_missing_masters():
    """Guards weights without masters: not stepped, or by choice; and masters of modified weights."""
    for steps, options in ((0, {}), (2, {"master_weights": "none"})):
        (net, optimizer), _ = trained(torch.float16, steps, **options)
        for name, value in fp32_state_dict(net, optimizer).items():
            assert torch.equal(value, net.state_dict()[name].to(value.dtype))
            assert value.dtype == torch.float32 or "norm" in name
    (net, optimizer), _ = trained(torch.bfloat16)
    with torch.no_grad():
        net.kernel.fill_(2.0)
    found = fp32_state_dict(net, optimizer)["kernel"]
    assert torch.equal(found.bfloat16(), net.kernel.detach())


def test_fp32_and_fp64_weights_are_shared():
    for dtype in (torch.float32, torch.float64):
        (net, optimizer), _ = trained(dtype)
        for name, value in fp32_state_dict(net, optimizer).items():
            assert value.data_ptr() == net.state_dict()[name].data_ptr()
            assert value.dtype == net.state_dict()[name].dtype


def test_wrappers_and_refusals():
    (net, optimizer), _ = trained(torch.bfloat16)
    wrapped = fp32_state_dict(nn.Sequential(net), optimizer)
    assert list(wrapped) == [f"0.{name}" for name in net.state_dict()]
    with pytest.raises(ValueError, match=r"AdamW trains none of the parameters in Linear.state_dict\(\)"):
        fp32_state_dict(nn.Linear(2, 2), optimizer)
    with pytest.raises(TypeError, match=r"optimizer is SGD; expected an optimizer of fusedamp.optim"):
        fp32_state_dict(net, torch.optim.SGD(net.parameters()))


@pytest.mark.parametrize("master_weights", ["fp32", "split"])
def test_sharded_weights(tmp_path, master_weights):
    """Guards FSDP2: DTensors come out, with the values of the unsharded run."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def trained_on(shard):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)).bfloat16()
        shard(net)
        optimizer = optim.AdamW(net.parameters(), lr=1e-2, master_weights=master_weights)
        for _ in range(3):
            net(torch.ones(4, 8, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
        return fp32_state_dict(net, optimizer)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        found = trained_on(lambda net: fully_shard(net, mesh=init_device_mesh("cpu", (1,))))
        whole = {name: value.full_tensor() for name, value in found.items() if isinstance(value, DTensor)}
    finally:
        dist.destroy_process_group()
    plain = trained_on(lambda net: net)
    assert whole.keys() == found.keys() == plain.keys()
    for name, value in whole.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, plain[name])
