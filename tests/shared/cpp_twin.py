"""Carries out the commands of tests/cpp/program in Python, and compares what both saw."""

import inspect
import re
import warnings
from functools import cache
from typing import Any

import torch
from cases import kept
from fusedamp import optim
from fusedamp.optim.state.encoded import plain

# Options of Python's groups that are accepted without effect.
NO_EFFECT = {"foreach", "fused", "capturable", "differentiable"}


class World:
    """What a case has. A command is a method; ``seen`` has its results and errors."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.optimizers: dict[str, Any] = {}
        self.seen: list[Any] = []

    def run(self, commands: list) -> list:
        for name, *args in commands:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    getattr(self, f"do_{name}")(*args)
                except (ValueError, TypeError, RuntimeError) as error:
                    kind = next(k for k in (ValueError, TypeError, RuntimeError) if isinstance(error, k))
                    caught_error = f"{kind.__name__}: {error}"
                else:
                    caught_error = None
            self.seen += [f"warning: {w.message}" for w in caught if w.category is UserWarning]
            if caught_error:
                self.seen.append(caught_error)
        return self.seen

    def all(self, names):
        return [self.tensors[name] for name in names]

    def optimizer(self, name):
        if name not in self.optimizers:  # its options were refused
            raise RuntimeError(f"no optimizer {name}")
        return self.optimizers[name]

    # Parameters and gradients

    def do_param(self, name, value):
        self.tensors[name] = parameter(snapshot(value))

    def do_param_view(self, name, value):
        self.tensors[name] = parameter(value)

    def do_meta(self, name):
        self.tensors[name] = parameter(torch.empty(3, device="meta"))
        self.tensors[name].grad = torch.empty(3, device="meta")

    def do_no_storage(self, name):
        self.tensors[name].untyped_storage().resize_(0)

    def do_part(self, name, whole, begin, end):
        self.tensors[name] = parameter(self.tensors[whole].detach()[begin:end])

    def do_grads(self, grads):
        for name, grad in grads.items():
            self.tensors[name].grad = grad

    def do_form(self, name, how):
        param = self.tensors[name]
        grad = param.grad
        param.grad = {
            "sparse": lambda: grad.to_sparse(1),
            "transposed": lambda: grad.t().contiguous().t(),
            "expanded": lambda: grad[:1].expand_as(grad),
            "gaps": lambda: torch.stack((grad, grad), -1)[..., 0],
            "conj": lambda: grad.conj().resolve_conj().conj(),
            "negated": lambda: torch._neg_view(grad.neg()),
        }[how]()

    def do_alias(self, name, other):
        param = self.tensors[name]
        param.grad = self.tensors[other].detach()[: len(param)]

    @torch.no_grad()
    def do_write(self, name, value):
        self.tensors[name].copy_(value)

    def do_set_data(self, name, value):
        self.tensors[name].data = snapshot(value)

    def do_reset(self):
        self.tensors, self.optimizers = {}, {}

    def do_echo(self, value):
        self.seen.append(value)

    def do_forget(self, name):
        del self.tensors[name]

    # Optimizers

    def group(self, kind, names, options):
        group = {"params": self.all(names)}
        if options is not None:  # whole in C++: what is not given has the class's default
            parameters = inspect.signature(kind).parameters
            defaults = {k: p.default for k, p in parameters.items() if k not in ("params", "storage")}
            group |= {k: options.get(k, v) for k, v in defaults.items()}
        return group

    def do_optimizer(self, name, kind, groups, defaults):
        cls = getattr(optim, kind)
        self.optimizers[name] = cls([self.group(cls, *group) for group in groups], **defaults)

    def do_step(self, name):
        self.optimizer(name).step()

    def do_look(self, name, names):
        state = self.optimizer(name).state
        for param in self.all(names):
            self.seen.append({"weight": snapshot(param), **snapshots(kept(state.get(param, {})))})

    def do_weights(self, names):
        self.seen.append([snapshot(param) for param in self.all(names)])

    def do_options(self, name, group, options):
        self.optimizer(name).param_groups[group].update(options)

    def do_set_options(self, name, group, _, options):
        optimizer = self.optimizer(name)
        old = optimizer.param_groups[group]
        new = self.group(type(optimizer), [], options)
        old.update(new | {"params": old["params"]})

    def do_lr(self, name, group, lr):
        group = self.optimizer(name).param_groups[group]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

    def do_add_group(self, name, group):
        self.optimizer(name).add_param_group(self.group(type(self.optimizer(name)), *group))

    def do_move(self, name):
        pass

    def do_state_dict(self, name):
        self.seen.append(snapshots(self.optimizer(name).state_dict()))

    def do_load_state_dict(self, name, value):
        self.optimizer(name).load_state_dict(value)

    def do_archive(self, name, other):
        self.optimizer(other).load_state_dict(self.optimizer(name).state_dict())

    # What other code may do between two steps

    def do_replace(self, name, group, i, other):
        self.optimizer(name).param_groups[group]["params"][i] = self.tensors[other]

    def do_swap(self, name, group):
        params = self.optimizer(name).param_groups[group]["params"]
        params[0], params[1] = params[1], params[0]

    def do_remove(self, name, group, i):
        del self.optimizer(name).param_groups[group]["params"][i]

    def do_erase_state(self, name, param):
        del self.optimizer(name).state[self.tensors[param]]

    def do_clear_state(self, name):
        self.optimizer(name).state.clear()

    def do_write_state(self, name, param, key, value):
        plain(self.optimizer(name).state[self.tensors[param]][key]).copy_(value)

    def do_set_state_data(self, name, param, key, value):
        self.optimizer(name).state[self.tensors[param]][key].data = snapshot(value)

    def do_step_in_inference_mode(self, name):
        with torch.inference_mode():
            self.optimizer(name).step()

    def do_closure(self, name, param):
        def closure():
            self.optimizer(name).zero_grad()
            loss = self.tensors[param].pow(2).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            self.seen.append(snapshot(self.optimizer(name).step(closure)))


def parameter(tensor):
    """A parameter that takes gradients of any dtype, as in C++."""
    made = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())
    made.grad_dtype = None
    return made


def snapshot(tensor):
    """A copy with the same values and strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())


def snapshots(value):
    """Copies of all tensors in a value of dicts and lists."""
    if isinstance(value, torch.Tensor):
        return snapshot(value)
    if isinstance(value, dict):
        return {k: snapshots(v) for k, v in value.items()}
    return type(value)(map(snapshots, value)) if isinstance(value, (list, tuple)) else value


def describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)} {value.stride()} {value.flatten()[:8].tolist()}"
    return repr(value)[:2000]


def difference(cpp: Any, python: Any, where: str = "seen") -> str:
    """Return where and how two results differ; empty if all bits are equal."""
    if isinstance(cpp, torch.Tensor) and isinstance(python, torch.Tensor):
        same = cpp.dtype == python.dtype and cpp.shape == python.shape
        same = same and (cpp.numel() == 0 or cpp.stride() == python.stride())
        if same and torch.equal(
            *(t.detach().contiguous().flatten().view(torch.uint8) for t in (cpp, python))
        ):
            return ""
    elif isinstance(cpp, dict) and isinstance(python, dict):
        if cpp.keys() <= python.keys() and python.keys() - cpp.keys() <= NO_EFFECT:
            return next(filter(None, (difference(cpp[k], python[k], f"{where}[{k!r}]") for k in cpp)), "")
        return f"{where}: keys {list(cpp)} of C++, {list(python)} of Python"
    elif isinstance(cpp, (list, tuple)) and type(cpp) is type(python):
        items = enumerate(zip(cpp, python, strict=False))
        found = next(filter(None, (difference(c, p, f"{where}[{i}]") for i, (c, p) in items)), "")
        return found or (
            "" if len(cpp) == len(python) else f"{where}: {len(cpp)} of C++, {len(python)} of Python"
        )
    elif isinstance(cpp, str) and isinstance(python, str):
        if without_addresses(cpp) == without_addresses(python):
            return ""
    elif (type(cpp) is type(python) or {type(cpp), type(python)} == {int, float}) and (
        cpp == python or (cpp != cpp and python != python)
    ):
        return ""
    return f"{where}:\n  C++    {describe(cpp)}\n  Python {describe(python)}"


def without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x...", text)


def same(program: Any, commands: list) -> list:
    """Carry out ``commands`` in both languages; all that they see is equal. Returns it."""
    cpp, python = program.run(commands), World().run(commands)
    assert (found := difference(cpp, python)) == "", found
    return cpp


# Commands that many cases have


@cache  # a file has an object once
def random(shape, dtype: torch.dtype, seed: int, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kind = torch.complex64 if dtype.is_complex else torch.float32
    return (torch.randn(shape, generator=generator, dtype=kind) * size).to(dtype)


def params(shapes: list, dtype: torch.dtype, first: int = 0) -> list:
    """Commands that make the parameters p0, p1 ..."""
    return [["param", f"p{first + i}", random(s, dtype, first + i)] for i, s in enumerate(shapes)]


def grads(shapes: list, dtype: torch.dtype, step: int) -> dict[str, torch.Tensor]:
    """Gradients of these at one step, of different sizes."""
    return {f"p{i}": random(s, dtype, 1000 * step + i, 10.0 ** -(i % 4)) for i, s in enumerate(shapes)}


def train(shapes: list, dtype: torch.dtype, steps: range = range(24)) -> list:
    """Commands of steps; all weights and states are read after the first two and the last."""
    commands: list = []
    for step in steps:
        commands += [["grads", grads(shapes, dtype, step)], ["step", "o"]]
        if step in (*steps[:2], steps[-1]):
            commands += [["look", "o", [f"p{i}" for i in range(len(shapes))]]]
    return commands
