"""What the functions of linear layers are given: which products are torch's affair, and errors by name."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)
HALF = (torch.float16, torch.bfloat16)
ACTIVATIONS = ("gelu_tanh", "relu")


def quick_dtype(input: Any, weight: Any, bias: Any) -> torch.dtype | None:
    """Return the dtype of a product with FP32 parameters, the usual case; None to ask ``product_dtype``."""
    if (
        type(input) is not Tensor
        or input.is_nested
        or input.layout is not torch.strided
        or type(weight) is not Parameter
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return None
    device, own, shape = input.device, input.dtype, weight.shape
    kind = device.type
    if kind not in ("cpu", "cuda") or weight.dtype is not torch.float32 or weight.device != device:
        return None
    if len(shape) != 2 or input.shape[-1:] != shape[1:]:
        return None
    if bias is not None and (
        type(bias) is not Parameter
        or bias.dtype is not torch.float32
        or bias.shape != shape[:1]
        or bias.device != device
    ):
        return None
    if not torch.is_autocast_enabled(kind):
        return own if own is torch.float32 else None
    return torch.get_autocast_dtype(kind) if own is torch.float32 or own in HALF else None


def _is_plain(op: str, tensors: tuple[Any, ...], names: tuple[str, ...]) -> bool:
    """True if all are plain tensors or None; raises if one is no tensor at all."""
    plain = True
    for t, name in zip(tensors, names, strict=True):
        if type(t) in _PLAIN or (t is None and name[0] == "b"):
            plain = plain and (t is None or t.layout is torch.strided)
            continue
        if not hasattr(t, "__torch_function__"):
            got = "None" if t is None else f"a {type(t).__name__}"
            raise TypeError(f"[{op}] {name} is {got}; expected a tensor. Pass torch.as_tensor of it.")
        plain = plain and _is_marked_parameter(t)
    return plain


def _is_marked_parameter(t: Any) -> bool:
    """True for a subclass of Parameter that changes no behavior of tensors."""
    kind = type(t)
    return (
        isinstance(t, Parameter)
        and kind.__torch_function__ is Parameter.__torch_function__
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


# Asked once: torch.compile of torch 2.11 cannot trace the question.
_WITH_AUTOCAST = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla"))
)


def product_dtype(op: str, tensors: tuple[Any, ...], names: tuple[str, ...]) -> torch.dtype:
    """Return the dtype of a 16-bit product; FP32 if it is torch's affair altogether."""
    if (
        not _is_plain(op, tensors, names)
        or tensors[0].is_nested
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return torch.float32
    input = tensors[0]
    device, dtype, kind = input.device, input.dtype, input.device.type
    autocast = kind in _WITH_AUTOCAST and torch.is_autocast_enabled(kind)
    for i in range(1, len(tensors), 2):
        _need_shapes(op, tensors, names, i)
    for t, name in zip(tensors, names, strict=True):
        if t is None:
            continue
        if t.device != device:
            raise ValueError(
                f"[{op}] {name} is on {t.device}; expected {device}, like {names[0]}. Move one of them with "
                ".to()"
            )
        if t.dtype is dtype and t.dtype.is_floating_point:
            continue
        if not t.dtype.is_floating_point and not t.dtype.is_complex:
            raise TypeError(f"[{op}] {name} is {t.dtype}; expected a floating-point tensor. Cast it")
        if not autocast and t.dtype is not dtype:
            raise ValueError(
                f"[{op}] {name} is {t.dtype}; expected {dtype}, like {names[0]}. Cast one of them, or run "
                f'under torch.autocast("{kind}")'
            )
    if autocast:  # which casts no FP64
        dtype = torch.get_autocast_dtype(kind)
        if any(t is not None and (t.dtype is torch.float64 or t.dtype.is_complex) for t in tensors):
            return torch.float32
    return dtype if dtype in HALF and kind != "meta" else torch.float32


def _need_shapes(op: str, tensors: tuple[Any, ...], names: tuple[str, ...], i: int) -> None:
    """Check a weight, the bias after it, and what the weight is multiplied with: the input or the weight
    before."""
    weight, bias = tensors[i], tensors[i + 1]
    if weight.dim() != 2:
        _refuse_shape(op, names[i], weight, "[out_features, in_features]")
    before = tensors[i - 1 if i == 1 else i - 2]
    if i == 1 and (before.dim() == 0 or before.shape[-1] != weight.shape[1]):
        _refuse_shape(op, names[0], before, f"[..., {weight.shape[1]}]", names[1], weight)
    if i > 1 and weight.shape[1] != before.shape[0]:
        _refuse_shape(op, names[i], weight, f"[..., {before.shape[0]}]", names[i - 2], before)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        _refuse_shape(op, names[i + 1], bias, f"[{weight.shape[0]}]", names[i], weight)


def _refuse_shape(
    op: str, name: str, got: Tensor, wanted: str, like_name: str = "", like: Tensor | None = None
) -> NoReturn:
    why = "" if like is None else f", as {like_name} {list(like.shape)}"
    raise ValueError(
        f"[{op}] {name} has shape {list(got.shape)}; expected {wanted}{why}. Reshape it, or use a layer of "
        "its size."
    )


def need_activation(op: str, activation: Any) -> None:
    if activation in ACTIVATIONS:
        return
    hint = (
        'Did you mean "gelu_tanh"? The exact GELU (erf) has no fused form'
        if activation == "gelu"
        else "Choose one, or use nn.Sequential of fusedamp.nn.Linear and another activation"
    )
    raise ValueError(f'[{op}] activation is {activation!r}; expected "gelu_tanh" or "relu". {hint}.')
