"""Checks and readings of arguments that the losses share."""

from __future__ import annotations

import operator
import re
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as torch_reduction

from fused_ce.reference import MEAN, NONE, SUM

REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
LABELS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
REALS = FLOATS | LABELS | {torch.bool}
HALVES = frozenset({torch.float16, torch.bfloat16})

# What the ops raise, and torch's gather where a loss is composed from torch's operations.
_OUT_OF_BOUNDS = re.compile(r"Target -?\d+ is out of bounds.*|index (-?\d+) is out of bounds")


def reduction_code(reduction: str, size_average: bool | None, reduce: bool | None) -> int:
    if size_average is not None or reduce is not None:
        # As torch's legacy_get_enum, which Dynamo cannot trace, nor a warning.
        averages = size_average is None or size_average
        reduces = reduce is None or reduce
        reduction = ("mean" if averages else "sum") if reduces else "none"
        if not torch.compiler.is_compiling():
            warnings.warn(
                "size_average and reduce args will be deprecated, please use "
                f"reduction='{reduction}' instead.",
                stacklevel=3,
            )
    try:
        return REDUCTIONS[reduction]
    except (KeyError, TypeError):  # torch's error, also for what has no hash
        return torch_reduction.get_enum(reduction)


def check_tensors(function: str, input: Tensor, target: Tensor) -> None:
    if isinstance(input, Tensor) and isinstance(target, Tensor):
        return
    is_target = isinstance(input, Tensor)
    place = "'target' (position 2)" if is_target else "'input' (position 1)"
    found = type(target if is_target else input).__name__
    raise TypeError(f"{function}(): argument {place} must be Tensor, not {found}")


def expects_gradient(option: Any) -> bool:
    return isinstance(option, Tensor) and option.requires_grad


def refuse_gradient(option: Any, name: str) -> None:
    """TypeError for an option, a number, that is a tensor and expects a gradient."""
    if expects_gradient(option):
        raise TypeError(
            f"{name} must be a number: as a tensor that requires grad it would get none"
        )


def read_index(index: Any, argument: str) -> int:
    """The index as an int. Torch takes what has the value of a 64-bit integer, but no bool."""
    if isinstance(index, torch.SymInt):
        return index  # type: ignore[return-value]
    if not isinstance(index, bool) and not (
        isinstance(index, Tensor) and index.dtype == torch.bool
    ):
        try:
            index = operator.index(index)
        except TypeError:
            pass
        else:
            if not -(2**63) <= index < 2**63:
                raise ValueError("Overflow when unpacking long long")
            return index  # type: ignore[no-any-return]
    raise TypeError(f"{argument} must be int, not {type(index).__name__}")


def defaults_of(op: Any) -> tuple[Any, ...]:
    """What an op's options are where a call leaves them out, as csrc/ops.cpp says."""
    arguments = op._schema.arguments
    return tuple(a.default_value for a in arguments if a.has_default_value())


def dtype_name(dtype: torch.dtype) -> str:
    """Torch's name of the dtype in messages, such as Float."""
    return torch.empty(0, dtype=dtype).type().rpartition(".")[2].removesuffix("Tensor")


def is_autocast_enabled(input: Tensor) -> bool:
    # Asking first whether any device has it costs a tenth of asking for the input's by name. The
    # meta device has no autocast, and asking for it raises.
    return (
        torch._C._is_any_autocast_enabled()
        and not input.is_meta
        and torch.is_autocast_enabled(input.device.type)
    )


def on_device(tensor: Tensor, input: Tensor) -> Tensor:
    if tensor.device == input.device:
        return tensor
    # Torch lets a 0-D tensor of the CPU stand for a number.
    if tensor.dim() == 0 and tensor.device.type == "cpu":
        return tensor.to(input.device)
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{input.device} and {tensor.device}!"
    )


def read_sample_weight(sample_weight: Tensor, input: Tensor, shape: torch.Size) -> Tensor:
    """The weights with as many dimensions as `shape`, whose leading ones they must have."""
    if not isinstance(sample_weight, Tensor):
        raise TypeError(f"sample_weight must be Tensor, not {type(sample_weight).__name__}")
    leading = sample_weight.shape
    if leading != shape[: len(leading)]:
        raise ValueError(
            f"sample_weight of shape {list(leading)} must have the shape of the input's leading "
            f"dimensions, {list(shape)}"
        )
    if sample_weight.dtype not in REALS:
        raise NotImplementedError(f"sample_weight of dtype {sample_weight.dtype} is not supported")
    if sample_weight.layout is not torch.strided:
        sample_weight = sample_weight.to_dense()
    return on_device(sample_weight.reshape(leading + (1,) * (len(shape) - len(leading))), input)


def read_normalizer(
    normalizer: float | Tensor | None, input: Tensor
) -> tuple[Tensor | None, float | None]:
    """The denominator of "mean" as a 0-D tensor or as a number."""
    if normalizer is None:
        return None, None
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1 or normalizer.dtype not in REALS:
            raise ValueError("normalizer must be a number or a tensor of one real number")
        if normalizer.layout is not torch.strided:
            normalizer = normalizer.to_dense()
        return on_device(normalizer.reshape(()), input), None
    if isinstance(normalizer, str):  # float() would parse it
        raise TypeError("normalizer must be a number or a tensor, not str")
    if torch.compiler.is_compiling():  # which would compile anew for each number
        dtype = torch.promote_types(input.dtype, torch.float32)
        return input.new_ones((), dtype=dtype) * normalizer, None
    return None, float(normalizer)


def is_zero_on_empty(on_empty: str) -> bool:
    if on_empty != "nan" and on_empty != "zero":
        raise ValueError(f"on_empty must be 'nan' or 'zero', not {on_empty!r}")
    return on_empty == "zero"


def raise_index_error(message: str) -> None:
    """Raises torch's exception if the message is about a label out of range."""
    found = _OUT_OF_BOUNDS.search(message)
    if found is not None:
        label = found[1]
        message = found[0] if label is None else f"Target {label} is out of bounds."
        raise IndexError(message) from None
