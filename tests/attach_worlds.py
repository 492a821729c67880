"""Parameters, optimizer and scaler, attached or not, and a record of what was read when."""

import torch
from cases import bits
from fusedamp import GradScaler, ops, optim
from on_device import DEVICE

OPTIMIZERS = {
    "AdamW": lambda p: optim.AdamW(p, lr=0.1),
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "torch's fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}
SIZES = [(5, 3), (), (0,), (70_000,), (7,)]  # 0-dim, empty, and several chunks of the engine
MIXED = [torch.float16, torch.float32, torch.float32, torch.bfloat16, torch.float64]


class World:
    """Parameters whose gradients backward makes, with optimizer and scaler."""

    def __init__(self, attached, make=OPTIMIZERS["AdamW"], dtypes=MIXED, scale=4.0, **options):
        generator = torch.Generator().manual_seed(1)
        self.params = [
            torch.randn(size, generator=generator).to(dtype).requires_grad_()
            for size, dtype in zip(SIZES, dtypes, strict=True)
        ]
        self.optimizer = make(self.params)
        self.scaler = GradScaler(DEVICE, init_scale=scale, growth_interval=2)
        self.handle = self.scaler.attach(self.optimizer, **{"min_numel": 0, **options}) if attached else None

    def backward(self, factor=1.0, without=()):
        loss = sum(
            (p * (p.detach() + i)).sum().double() for i, p in enumerate(self.params) if i not in without
        )
        self.scaler.scale(loss * factor).backward()

    def finish(self, clip=None, norm_type=2.0):
        norm = None if clip is None else self.scaler.clip_grad_norm_(self.optimizer, clip, norm_type)
        self.scaler.step(self.optimizer)
        skipped, report = self.scaler.last_step_skipped.item(), self.scaler.overflow_report()
        self.scaler.update()
        return norm if norm is None else bits(norm), skipped, report, self.scaler.get_scale()

    def everything(self):
        states = [v for s in self.optimizer.state.values() for v in s.values()]
        return [bits(t) for t in (*self.params, *states)]


def record_reads(monkeypatch):
    """The gradients that each read pass was given, by their address; sums of results are not read passes."""
    record, real = [], ops._grad_stats

    def spy(grads, inv_scale=None, *rest):
        if inv_scale is not None:
            record.append([grad.data_ptr() for grad in grads])
        return real(grads, inv_scale, *rest)

    monkeypatch.setattr(ops, "_grad_stats", spy)
    return record
