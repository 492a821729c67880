"""What a watch should count, computed with NumPy, and training loops that say what they did."""

import math

import numpy as np
import torch
from fusedamp import GradScaler, optim
from fusedamp.ops.recode import master_of
from fusedamp.optim.state.encoded import plain
from torch import nn

SIZES = {"a": (37,), "b": (), "c": (5, 3), "d": (0,), "e": (130,)}


def exponents(values):
    """floor(log2 |x|), exactly: of FP64 numbers that are neither 0 nor infinite."""
    return np.frexp(values)[1] - 1


def histogram(tensor):
    """Elements of each bin. 0: zeros; 1: below 2^-40; then binades; 62: from 2^20; 63: inf and NaN."""
    values = tensor.detach().double().abs().flatten().numpy()
    bins = np.zeros(values.shape, dtype=np.int64)
    finite = np.isfinite(values) & (values > 0)
    bins[finite] = np.clip(exponents(values[finite]), -41, 20) + 42
    bins[~np.isfinite(values)] = 63
    return torch.from_numpy(np.bincount(bins, minlength=64))


def bin_of(value):
    return int(histogram(torch.tensor([value])).argmax())


def largest(tensor):
    values = tensor.detach().double().abs().flatten()
    return math.inf if not values.isfinite().all() else values.max().item() if values.numel() else 0.0


def moved_and_lost(old, new, weight):
    """How many of ``old`` (masters or FP32 weights) changed, and how many of these a 16-bit weight loses."""
    update = new - old
    moves = new != old
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return int(moves.sum()), 0
    stays = (weight.float() + update).to(weight.dtype).view(torch.int16) == weight.view(torch.int16)
    return int(moves.sum()), int((moves & stays).sum())


def model_of(dtypes, seed=0):
    """A module with parameters of several sizes, one dtype each, in turn."""
    torch.manual_seed(seed)
    model = nn.Module()
    for i, (name, shape) in enumerate(SIZES.items()):
        model.register_parameter(name, nn.Parameter(torch.randn(shape).to(dtypes[i % len(dtypes)])))
    return model


class Loop:
    """Trains with made-up gradients, and keeps what each step did.

    Args:
        drive: how a step is made: "fused", "clip", "unscale", "hook" (fusedamp's scaler), "torch" (torch's
            scaler), "none" (no scaler), "disabled" (a scaler that is off).
        bad: numbers of steps whose gradients overflow, with a scaler.
    """

    def __init__(self, drive, make, dtypes, bad=(), scale=8.0):
        self.drive = drive
        self.bad = () if drive in ("none", "disabled") else bad  # NaN would stay in the weights
        self.model = model_of(dtypes)
        self.optimizer = make(list(self.model.parameters()))
        kind = torch.amp.GradScaler if drive == "torch" else GradScaler
        self.scaler = None
        if drive != "none":
            self.scaler = kind("cpu", init_scale=scale, growth_interval=3, enabled=drive != "disabled")
        if drive == "hook":
            self.optimizer.register_step_pre_hook(lambda *_: None)
        self.generator = torch.Generator().manual_seed(1)
        self.steps = []

    def step(self):
        number, scale = len(self.steps) + 1, 1.0
        if self.scaler is not None:
            self.scaler.scale(torch.zeros(()))
            scale = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
        grads, before = {}, {}
        for i, (name, param) in enumerate(self.model.named_parameters()):
            spread = (torch.randn(param.shape, generator=self.generator) * 12).clamp(max=15)
            grad = torch.randn(param.shape, generator=self.generator) * 2.0**-10 * spread.exp2()
            param.grad = (grad * scale).to(param.dtype)
            if param.numel() > 3 and number % 2:
                param.grad.view(-1)[:3] = torch.tensor([0.0, -0.0, 2.0**-24])
            if number in self.bad and i == 2:
                param.grad.view(-1)[1] = math.nan
            grads[name], before[name] = param.grad.clone(), (self.value(param), param.detach().clone())
        skipped = number in self.bad
        self.run()
        after = {name: self.value(param) for name, param in self.model.named_parameters()}
        self.steps.append(dict(grads=grads, before=before, after=after, scale=scale, skipped=skipped))

    def run(self):
        optimizer, scaler = self.optimizer, self.scaler
        if scaler is None:
            optimizer.step()
            return
        if self.drive == "clip":
            scaler.clip_grad_norm_(optimizer, 1.0)
        if self.drive == "unscale":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    def value(self, param):
        """The FP32 or FP64 number that a step updates."""
        master = self.optimizer.state.get(param, {}).get("master")
        if master is not None:
            return master_of(param.detach(), plain(master))
        return param.detach().to(torch.promote_types(param.dtype, torch.float32), copy=True)

    def check(self, record, updates=True):
        """Compare a record with what its step did."""
        step = self.steps[record.step - 1]
        assert record.names == tuple(SIZES)
        assert record.scale == step["scale"]
        assert record.skipped == step["skipped"]
        for i, name in enumerate(record.names):
            grad, (old, weight), new = step["grads"][name], step["before"][name], step["after"][name]
            assert record.numel[i] == grad.numel()
            assert torch.equal(record.histogram[i], histogram(grad)), name
            assert record.largest[i].item() == largest(grad)
            if grad.isfinite().all():
                norm = (grad.double() / step["scale"]).norm().item()
                assert math.isclose(record.norm[i].item(), norm, rel_tol=1e-5)
            else:
                assert not math.isfinite(record.norm[i].item())
            if not updates or step["skipped"]:
                continue
            moved, lost = moved_and_lost(old, new, weight)
            assert (record.moved[i].item(), record.lost[i].item()) == (moved, lost), name
            for got, wanted in ((record.update_norm[i], new - old), (record.weight_norm[i], old)):
                assert math.isclose(got.item(), wanted.double().norm().item(), rel_tol=1e-6), name
        if not updates or step["skipped"]:
            assert record.moved is None


FUSED = {
    "AdamW": lambda p: optim.AdamW(p, lr=1e-3),
    "SGD": lambda p: optim.SGD(p, lr=1e-3, momentum=0.9),
    "LAMB": lambda p: optim.LAMB(p, lr=1e-3),
    "split": lambda p: optim.AdamW(p, lr=1e-3, master_weights="split"),
    "two rules": lambda p: optim.RMSprop(
        [{"params": p[:2], "centered": True}, {"params": p[2:3]}, {"params": p[3:], "momentum": 0.9}], lr=1e-3
    ),
}


TORCHS = {
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}
MIXED = [torch.float16, torch.float32, torch.bfloat16]
ROUTES = ["fused", "clip", "unscale", "hook", "torch", "none", "disabled"]


def dtypes_of(drive):
    # torch's scaler unscales no FP16 gradients.
    return [torch.bfloat16, torch.float32] if drive == "torch" else MIXED
