"""Carries out a script about a GradScaler, one command a line, in Python.

tests/cpp/program/scaler_script.cpp does so in C++. The answers are lines, with hashes of all bits of tensors.
"""

import math
import warnings

import torch
from fusedamp import GradScaler, clip_grad_norm_
from fusedamp.optim import SGD, AdamW

DTYPES = dict(
    f16=torch.float16,
    bf16=torch.bfloat16,
    f32=torch.float32,
    f64=torch.float64,
    c64=torch.complex64,
    c128=torch.complex128,
)
WHOLE = ("growth_interval", "hysteresis", "headroom_bits")
TEXT = ("hysteresis_refill", "on_floor", "policy")


class Reading(AdamW):
    out: list[str] = []

    def step(self, closure=None):
        grad = self.param_groups[0]["params"][0].grad
        self.out.append(f"read {0 if grad is None else grad.sum().double().item():.17g}")
        return super().step(closure)


def bits(tensor):
    if tensor is None:
        return "none"
    plain = tensor.detach()
    if plain.is_sparse:
        plain = plain.coalesce()._values()
    plain = plain.resolve_conj().resolve_neg().contiguous()
    found = 0xCBF29CE484222325
    for byte in bytes(plain.reshape(-1).view(torch.uint8).tolist()) if plain.numel() else b"":
        found = (found ^ byte) * 0x100000001B3 % 2**64
    return f"{str(plain.dtype)[6:]}{list(plain.shape)} {found:x}"


class Program:
    def __init__(self):
        self.options = {}
        self.scaler = GradScaler("cpu")
        self.params, self.optimizers, self.out = [], [], []

    def values(self, seed, shape):
        n = math.prod(shape)
        return torch.tensor(
            [((i * 37 + seed * 101) % 97 - 48) / 1024.0 for i in range(n)], dtype=torch.float64
        ).reshape(shape)

    def optimizer(self, words, at):
        return self.optimizers[int(words[at]) if len(words) > at else 0]

    def do_options(self, words):
        pairs = dict(zip(words[1::2], words[2::2], strict=True))
        self.options = {
            name: int(v)
            if name in WHOLE
            else v
            if name in TEXT
            else v == "1"
            if name == "enabled"
            else float(v)
            for name, v in pairs.items()
        }
        self.scaler = GradScaler("cpu", **self.options)

    def do_params(self, words):
        self.params = []
        for i in range(1, len(words) - 1, 2):
            shape = [int(size) for size in words[i + 1].split(",") if size != "-"]
            self.params.append(self.values(i, shape).to(DTYPES[words[i]]).requires_grad_())

    def do_optimizer(self, words):
        mine, lr = self.params[int(words[3]) : int(words[4])], float(words[2])
        self.optimizers.append(
            {
                "adamw": lambda: AdamW(mine, lr=lr, weight_decay=0.125),
                "fused_sgd": lambda: SGD(mine, lr=lr, momentum=0.5),
                "reading": lambda: Reading(mine, lr=lr, weight_decay=0.125),
                "sgd": lambda: torch.optim.SGD(mine, lr=lr, foreach=False),
                "adam": lambda: torch.optim.Adam(mine, lr=lr, foreach=False),
            }[words[1]]()
        )
        Reading.out = self.out

    def do_drop(self, words):
        self.optimizers.clear()

    def do_grads(self, words):
        factor = (float(words[2]) if len(words) > 2 else 1.0) * self.scaler.get_scale()
        for i, param in enumerate(self.params):
            grad = (self.values(int(words[1]) * 7 + i + 3, param.shape) * factor).to(param.dtype)
            param.grad = grad * (1 - 0.5j) if param.is_complex() else grad

    @torch.no_grad()
    def do_grad(self, words):
        param, how = self.params[int(words[1])], words[2]
        grad = param.grad
        if how == "none":
            param.grad = None
        elif how == "put":
            grad.view(-1)[int(words[3])].fill_(float(words[4]))
        elif how == "times":
            grad.mul_(float(words[3]))
        elif how == "double":
            param.grad = grad * 2
        elif how == "clone":
            param.grad = grad.clone()
        elif how == "sparse":
            param.grad = torch.sparse_coo_tensor(torch.tensor([[0, 1, 1]]), grad[:3].clone(), grad.shape)
        elif how == "csr":
            param.grad = grad.to_sparse_csr()
        elif how == "expanded":
            param.grad = grad[:1].clone().expand(grad.shape)
        elif how == "transposed":
            param.grad = grad.t().contiguous().t()
        elif how == "gaps":
            param.grad = torch.zeros(grad.shape[0], 2 * grad.shape[1], dtype=grad.dtype)[:, ::2].copy_(grad)
        elif how == "conj":
            param.grad = grad.conj().resolve_conj().conj()
        elif how == "negated":
            param.grad = torch._neg_view(grad.neg())
        elif how == "graph":
            with torch.enable_grad():
                param.grad = grad.clone().requires_grad_() * 1.0
        elif how == "inference":
            with torch.inference_mode():
                param.grad = grad.clone()

    def do_loss(self, words):
        self.out.append(
            f"loss {bits(self.scaler.scale(torch.full((), float(words[1])).to(DTYPES[words[2]])))}"
        )

    def do_unscale(self, words):
        self.scaler.unscale_(self.optimizer(words, 1))

    def do_clip(self, words):
        norm = self.scaler.clip_grad_norm_(self.optimizer(words, 3), float(words[1]), float(words[2]))
        self.out.append(f"norm {bits(norm)}")

    def do_clip_by_tensor(self, words):
        most = torch.full((1,), float(words[1])).to(DTYPES[words[3]])
        self.out.append(
            f"norm {bits(self.scaler.clip_grad_norm_(self.optimizer(words, 4), most, float(words[2])))}"
        )

    def do_clip_params(self, words):
        finite = len(words) > 3 and words[3] == "finite"
        self.out.append(
            f"norm {bits(clip_grad_norm_(self.params, float(words[1]), float(words[2]), finite))}"
        )

    def do_step(self, words):
        self.scaler.step(self.optimizer(words, 1))

    def do_closure(self, words):
        self.scaler.step(self.optimizer(words, 1), closure=lambda: None)

    def do_update(self, words):
        self.scaler.update(*map(float, words[1:]))

    def do_update_by_tensor(self, words):
        self.scaler.update(torch.full((int(words[2]),), float(words[1])))

    def do_growth_factor(self, words):
        self.scaler.set_growth_factor(float(words[1]))

    def do_backoff_factor(self, words):
        self.scaler.set_backoff_factor(float(words[1]))

    def do_growth_interval(self, words):
        self.scaler.set_growth_interval(int(words[1]))

    def do_show(self, words):
        self.out.append(f"scale {self.scaler.get_scale()!r} skipped {int(self.scaler.last_step_skipped)}")
        self.out += [f"param {bits(param)} grad {bits(param.grad)}" for param in self.params]
        self.out += str(self.scaler.overflow_report()).split("\n")

    def do_report(self, words):
        self.out += str(self.scaler.overflow_report(self.optimizer(words, 1))).split("\n")

    def do_state(self, words):
        self.out += [f"state {name} {value!r}" for name, value in self.scaler.state_dict().items()]

    def do_move(self, words):
        pass

    def do_resume(self, words):
        state = self.scaler.state_dict()
        self.scaler = GradScaler("cpu", **self.options)
        self.scaler.load_state_dict(state)

    def do_save(self, words):
        torch.save(self.scaler.state_dict(), words[1])

    def do_load_scale(self, words):
        state = self.scaler.state_dict()
        if state:
            self.scaler.load_state_dict(state | {"scale": float(words[1])})

    def do_load(self, words):
        self.scaler.load_state_dict(torch.load(words[1], weights_only=True))


def run(commands: list[str]) -> list[str]:
    """Return the answers to ``commands``."""
    program = Program()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _run(program, commands)


def _run(program: Program, commands: list[str]) -> list[str]:
    for line in commands:
        words = line.split()
        program.out.append(f"> {line}")
        try:
            getattr(program, "do_" + words[0])(words)
        except KeyError as error:
            wanted = "expected all entries that state_dict() returns. Load a whole state."
            program.out.append(f"ValueError: [GradScaler] state_dict has no {error}; {wanted}")
        except (ValueError, TypeError) as error:
            program.out += f"{type(error).__name__}: {error}".split("\n")
        except (RuntimeError, AssertionError) as error:
            program.out += f"Error: {error}".split("\n")
    return program.out
