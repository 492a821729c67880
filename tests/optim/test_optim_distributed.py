"""One process, real process group: DTensor parameters, distributed checkpoints, ZeroRedundancyOptimizer."""

import copy
import tempfile

import pytest
import torch
from cases import BY_NAME, COMPOSED, MAIN, kept, make_params, set_grads
from fusedamp.optim.state import encoded

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from torch.distributed import checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPLIT = {"master_weights": "split", "state_dtype": torch.bfloat16, "rounding_seed": 3}
CODES = {"master_weights": "split", "state_dtype": "int8"}  # of plain tensors only
RANDOM = {"master_weights": "none", "stochastic_rounding": True, "rounding_seed": 3}
SOME = [BY_NAME[name] for name in ("adamw", "sgd-nesterov", "lamb")]  # in formats other than FP32
CHECKPOINTS = [
    *((case, {}, sharded) for case in MAIN for sharded in (False, True)),
    *((case, SPLIT, sharded) for case in SOME for sharded in (False, True)),
    *((case, CODES, False) for case in SOME),
]


@pytest.fixture(scope="module", autouse=True)
def process_group():
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture
def mesh():
    return init_device_mesh("cpu", (1,))


def as_dtensors(params, mesh, placement):
    return [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [placement])) for p in params]


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_dtensors_step_as_plain_tensors(case, dtype, placement, mesh):
    """Guards FSDP2: state has the parameter's placement; with plain parameters, which torch cannot mix in."""
    plain = make_params(dtype, [(6, 4), (5,), (3, 3)])
    params = [*as_dtensors(plain[:2], mesh, placement), copy.deepcopy(plain[2])]
    optimizer, expected = case.ours(params, **case.options), case.ours(plain, **case.options)
    for s in range(3):
        for p, q, grad in zip(params, plain, set_grads(plain, s), strict=True):
            p.grad = distribute_tensor(grad, mesh, [placement]) if isinstance(p, DTensor) else grad
            assert q.grad is grad
        versions = [p._version for p in params]
        optimizer.step()
        expected.step()
        assert all(p._version > v for p, v in zip(params, versions, strict=True))
    for p, q in zip(params[:2], plain[:2], strict=True):
        assert torch.equal(p.full_tensor(), q)
        for name, value in optimizer.state[p].items():
            if name in ("step", *case.scalars):
                assert not isinstance(value, DTensor)
                assert torch.equal(value, expected.state[q][name])
            else:
                assert value.placements == (placement,)
                assert torch.equal(value.full_tensor(), expected.state[q][name])
    assert torch.equal(params[2], plain[2])


@pytest.mark.parametrize("storage", [SPLIT, RANDOM], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_compressed_dtensors_step_as_plain_tensors(case, dtype, storage, mesh):
    """Guards split masters, BF16 states and random numbers of shards: the bits of the whole tensor, here."""
    plain = make_params(dtype, [(6, 4), (5,)])
    params = as_dtensors(plain, mesh, Shard(0))
    optimizer, expected = (case.ours(p, **case.options, **storage) for p in (params, plain))
    for s in range(3):
        for p, grad in zip(params, set_grads(plain, s), strict=True):
            p.grad = distribute_tensor(grad, mesh, [Shard(0)])
        optimizer.step()
        expected.step()
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(p.full_tensor(), q)
        for name, value in kept(optimizer.state[p]).items():
            found = value.full_tensor() if isinstance(value, DTensor) else value
            wanted = encoded.plain(expected.state[q][name])
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted), name


def test_fully_sharded_module(mesh):
    """Guards FSDP2 itself: sharded parameters, with slots cached between steps."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)).bfloat16()
    model = copy.deepcopy(plain)
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    ends = [(m, BY_NAME["adamw"].ours(m.parameters(), lr=0.1)) for m in (model, plain)]
    for _ in range(3):
        for m, optimizer in ends:
            optimizer.zero_grad()
            m(torch.ones(3, 4, dtype=torch.bfloat16)).float().pow(2).sum().backward()
            slots = list(optimizer._slots.values())
            optimizer.step()
            assert not slots or optimizer._plan or list(optimizer._slots.values()) == slots
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q)


def test_state_with_another_placement(mesh):
    """Guards pairing of shards: state that is placed otherwise than its parameter is redistributed."""
    (param,) = as_dtensors(make_params(torch.float32, [(4, 4)]), mesh, Shard(0))
    optimizer = BY_NAME["sgd-nesterov"].ours([param], momentum=0.9)
    param.grad = torch.ones_like(param)
    optimizer.step()
    buffer = optimizer.state[param]["momentum_buffer"]
    optimizer.state[param]["momentum_buffer"] = buffer.redistribute(mesh, [Shard(1)])
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"].placements == (Shard(0),)


def test_gradients_with_another_placement(mesh):
    """Guards gradients that are placed otherwise than the parameter: they are redistributed."""
    plain = make_params(torch.float32, [(6, 4)])
    params = as_dtensors(plain, mesh, Shard(0))
    set_grads(plain, 0)
    for placement in (Shard(1), Replicate()):
        params[0].grad = distribute_tensor(plain[0].grad, mesh, [placement])
        for p in (params, plain):
            BY_NAME["adamw"].ours(p).step()
        assert torch.equal(params[0].full_tensor(), plain[0])


@pytest.mark.parametrize("to_dtensor", [True, False])
def test_state_moves_between_plain_and_sharded(mesh, to_dtensor):
    """Guards resharding: a checkpoint of plain tensors loads into DTensor parameters, and the reverse."""
    plain = make_params(torch.bfloat16, [(6, 4), (5,)])
    sharded = as_dtensors(plain, mesh, Shard(0))
    case = BY_NAME["adamw"]
    here, there = case.ours(plain, **case.options), case.ours(sharded, **case.options)
    for p, q in zip(plain, sharded, strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    first, second = (here, there) if to_dtensor else (there, here)
    first.step()
    second.load_state_dict(first.state_dict())
    for p, q in zip(plain, sharded, strict=True):
        assert isinstance(there.state[q]["master"], DTensor)
        assert not isinstance(here.state[p]["master"], DTensor)
        assert torch.equal(there.state[q]["exp_avg"].full_tensor(), here.state[p]["exp_avg"])
    second.step()


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("case", "storage", "sharded"), CHECKPOINTS, ids=str)
def test_distributed_checkpoint(case, storage, sharded, flatten, mesh, tmp_path):
    """Guards DCP: fresh optimizers get their state by its zero step, save and load round-trip, training
    resumes.
    """

    def build():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)).to(torch.bfloat16)
        if sharded:
            for module in model:
                for name, p in list(module.named_parameters()):
                    shard = torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
                    setattr(module, name, shard)
        return model, case.ours(model.parameters(), **case.options, **storage)

    def train(model, optimizer, seeds):
        for seed in seeds:
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.1 + seed)
            optimizer.step()
            optimizer.zero_grad()

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = build()
    train(model, optimizer, [0, 1])
    state = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(state, checkpoint_id=str(tmp_path))

    resumed, other = build()
    before = [p.detach().clone() for p in resumed.parameters()]
    template = {
        "model": resumed.state_dict(),
        "optimizer": get_optimizer_state_dict(resumed, other, options=options),
    }
    for p, q in zip(resumed.parameters(), before, strict=True):
        assert torch.equal(p, q)  # creating the state moved nothing
    dcp.load(template, checkpoint_id=str(tmp_path))
    resumed.load_state_dict(template["model"])
    set_optimizer_state_dict(resumed, other, template["optimizer"], options=options)
    train(model, optimizer, [2, 3])
    train(resumed, other, [2, 3])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name, value in kept(optimizer.state[p]).items():
            assert torch.equal(value, kept(other.state[q])[name]), name
            wide = torch.float64 if name in case.scalars else torch.float32
            assert kept(other.state[q])[name].dtype == (value.dtype if storage else wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", COMPOSED, ids=str)
def test_matrices_on_a_mesh_of_one_step_as_plain_tensors(case, dtype, mesh):
    """Guards rules over whole tensors where nothing is split, and the placements of means."""
    plain = make_params(dtype, [(6, 4), (5,)])
    params = as_dtensors(plain, mesh, Shard(0))
    optimizer, expected = case.ours(params, **case.options), case.ours(plain, **case.options)
    for s in range(3):
        for p, grad in zip(params, set_grads(plain, s), strict=True):
            p.grad = distribute_tensor(grad, mesh, [Shard(0)])
        optimizer.step()
        expected.step()
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(p.full_tensor(), q)
        for name, value in optimizer.state[p].items():
            if name != "step":
                assert value.placements == ((Replicate() if name == "col_var" else Shard(0)),)
                assert torch.equal(value.full_tensor(), expected.state[q][name])


@pytest.mark.parametrize("case", MAIN + COMPOSED, ids=str)
def test_zero_redundancy_optimizer(case):
    """Guards wrappers that take the class and its arguments and build the optimizer themselves."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params, plain = make_params(torch.bfloat16, [(4, 3), (7,)]), make_params(torch.bfloat16, [(4, 3), (7,)])
    optimizer = ZeroRedundancyOptimizer(params, case.ours, **case.options)
    expected = case.ours(plain, **case.options)
    for s in range(3):
        set_grads(params, s)
        set_grads(plain, s)
        optimizer.step()
        expected.step()
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(p, q)
