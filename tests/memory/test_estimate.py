"""``fusedamp.estimate`` tells what is really allocated, before it is: held against the memory of every tensor
after a step.
"""

import json
import math

import pytest
import torch
from cases import CASES, WITH_TORCH, kept, make_params, set_grads
from fusedamp import Memory, estimate, optim
from fusedamp.commands import cli
from fusedamp.memory.model_shapes import MODELS
from fusedamp.optim.core.options import STORAGE
from fusedamp.optim.state.encoded import plain

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 5), (257,), (), (0,), (16, 16)]


def storage_of(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def allocated(optimizer, params) -> Memory:
    """Return the bytes in memory after one step."""
    set_grads(params, 0)
    optimizer.step()
    entries = [dict(optimizer.state[p]) for p in params]
    masters = [plain(entry.pop("master")) for entry in entries if "master" in entry]
    states = [value for entry in entries for value in kept(entry).values()]
    return Memory(
        "seen",
        storage_of(params),
        storage_of(p.grad for p in params),
        storage_of(masters),
        storage_of(states),
    )


def parts(row: Memory) -> tuple[int, ...]:
    return row.weights, row.gradients, row.masters, row.states


def options_of(row: Memory) -> dict:
    """The storage options in the name of one of our rows."""
    name, _, options = row.name.partition(": ")
    assert name == "fusedamp"
    return eval(f"dict({options})", {"torch": torch, "dict": dict})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_what_a_step_allocates(case, dtype):
    """Guards all figures of our rows: each is what a step with those options leaves in memory."""
    found = estimate(SHAPES, case.ours, dtype=dtype, **case.options)
    ours = [row for row in found.rows if row.name.startswith("fusedamp")]
    modes = math.prod(map(len, STORAGE.values()))
    assert 1 <= len(ours) <= modes
    refuses = dtype in (torch.float32, torch.float64) or case.options.get("centered")
    assert len(ours) == modes or refuses or not case.ours.can_compress
    for row in ours:
        params = make_params(dtype, SHAPES)
        optimizer = case.ours(params, **{**case.options, **options_of(row)})
        assert parts(row) == parts(allocated(optimizer, params)), row.name
    assert found.rows[0].total == sum(parts(ours[0]))
    assert (found.params, found.tensors) == (sum(p.numel() for p in params), len(params))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WITH_TORCH, ids=str)
def test_rows_of_plain_torch_are_what_torch_allocates(case, dtype):
    """Guards the comparison: torch's own optimizers, apart from step counts, which not all of them keep, and
    scalars, which it keeps in FP32.
    """
    found = {row.name: row for row in estimate(SHAPES, case.ours, dtype=dtype, **case.options).rows}
    names = {torch.float32: "plain torch", torch.float64: "plain torch"}
    for width, name in (
        (dtype, names.get(dtype, "plain torch: 16-bit weights and states")),
        (torch.float32, "plain torch: FP32 weights under AMP"),
    ):
        if name in found:
            params = make_params(width, SHAPES)
            optimizer = case.torch(params, **case.options, foreach=False)
            seen = allocated(optimizer, params)
            entries = optimizer.state.values()
            scalar = 4 if width.itemsize == 2 else 8  # halved there as the other states are
            steps = (4 + scalar * len(case.scalars)) * len(SHAPES)
            kept = sum(4 * (name in entry) for entry in entries for name in ("step", *case.scalars))
            row = found[name]
            expected = (seen.weights, seen.gradients, 0, seen.states - kept + steps)
            assert parts(row) == expected, name
    if dtype in (torch.float16, torch.bfloat16):
        by_hand = found["plain torch: 16-bit weights, FP32 masters by hand"]
        amp, numel = found["plain torch: FP32 weights under AMP"], sum(map(math.prod, SHAPES))
        assert parts(by_hand) == (2 * numel, 6 * numel, 4 * numel, amp.states)


@pytest.mark.parametrize("storage", [{}, {"stochastic_rounding": True, "master_weights": "none"}])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_a_number_of_parameters_with_any_storage(state_dtype, storage):
    made = estimate(10**9, optim.AdamW, dtype=torch.bfloat16, state_dtype=state_dtype, **storage)
    usual = estimate(10**9, optim.AdamW, dtype=torch.bfloat16)
    mode = f'fusedamp: master_weights="{storage.get("master_weights", "fp32")}", state_dtype="{state_dtype}"'
    assert made.rows[0].name == mode
    assert set(made.rows) == set(usual.rows)


def test_figures_that_everybody_knows():
    """Guards the arithmetic: Adam in BF16 takes 16 B/param here, 20 with masters by hand, 8 in BF16 alone."""
    found = {row.name: row for row in estimate(10**12, optim.AdamW, dtype=torch.bfloat16).rows}
    per_param = {name: round(row.total / 10**12, 6) for name, row in found.items()}
    assert per_param['fusedamp: master_weights="fp32", state_dtype="float32"'] == 16
    assert per_param['fusedamp: master_weights="split", state_dtype="float32"'] == 14
    assert per_param['fusedamp: master_weights="split", state_dtype="bfloat16"'] == 10
    assert per_param['fusedamp: master_weights="split", state_dtype="int8"'] == 8 + 2 * 4 / 128
    assert per_param["plain torch: FP32 weights under AMP"] == 16
    assert per_param["plain torch: 16-bit weights, FP32 masters by hand"] == 20
    assert per_param["plain torch: 16-bit weights and states"] == 8  # 10**12 of them: nothing was allocated


def test_ways_to_say_what_is_trained():
    """Guards the first argument: module, meta module, tensors, names, shapes, groups and a count agree."""
    module, meta = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4, device="meta")
    named = list(module.named_parameters())
    ways = [module, meta, module.parameters(), named, [(4, 6), (4,)], [(4, 6), torch.Size([4])],
            [{"params": [(4, 6)]}, {"params": named[1:]}]]  # fmt: skip
    expected = estimate(module, optim.Adam)
    for way in ways:
        assert estimate(way, optim.Adam) == expected
    assert estimate(torch.ones(28), optim.SGD) == estimate(28, optim.SGD) == estimate([28], optim.SGD)
    assert meta.weight.is_meta


def test_an_optimizer_that_exists():
    """Guards instances: their groups' options count, per group, and are not changed; options replace them."""
    params = make_params(torch.bfloat16, [(10,), (10,)])
    optimizer = optim.SGD([{"params": params[:1], "momentum": 0.9}, {"params": params[1:]}])
    before = optimizer.state_dict()
    found = estimate(params, optimizer)
    assert parts(found.rows[0]) == (40, 40, 80, 40 + 8)
    assert parts(estimate(params, optimizer, momentum=0.5).rows[0]) == (40, 40, 80, 80 + 8)
    optimizer.param_groups[0]["master_weights"] = "none"
    assert parts(estimate(params, optimizer).rows[0]) == (40, 40, 40, 40 + 8)
    assert estimate(params, optimizer).rows[0].name == "fusedamp: as in the groups"
    optimizer.param_groups[0]["master_weights"] = "auto"
    assert optimizer.state_dict() == before
    assert parts(allocated(optimizer, params)) == parts(found.rows[0])


def test_frozen_parameters_are_weights_only():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2)).requires_grad_(False)
    model[1].requires_grad_(True)
    for optimizer in (optim.SGD, optim.SGD(model[1].parameters())):
        row = estimate(model, optimizer).rows[0]
        assert parts(row) == (4 * 38, 4 * 10, 0, 4 * 2)


def test_dtypes_of_weights_and_gradients():
    """Guards main_grad, grad_dtype and both arguments; a non-float tensor keeps its dtype."""
    params = make_params(torch.bfloat16, [(10,), (10,)])
    params[0].main_grad = torch.zeros(10)
    params[1].grad_dtype = torch.float32
    assert parts(estimate(params, optim.SGD).rows[0])[:3] == (40, 80, 80)
    assert parts(estimate(params, optim.SGD, grad_dtype=torch.bfloat16).rows[0])[:3] == (40, 40, 80)
    assert parts(estimate([(10,)], optim.SGD, dtype=torch.float16).rows[0])[:3] == (20, 20, 40)
    frozen = torch.nn.Parameter(torch.ones(10, dtype=torch.int8), requires_grad=False)
    assert estimate([frozen, (10,)], optim.SGD, dtype=torch.float64).rows[0].weights == 10 + 80


def test_layouts():
    """Guards parameters with gaps and in channels_last: states are dense."""
    param = torch.nn.Parameter(torch.ones(4, 6)[:, ::2])
    found = estimate([param], optim.AdamW).rows[0]
    assert parts(found) == (48, 48, 0, 96 + 4)
    assert allocated(optim.AdamW([param]), [param]).states == found.states


PARAM = torch.nn.Parameter(torch.ones(3))
BAD = {
    "torch's class": (([PARAM], torch.optim.AdamW), {}, r"expected a class of fusedamp.optim"),
    "instance of torch": (([PARAM], torch.optim.AdamW([PARAM])), {}, r"expected a class of fusedamp.optim"),
    "a word": (("gpt2", optim.SGD), {}, r"the first argument is 'gpt2'; expected a module, a tensor"),
    "half a parameter": ((2.5, optim.SGD), {}, r"2.5 parameters; expected a whole number from 1"),
    "none": (([], optim.SGD), {}, r"no parameter to train; expected at least one"),
    "all frozen": ((torch.nn.Linear(2, 2).requires_grad_(False), optim.SGD), {}, "no parameter to train"),
    "bad shape": (([(2, -1)], optim.SGD), {}, r"\(2, -1\) is neither a tensor nor a shape"),
    "bad size": (([(2, 1.5)], optim.SGD), {}, r"\(2, 1.5\) is neither a tensor nor a shape"),
    "mixed": (([PARAM, {"params": PARAM}], optim.SGD), {}, "groups and parameters are mixed"),
    "dtype": (([torch.ones(3, dtype=torch.int8)], optim.SGD), {}, "int8"),
    "option": (
        ([PARAM], optim.SGD),
        {"betas": 1},
        r"betas is not an option of SGD; expected some of \['dampen",
    ),
    "option of instance": (([PARAM], optim.SGD([PARAM])), {"betas": 1}, r"betas is not an option of SGD"),
    "value": (([PARAM], optim.SGD), {"lr": -1}, r"\[SGD\] lr is -1; expected"),
    "value of instance": (([PARAM], optim.SGD([PARAM])), {"lr": -1}, r"\[SGD\] lr is -1; expected"),
    "stranger": (([(3,)], optim.SGD([PARAM])), {}, r"group 0 params\[0\], of shape \[3\], is not among"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    """Guards the errors: in words, and before anything else happens."""
    arguments, options, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        estimate(*arguments, **options)


def test_named_networks_have_their_known_sizes():
    """Guards the shapes: the totals are those that the networks are known by."""
    totals = {name: sum(map(math.prod, shapes())) for name, shapes in MODELS.items()}
    assert totals == {
        "bert-base": 109_482_240,
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        "llama-2-7b": 6_738_415_616,
        "llama-3-8b": 8_030_261_248,
    }


def test_table(capsys):
    """Guards what a user reads: every row with its five figures and a readable total."""
    assert cli.main(["estimate", "--model", "gpt2", "--set", "master_weights=none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "AdamW: 124,439,808 parameters in 148 tensors"
    assert lines[1].split() == ["bytes", "per", "parameter", "weights", "gradients", "masters", "states",
                                "sum", "in", "all"]  # fmt: skip
    assert lines[2].startswith('fusedamp: master_weights="none"')  # what was asked comes first
    assert lines[2].split()[-7:] == ["2.00", "2.00", "0.00", "8.00", "12.00", "1.391", "GiB"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_json(capsys):
    """Guards the machine-readable form: bytes as whole numbers."""
    arguments = ["--shape", "4x6", "--shape", "4", "--dtype", "fp32", "--optimizer", "sgd", "--json"]
    assert cli.main(["estimate", *arguments, "--set", "momentum=0.9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["optimizer"], found["params"], found["tensors"]) == ("SGD", 28, 2)
    expected = {"weights": 112, "gradients": 112, "masters": 0, "states": 120, "host": 0, "total": 344}
    assert {k: v for k, v in found["rows"][0].items() if k != "name"} == expected


@pytest.mark.parametrize("form", [{}, {"master_weights": "split", "state_dtype": "int8"}], ids=str)
def test_offload(form):
    """Guards the bytes of Offloaded: the estimate against what a step has made, on device and host."""
    params = [torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16)) for shape in ((64, 32), (128,))]
    frozen = torch.nn.Parameter(torch.zeros(10, dtype=torch.bfloat16), requires_grad=False)
    optimizer = optim.Offloaded(optim.AdamW, params, **form)
    row = estimate([*params, frozen], optimizer).rows[0]
    assert row == estimate([*params, frozen], optim.AdamW, offload=True, **form).rows[0]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    host = [part for bucket in optimizer._mirror.buckets for part in (bucket._weights, bucket._grads)]
    states = optimizer.state_dict()["state"].values()
    host += [value for entry in states for value in entry.values() if isinstance(value, torch.Tensor)]
    assert row.host == sum(part.nbytes for part in host)
    assert row.device == sum(p.nbytes for p in params) * 2 + frozen.nbytes
    assert row.name.startswith("fusedamp offloaded: master_weights=")


def test_offload_in_the_table(capsys):
    command = ["estimate", "--params", "1000", "--set", "master_weights=split", "--offload"]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-5:] == ["sum", "device", "host", "in", "all"]
    assert lines[2].split()[-9:-2] == ["4.00", "4.00", "2.00", "8.00", "18.00", "4.00", "14.00"]
    assert lines[-1].split()[-4:-2] == ["8.00", "0.00"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--params", "many"], "--params is many; it must be a whole number from 1"),
        (["--params", "0"], "--params is 0"),
        (["--params", "1e300"], "--params is 1e300"),
        (["--params", "2.5"], "--params is 2.5"),
        (["--shape", "3xx4"], "--shape is 3xx4; it must be whole numbers separated by x"),
        (["--params", "10", "--set", "momentum"], "--set is momentum; it must be NAME=VALUE"),
        (
            ["--params", "10", "--set", "speed=3"],
            "speed is not an option of AdamW; expected some of ['amsgrad'",
        ),
        (["--params", "10", "--set", "lr=-1"], "lr is -1; expected a finite number >= 0"),
        (["--params", "10", "--set", "master_weights=fp8"], "master_weights is 'fp8'; expected one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_commands(arguments, words, capsys):
    """Exit code 2 and one line with a fix."""
    assert cli.main(["estimate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fusedamp estimate: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


@pytest.mark.parametrize("arguments", [[], ["--model", "gpt9"], ["--params", "9", "--model", "gpt2"]])
def test_commands_that_argparse_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["estimate", *arguments])
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err
