"""What the kernels of all losses share: operands of any strides, and formulas.

An operand of a kernel is a pair: a tensor and its strides, innermost dimension first; a stride of 0
is known when the kernel is compiled, and a scalar has no strides at all. `sizes` are those of all
dimensions but the outermost: nothing to divide by where there is just one.
"""

# Kernels are typed by Triton, not by annotations, and write compile-time arguments in capitals.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def log_of_normal(v, c):
    """log(v + c), c being what rounding v lost, or None; v is positive and not subnormal, or NaN.
    Precise next to v = 1, where tl.log is not."""
    if v.dtype == tl.float64:
        log = tl.log(v)
        if c is not None:
            log += tl.where(c == 0.0, 0.0, c / v)
        return log
    else:
        k = (v.to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23  # v / 2^k is in sqrt(1/2) .. sqrt(2)
        power = ((127 - k) << 23).to(tl.float32, bitcast=True)  # 2^-k
        f = v * power - 1.0
        if c is not None:
            f += c * power
        p = -0.078598422185  # log(1 + f) = f - f^2 / 2 + f^3 p(f), minimax: relative error 6e-9
        p = p * f + 0.128817256184
        p = p * f - 0.13128709817
        p = p * f + 0.141811804401
        p = p * f - 0.166245572372
        p = p * f + 0.200022867143
        p = p * f - 0.250008103241
        p = p * f + 0.333333167225
        k = k.to(tl.float32)
        return k * 0.693145751953125 + (k * 1.4286068203094e-06 + (f - f * f * (0.5 - f * p)))


@triton.jit
def precise_log(v, c):
    """log_of_normal, and of any other v."""
    return tl.where(v < 1.1754943508222875e-38, tl.log(v), log_of_normal(v, c))


@triton.jit
def offsets(strides, index, sizes):
    """How far the elements of these indices lie from the first."""
    offset = tl.zeros_like(index)
    for d in tl.static_range(len(strides)):
        if d + 1 < len(strides):
            size = sizes[d].to(index.dtype)
            coordinate = index % size
            index = index // size
        else:
            coordinate = index
        offset += coordinate * strides[d]
    return offset


@triton.jit
def pointers(operand, index, sizes):
    return operand[0] + offsets(operand[1], index, sizes)


@triton.jit
def load(operand, index, sizes, mask):
    if len(operand[1]) == 0:
        return tl.load(operand[0])
    else:
        return tl.load(pointers(operand, index, sizes), mask=mask, other=0)


@triton.jit
def cast(value, dtype: tl.constexpr):
    if dtype != tl.float64:
        value = value.to(tl.float32)  # float64 to bfloat16 is no single conversion
    return value.to(dtype)


@triton.jit
def store(operand, index, sizes, mask, value):
    tl.store(pointers(operand, index, sizes), cast(value, operand[0].dtype.element_ty), mask=mask)


@triton.jit
def is_done(unless_one):
    if unless_one is None:
        return False
    else:
        return tl.load(unless_one) == 1.0


@triton.jit
def mean_divisor(counts, counters, normalizer, denominator, LENGTH: tl.constexpr):
    """What a mean divides by: the sum of counts, a number on the device or an argument."""
    if counts is not None:
        lanes = tl.arange(0, LENGTH)
        return tl.sum(tl.load(counts + lanes, mask=lanes < counters, other=0).to(tl.float64))
    elif normalizer is not None:
        return tl.load(normalizer).to(tl.float64)
    else:
        return tl.full([], denominator, tl.float64)


# Not None: Triton 3.6 compiles neither `is None` nor `len` of a tuple with None anywhere in it.
NO_STRIDE = tl.constexpr(0)
Strides = tuple[int | tl.constexpr, ...]
Operand = tuple[Tensor, Strides]


@lru_cache(maxsize=1024)
def collapse(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], tuple[Strides, ...], Any]:
    """The fewest dimensions that hold for all operands, in the memory order of the first.

    Returns what the kernels take: sizes, each operand's strides, and the type of an index.
    """
    order = sorted(
        (d for d in range(len(shape)) if shape[d] != 1), key=lambda d: [s[d] for s in strides]
    )
    sizes: list[int] = []
    steps: list[list[int]] = []  # [dimension][operand]
    for d in order:
        step = [s[d] for s in strides]
        if sizes and step == [inner * sizes[-1] for inner in steps[-1]]:
            sizes[-1] *= shape[d]
        else:
            sizes.append(shape[d])
            steps.append(step)
    if not sizes:  # a single element
        sizes, steps = [1], [[1] * len(strides)]
    by_operand = list(zip(*steps, strict=True))
    farthest = [sum((n - 1) * step for n, step in zip(sizes, s, strict=True)) for s in by_operand]
    index = tl.uint32 if max(math.prod(sizes), *farthest) < 2**31 else tl.uint64
    simple = tuple(tuple(step or NO_STRIDE for step in s) if any(s) else () for s in by_operand)
    return tuple(sizes[:-1]), simple, index


def readable(tensor: Tensor) -> Tensor:
    """Triton has no bool in memory; its bytes are the numbers 0 and 1."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def operands(
    shape: torch.Size, tensors: Sequence[tuple[Tensor, tuple[int, ...]] | None]
) -> tuple[list[Operand | None], tuple[int, ...], Any]:
    """What the kernels take for tensors of these strides; sizes; the type of an index."""
    present = [t for t in tensors if t is not None]
    sizes, strides, index = collapse(tuple(shape), tuple(s for _, s in present))
    found = iter([(readable(t), s) for (t, _), s in zip(present, strides, strict=True)])
    return [None if t is None else next(found) for t in tensors], sizes, index
