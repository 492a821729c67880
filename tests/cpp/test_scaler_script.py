"""GradScaler in C++ gives the bits, scales, skips, reports and errors of Python's, in any order of calls."""

import difflib
import re

import pytest
import scaler_script
import torch

PARAMS = "params f16 3,4 bf16 5 f32 2,3 f16 -"
BAD = ((), (0,), (0, 4, 5, 10))  # steps whose gradients overflow
LONG = ("step", "unscale", "clip", "headroom", "hysteresis")  # ways that go on for 24 steps, others for 7
# "reading" overrides step(), and so gets unscaled gradients; sgd and adam are torch's.
OPTIMIZERS = {name: f"optimizer {name} 0.01 0 4" for name in ("adamw", "reading", "sgd", "adam", "fused_sgd")}


def train(optimizer, options="", steps=24, each=(), bad=()):
    """Return the commands of ``steps`` iterations. ``each``: commands before each step, or a function that
    returns those of a step."""
    lines = [f"options {options}", PARAMS, optimizer]
    for k in range(steps):
        lines += ["loss 0.5 f32", f"grads {k}"]
        lines += [f"grad {k % 4} put 0 {'inf' if k % 2 else 'nan'}"] * (k in bad)
        lines += each(k) if callable(each) else each
        lines += ["step", "show", "update", "show"]
    return [*lines, "state", "report"]


# Ways through an iteration, with the options of the scaler.
WAYS = {
    "step": ("growth_interval 3", []),
    "unscale": ("growth_interval 3", ["unscale", "show"]),
    "clip": ("growth_interval 3", ["clip 0.05 2"]),
    "clip by other norms": (
        "growth_interval 3",
        lambda k: ["clip " + ("0.05 3", "0.02 inf", "3 0", "0.1 1", "9 0.5")[k % 5]],
    ),
    "clip by a tensor": ("", lambda k: [f"clip_by_tensor 0.05 2 {('f32', 'f64', 'f16', 'bf16')[k % 4]}"]),
    "clip twice": ("growth_interval 3", ["clip 0.05 2", "clip 0.03 2"]),
    "clip by several norms": ("growth_interval 3", ["clip 0.05 2", "clip 0.03 inf", "clip 0.02 1"]),
    "clip, unscale": ("growth_interval 3", ["clip 0.05 2", "unscale", "show"]),
    "clip twice, unscale": ("growth_interval 3", ["clip 0.05 2", "clip 0.02 1", "unscale", "show"]),
    "unscale, clip": ("growth_interval 3", ["unscale", "clip 0.05 2", "show"]),
    "clip, modify": ("growth_interval 3", ["clip 0.05 2", "grad 2 times 3.5"]),
    "clip twice, modify": ("growth_interval 3", ["clip 0.05 2", "clip 0.04 1", "grad 2 times 3.5"]),
    "clip, replace": ("", ["clip 0.05 2", "grad 2 double"]),
    "clip twice, replace": ("", ["clip 0.05 2", "clip 0.04 2", "grad 2 double"]),
    "clip, replace, remove": ("", ["clip 0.05 2", "grad 1 clone", "grad 0 none"]),
    "clip, overflow": ("", lambda k: ["clip 0.05 2", *(["grad 1 put 2 inf"] if k % 3 == 1 else [])]),
    "clip, scale": ("", lambda k: ["clip 0.05 2", f"load_scale {4096 >> k % 3}"]),
    "some gradients": ("", lambda k: [f"grad {k % 4} none"]),
    "headroom": ("policy headroom growth_interval 3", ["state"]),
    "headroom, clip": (
        "policy headroom growth_interval 3 headroom_bits 4",
        lambda k: ["clip 0.1 1", *(["unscale"] if k % 2 else [])],
    ),
    "headroom, clip twice": ("policy headroom", ["clip 0.1 1", "clip 0.05 2"]),
    "hysteresis": ("hysteresis 2 growth_interval 4", ["state"]),
    "hysteresis, good steps": ("hysteresis 3 hysteresis_refill good_step growth_interval 4", ["state"]),
    "disabled": ("enabled 0", ["clip 0.05 2", "unscale"]),
    "resume": (
        "hysteresis 3 growth_interval 4",
        lambda k: ["resume", "loss 1 f16"] if k % 5 == 3 else ["move"],
    ),
    "resume headroom": ("policy headroom", lambda k: ["resume", "loss 1 f16"] if k % 5 == 3 else []),
    "bounds": ("min_scale 16 max_scale 3e5 growth_interval 1", []),
}
FORMS = ("sparse", "expanded", "transposed", "gaps", "negated", "graph", "inference")
CALLS = (
    ["unscale", "show"],
    ["clip 0.05 2"],
    ["clip 0.05 1", "unscale"],
    ["clip 0.05 2", "clip 0.01 3"],
    [],
)


def same(program, *scripts, ignore=None):
    """Run the scripts in both languages; all answers are equal, but for matches of ``ignore``."""
    answers = program.run([["scaler_script", "\n".join(script)] for script in scripts])
    for script, answer in zip(scripts, (a for a in answers if not a.startswith("warning: ")), strict=True):
        found, wanted = answer.rstrip("\n").split("\n"), scaler_script.run(script)
        if ignore:
            found, wanted = ([re.sub(ignore, "", line) for line in lines] for lines in (found, wanted))
        assert found == wanted, "\n".join(difflib.unified_diff(wanted, found, "Python", "C++", lineterm=""))


def bits_of(optimizer):
    """Return what torch does otherwise in C++: its own Adam on 16-bit weights."""
    return r"(?<=param )(\S+ ?\d*\]) \w+" if optimizer == "adam" else None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_iterations(optimizer, way, program):
    options, each = WAYS[way]
    steps = 24 if way in LONG else 7
    scripts = [train(OPTIMIZERS[optimizer], options, steps, each, bad) for bad in BAD]
    same(program, *scripts, ignore=bits_of(optimizer))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_forms_of_gradients(optimizer, form, program):
    """Sparse ones with duplicates, expanded, with gaps, negated, with a graph, without a version counter."""
    if form == "sparse" and optimizer not in ("sgd", "fused_sgd"):
        pytest.skip("takes no sparse gradients")
    scripts = []
    for bad in ([], ["grad 0 put 0 inf"]):
        for calls in CALLS:
            each = [*bad, f"grad 0 {form}", *calls, "show"]
            scripts.append(train(OPTIMIZERS[optimizer], "growth_interval 3", 5, each))
    same(program, *scripts, ignore=bits_of(optimizer))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_gradients(optimizer, program):
    same(program, train(OPTIMIZERS[optimizer], "", 2, [f"grad {i} none" for i in range(4)]))


@pytest.mark.parametrize(
    "params", ["f64 3,4 f16 2,3 f64 5", "c64 3,4 c128 2,3 f16 5", "f32 0 bf16 3,0 f16 5"]
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_other_dtypes_and_sizes(optimizer, params, program):
    lines = ["options growth_interval 2", f"params {params}", f"optimizer {optimizer} 0.01 0 3", "loss 1 f64"]
    for k in range(10):
        clip = f"clip 0.01 {('1', '2', 'inf', '3', '0')[k % 5]}"
        lines += [f"grads {k}", *[clip] * (1 + k // 5), "show", "step", "show"]
        lines += ["update", "show"]
    same(program, lines)


@pytest.mark.parametrize("options", ["", "policy headroom"])
def test_two_optimizers(options, program):
    """One scale for both; each has its own report."""
    lines = [f"options {options}", PARAMS, "optimizer adamw 0.01 0 2", "optimizer sgd 0.1 2 4", "loss 1 f32"]
    for k in range(8):
        lines += [f"grads {k}", *([f"grad {k} put 0 inf"] if k < 4 else [])]
        lines += ["clip 0.01 2 0", "step 0", "step 1", "update", "show", "report 0", "report 1", "state"]
    same(program, lines)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_calls_out_of_order(optimizer, program):
    lines = ["unscale", "clip 1 2", "step", "update", "update 4", "loss 1 f32", "update", "grads 1"]
    lines += ["unscale", "unscale", "step", "step", "unscale", "clip 1 2", "update", "grads 1", "closure"]
    lines += ["clip -1 2", "clip nan 2", "clip 1 -1", "clip 1 nan", "state"]
    lines += [f"update {value}" for value in ("0", "-1", "nan", "inf", "1e39", "1e-45", "8")] + ["state"]
    lines += [f"update_by_tensor {value}" for value in ("16 1", "0 1", "inf 1", "16 2")] + ["state"]
    lines += [f"growth_factor {value}" for value in ("0.5", "inf", "nan", "1")]
    lines += [f"backoff_factor {value}" for value in ("0", "1", "1.5", "nan")]
    lines += [f"growth_interval {value}" for value in ("0", "5", "2147483648")] + ["state", "show"]
    same(program, ["options", PARAMS, OPTIMIZERS[optimizer], *lines], ignore=bits_of(optimizer))


OPTIONS = """
init_scale 0; init_scale nan; init_scale inf; init_scale 1e39; init_scale -2; max_scale nan; max_scale 1e39
growth_factor 1; growth_factor inf; growth_factor nan; backoff_factor 1; backoff_factor 0; backoff_factor nan
growth_interval 0; growth_interval 2147483648; min_scale 0; min_scale 1e-39; min_scale nan; max_scale 3
min_scale 8 max_scale 4; hysteresis 0; hysteresis_refill never; on_floor cry; policy other
policy headroom hysteresis 2; policy headroom hysteresis_refill good_step; policy headroom growth_factor 3
policy headroom backoff_factor 0.25; headroom_bits 3; headroom_bits 15; policy headroom headroom_bits 14
policy headroom min_scale 5 max_scale 7 init_scale 6; enabled 0 init_scale 0 growth_factor 0
enabled 0 hysteresis 0
"""


def test_options(program):
    rest = ["growth_factor 3", "backoff_factor 0.25", "state", "loss 3 f16"]
    every = [options.strip() for options in OPTIONS.replace("\n", ";").split(";") if options.strip()]
    same(program, *([f"options {options}", *rest] for options in every))


def test_an_overflow_at_the_floor(program):
    bounds = ("min_scale 1024", "min_scale 1e-10 backoff_factor 0.1", "min_scale 1e-10 policy headroom")
    options = [f"{bound} init_scale 4096 on_floor raise" for bound in bounds]
    same(program, *(train(OPTIMIZERS["adamw"], o, bad=range(24)) for o in options))


@pytest.mark.parametrize(
    "params", ["f16 3,4 bf16 5 f32 2,3", "f64 3,4 bf16 2,3 f16 5", "c64 3,4 c128 2,3 f16 5"]
)
def test_clip_grad_norm_(params, program):
    lines = [f"params {params}"]
    for k, norm in enumerate(("0", "1", "2", "3", "inf", "0.5")):
        lines += [f"grads {k}", f"clip_params 1 {norm}", f"clip_params 1e3 {norm}", "show"]
    for form in ("gaps", "negated", "conj", "transposed", "sparse", "inference"):
        lines += ["grads 1", f"grad 0 {form}", "clip_params 0.1 2", "show", "clip_params 0.05 inf", "show"]
    lines += ["grads 2", "grad 1 put 0 inf", "clip_params 1 2 finite", "clip_params 1 inf finite", "show"]
    lines += ["clip_params 1 2", "show", "clip_params -1 2", "clip_params nan 2", "clip_params 1 nan"]
    same(program, [*lines, *(f"grad {i} none" for i in range(3)), "clip_params 1 2"])


STATE = dict(scale=32.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=7, _growth_tracker=3)
STATES = [
    ("", {}),
    ("hysteresis 3", {}),
    ("max_scale 1000 init_scale 8", dict(scale=1e9)),
    ("", dict(scale=32, growth_factor=3)),
    ("", dict(growth_interval=7.0, _growth_tracker=3.0)),
    ("", dict(_hysteresis_tracker=2)),
    *(("hysteresis 3", dict(_hysteresis_tracker=left)) for left in (2, 5, None, -1, 1.5)),
    *(("", dict(scale=v)) for v in (0.0, -1.0, float("nan"), float("inf"), 1e39, "x", True, None)),
    *(("", dict(scale=torch.tensor(v))) for v in (8.0, 3, True, [8.0, 3.0])),
    *(("", dict(growth_factor=v)) for v in (0.5, "2", torch.tensor(4.0))),
    *(("", dict(backoff_factor=v)) for v in (2, 0.0)),
    *(("", dict(growth_interval=v)) for v in (0, 2.5, None)),
    *(("", dict(_growth_tracker=v)) for v in (-1, 2**31 - 1, None)),
]
HEADROOM = [
    *([], [0] * 4, [1, 2, 3, 64, -3, 4, 5], [0, 0, 0, 0, -40, 23], [0] * 516, (0, 0, 0, 0, 1)),
    *([0] * 3, [0] * 517, [4, 0, 0, 0], [0, 2**31 - 1, 0, 0], [0, 0, 0, -1], [0, 0, 0, 0, 24]),
    *([0, 0, 0, 0.5], [True, 0, 0, 0], ["a", 0, 0, 0], "x", None),
]


def test_states(program, tmp_path):
    """Loading is all or nothing, before and after the first loss; torch's states are like the first one."""
    states = [(options, STATE | changes) for options, changes in STATES]
    states += [("", {k: v for k, v in STATE.items() if k != name}) for name in STATE]
    states += [("", {}), ("enabled 0", {}), ("enabled 0", STATE)]
    for saved in HEADROOM:
        states += [(options, STATE | dict(_headroom=saved)) for options in ("policy headroom", "")]
    scripts = []
    for i, (options, state) in enumerate(states):
        torch.save(state, tmp_path / f"{i}.pt")
        load = [f"load {tmp_path}/{i}.pt", "state", "loss 1 f32"]
        scripts.append([f"options {options}", *load, *load, "resume", "state"])
    same(program, *scripts)


def test_a_full_window(program, tmp_path):
    """The policy "headroom" keeps the exponents of 512 steps; the oldest makes room."""
    saved = [0, 1, 2, 64, *(k % 7 - 12 for k in range(512))]
    torch.save(STATE | dict(_headroom=saved), tmp_path / "state.pt")
    lines = [
        "options policy headroom",
        PARAMS,
        OPTIMIZERS["adamw"],
        f"load {tmp_path}/state.pt",
        "loss 1 f32",
    ]
    for k in range(4):
        lines += [f"grads {k}", "step", "update", "state", *["resume", "state", "loss 1 f32"] * (k == 1)]
    same(program, lines)


def test_states_of_training(program, tmp_path):
    """A state that was saved in one language goes on in the other."""
    path = tmp_path / "state.pt"
    for options in ("hysteresis 3 growth_interval 4", "policy headroom growth_interval 4"):
        start = train(OPTIMIZERS["adamw"], options, 9, bad=(2, 3))
        end = train(OPTIMIZERS["adamw"], options, 9, lambda k: [f"load {path}"] if k == 0 else [], (4,))
        same(program, [*start, f"save {path}"])  # Python's is the last one
        wanted = torch.load(path, weights_only=True)
        same(program, end)
        program.run([["scaler_script", "\n".join([*start, f"save {path}"])]])
        assert torch.load(path, weights_only=True) == wanted


@pytest.mark.parametrize(
    "check",
    [
        *("never waits", "in inference mode", "builds no graph", "moves", "lifetimes", "names", "closures"),
        *("archives", "counts later", "many sets", "replaced parameters", "arguments", "warns once"),
    ],
)
def test_in_cpp_alone(check, program):
    assert program.run([["scaler_check", check]])[-1] == ""
