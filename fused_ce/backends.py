"""Loads the native library, and decides which implementation serves each op on each device.

There is one dispatch path: an op of csrc/ops.cpp has one implementation on each device's dispatch
key. The CPU's, and CUDA's where it was compiled, come from the native library. On GPUs without
native kernels (CUDA's key is that of AMD's too, XPU's that of Intel's) Triton's are registered on
the same key, and plain PyTorch where there is no Triton either.
Forcing a backend registers another implementation on the same keys.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fused_ce import _C, reference  # loading _C registers the ops
from fused_ce.arguments import raise_index_error

# All but _empty_gradient, which is the CPU's alone (fused_ce/autograd.py).
OPS = (
    "_bce",
    "_bce_with_gradient",
    "_bce_backward",
    "_softmax_ce",
    "_softmax_ce_with_gradient",
    "_softmax_ce_backward",
    "_scale_",
)
DEVICES = ("CPU", "CUDA", "XPU")
BACKENDS = ("native", "triton", "reference")

_NATIVE = {
    (op, device): torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_ce::{op}", device)
    for op in OPS
    for device in DEVICES
}


def _differentiated(
    function: Callable[..., tuple[Tensor, ...]],
    gradient: Tensor,
    grads: tuple[Tensor | None, ...],
    input: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    """The results of `function`; writes the gradient of `input`, given that of the results."""
    # An op may be called below autograd, as it is from compiled code.
    with_autograd = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    with with_autograd, torch.enable_grad():
        leaf = input.detach().requires_grad_()
        results = function(leaf, *options)
        seeded = [
            (result, grad.expand_as(result).to(result.dtype))
            for result, grad in zip(results, grads, strict=False)
            if grad is not None
        ]
        outputs, upstream = zip(*seeded, strict=True)
        (computed,) = torch.autograd.grad(outputs, leaf, upstream)
    gradient.copy_(computed)
    return tuple(result.detach() for result in results)


def _reference_bce(*arguments: Any) -> Tensor:
    loss = reference.bce(*arguments)
    if loss.dim() > 0:  # in the memory order that the op promises
        loss = torch.empty_like(arguments[0], dtype=loss.dtype).copy_(loss)
    return loss


def _bce(*arguments: Any) -> tuple[Tensor]:
    return (reference.bce(*arguments),)


def _reference_bce_with_gradient(gradient: Tensor, *arguments: Any) -> Tensor:
    return _differentiated(_bce, gradient, (gradient.new_ones(()),), *arguments)[0]


def _reference_bce_backward(
    gradient: Tensor, _written: bool, grad_output: Tensor, *arguments: Any
) -> None:
    _differentiated(_bce, gradient, (grad_output,), *arguments)


def _reference_softmax_ce_with_gradient(gradient: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _differentiated(reference.softmax_ce, gradient, (gradient.new_ones(()),), *arguments)


def _reference_softmax_ce_backward(gradient: Tensor, _written: bool, *arguments: Any) -> None:
    grads, tensors, options = arguments[:3], arguments[5:10], arguments[10:]
    outputs = reference.LSE | reference.ENTROPY
    _differentiated(reference.softmax_ce, gradient, grads, *tensors, outputs, *options)


def _reference_scale_(gradient: Tensor, scale: Tensor) -> None:
    gradient.mul_(scale)


_REFERENCE: dict[str, Callable[..., Any]] = {
    "_bce": _reference_bce,
    "_bce_with_gradient": _reference_bce_with_gradient,
    "_bce_backward": _reference_bce_backward,
    "_softmax_ce": reference.softmax_ce,
    "_softmax_ce_with_gradient": _reference_softmax_ce_with_gradient,
    "_softmax_ce_backward": _reference_softmax_ce_backward,
    "_scale_": _reference_scale_,
}


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_ops() -> dict[str, Callable[..., Any]]:
    from fused_ce.triton import bce, softmax_ce

    return bce.OPS | softmax_ce.OPS


def _is_available(name: str, op: str, device: str) -> bool:
    if name == "native":
        return _NATIVE[op, device]
    if name == "triton":
        return _has_triton() and (device != "CPU" or _triton_interprets())
    return True


def _best(op: str, device: str) -> str:
    """Without a choice of the user's: native kernels, then Triton on GPUs, then plain PyTorch."""
    order = ("native", "reference") if device == "CPU" else ("native", "triton", "reference")
    return next(name for name in order if _is_available(name, op, device))


def _devices_in_use() -> tuple[str, ...]:
    built = (True, torch.backends.cuda.is_built(), torch.xpu._is_compiled())
    return tuple(device for device, is_built in zip(DEVICES, built, strict=True) if is_built)


_serving = {(op, device): "native" for op in OPS for device in DEVICES}
_forced: str | None = None
_library: torch.library.Library | None = None


def _register() -> None:
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
    for op, device in _NATIVE:
        name = _best(op, device)
        if _forced is not None and _is_available(_forced, op, device):
            name = _forced
        _serving[op, device] = name
        if name == "native":
            continue
        if _library is None:
            _library = torch.library.Library("fused_ce", "IMPL")
        implementation = (_triton_ops() if name == "triton" else _REFERENCE)[op]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            _library.impl(op, implementation, device)


def set_backend(name: str | None) -> None:
    """Forces the implementation of every op: "native" (C++ and CUDA), "triton" or "reference"
    (plain PyTorch); None lets each device have its best. The environment variable FUSED_CE_BACKEND
    does the same at import.

    Raises ValueError for an unknown name, and RuntimeError where no device of this installation has
    that backend.
    """
    global _forced
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}, or None")
    if name is not None:
        missing = [
            device
            for device in _devices_in_use()
            if not all(_is_available(name, op, device) for op in OPS)
        ]
        if name == "triton" and missing == ["CPU"] and len(_devices_in_use()) > 1:
            missing = []  # Triton serves GPUs; the CPU keeps its native kernels
        if missing:
            raise RuntimeError(f"backend {name!r} is not available on {', '.join(missing)} here")
    _forced = name
    _register()


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """`set_backend` for the length of a `with` block."""
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def check() -> None:
    """Raises IndexError for a label out of range, and RuntimeError for other bad input, that a CUDA
    kernel has found since the last call.

    Waits for the current device's work to end first. Without this call, the next call into the
    package after the kernel has run raises it.
    """
    if "CUDA" in _devices_in_use() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    report = _C.take_report()
    if report:
        raise_index_error(report)
        raise RuntimeError(report)


def table() -> list[tuple[str, str, str]]:
    """(op, device, backend) for every op and device of this installation."""
    return [
        (op, device.lower(), _serving[op, device]) for device in _devices_in_use() for op in OPS
    ]


def build_info() -> dict[str, str]:
    """Versions, architectures and capabilities, in the order in which they are shown."""
    import fused_ce

    build = dict(line.split("=", 1) for line in _C.build_info().splitlines())
    return {
        "version": fused_ce.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "torch CUDA": torch.version.cuda or "none",
        "CUDA architectures": build["architectures"],
        "CUDA toolkit": build["toolkit"],
        "CPU capability": build["capability"],
    }


set_backend(os.environ.get("FUSED_CE_BACKEND") or None)
