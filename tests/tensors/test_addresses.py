"""Fields read in bulk: each is the tensor's own, now; whatever is not plain is left to the ops that check."""

import subprocess
import sys

import pytest
import torch
from fusedamp import _C, optim
from fusedamp.tensors import addresses

PLAIN = {
    "float32": lambda: torch.randn(3, 5),
    "float16": lambda: torch.randn(7).half(),
    "bfloat16": lambda: torch.nn.Parameter(torch.randn(2, 3).bfloat16()),
    "float64": lambda: torch.randn(4).double(),
    "view at an offset": lambda: torch.randn(9)[3:],
    "0-dim": lambda: torch.tensor(2.0),
    "empty": lambda: torch.zeros(0, 3),
    "size 1 with an odd stride": lambda: torch.randn(4, 3)[:, :1].t()[:, :1],
}
CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}

REFUSED = {
    "transposed": lambda: torch.randn(3, 5).t(),
    "with gaps": lambda: torch.randn(6)[::2],
    "expanded": lambda: torch.randn(1).expand(3),
    "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "sparse": lambda: torch.randn(3, 5).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "integer": lambda: torch.zeros(3, dtype=torch.int32),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "negated lazily": lambda: torch.tensor([1 + 2j]).conj().imag,
    "a subclass": lambda: torch.nn.Buffer(torch.randn(3)).as_subclass(type("Odd", (torch.Tensor,), {})),
    "freed": lambda: _freed(torch.randn(3)),
    "all zeros, without memory": lambda: torch._efficientzerotensor(3),
    "no tensor": lambda: None,
}


def _freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def test_fields_are_the_tensors_own():
    tensors = [make() for make in PLAIN.values()]
    places, numels, codes = addresses.rows(addresses.read(tensors)).tolist()
    assert places == [t.data_ptr() for t in tensors]
    assert numels == [t.numel() for t in tensors]
    assert codes == [CODES[t.dtype] for t in tensors]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_plain_is_refused(name, place):
    """At the first place, and after a plain one."""
    assert addresses.read([*([torch.randn(3)] * place), REFUSED[name]()]) is None


def test_nothing_to_read():
    assert addresses.read([]) is None


def test_float64_is_found():
    assert not addresses.holds_float64(addresses.read([torch.randn(3), torch.randn(3).half()]))
    assert addresses.holds_float64(addresses.read([torch.randn(3), torch.randn(3).double(), torch.randn(3)]))


CHANGES = {
    "memory": lambda t: t.set_(torch.randn(4, 3)),
    "data": lambda t: setattr(t, "data", torch.randn(4, 3)),
    "size": lambda t: t.resize_(6, 3),
    "dtype": lambda t: setattr(t, "data", t.data.view(torch.bfloat16)[:, :3].contiguous()),
    "order": lambda t: setattr(t, "data", t.data.view(3, 4).t()),
    "freed": lambda t: _freed(t),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(change):
    """Guards against stale addresses: what is remembered holds only while every field is as it was."""
    tensors = [torch.randn(2), torch.zeros(4, 3), torch.randn(5)]
    fields = addresses.read(tensors)
    assert _C.same_fields(tensors, fields)
    CHANGES[change](tensors[1])
    assert not _C.same_fields(tensors, fields)


def test_another_length_is_another_list():
    tensors = [torch.randn(2), torch.randn(3)]
    fields = addresses.read(tensors)
    assert not _C.same_fields(tensors[:1], fields)
    assert not _C.same_fields([*tensors, torch.randn(1)], fields)


def test_copy_on_write_memory_is_not_shared():
    """The address that is handed out may be written through: a lazy clone must have its own by then."""
    original = torch.randn(8)
    before, clone = original.clone(), torch._lazy_clone(original)
    address = addresses.rows(addresses.read([clone])).tolist()[0][0]
    assert address == clone.data_ptr() != original.data_ptr()
    assert torch.equal(original, before)


def test_columns_of_entries():
    """Values under each key, key by key; None if a key, an attribute or the size is wrong."""
    one, two = torch.zeros(1), torch.zeros(2)
    entries, columns = [{"a": one, "b": 1j}, {"a": two, "b": 2j}], [("a", None), ("b", "imag")]
    found = _C.columns_of(entries, columns, [2, 2])
    assert found[0] is one
    assert found[1] is two
    assert found[2:] == [1.0, 2.0]
    assert _C.columns_of(entries, columns, [2, 3]) is None
    assert _C.columns_of(entries, [("c", None)], [2, 2]) is None
    assert _C.columns_of(entries, [("a", "bits")], [2, 2]) is None


@pytest.mark.parametrize("shift", range(-12, 13))
def test_shared_memory_is_found(shift):
    """A gradient next to a parameter's memory, and one that begins or ends in it."""
    memory = torch.zeros(64)
    params = [memory[20:24], memory[40:44]]
    spans = _C.spans([addresses.read(params[1:]), addresses.read(params[:1])])
    grad = memory[30 + shift : 34 + shift]
    other = memory[60:]
    shares = 16 < 30 + shift < 24 or 36 < 30 + shift < 44
    assert _C.touches(addresses.read([other, grad]), spans) == shares
    assert not _C.touches(addresses.read([torch.zeros(0), other]), spans)


@pytest.mark.parametrize(
    ("row", "value", "text"),
    [(0, 0, "has 3 elements at"), (1, -3, "has -3 elements"), (2, 4, "dtype code 4")],
)
def test_gradient_rows_that_are_none_are_refused(row, value, text):
    fields = addresses.rows(addresses.read([torch.ones(3), torch.ones(3)]))
    fields[row, 1] = value
    with pytest.raises(RuntimeError, match=r"\[grad_stats\] rows\[1\] has ") as caught:
        torch.ops.fusedamp._packed_grad_stats(fields, torch.ones(1))
    assert text in str(caught.value)


def test_without_a_global_lock_tensors_are_handed_over_one_by_one():
    """Guards free-threaded Python: nothing is borrowed or counted, numbers are the same, `info` says so."""
    code = """
import sys
sys._is_gil_enabled = lambda: False
import torch
from fusedamp import GradScaler, optim
from fusedamp.commands.info import system_info
from fusedamp.optim.core import ownership
param = torch.nn.Parameter(torch.ones(3))
optimizer, scaler = optim.AdamW([param], lr=0.1), GradScaler("cpu", init_scale=4.0)
scaler.scale(torch.zeros(()))
for _ in range(5):
    param.grad = torch.full((3,), 4.0)
    scaler.clip_grad_norm_(optimizer, 1.0)
    scaler.step(optimizer)
    scaler.update()
assert optimizer._plan is None
assert not ownership.no_other_references(vars(optimizer))
assert "one by one" in system_info()["addresses"] and "GIL" in system_info()["addresses"]
print(param.sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([param], lr=0.1)
    for _ in range(5):
        param.grad = torch.full((3,), 3**-0.5)
        optimizer.step()
    assert float(done.stdout) == pytest.approx(param.sum().item(), rel=1e-6)
