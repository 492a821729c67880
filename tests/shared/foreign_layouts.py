"""Optimizer checkpoints in the layouts of other libraries, made by hand from a run of fusedamp's AdamW."""

import torch
from cases import make_params
from fusedamp import optim

OPTIONS = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
SHAPES = [(7,), (), (3, 5), (0,), (257,), (33, 1, 31)]


def grads(seed):
    return [p.detach() for p in make_params(torch.float32, SHAPES, seed=seed + 10)]


def advance(params, optimizer, steps, dtype=torch.float32):
    """Steps with the gradients of each step number, rounded to ``dtype``."""
    for step in steps:
        for p, grad in zip(params, grads(step), strict=True):
            p.grad = grad.to(dtype).to(p.dtype)
        optimizer.step()


def reference(dtype=torch.float32, steps=4):
    """Return parameters and optimizer of a run in FP32, whose gradients are those of ``dtype``."""
    params = make_params(torch.float32, SHAPES)
    optimizer = optim.AdamW(params, **OPTIONS)
    advance(params, optimizer, range(steps), dtype)
    return params, optimizer


def states(params, optimizer):
    return [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]


def half(params, dtype):
    return [torch.nn.Parameter(p.detach().to(dtype)) for p in params]


def group_of(count, **options):
    return {**OPTIONS, "params": list(range(count)), **options}


def apex(params, optimizer, **options):
    """Apex FusedAdam: the step count is an option of the group; its checkpoint has no masters."""
    entries = {
        i: {k: v for k, v in e.items() if k in ("exp_avg", "exp_avg_sq")}
        for i, e in enumerate(states(params, optimizer))
    }
    group = group_of(len(params), bias_correction=True, step=4, **options)
    return {"state": entries, "param_groups": [group]}


def te_split(master):
    """TransformerEngine's rule: the upper half, one more if the lower half is negative as int16."""
    bits = master.view(torch.int32)
    low = (bits & 0xFFFF).to(torch.int16)
    high = (bits >> 16) + (low < 0)
    return high.to(torch.int16).view(torch.bfloat16), low


def te_joined(weight, low):
    high = weight.view(torch.int16).to(torch.int32) - (low < 0).to(torch.int32)
    return ((high << 16) | (low.to(torch.int32) & 0xFFFF)).view(torch.float32)


def te(params, optimizer, remainders):
    saved = apex(params, optimizer)
    for i, p in enumerate(params):
        master = p.detach().clone()
        saved["state"][i]["master_param"] = te_split(master)[1] if remainders else master
    return saved


def deepspeed(params, optimizer, padding=3):
    """FP16_Optimizer: flat tensors of a group, padded."""

    def flat(tensors):
        return torch.cat([*(t.detach().reshape(-1) for t in tensors), torch.zeros(padding)])

    entries = states(params, optimizer)
    state = {k: flat([e[k] for e in entries]) for k in ("exp_avg", "exp_avg_sq")}
    inner = {"state": {0: state}, "param_groups": [group_of(1, bias_correction=True, step=4)]}
    return {"optimizer_state_dict": inner, "fp32_groups_flat": [flat(params)], "cur_scale": 1024.0}


def bnb(params, optimizer, nested, change=lambda entry: entry):
    entries = {}
    for i, e in enumerate(states(params, optimizer)):
        found = change({"state1": e["exp_avg"], "state2": e["exp_avg_sq"]})
        entries[i] = {"step": 4, **({"__bnb_optimizer_quant_state__": found} if nested else found)}
    return {"state": entries, "param_groups": [group_of(len(params), alpha=0.0, t_alpha=None, t_beta3=None)]}


def optimi(params, optimizer, dtype, **options):
    """optimi divides the stored averages by 1 - beta^step, and keeps the rounding error of weights."""
    entries = {}
    for i, (p, e) in enumerate(zip(params, states(params, optimizer), strict=True)):
        entries[i] = {"exp_avg": e["exp_avg"] / (1 - 0.8**4), "exp_avg_sq": e["exp_avg_sq"] / (1 - 0.95**4)}
        weight = p.detach().to(dtype)
        error = (p.detach() - weight.float()).to(dtype) if dtype != torch.float32 else None
        entries[i]["kahan_comp"] = error
    group = group_of(len(params), beta1=0.8, beta2=0.95, step=torch.tensor(4, dtype=torch.int32))
    del group["betas"]
    group |= dict(decouple_wd=True, decouple_lr=False, max_lr=None, kahan_sum=True, foreach=False)
    return {
        "state": entries,
        "param_groups": [{**group, "triton": False, "gradient_release": False, **options}],
    }


class Dequantizing(torch.Tensor):
    """What convert uses of torchao's subclasses: ``codes`` and ``dequantize()``."""

    def dequantize(self):
        return self.codes * 2.0


def torchao(params, optimizer):
    entries = {}
    for i, e in enumerate(states(params, optimizer)):
        entries[i] = {"step": torch.tensor(4.0)}
        for name in ("exp_avg", "exp_avg_sq"):
            wrapped = torch.zeros_like(e[name]).as_subclass(Dequantizing)
            wrapped.codes = e[name] / 2
            entries[i][name] = wrapped
    group = group_of(len(params), lr=torch.tensor(1e-2, dtype=torch.float64), amsgrad=False)
    return {"state": entries, "param_groups": [group]}


LAYOUTS = {
    "apex": apex,
    "te": lambda *made: te(*made, True),
    "deepspeed": deepspeed,
    "bitsandbytes": lambda *made: bnb(*made, True),
    "optimi": lambda *made: optimi(*made, torch.float32),
    "torchao": torchao,
}
