"""Binary cross entropy in Triton: the ops of csrc/ops.cpp, loss and gradient in one pass.

Reading order: the formulas (one helper per form), the kernels, then the ops that launch them.
mean and sum cost two launches: `_elements` leaves one partial sum per program, `_finish` adds them
up in a fixed order, so equal inputs give equal bits. The gradient of a mean over the elements that
are not ignored needs their number before its first element is written: `_count` goes ahead.
"""

# Kernels are typed by Triton, not by annotations, and write compile-time arguments in capitals.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ce import reference
from fused_ce.reference import MEAN, NONE
from fused_ce.triton.common import (
    Operand,
    cast,
    is_done,
    load,
    mean_divisor,
    operands,
    precise_log,
    readable,
    store,
)

LOGITS = tl.constexpr(reference.LOGITS)
PROBABILITY = tl.constexpr(reference.PROBABILITY)

BLOCK = 1024  # elements a program handles at a time: 8 a thread, 16 bytes of a half dtype
PROGRAMS = 4096  # at most; their partial sums are one block of the finishing kernel
COUNTERS = 1024  # at most; every program that writes gradients adds up what `_count` counted


# -- formulas: in float32 or float64, whichever dtype the arguments have ---------------------------


@triton.jit
def _exp_minus(y):
    """exp(-y) for y >= 0. tl.exp rounds y * log2(e) in float32, which costs up to y ulp."""
    if y.dtype == tl.float64:
        return tl.exp(-y)
    else:
        y = tl.minimum(y, 110.0, propagate_nan=tl.PropagateNan.ALL)  # exp(-110) is 0 in float32
        shifted = 12582912.0 - y * 1.4426950408889634  # + 1.5 * 2^23: the last bits count integers
        n = shifted - 12582912.0  # exp(-y) = 2^n * exp(rest)
        rest = (-y - n * 0.693145751953125) - n * 1.4286068203094e-06  # the first is exact
        p = 0.0013836755258  # exp on -log(2)/2 .. log(2)/2, minimax: relative error 2e-9
        p = p * rest + 0.00837489808854
        p = p * rest + 0.0416682315564
        p = p * rest + 0.166664191951
        p = p * rest + 0.499999920334
        p = p * rest + 1.00000003654
        p = p * rest + 1.0
        bits = (shifted.to(tl.int32, bitcast=True) << 23) + 0x5F800000
        power = bits.to(tl.float32, bitcast=True)  # 2^(n + 64), so that no n underflows
        return p * power * 5.421010862427522e-20  # 2^-64


@triton.jit
def _parts(x):
    """y = |x|, e = exp(-y), r = 1 / (1 + e) and log1p(e): all that the formulas of a logit need."""
    y = tl.abs(x)
    e = _exp_minus(y)
    d = 1.0 + e
    r = 1.0 / d
    if x.dtype == tl.float64:
        log1p = tl.log(d) + (e - (d - 1.0)) * r
    else:
        r += r * ((1.0 - r) - e * r)  # the division is approximate in float32, and d is rounded
        p = -0.00325637847955  # log1p(e) = e + e^2 p(e) on 0 .. 1, minimax: relative error 9e-9
        p = p * e + 0.0200345166107
        p = p * e - 0.0575786435285
        p = p * e + 0.1069882282
        p = p * e - 0.153843851882
        p = p * e + 0.197126676023
        p = p * e - 0.249635297753
        p = p * e + 0.333311536702
        p = p * e - 0.499999605332
        log1p = e + e * e * p
    return y, e, r, log1p


@triton.jit
def _logits(x, a, b, ab, y, e, r, log1p):
    """-b log(sigmoid(x)) - a log(1 - sigmoid(x)) and its derivative; ab = a + b."""
    m = tl.where(x >= 0.0, a, b)
    loss = m * tl.where(m == 0.0, 0.0, y) + ab * log1p  # not 0 * inf for an infinite logit
    slope = m - ab * e * r
    return loss, tl.where(x >= 0.0, slope, -slope)


@triton.jit
def _probability(p, a, t):
    """-t log(p) - a log(1 - p), both logs clamped at -100, and torch's derivative."""
    q = 1.0 - p
    log_p = precise_log(p, tl.zeros_like(p))
    log_q = precise_log(q, (1.0 - q) - p)
    log_p = tl.where(log_p < -100.0, -100.0, log_p)  # not tl.maximum, which drops NaN
    log_q = tl.where(log_q < -100.0, -100.0, log_q)
    variance = p * q
    least = 9.999999960041972e-13  # float32's 1e-12, which torch has in float64, too
    variance = tl.where(variance < least, least, variance)
    return -(t * log_p + a * log_q), (p - t) / variance


@triton.jit
def _focal(x, a, t, alpha, beta, gamma, parity, POWER: tl.constexpr):
    """(alpha * t + beta * a) * u^gamma * cross entropy, with u = 1 - p_t, and its derivative.

    POWER is a small whole gamma or -1.
    """
    y, e, r, log1p = _parts(x)
    loss, slope = _logits(x, a, t, 1.0, y, e, r, log1p)
    m = tl.where(x >= 0.0, a, t)
    n = tl.where(x >= 0.0, t, a)
    v = m + n * e  # u = r * v
    if POWER == 0:
        modulation = 1.0
        modulation_slope = tl.zeros_like(x)
    elif POWER > 0:
        u = r * v
        lower = 1.0  # u^(gamma - 1)
        for _ in tl.static_range(POWER - 1):
            lower *= u
        modulation = lower * u
        modulation_slope = POWER * lower * (a - t) * e * r * r
    else:
        # by logarithms, and e apart from n: u may underflow. u < 0 takes a target outside 0 .. 1.
        only_n = m == 0.0
        log_v = precise_log(tl.abs(tl.where(only_n, n, v)), tl.zeros_like(v))
        log_v -= tl.where(only_n, y, 0.0)
        log_u = log_v - log1p
        modulation = _exp_minus(-gamma * log_u) * tl.where(v < 0.0, parity, 1.0)
        modulation_slope = gamma * modulation * (a - t) * r * tl.where(only_n, 1.0 / n, e / v)
    steeper = tl.where(modulation_slope == 0.0, 0.0, loss * modulation_slope)  # not inf * 0
    alpha_t = alpha * t + beta * a
    return alpha_t * modulation * loss, alpha_t * (modulation * slope + steeper)


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def _indices(i, iterations, ALIGNED: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """The elements, counted in memory order, of this program's i-th block."""
    block = tl.program_id(0).to(INDEX) * iterations + i
    index = block * BLOCK + tl.arange(0, BLOCK)
    if not ALIGNED:  # an end amid 16 bytes: a thread takes single elements, its neighbour the next
        index = tl.multiple_of(index, 1)
    return index


@triton.jit
def _is_kept(target, ignore_index):
    if target.dtype.is_floating() and target.dtype != tl.float64:
        narrow = ignore_index.to(tl.float32)
        exact = narrow.to(tl.float64) == ignore_index.to(tl.float64)
        return target.to(tl.float32) != tl.where(exact, narrow, float("nan"))  # NaN equals nothing
    else:
        return target != ignore_index


@triton.jit(do_not_specialize=["iterations", "ignore_index"])
def _count(
    target,
    counts,
    unless_one,
    numel,
    iterations,
    sizes,
    ignore_index,
    ALIGNED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[program] = how many of this program's targets are not ignored."""
    kept = tl.zeros([BLOCK], tl.int32)
    if is_done(unless_one):
        iterations = 0
    for i in range(iterations):
        index = _indices(i, iterations, ALIGNED, INDEX, BLOCK)
        mask = index < numel
        t = load(target, index, sizes, mask)
        kept += (mask & _is_kept(t, ignore_index)).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(kept))


@triton.jit(do_not_specialize=["iterations", "counters", "ignore_index"])
def _elements(
    input,
    target,
    weight,  # operand or None
    pos_weight,  # operand or None
    sample_weight,  # operand or None: multiplies as `weight` does
    upstream,  # operand or None: what the gradient is multiplied by
    gradient,  # operand or None: written; may be the input itself
    unless_one,  # pointer or None: an upstream gradient, with nothing to do where it is 1
    loss,  # operand or None: written, one loss per element
    sums,  # [programs] or None: written, one partial sum per program
    counts,  # [counters] or None: elements that are not ignored; read for a gradient, else written
    counters,
    normalizer,
    denominator: tl.float64,
    numel,
    iterations,
    sizes,
    ignore_index,
    smooth_scale: tl.float64,
    smooth_shift: tl.float64,
    alpha: tl.float64,
    beta: tl.float64,
    gamma: tl.float64,
    parity: tl.float64,
    FORM: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    ZERO_ON_EMPTY: tl.constexpr,
    COUNTERS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if is_done(unless_one):
        iterations = 0
    smooth_scale = tl.full([], smooth_scale, COMPUTE)
    smooth_shift = tl.full([], smooth_shift, COMPUTE)
    alpha = tl.full([], alpha, COMPUTE)
    beta = tl.full([], beta, COMPUTE)
    gamma = tl.full([], gamma, COMPUTE)
    parity = tl.full([], parity, COMPUTE)
    if gradient is not None:
        divisor = mean_divisor(counts, counters, normalizer, denominator, COUNTERS)
        scale = (1.0 / divisor).to(COMPUTE)
    total = tl.zeros([BLOCK], COMPUTE)
    kept = tl.zeros([BLOCK], tl.int32)
    for i in range(iterations):
        index = _indices(i, iterations, ALIGNED, INDEX, BLOCK)
        mask = index < numel
        x = load(input, index, sizes, mask).to(COMPUTE)
        t = load(target, index, sizes, mask)
        keep = mask
        if ignore_index is not None:
            keep = mask & _is_kept(t, ignore_index)
        t = t.to(COMPUTE)
        if FORM == PROBABILITY:
            in_range = (x >= 0.0) & (x <= 1.0) & (t >= 0.0) & (t <= 1.0)
            x = tl.where(in_range, x, float("nan"))  # torch raises, which would take a sync
        a = 1.0 - t
        if SMOOTH:
            a = a * smooth_scale + smooth_shift
            t = t * smooth_scale + smooth_shift
        if FORM == LOGITS:
            y, e, r, log1p = _parts(x)
            if pos_weight is None:
                value, slope = _logits(x, a, t, 1.0, y, e, r, log1p)
            else:
                b = load(pos_weight, index, sizes, mask).to(COMPUTE) * t
                value, slope = _logits(x, a, b, a + b, y, e, r, log1p)
        elif FORM == PROBABILITY:
            value, slope = _probability(x, a, t)
        else:
            value, slope = _focal(x, a, t, alpha, beta, gamma, parity, POWER)
        if weight is not None:
            w = load(weight, index, sizes, mask).to(COMPUTE)
            value *= w
            slope *= w
        if sample_weight is not None:
            w = load(sample_weight, index, sizes, mask).to(COMPUTE)
            value *= w
            slope *= w
        value = tl.where(keep, value, 0.0)
        if loss is not None:
            store(loss, index, sizes, mask, value)
        if sums is not None:
            total += value
        if gradient is None:
            kept += keep.to(tl.int32)
        else:
            slope *= scale
            if upstream is not None:
                slope *= load(upstream, index, sizes, mask).to(COMPUTE)
            if ignore_index is not None:
                slope = tl.where(keep, slope, 0.0)
            if ZERO_ON_EMPTY:
                slope = tl.where(divisor != 0.0, slope, 0.0)
            store(gradient, index, sizes, mask, slope)
    if sums is not None:
        tl.store(sums + program, tl.sum(total))
    if counts is not None and gradient is None:
        tl.store(counts + program, tl.sum(kept))


@triton.jit(do_not_specialize=["programs", "counters"])
def _finish(
    result,
    sums,
    programs,
    counts,
    counters,
    normalizer,
    denominator: tl.float64,
    ZERO_ON_EMPTY: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """result = sum / divisor, by one program: float64, in the same order every time."""
    lanes = tl.arange(0, PROGRAMS)
    total = tl.sum(tl.load(sums + lanes, mask=lanes < programs, other=0.0).to(tl.float64))
    divisor = mean_divisor(counts, counters, normalizer, denominator, PROGRAMS)
    value = total / divisor
    if ZERO_ON_EMPTY:
        value = tl.where(divisor == 0.0, 0.0, value)
    tl.store(result, cast(value, result.dtype.element_ty))


@triton.jit(do_not_specialize=["iterations"])
def _scale(
    gradient,
    scale,
    numel,
    iterations,
    sizes,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gradient *= scale; reads only the scalar if that is 1, as it mostly is."""
    factor = tl.load(scale).to(COMPUTE)
    if factor != 1.0:
        for i in range(iterations):
            index = _indices(i, iterations, ALIGNED, INDEX, BLOCK)
            mask = index < numel
            value = load(gradient, index, sizes, mask).to(COMPUTE) * factor
            store(gradient, index, sizes, mask, value)


# -- launches --------------------------------------------------------------------------------------


def _operands(
    shape: torch.Size, tensors: list[Tensor | None]
) -> tuple[list[Operand | None], tuple[int, ...], dict[str, Any]]:
    """What the kernels take for `tensors`, broadcast to `shape`; sizes; how to index elements."""
    views = [None if t is None else t.expand(shape) for t in tensors]
    found, sizes, index = operands(shape, [None if v is None else (v, v.stride()) for v in views])
    return found, sizes, {"ALIGNED": shape.numel() % 16 == 0, "INDEX": index, "BLOCK": BLOCK}


def _grid(numel: int, limit: int) -> tuple[int, int]:
    """How many programs, and how many blocks each."""
    blocks = triton.cdiv(numel, BLOCK)
    iterations = max(1, triton.cdiv(blocks, limit))
    return triton.cdiv(blocks, iterations), iterations


def _run(
    gradient: Tensor | None,
    written: bool,
    grad_output: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    form: int,
    reduction: int,
    dtype: torch.dtype,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    alpha: float = -1.0,
    gamma: float = 0.0,
    denominator: float | None = None,
    zero_on_empty: bool = False,
) -> Tensor | None:
    """Fills `gradient`, if given; returns the loss, unless there is a `grad_output`. If `written`
    it is filled unless `grad_output` is 1."""
    compute = torch.float64 if torch.float64 in (input.dtype, dtype) else torch.float32
    numel = input.numel()
    programs, iterations = counters, count_iterations = _grid(numel, PROGRAMS)
    elements = result = sums = counts = None
    if grad_output is None and reduction == NONE:
        elements = torch.empty_like(input, dtype=dtype)
    elif grad_output is None:
        result = input.new_empty((), dtype=dtype)
        sums = input.new_empty(programs, dtype=compute)
    if reduction != MEAN:
        normalizer, denominator = None, 1.0
    elif normalizer is not None:
        normalizer = readable(normalizer)
    elif denominator is None and ignore_index is None:
        denominator = numel
    elif denominator is None:
        if gradient is not None:
            counters, count_iterations = _grid(numel, COUNTERS)
        counts = input.new_empty(counters, dtype=torch.int32)
    mean = {
        "counts": counts,
        "counters": counters,
        "normalizer": normalizer,
        "denominator": float(denominator or 0.0),
        "ZERO_ON_EMPTY": zero_on_empty,
    }
    unless_one = grad_output if written else None
    (out_gradient, out_loss, x, t, *factors), sizes, indexing = _operands(
        input.shape,
        [gradient, elements, input, target, weight, pos_weight, sample_weight, grad_output],
    )
    with torch.accelerator.device_index(input.device.index):
        if numel and counts is not None and gradient is not None:
            _count[(counters,)](
                t, counts, unless_one, numel, count_iterations, sizes, ignore_index, **indexing
            )
        if numel:
            _elements[(programs,)](
                x,
                t,
                *factors,
                out_gradient,
                unless_one,
                out_loss,
                sums,
                numel=numel,
                iterations=iterations,
                sizes=sizes,
                ignore_index=ignore_index,
                smooth_scale=1.0 - label_smoothing,
                smooth_shift=0.5 * label_smoothing,
                alpha=alpha if alpha >= 0 else 1.0,
                beta=1.0 - alpha if alpha >= 0 else 1.0,
                gamma=gamma,
                parity=1.0 - 2.0 * (gamma % 2) if gamma % 1 == 0 else math.nan,
                FORM=form,
                SMOOTH=label_smoothing != 0,
                POWER=int(gamma) if gamma in range(9) else -1,
                COUNTERS=COUNTERS,
                COMPUTE=tl.float64 if compute == torch.float64 else tl.float32,
                **mean,
                **indexing,
            )
        if result is not None:
            _finish[(1,)](result, sums, programs, PROGRAMS=PROGRAMS, num_warps=8, **mean)
    return elements if result is None else result


def bce(*arguments: Any) -> Tensor | None:
    """The op `_bce`."""
    return _run(None, False, None, *arguments)


def bce_with_gradient(gradient: Tensor, *arguments: Any) -> Tensor | None:
    """The op `_bce_with_gradient`."""
    return _run(gradient, False, None, *arguments)


def bce_backward(*arguments: Any) -> None:
    """The op `_bce_backward`."""
    _run(*arguments)


def scale_(gradient: Tensor, scale: Tensor) -> None:
    """The op `_scale_`."""
    numel = gradient.numel()
    programs, iterations = _grid(numel, PROGRAMS)
    (operand,), sizes, indexing = _operands(gradient.shape, [gradient])
    if numel:
        with torch.accelerator.device_index(gradient.device.index):
            _scale[(programs,)](
                operand,
                readable(scale),
                numel,
                iterations,
                sizes,
                COMPUTE=tl.float64 if gradient.dtype == torch.float64 else tl.float32,
                **indexing,
            )


OPS: dict[str, Callable[..., Any]] = {
    "_bce": bce,
    "_bce_with_gradient": bce_with_gradient,
    "_bce_backward": bce_backward,
    "_scale_": scale_,
}
