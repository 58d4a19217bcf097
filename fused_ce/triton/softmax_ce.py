"""Softmax cross entropy in Triton: the ops of csrc/ops.cpp, loss and gradient in one launch.

A program takes a tile of rows (one row of many classes, or many rows of a few) and goes through its
classes in blocks. The first pass keeps a running maximum and what is summed relative to it; the
second, for the gradient, reads the logits again, which the cache still holds. Where a tile's
classes fit one block there is no second read.

mean and sum cost two launches: `_prepare` finds what a mean divides by and sets the ticket to zero;
`_rows` leaves a partial sum per program, and the program that draws the last ticket adds them up,
in the same order whichever it is, so that equal inputs give equal bits.

Backward ignores the saved lse and entropy and finds them again from the logits, which the gradient
reads anyway: exp(l - lse) would lose the digits that l has beyond lse's last place.
"""

# Kernels are typed by Triton, not by annotations, and write compile-time arguments in capitals.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803, N806, SIM102

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ce.reference import CORRECT, ENTROPY, LSE, MEAN, NONE, PREDICTION
from fused_ce.triton.common import (
    cast,
    is_done,
    load,
    log_of_normal,
    mean_divisor,
    offsets,
    operands,
    readable,
)

ROW_BYTES = 16384  # of a row that a program reads at a time
WARP = 1024  # elements of a tile that a warp has
WARPS = 8192  # of all programs, at most
UNIT = 16  # elements: a multiple of what is read at a time, and what Triton looks for
LABELS = 1024  # a program of `_prepare` reads at a time
COUNTERS = 256  # at most; every program that writes gradients adds up what `_prepare` counted
FINISH = 1024  # partial sums added at a time


# -- blocks of a tile ------------------------------------------------------------------------------
# Of tensors with two dimensions the first is rows and the second classes.


class Tile(NamedTuple):
    """Some rows, and how their logits are read. Pointers are to class 0 of each row."""

    input: Any  # [ROWS, 1] pointers
    target: Any  # [ROWS, 1] pointers to probabilities, or None
    weight: Any  # pointer or None
    steps: Any  # from class to class of input, target, weight, gradient
    live: Any  # [ROWS, 1]: which rows' logits are read
    exists: Any  # [ROWS, 1]
    form: Any  # softcap, logit_scale / softcap, logit_scale; the first two or all None
    smooth: Any  # what a probability is multiplied by; what is added to it, or None


class Sums(NamedTuple):
    """Of a row, over the blocks so far; d is logit - base and c the loss's coefficients."""

    top: Any  # the largest logit, whose base is what is subtracted
    total: Any  # of exp(d)
    spread: Any  # of exp(d) * d
    mixed: Any  # of c
    distance: Any  # of c * d
    largest: Any  # rank and first class of the largest logit
    likeliest: Any  # the same of the probabilities


class Factors(NamedTuple):
    """What the parts of a row's gradient are multiplied by: [ROWS, 1] or None."""

    exp: Any
    spread: Any  # exp(d) * (d - center)
    center: Any
    mixed: Any
    label: Any  # the label's class, and what is subtracted there
    own: Any
    graded: Any  # rows whose gradient is not 0 throughout


@triton.jit
def _tanh(u):
    y = tl.abs(u)
    z = u * u
    # Lambert's continued fraction to its seventh denominator: 3e-16 off at 1/2.
    p = y * (((z + 378.0) * z + 17325.0) * z + 135135.0)
    q = ((28.0 * z + 3150.0) * z + 62370.0) * z + 135135.0
    t = tl.where(y < 0.5, p / q, 1.0 - 2.0 / (tl.exp(2.0 * y) + 1.0))
    return tl.where(u < 0.0, -t, t)


@triton.jit
def _capped(x, form):
    """The logits of what was read, and their derivative."""
    if form[0] is not None:
        t = _tanh(x * form[1])
        return form[0] * t, form[2] * (1.0 - t * t)
    elif form[2] is not None:
        return x * form[2], form[2]
    else:
        return x, 1.0


@triton.jit
def _base(top):
    """What to subtract before exp: not an infinite maximum, of which inf - inf would come."""
    return tl.where(tl.abs(top) == float("inf"), 0.0, top)


@triton.jit
def _block(first, begin, end, BLOCK: tl.constexpr):
    """The classes of a block, and which of them are in begin .. end."""
    c = first + tl.arange(0, BLOCK)[None, :].to(end.dtype)
    inside = c < end
    if begin is not None:
        inside = inside & (c >= begin)
    return c, inside


@triton.jit
def _edges(begin, span, end, LANES: tl.constexpr):
    """The classes in begin .. end that are not in the span: less than a unit at each end."""
    lane = tl.arange(0, LANES)[None, :].to(end.dtype)
    c = tl.where(lane < LANES // 2, lane, lane - LANES // 2 + span[1])
    return c, tl.where(lane < LANES // 2, (c >= begin) & (c < span[0]), c < end)


@triton.jit
def _logits(tile, c, inside, COMPUTE: tl.constexpr):
    """Logits, -inf where there is none, and their slopes."""
    there = tile.live & inside
    x = tl.load(tile.input + c * tile.steps[0], mask=there, other=float("-inf")).to(COMPUTE)
    logit, slope = _capped(x, tile.form)
    if tile.form[2] is not None:
        logit = tl.where(there, logit, float("-inf"))
    return logit, slope


@triton.jit
def _probabilities(tile, c, inside, COMPUTE: tl.constexpr):
    there = tile.exists & inside
    return tl.load(tile.target + c * tile.steps[1], mask=there, other=0).to(COMPUTE)


@triton.jit
def _coefficients(tile, p, c, inside, COMPUTE: tl.constexpr):
    """What the loss multiplies -log p by, beside the label's own part."""
    coefficient = tile.smooth[1]
    if tile.target is not None:
        coefficient = p * tile.smooth[0]
        if tile.smooth[1] is not None:
            coefficient += tile.smooth[1]
    if tile.weight is not None:
        weight = tl.load(tile.weight + c * tile.steps[2], mask=inside, other=0)
        coefficient *= weight.to(COMPUTE)
    return tl.where(tile.exists & inside, coefficient, 0.0)


@triton.jit
def _first_largest(x, c, inside, end):
    """Rank and class of the first of the largest, as argmax finds it. Ranks are integers in the
    order of the numbers, but a NaN is the largest of all, and -0 equals 0."""
    INTEGER: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
    LAST: tl.constexpr = 2 ** (INTEGER.primitive_bitwidth - 1) - 1
    rank = x.to(INTEGER, bitcast=True)
    rank = tl.where(rank < 0, rank ^ LAST, rank)
    rank = tl.where(x == 0.0, 0, tl.where(x != x, LAST, rank))
    rank = tl.where(inside, rank, -LAST - 1)
    top = tl.max(rank, 1)
    return top, tl.min(tl.where(rank == top[:, None], c, end), 1)


@triton.jit
def _first_of_both(a, b):
    first = tl.where(a[0] > b[0], a[1], tl.where(a[0] < b[0], b[1], tl.minimum(a[1], b[1])))
    return tl.maximum(a[0], b[0]), first


@triton.jit
def _add(tile, sums, classes, end, SPREAD: tl.constexpr, BEST: tl.constexpr, COMPUTE: tl.constexpr):
    """Reads a block into the sums of its rows; returns what `_put` needs of it, too."""
    MIXED: tl.constexpr = tile.target is not None or tile.smooth[1] is not None
    c, inside = classes
    logit, slope = _logits(tile, c, inside, COMPUTE)
    p = logit  # not used where there are none; Triton 3.6 cannot return None
    if tile.target is not None:
        p = _probabilities(tile, c, inside, COMPUTE)
    coefficient = logit
    if MIXED:
        coefficient = _coefficients(tile, p, c, inside, COMPUTE)
    top = tl.max(logit, 1)
    if sums is not None:
        top = tl.maximum(top, sums.top)
    base = _base(top)
    d = logit - base[:, None]
    e = tl.exp(d)
    total = tl.sum(e, 1)
    zero = tl.zeros_like(total)
    spread, mixed, distance = zero, zero, zero
    if SPREAD:
        spread = tl.sum(tl.where(e == 0.0, 0.0, e * d), 1)
    if MIXED:
        mixed = tl.sum(coefficient, 1)
        distance = tl.sum(tl.where(inside, coefficient * d, 0.0), 1)
    largest, likeliest = (zero, zero), (zero, zero)
    if BEST:
        largest = _first_largest(logit, c, inside, end)
        if tile.target is not None:
            likeliest = _first_largest(p, c, inside, end)
    if sums is not None:
        shrink = tl.exp(sums.top - base)
        shift = _base(sums.top) - base
        total += sums.total * shrink
        spread += tl.where(shrink == 0.0, 0.0, shrink * (sums.spread + sums.total * shift))
        mixed += sums.mixed
        distance += sums.distance + sums.mixed * shift
        if BEST:
            largest = _first_of_both(largest, sums.largest)
            if tile.target is not None:
                likeliest = _first_of_both(likeliest, sums.likeliest)
    return Sums(top, total, spread, mixed, distance, largest, likeliest), (d, e, slope, coefficient)


@triton.jit
def _spread_out(sums):
    """The same sums, one row a thread where there are several. In the tile's layout every thread
    that holds part of a row would compute what follows; a gather changes the layout in a way that
    the compiler does not undo."""
    if sums.top.shape[0] == 1:
        return sums
    else:
        row = tl.arange(0, sums.top.shape[0])
        return Sums(
            tl.gather(sums.top, row, 0),
            tl.gather(sums.total, row, 0),
            tl.gather(sums.spread, row, 0),
            tl.gather(sums.mixed, row, 0),
            tl.gather(sums.distance, row, 0),
            (sums.largest[0], tl.gather(sums.largest[1], row, 0)),
            (sums.likeliest[0], tl.gather(sums.likeliest[1], row, 0)),
        )


@triton.jit
def _put(tile, output, factors, classes, block, has_label):
    """Writes a block of the gradient."""
    c, inside = classes
    d, e, slope, coefficient = block
    g = e * factors.exp
    if factors.spread is not None:
        g += tl.where(e == 0.0, 0.0, e * factors.spread * (d - factors.center))
    if factors.mixed is not None:
        g -= coefficient * factors.mixed
    if factors.own is not None:
        if has_label:
            g = tl.where(c == factors.label, g - factors.own, g)
    g *= slope
    if factors.graded is not None:
        g = tl.where(factors.graded, g, 0.0)
    g = cast(g, output.dtype.element_ty)
    tl.store(output + c * tile.steps[3], g, mask=tile.exists & inside)


@triton.jit
def _put_again(tile, output, factors, classes, base, has_label, COMPUTE: tl.constexpr):
    """`_put` of a block that is read a second time."""
    c, inside = classes
    logit, slope = _logits(tile, c, inside, COMPUTE)
    coefficient = logit
    if factors.mixed is not None:
        p = _probabilities(tile, c, inside, COMPUTE) if tile.target is not None else logit
        coefficient = _coefficients(tile, p, c, inside, COMPUTE)
    d = logit - base
    _put(tile, output, factors, classes, (d, tl.exp(d), slope, coefficient), has_label)


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["iterations", "ignore_index"])
def _prepare(
    target,  # operand: labels
    weight,  # pointer or None
    weight_step,
    counts,  # [programs] or None: sums of the weights of the labels that are not ignored
    ticket,  # [1]: set to 0
    rows,
    iterations,
    sizes,
    classes,
    ignore_index,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program == 0:
        tl.store(ticket, 0)
    if counts is not None:
        total = tl.zeros([BLOCK], tl.int32 if weight is None else tl.float64)
        for i in range(iterations):
            row = (program.to(INDEX) * iterations + i) * BLOCK + tl.arange(0, BLOCK)
            mask = row < rows
            label = load(target, row, sizes, mask).to(tl.int64)
            kept = mask & (label != ignore_index)
            if weight is None:
                total += kept.to(tl.int32)
            else:
                kept = kept & (label >= 0) & (label < classes)
                total += tl.load(weight + label * weight_step, mask=kept, other=0).to(tl.float64)
        tl.store(counts + program, tl.sum(total).to(tl.float64))


@triton.jit
def _start(operand, row, sizes, UNIT: tl.constexpr):
    """Pointers to class 0 of rows, or to the multiple of UNIT elements before it."""
    return operand[0] + offsets(operand[1], row, sizes) // UNIT * UNIT


@triton.jit
def _put_by_row(operand, row, sizes, exists, value):
    offset = offsets(operand[1], row, sizes)
    kind: tl.constexpr = operand[0].dtype.element_ty
    if kind.is_floating():
        value = cast(value, kind)
    tl.store(operand[0] + offset, value.to(kind), mask=exists)


@triton.jit(do_not_specialize=["tiles", "ignore_index", "counters"])
def _rows(
    input,  # operand: of class 0 of every row, as gradient and probabilities
    target,  # operand: labels or probabilities
    gradient,  # operand or None: written; may be the input itself
    unless_one,  # pointer or None: an upstream gradient, with nothing to do where it is 1
    sample_weight,  # operand or None
    grad_loss,  # operand or None: what multiplies the loss's gradient
    grad_lse,  # operand or None
    grad_entropy,  # operand or None
    loss,  # operand or None, as the next four: written, one element a row
    lse,
    entropy,
    prediction,
    correct,
    weight,  # pointer or None
    steps,  # from class to class of input, probabilities, weight, gradient
    sums,  # [programs] or None: partial sums of the losses
    ticket,  # [1]: how many programs have left theirs
    result,  # [] or None: the sum of all over the divisor
    counts,  # [counters] or None
    counters,
    normalizer,
    denominator: tl.float64,
    rows,
    tiles,
    classes,
    sizes,
    ignore_index,
    factor: tl.float64,
    flat: tl.float64,
    softcap: tl.float64,
    inner_scale: tl.float64,
    logit_scale: tl.float64,
    z_loss: tl.float64,
    PROBABILITIES: tl.constexpr,
    OF_LOSS: tl.constexpr,
    SMOOTH: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SQUARED: tl.constexpr,
    ZERO_ON_EMPTY: tl.constexpr,
    COUNTERS: tl.constexpr,
    FINISH: tl.constexpr,
    UNIT: tl.constexpr,
    EDGES: tl.constexpr,
    ACROSS: tl.constexpr,
    SINGLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    CLASS: tl.constexpr,
):
    """OF_LOSS: the gradient is the loss's, too. ACROSS: neighbours in memory are rows, not classes.
    SINGLE: one block has all classes. EDGES: 0, and every row starts at a multiple of UNIT
    elements; or a tile is one row, its classes are counted from the last multiple before it, and
    what blocks of whole units leave at its ends is a block of so many lanes."""
    BEST: tl.constexpr = prediction is not None or correct is not None
    SPREAD: tl.constexpr = entropy is not None or grad_entropy is not None
    READ_ALL: tl.constexpr = ACROSS or lse is not None or entropy is not None or BEST
    MIXED: tl.constexpr = PROBABILITIES or SMOOTH
    end = tl.full([], classes, CLASS)
    if EDGES == 0:
        end = end // UNIT * UNIT  # changes nothing, but tells the compiler what divides it
    z_loss = tl.full([], z_loss, COMPUTE)
    factor = tl.full([], factor, COMPUTE)
    smooth = (factor, tl.full([], flat, COMPUTE) if SMOOTH else None)
    scale = tl.full([], logit_scale, COMPUTE)
    form = (None, None, scale if SCALED else None)
    if CAPPED:
        form = (tl.full([], softcap, COMPUTE), tl.full([], inner_scale, COMPUTE), scale)
    if gradient is not None and OF_LOSS:
        divisor = mean_divisor(counts, counters, normalizer, denominator, COUNTERS)
        inverse = (1.0 / divisor).to(COMPUTE)
        if counts is not None and not ZERO_ON_EMPTY:
            # As torch's mean over labels of weight 0, with label smoothing too.
            inverse = tl.where(divisor == 0.0, float("nan"), inverse)

    losses = tl.zeros([ROWS], COMPUTE)
    if is_done(unless_one):
        tiles = 0
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tl.full([], i, INDEX) * ROWS + tl.arange(0, ROWS).to(INDEX)
        exists = row < rows
        margin = tl.zeros([], CLASS)  # the number of class 0
        span = (None, end)  # of the blocks
        if EDGES > 0:
            margin = (offsets(input[1], tl.full([], i, INDEX), sizes) % UNIT).to(CLASS)
            span = (tl.where(margin > 0, UNIT, 0).to(CLASS), (end + margin) // UNIT * UNIT)
        last = end + margin
        weights = weight - margin * steps[2] if weight is not None else None
        x = _start(input, row, sizes, UNIT)
        kept = exists & (classes > 0)
        if not PROBABILITIES:
            y = load(target, row, sizes, exists).to(tl.int64)
            kept = exists & (y != ignore_index)
            known = kept & (y >= 0) & (y < classes)
            y = tl.where(known, y, 0).to(CLASS) + margin
            at_label = tl.load(x + y * steps[0], mask=known, other=0).to(COMPUTE)
            at_label, _ = _capped(at_label, form)
            label_weight = tl.zeros([ROWS], COMPUTE) + factor
            if weight is not None:
                of_label = tl.load(weights + y * steps[2], mask=known, other=0)
                label_weight *= of_label.to(COMPUTE)
            label_weight = tl.where(kept & (known == 0), float("nan"), label_weight)

        # What reaches the gradient of a row, and which rows that leaves at 0: these are not read,
        # unless their statistics are wanted.
        graded = kept & OF_LOSS
        live = graded
        on_e = tl.zeros([ROWS], COMPUTE)
        if gradient is not None:
            if OF_LOSS:
                if ZERO_ON_EMPTY:
                    graded = graded & (tl.zeros([ROWS], tl.float64) + divisor != 0.0)
                on_loss = tl.zeros([ROWS], COMPUTE) + inverse
                if sample_weight is not None:
                    on_loss *= load(sample_weight, row, sizes, exists).to(COMPUTE)
                if grad_loss is not None:
                    on_loss *= load(grad_loss, row, sizes, exists).to(COMPUTE)
                on_loss = tl.where(graded, on_loss, 0.0)
            if grad_lse is not None:
                on_e += load(grad_lse, row, sizes, exists).to(COMPUTE)
                graded = graded | (on_e != 0.0)
            if grad_entropy is not None:
                on_entropy = load(grad_entropy, row, sizes, exists).to(COMPUTE)
                graded = graded | (on_entropy != 0.0)
        live = exists if READ_ALL else live | graded

        tile = Tile(
            x[:, None],
            _start(target, row, sizes, UNIT)[:, None] if PROBABILITIES else None,
            weights,
            steps,
            live[:, None],
            exists[:, None],
            form,
            smooth,
        )
        head = _edges(margin, span, last, EDGES) if EDGES > 0 else _block(0, None, end, BLOCK)
        state, block = _add(tile, None, head, last, SPREAD, BEST, COMPUTE)
        if not SINGLE:
            stop = span[1]
            if not READ_ALL:
                stop *= tl.max(live.to(CLASS))  # a tile of ignored rows is not gone through
            for first in range(BLOCK if EDGES == 0 else 0, stop, BLOCK):
                rest = _block(first, span[0], span[1], BLOCK)
                state = _add(tile, state, rest, last, SPREAD, BEST, COMPUTE)[0]

        state = _spread_out(state)
        base = _base(state.top)
        infinite = state.total == float("inf")
        total = tl.where(infinite, float("nan"), state.total)  # so are torch's loss and gradient
        log_total = tl.where(total == 0.0, float("-inf"), log_of_normal(total, None))
        row_lse = tl.where(infinite, float("inf"), base + log_total)
        row_entropy = log_total - state.spread / total
        pull = tl.zeros([ROWS], COMPUTE)  # the sum of all that multiplies -log p
        value = pull
        if MIXED:
            pull = state.mixed
            value = pull * log_total - state.distance
        if loss is not None or sums is not None:
            if not PROBABILITIES:
                value += label_weight * ((base - at_label) + log_total)
            if SQUARED:
                value += z_loss * row_lse * row_lse
            if sample_weight is not None:
                value *= load(sample_weight, row, sizes, exists).to(COMPUTE)
            value = tl.where(kept, value, 0.0)
            if loss is not None:
                _put_by_row(loss, row, sizes, exists, value)
            losses += value
        if lse is not None:
            _put_by_row(lse, row, sizes, exists, row_lse)
        if entropy is not None:
            _put_by_row(entropy, row, sizes, exists, row_entropy)
        if BEST:
            chosen = state.largest[1]
            if prediction is not None:
                _put_by_row(prediction, row, sizes, exists, chosen - margin)
            if correct is not None:
                right = chosen == state.likeliest[1] if PROBABILITIES else known & (chosen == y)
                _put_by_row(correct, row, sizes, exists, right.to(tl.int32))

        if gradient is not None:
            label, own, on_spread, center, on_mixed = None, None, None, None, None
            if OF_LOSS:
                if not PROBABILITIES:
                    pull += label_weight
                    label = y[:, None]
                    own = (on_loss * label_weight)[:, None]
                if SQUARED:
                    pull += 2.0 * z_loss * row_lse
                on_e += on_loss * pull
                if MIXED:
                    on_mixed = on_loss[:, None]
            on_e = tl.where(graded, on_e / total, 0.0)
            if grad_entropy is not None:
                on_spread = tl.where(graded, -on_entropy / total, 0.0)[:, None]
                center = (log_total - row_entropy)[:, None]
            cleared = graded[:, None] if READ_ALL or ZERO_ON_EMPTY else None
            factors = Factors(on_e[:, None], on_spread, center, on_mixed, label, own, cleared)
            output = _start(gradient, row, sizes, UNIT)[:, None]
            if SINGLE:
                _put(tile, output, factors, head, block, True)
            else:
                at = base[:, None]
                if EDGES > 0:
                    _put_again(tile, output, factors, head, at, True, COMPUTE)
                for first in range(0, span[1], BLOCK):
                    rest = _block(first, span[0], span[1], BLOCK)
                    has_label = True
                    if label is not None:
                        has_label = (tl.max(y) >= first) & (tl.min(y) < first + BLOCK)
                    _put_again(tile, output, factors, rest, at, has_label, COMPUTE)

    if sums is not None:
        programs = tl.num_programs(0)
        tl.store(sums + tl.program_id(0), tl.sum(losses))
        tl.debug_barrier()
        if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
            lanes = tl.arange(0, FINISH)
            by_lane = tl.zeros([FINISH], tl.float64)
            for done in range(0, programs, FINISH):
                some = done + lanes
                partial = tl.load(sums + some, mask=some < programs, other=0, cache_modifier=".cg")
                by_lane += partial.to(tl.float64)
            by = mean_divisor(counts, counters, normalizer, denominator, COUNTERS)
            mean = tl.sum(by_lane) / by
            if ZERO_ON_EMPTY:
                mean = tl.where(by == 0.0, 0.0, mean)
            elif counts is not None:
                mean = tl.where(by == 0.0, float("nan"), mean)
            tl.store(result, cast(mean, result.dtype.element_ty))


# -- launches --------------------------------------------------------------------------------------


def _class_dimension(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0


def _layout(
    tensors: list[Tensor], weight_step: int, classes: int, rows: int
) -> tuple[dict[str, Any], int]:
    """How tiles cut the logits, which come first among the tensors with classes; and how many warps
    a program has. Each warp has rows of its own, unless there is just one row."""
    input = tensors[0]
    dim = _class_dimension(input)
    steps = [t.stride(dim) for t in tensors]
    apart = [[s for d, s in enumerate(t.stride()) if d != dim and t.size(d) > 1] for t in tensors]
    unit = math.gcd(UNIT, classes, *(s for strides in apart for s in strides))
    wide = 16 // input.element_size()
    block = triton.next_power_of_2(max(classes, 1))
    across = triton.next_power_of_2(max(rows, 1))
    neighbours = any(0 < s < steps[0] for s in apart[0])  # in memory are rows, not classes
    if neighbours:
        across = min(across, 4 * 32 * wide)
        warps = max(1, across // (32 * wide))
        block = min(block, warps * WARP // across)
    elif block <= 32 and across >= 128:
        across = min(across, 512, 4 * WARP // block)
        warps = 4
    else:
        block = min(block, ROW_BYTES // input.element_size())
        across = max(1, min(across, WARP // block))
        warps = max(1, min(8, block // WARP))
    shifted = (
        classes > max(block, UNIT)
        and across == 1
        and unit < wide
        and all(s == 1 for s in steps)
        and all(t.stride() == input.stride() for t in tensors)
    )
    farthest = max(weight_step, *steps) * max(classes, block) + block
    layout = {
        "UNIT": UNIT if shifted else unit,
        # A lane for each element that the threads have at once: of fewer, several warps would hold
        # the same one. Triton gives each thread 16 bytes of the narrowest elements.
        "EDGES": warps * 32 * 16 // min(t.element_size() for t in tensors) if shifted else 0,
        "ACROSS": neighbours,
        "SINGLE": classes <= block,
        "ROWS": across,
        "BLOCK": block,
        "CLASS": tl.int32 if farthest < 2**31 else tl.int64,
    }
    return layout, warps


def _run(
    gradient: Tensor | None,
    written: bool,
    grads: tuple[Tensor | None, ...],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    outputs: int,
    reduction: int,
    dtype: torch.dtype,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    denominator: float | None = None,
    zero_on_empty: bool = False,
) -> tuple[Tensor, ...]:
    """Fills `gradient`, if given, and returns the results of the ops; or none where there are
    `grads`, of loss, lse and entropy, which backward has. If `written` it is filled unless that of
    the loss is 1."""
    in_double = torch.float64 in (input.dtype, dtype)
    compute = torch.float64 if in_double else torch.float32
    dim = _class_dimension(input)
    classes = input.size(dim)
    shape = input.shape[:dim] + input.shape[dim + 1 :]
    rows = shape.numel()
    soft = target.is_floating_point()
    forward = not grads
    of_loss = forward or grads[0] is not None

    kinds = (dtype, compute, compute, torch.int64, torch.bool)
    wanted = (
        forward and reduction == NONE,
        *(outputs & bit for bit in (LSE, ENTROPY, PREDICTION, CORRECT)),
    )
    by_row = [
        input.new_empty(shape, dtype=kind) if is_wanted else None
        for is_wanted, kind in zip(wanted, kinds, strict=True)
    ]
    with_classes = [t for t in (input, target if soft else None, gradient) if t is not None]
    weight_step = 0 if weight is None else weight.stride(0)
    layout, warps = _layout(with_classes, weight_step, classes, rows)
    tiles = triton.cdiv(rows, layout["ROWS"])
    programs = max(1, triton.cdiv(tiles, triton.cdiv(tiles, WARPS // warps) or 1))
    result = sums = counts = None
    if forward and reduction != NONE:
        result = input.new_empty((), dtype=dtype)
        sums = input.new_empty(programs, dtype=compute)
    counters = iterations = 1
    if reduction != MEAN or not of_loss:
        normalizer, denominator = None, 1.0
    elif normalizer is not None:
        normalizer = readable(normalizer)
    elif denominator is None and soft:
        denominator = rows
    elif denominator is None:
        blocks = triton.cdiv(rows, LABELS)
        iterations = max(1, triton.cdiv(blocks, COUNTERS))
        counters = max(1, triton.cdiv(blocks, iterations))
        counts = input.new_empty(counters, dtype=torch.float64)
    ticket = input.new_empty(1, dtype=torch.int32)

    def of_classes(tensor: Tensor | None) -> tuple[Tensor, tuple[int, ...]] | None:
        if tensor is None:
            return None
        return tensor, tensor.stride()[:dim] + tensor.stride()[dim + 1 :]

    def of_rows(tensor: Tensor | None) -> tuple[Tensor, tuple[int, ...]] | None:
        return None if tensor is None else (tensor, tensor.expand(shape).stride())

    places, sizes, index = operands(
        shape,
        [
            of_classes(input),
            of_classes(target) if soft else of_rows(target),
            of_classes(gradient),
            of_rows(sample_weight),
            *map(of_rows, grads or (None, None, None)),
            *map(of_rows, by_row),
        ],
    )
    shared = {
        "weight": weight,
        "ticket": ticket,
        "counts": counts,
        "rows": rows,
        "sizes": sizes,
        "classes": classes,
        "ignore_index": ignore_index,
        "INDEX": index,
    }
    with torch.accelerator.device_index(input.device.index):
        if result is not None or counts is not None:
            _prepare[(counters,)](
                places[1],
                weight_step=weight_step,
                iterations=iterations,
                BLOCK=LABELS,
                **shared,
            )
        if rows or result is not None:
            _rows[(programs,)](
                *places[:3],
                grads[0] if written else None,
                *places[3:],
                steps=(
                    input.stride(dim),
                    target.stride(dim) if soft else 0,
                    weight_step,
                    0 if gradient is None else gradient.stride(dim),
                ),
                sums=sums,
                result=result,
                counters=counters,
                normalizer=normalizer,
                denominator=float(denominator or 0.0),
                tiles=tiles,
                factor=1.0 - label_smoothing,
                flat=label_smoothing / max(classes, 1),
                softcap=softcap,
                inner_scale=logit_scale / softcap if softcap else 0.0,
                logit_scale=logit_scale,
                z_loss=z_loss,
                PROBABILITIES=soft,
                OF_LOSS=of_loss,
                SMOOTH=label_smoothing != 0,
                CAPPED=softcap != 0,
                SCALED=logit_scale != 1,
                SQUARED=z_loss != 0,
                ZERO_ON_EMPTY=zero_on_empty,
                COUNTERS=COUNTERS,
                FINISH=FINISH,
                COMPUTE=tl.float64 if in_double else tl.float32,
                num_warps=warps,
                **layout,
                **shared,
            )
    if not forward:
        return ()
    loss, *rest = (
        input.new_empty(0, dtype=kind) if r is None else r
        for r, kind in zip(by_row, kinds, strict=True)
    )
    return (loss if result is None else result, *rest)


def softmax_ce(*arguments: Any) -> tuple[Tensor, ...]:
    """The op `_softmax_ce`."""
    return _run(None, False, (), *arguments)


def softmax_ce_with_gradient(gradient: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The op `_softmax_ce_with_gradient`."""
    return _run(gradient, False, (), *arguments)


def softmax_ce_backward(gradient: Tensor, written: bool, *arguments: Any) -> None:
    """The op `_softmax_ce_backward`."""
    tensors_and_options = (*arguments[5:10], 0, *arguments[10:])
    _run(gradient, written, arguments[:3], *tensors_and_options)


OPS: dict[str, Callable[..., Any]] = {
    "_softmax_ce": softmax_ce,
    "_softmax_ce_with_gradient": softmax_ce_with_gradient,
    "_softmax_ce_backward": softmax_ce_backward,
}
