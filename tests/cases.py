"""What the tests share: dtypes, the forms of the losses, inputs, layouts, and how errors count.

The oracle of a form is float64 PyTorch on the CPU, written here without fused_ce.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ce.functional as fused
from fused_ce import backends

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REDUCTIONS = ("none", "mean", "sum")

# (torch's deprecated arguments, the reduction that they mean)
LEGACY_REDUCTIONS: list[tuple[dict[str, Any], str]] = [
    ({"size_average": False}, "sum"),
    ({"size_average": True}, "mean"),
    ({"reduce": False}, "none"),
    ({"size_average": False, "reduce": True}, "sum"),
    ({"reduction": "elementwise_mean"}, "mean"),
]

ALPHA, GAMMA = 0.25, 2.0


def torchvision_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = ALPHA,
    gamma: float = GAMMA,
    reduction: str = "none",
) -> Tensor:
    """The formula of torchvision.ops.sigmoid_focal_loss."""
    p = torch.sigmoid(inputs)
    ce = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce * (1 - p_t) ** gamma
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return reduce(loss, reduction)


def exact_logits_loss(
    x: Tensor, t: Tensor, weight: Tensor | float = 1, pos_weight: Tensor | float = 1
) -> Tensor:
    """Binary cross entropy as a sum of softplus: torch's own formula subtracts, and loses digits in
    the tails even in float64."""
    zero = torch.zeros_like(x)
    loss = pos_weight * t * torch.logaddexp(zero, -x) + (1 - t) * torch.logaddexp(zero, x)
    return weight * loss


def exact_probability_loss(p: Tensor, t: Tensor, weight: Tensor | float = 1) -> Tensor:
    return -weight * (t * torch.log(p) + (1 - t) * torch.log1p(-p))


def exact_cross_entropy(
    x: Tensor,
    t: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    on_empty: str = "nan",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Softmax cross entropy with all extras, through one distribution over the classes for labels
    and probabilities alike, in the logits' dtype (meant for float64)."""
    dim = 1 if x.dim() > 1 else 0
    classes = x.size(dim)
    w = x.new_ones(classes) if weight is None else weight
    column = [1] * x.dim()
    column[dim] = classes
    if t.is_floating_point():
        kept, q = torch.ones_like(x.sum(dim), dtype=torch.bool), t
        count = torch.tensor(float(kept.numel()))
    else:
        t = t.long()
        kept = t != ignore_index
        label = torch.where(kept, t, 0)
        q = F.one_hot(label, classes).movedim(-1, dim).to(x)
        count = (w[label] * kept).sum()
    logits = capped(torch.where(kept.unsqueeze(dim), x, 0.0), softcap, logit_scale)
    q = q * (1 - label_smoothing) + label_smoothing / classes
    loss = q * w.reshape(column) * -torch.log_softmax(logits, dim)
    if not t.is_floating_point():  # what is no label counts nothing, at a logit of -inf too
        loss = torch.where(q == 0, 0.0, loss)
    loss = loss.sum(dim)
    loss = loss + z_loss * torch.logsumexp(logits, dim) ** 2
    if sample_weight is not None:
        missing = (1,) * (loss.dim() - sample_weight.dim())
        loss = loss * sample_weight.reshape(sample_weight.shape + missing)
    loss = torch.where(kept, loss, 0.0)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    divisor = torch.as_tensor(count if normalizer is None else normalizer).reshape(())
    return total * 0 if divisor == 0 and on_empty == "zero" else total / divisor


def capped(x: Tensor, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    logits = x * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def exact_focal_loss(x: Tensor, t: Tensor, alpha: float = ALPHA, gamma: float = GAMMA) -> Tensor:
    """torchvision's with 1 - p_t as a sum."""
    u = torch.sigmoid(-x) * t + torch.sigmoid(x) * (1 - t)
    loss = exact_logits_loss(x, t) * u**gamma
    return loss * (alpha * t + (1 - alpha) * (1 - t)) if alpha >= 0 else loss


def reduce(loss: Tensor, reduction: str) -> Tensor:
    return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]


class Form(NamedTuple):
    name: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]  # what it replaces, with the same arguments
    exact: Callable[..., Tensor]  # (input, target, **weights) -> unreduced loss
    weights: tuple[str, ...]  # which of torch's weights it takes


LOGITS = Form(
    "logits",
    fused.binary_cross_entropy_with_logits,
    F.binary_cross_entropy_with_logits,
    exact_logits_loss,
    ("weight", "pos_weight"),
)
PROBABILITY = Form(
    "probability",
    fused.binary_cross_entropy,
    F.binary_cross_entropy,
    exact_probability_loss,
    ("weight",),
)
FOCAL = Form("focal", fused.sigmoid_focal_loss, torchvision_focal_loss, exact_focal_loss, ())
FORMS = (LOGITS, PROBABILITY, FOCAL)
# Of probabilities, softmax cross entropy takes what those take; `exact` does not reduce it.
SOFTMAX = Form(
    "softmax",
    fused.cross_entropy,
    F.cross_entropy,
    lambda x, t, **weights: exact_cross_entropy(x, t, reduction="none", **weights),
    ("weight",),
)


def form_id(form: Form) -> str:
    return form.name


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_input(form: Form, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of a spread that reaches both tails, or probabilities that reach neither 0 nor 1."""
    x = torch.randn(shape) * 4
    if form is PROBABILITY:
        x = torch.sigmoid(x).clamp(0.01, 0.99)
    return x.to(dtype)


def make_target(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Soft labels with exact zeros and ones among them; hard ones as integers."""
    hard = torch.rand(shape) < 0.5
    if not dtype.is_floating_point:
        return hard.to(dtype)
    return torch.where(torch.rand(shape) < 0.5, hard.float(), torch.rand(shape)).to(dtype)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _sliced(x: Tensor) -> Tensor:
    # 7 is prime to every vector width, so that no two neighbours share a load
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] * 7)
    wide[..., 3::7] = x
    return wide[..., 3::7]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _offset(x: Tensor) -> Tensor:
    # one element past an aligned address
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced": _sliced,
    "offset": _offset,
    "expanded": _expanded,
}


def exact(
    form: Form,
    x: Tensor,
    t: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    on_empty: str = "nan",
    **weights: Any,
) -> Tensor:
    """The loss with all extras, differentiable, in the arguments' dtype (meant for float64)."""
    kept = torch.ones_like(t, dtype=torch.bool) if ignore_index is None else t != ignore_index
    x, t = torch.where(kept, x, 0.5), torch.where(kept, t, 1.0)
    loss = form.exact(x, t * (1 - label_smoothing) + label_smoothing / 2, **weights)
    if sample_weight is not None:
        loss = loss * sample_weight.reshape(
            sample_weight.shape + (1,) * (x.dim() - sample_weight.dim())
        )
    loss = torch.where(kept, loss, 0.0)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    divisor = torch.as_tensor(kept.sum() if normalizer is None else normalizer).reshape(())
    return total * 0 if divisor == 0 and on_empty == "zero" else total / divisor


class Result(NamedTuple):
    loss: Tensor
    gradient: Tensor | None


def run(
    loss_function: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    *,
    device: str = "cpu",
    upstream: Tensor | float = 1.0,
    **options: Any,
) -> Result:
    """Loss and the input's gradient, computed on `device` and brought back to the CPU."""

    def moved(value: Any) -> Any:
        return on(value, device) if isinstance(value, Tensor) else value

    leaf = moved(x).detach().requires_grad_()
    loss = loss_function(leaf, moved(t), **{k: moved(v) for k, v in options.items()})
    seed = torch.as_tensor(upstream, dtype=loss.dtype).expand(loss.shape).to(device)
    (gradient,) = torch.autograd.grad(loss, leaf, seed)
    return Result(loss.detach().cpu(), gradient.cpu())


def on(tensor: Tensor, device: str) -> Tensor:
    """The tensor on the device with its strides, which `.to` keeps for dense tensors only, and as
    far past an aligned address."""
    if tensor.device.type == device:
        return tensor
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if tensor.numel() == 0:
        return tensor.to(device)
    offset = tensor.storage_offset() % 16
    storage = torch.empty(offset + extent, dtype=tensor.dtype, device=device)
    storage[offset:] = tensor.as_strided((extent,), (1,))
    return storage.as_strided(tensor.shape, tensor.stride(), offset)


def ulps(actual: Tensor, exact: Tensor, scale: float = 0.0) -> float:
    """The largest error in units of the last place of `actual`'s dtype.

    `scale` is for results in which larger terms cancel: the unit is then at least that of `scale`.
    """
    assert actual.shape == exact.shape
    if actual.numel() == 0:
        return 0.0
    info = torch.finfo(actual.dtype)
    magnitude = exact.double().abs().clamp_min(max(scale, info.tiny))
    unit = info.eps * torch.exp2(torch.floor(torch.log2(magnitude)))
    return ((actual.double() - exact.double()).abs() / unit).nan_to_num(nan=math.inf).max().item()


def double(value: Any) -> Any:
    """A tensor of floats in float64, for the oracle; labels and numbers as they are."""
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def positional(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Names and defaults of the parameters that may be given by position."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY]


def allocated(function: Callable[[], Any]) -> int:
    """Bytes that torch allocates in the call, on the CPU."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")


def allocated_with_gradient(function: Callable[[], Tensor], leaf: Tensor) -> int:
    """Bytes that torch allocates for the function's result and its gradient, on the CPU."""
    results: list[Tensor] = []
    forward = allocated(lambda: results.append(function()))
    seed = torch.ones_like(results[0])
    return forward + allocated(lambda: torch.autograd.grad(results[0], leaf, seed))


def far_memory(elements: int, device: str) -> Tensor:
    """That many bfloat16 values, none of them written."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 3 * elements:
        pytest.skip(f"needs {elements >> 29} GiB of device memory")
    return torch.empty(elements, dtype=torch.bfloat16, device=device)


def zeros(shape: tuple[int, ...] | int, dtype: torch.dtype, device: str) -> Tensor:
    """Zeros, which take up no memory on the CPU until they are written."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = torch.empty((), dtype=dtype).element_size()
    return torch.from_numpy(np.zeros(shape, f"i{size}")).view(dtype)


def require_memory(size: int, device: str) -> None:
    """Skips a test that writes `size` bytes where there are hardly as many."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        memory = Path("/proc/meminfo")
        text = memory.read_text(encoding="ascii") if memory.exists() else "MemAvailable: 0"
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    if free < 1.4 * size:
        pytest.skip(f"needs {1.4 * size / 2**30:.0f} GiB of memory")


def skip_where_slow(
    loss_function: Callable[..., Tensor], shape: tuple[int, ...], elements: int, device: str
) -> None:
    """Skips a test of so many elements where it would take long, to judge by the shape's, or
    copies of them all."""
    if not is_native(device):
        pytest.skip("plain PyTorch makes copies")
    x = torch.zeros(shape, device=device)
    t = torch.zeros(shape[:1] + shape[2:], dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        loss_function(x, t).item()
        seconds.append(time.perf_counter() - start)
    if min(seconds) * elements / x.numel() > 20:
        pytest.skip("takes long here")


def is_native(device: str) -> bool:
    """Whether compiled kernels serve the device. Plain PyTorch makes copies that they do not."""
    serving = {(op, where): backend for op, where, backend in backends.table()}
    return serving["_softmax_ce", device] == "native"


def can_force_native() -> bool:
    """Whether all devices that this PyTorch knows have compiled kernels."""
    return {backend for _, _, backend in backends.table()} == {"native"}
