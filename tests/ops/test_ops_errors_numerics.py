"""grad_numerics refuses wrong arguments, in words that name the op, and changes nothing."""

import op_refusals
import pytest
import torch
from fusedamp import ops
from fusedamp.tensors import addresses
from op_calls import scalar
from op_refusals import NO_DATA, bad_type, bad_value
from test_ops_errors_gradients import GRADIENTS, INV_SCALE, LISTS, NORM_TYPE
from test_ops_numerics import outputs

OP = "grad_numerics"
EXTREMES, HISTOGRAM = (
    "expected contiguous float64 [3, 3], a row per gradient",
    "expected contiguous int64 [3, 64], a row",
)


def on_meta(t):
    return t.to("meta")


OUTPUTS = {
    "extremes: rows": ("extremes", bad_value(lambda t: t[:2], "is float64 of shape [2, 3], ", EXTREMES)),
    "extremes: flat": ("extremes", bad_value(lambda t: t.flatten(), "is float64 of shape [9], ", EXTREMES)),
    "extremes: dtype": ("extremes", bad_value(lambda t: t.float(), "is float32 of shape [3, 3], ", EXTREMES)),
    "extremes: transposed": (
        "extremes",
        bad_value(lambda t: t.t(), "shape [3, 3], strides [1, 3]; ", EXTREMES),
    ),
    "extremes: gaps": ("extremes", bad_value(op_refusals.with_gaps, "strides [6, 2]; ", EXTREMES)),
    "extremes: expanded": ("extremes", bad_value(lambda t: t[:1].expand(3, 3), "strides [0, 1]; ", EXTREMES)),
    "extremes: meta": ("extremes", bad_value(on_meta, "is " + NO_DATA)),
    "extremes: freed": (
        "extremes",
        bad_value(op_refusals.freed, "has no memory; expected allocated storage"),
    ),
    "extremes: sparse": (
        "extremes",
        bad_value(torch.Tensor.to_sparse, "is sparse", "expected a strided tensor"),
    ),
    "extremes: None": ("extremes", bad_type(lambda t: None, "is None; expected a tensor")),
    "histogram: columns": (
        "histogram",
        bad_value(lambda t: t[:, :63], "is int64 of shape [3, 63], ", HISTOGRAM),
    ),
    "histogram: rows": ("histogram", bad_value(lambda t: torch.cat([t, t]), "shape [6, 64], ", HISTOGRAM)),
    "histogram: dtype": ("histogram", bad_value(lambda t: t.int(), "is int32 of shape [3, 64], ", HISTOGRAM)),
    "histogram: strides": (
        "histogram",
        bad_value(lambda t: t.t().contiguous().t(), "strides [1, 3]; ", HISTOGRAM),
    ),
    "histogram: meta": ("histogram", bad_value(on_meta, "is " + NO_DATA)),
    "histogram: number": ("histogram", bad_type(lambda t: 1, "is a int; expected a tensor")),
    "due: dtype": ("due", bad_value(lambda t: t.long(), "is int64 of shape []; expected one int32 element")),
    "due: bool": ("due", bad_value(lambda t: t.bool(), "is Bool of shape []; expected one int32 element")),
    "due: two": (
        "due",
        bad_value(lambda t: t.repeat(2), "is int32 of shape [2]; expected one int32 element"),
    ),
    "due: meta": ("due", bad_value(on_meta, "is " + NO_DATA)),
    "due: number": ("due", bad_type(int, "is a int; expected a tensor")),
}


def ways(grads):
    """Into the op: by addresses, and with a transposed gradient by tensors."""
    return grads, [*grads[:-1], torch.randn(3, 2).t()]


def refuse(grads, numerics, refusal, **options):
    tensors = [t for t in (*grads, *numerics) if isinstance(t, torch.Tensor) and t.layout is torch.strided]
    kept = [t for t in tensors if not t.is_meta and (t.untyped_storage().nbytes() or not t.numel())]
    op_refusals.check(lambda: ops.grad_numerics(grads, *numerics, **options), kept, OP, refusal)


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs(case):
    name, refusal = OUTPUTS[case]
    refusal = refusal._replace(texts=(name, *refusal.texts))
    for grads in ways([torch.randn(2, 3) for _ in range(3)]):
        numerics, _ = outputs(3)
        refuse(grads, numerics._replace(**{name: refusal.change(getattr(numerics, name))}), refusal)


def test_other_devices():
    """No message of CUDA: the CPU's op is called with a tensor elsewhere."""
    numerics, _ = outputs(1)
    refusal = bad_value(None, "histogram is " + NO_DATA)
    refuse([torch.ones(3)], numerics._replace(histogram=numerics.histogram.to("meta")), refusal)


def test_shared_memory():
    """Of what is written with a gradient at either end, with each other, the flag or the factor."""
    memory = torch.zeros(3 * 64 + 9, dtype=torch.int64)
    histogram, extremes = memory[:192].view(3, 64), memory[192:].view(torch.float64).view(3, 3)
    words = memory.view(torch.int32)
    own = "expected memory of its own for all that the op writes. Pass each tensor once, or a clone()"
    numerics, _ = outputs(3)
    numerics = numerics._replace(histogram=histogram, extremes=extremes)
    others = [torch.ones(3), torch.ones(2)]
    for t, name in ((histogram, "histogram"), (extremes, "extremes")):
        flat = t.flatten().view(torch.float32)
        for grad in (flat[:1], flat[-1:], t.view(torch.float64).t(), t.flatten().view(torch.float16)[3:7]):
            text = f"{name} (shape {list(t.shape)}) shares memory with grads[1]; {own}"
            refuse([others[0], grad, others[1]], numerics, bad_value(None, text))
    around = torch.zeros(400, dtype=torch.float32)  # a gradient that begins before and ends after an output
    inside = around[101:119].view(torch.float64).view(3, 3) if around.data_ptr() % 8 else None
    inside = around[100:118].view(torch.float64).view(3, 3) if inside is None else inside
    text = f"extremes (shape [3, 3]) shares memory with grads[2]; {own}"
    refuse([*others, around], numerics._replace(extremes=inside), bad_value(None, text))

    overlapping = memory[3:12].view(torch.float64).view(3, 3)
    refusal = bad_value(None, "shares memory with", own)
    refuse([*others, others[0]], numerics._replace(extremes=overlapping), refusal)
    text = f"histogram (shape [3, 64]) shares memory with due; {own}"
    refuse([*others, others[0]], numerics._replace(due=words[383]), bad_value(None, text))
    text = f"extremes (shape [3, 3]) shares memory with inv_scale; {own}"
    factor = words[400].view(torch.float32)
    refuse([*others, others[0]], numerics, bad_value(None, text), inv_scale=factor)


def test_next_to_each_other():
    """Memory that touches is not shared."""
    memory = torch.zeros(64 + 3 + 2, dtype=torch.int64)
    grad, histogram = memory[:1].view(torch.float16), memory[1:65].view(1, 64)
    extremes, last = memory[65:68].view(torch.float64).view(1, 3), memory[68:].view(torch.int32)
    ops.grad_numerics([grad], extremes, histogram, last[0] + 1, inv_scale=last[1].view(torch.float32))
    assert histogram[0].tolist() == [4] + [0] * 63
    assert extremes.tolist() == [[0.0, 4.0, 0.0]]


def test_the_check_of_a_step():
    """The packed op refuses on its own: its callers pass addresses."""
    grads = [torch.ones(3)]
    fields = addresses.rows(addresses.read(grads))
    numerics, _ = outputs(1)
    cases = {
        "extremes is float64 of shape [3, 3]": numerics._replace(extremes=outputs(3)[0].extremes),
        "histogram is int64 of shape [3, 64]": numerics._replace(histogram=outputs(3)[0].histogram),
        "due is float32 of shape []": numerics._replace(due=scalar(1.0)),
    }
    for text, bad in cases.items():
        check = lambda bad=bad: ops.check_grads(fields, False, scalar(1.0), 2.0, 1.0, bad)  # noqa: E731
        op_refusals.check(check, [*grads, *bad], "_check_numerics", bad_value(None, text))
    for name in ("scale", "max_norm"):
        pair = numerics.extremes.view(torch.float32)
        taken = dict(scale=scalar(1.0), max_norm=scalar(1.0)) | {name: pair[0, 1]}
        check = lambda taken=taken: ops.check_grads(fields, False, norm_type=2.0, numerics=numerics, **taken)  # noqa: E731
        refusal = bad_value(None, f"extremes (shape [1, 3]) shares memory with {name}")
        op_refusals.check(check, [*grads, *numerics], "_check_numerics", refusal)


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_gradients(name, place):
    grads = [torch.randn(2, 3) for _ in range(3)]
    grads[place] = GRADIENTS[name].change(grads[place])
    numerics, _ = outputs(3)
    refuse(grads, numerics, GRADIENTS[name]._replace(texts=(f"grads[{place}] ", *GRADIENTS[name].texts)))


@pytest.mark.parametrize("name", LISTS)
def test_what_is_no_list(name):
    numerics, _ = outputs(1)
    op_refusals.check(lambda: ops.grad_numerics(LISTS[name].change, *numerics), numerics, OP, LISTS[name])


@pytest.mark.parametrize("name", INV_SCALE)
def test_inv_scale(name):
    for grads in ways([torch.randn(3)] * 3):
        refuse(grads, outputs(3)[0], INV_SCALE[name], inv_scale=INV_SCALE[name].change)


@pytest.mark.parametrize("name", NORM_TYPE)
def test_norm_type(name):
    refuse([torch.ones(3)], outputs(1)[0], NORM_TYPE[name], norm_type=NORM_TYPE[name].change)


def test_no_gradients():
    refuse([], outputs(0)[0], bad_value(None, "grads is empty; expected at least one tensor"))
