"""Softmax cross entropy in Triton: the ops of csrc/ops.cpp, loss and gradient in one launch.

A program takes a tile of rows (one row of many classes, or many rows of a few) and goes through its
classes in blocks. The first pass keeps a running maximum and what is summed relative to it; the
second, for the gradient, reads the logits again, which the cache still holds. Where a tile's
classes fit one block there is no second read.

mean and sum cost two launches: `_prepare` finds what a mean divides by and sets the ticket to zero;
`_rows` leaves a partial sum per program, and the program that draws the last ticket adds them up,
in the same order whichever it is, so that equal inputs give equal bits.

Backward ignores the saved lse and entropy and finds them again from the logits, which costs no
memory traffic: exp(l - lse) would lose the digits that l has beyond lse's last place.
"""

# Kernels are typed by Triton, not by annotations, and write compile-time arguments in capitals.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803, N806, SIM102

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ce.triton.common import (
    cast,
    load,
    mean_divisor,
    offsets,
    operands,
    precise_log,
    readable,
)

NONE, MEAN = 0, 1  # reductions
LSE, ENTROPY, PREDICTION, CORRECT = 1, 2, 4, 8  # bits of `outputs`

ROW_BYTES = 16384  # of a row that a program reads at a time: 16 bytes 4 times a thread
TILE = 2048  # elements of a tile of several rows
CLASSES_ACROSS = 32  # of a tile whose rows, not classes, are neighbours in memory
PROGRAMS = 16384  # at most
LABELS = 1024  # a program of `_prepare` reads at a time
COUNTERS = 256  # at most; every program that writes gradients adds up what `_prepare` counted
FINISH = 4096  # partial sums added at a time


# -- formulas --------------------------------------------------------------------------------------


@triton.jit
def _tanh(u):
    y = tl.abs(u)
    far = 1.0 - 2.0 / (tl.exp(2.0 * y) + 1.0)
    if u.dtype != tl.float64:
        z = u * u
        p = -0.00589515028801  # tanh(y) = y + y^3 p(y^2) on 0 .. 0.6, minimax: relative error 3e-9
        p = p * z + 0.0207959645902
        p = p * z - 0.053783828034
        p = p * z + 0.13331924098
        p = p * z - 0.333332980009
        far = tl.where(y < 0.6, y + y * z * p, far)
    return tl.where(u < 0.0, -far, far)


@triton.jit
def _capped(x, form):
    """The logits of what was read, and their derivative. `form` is (softcap, logit_scale / softcap,
    logit_scale); without a cap the first two are None, and a scale of 1 is None too."""
    if form[0] is not None:
        t = _tanh(x * form[1])
        return form[0] * t, form[2] * (1.0 - t * t)
    elif form[2] is not None:
        return x * form[2], form[2]
    else:
        return x, 1.0


@triton.jit
def _base(top):
    """What to subtract before exp: a maximum of -inf would make -inf - -inf of it."""
    return tl.where(top == float("-inf"), 0.0, top)


# -- a tile and its blocks of classes --------------------------------------------------------------
# Rows are the first dimension of a tile and classes the second; what belongs to a row is [ROWS, 1].
# A tile is a tuple of tuples, with None for what there is not:
#   pointers to class 0 of input, target (of probabilities), weight; shifted if the tile is
#   steps from class to class of these three
#   extent: number of classes; shift, by which a row starts before its class 0
#   form: softcap, logit_scale / softcap, logit_scale
#   smooth: what a probability is multiplied by, what is added to it
#   live: the rows whose logits are read, the rows there are


@triton.jit
def _block(tile, block, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """The classes of a block, their places, and which of them exist (None: all)."""
    classes, shift = tile[2]
    place = block * BLOCK + tl.arange(0, BLOCK)[None, :].to(classes.dtype)
    c = place - shift
    return c, place, (c >= 0) & (c < classes) if MASKED else None


@triton.jit
def _read(pointer, step, place, rows, inside, COMPUTE: tl.constexpr):
    mask = rows
    if inside is not None:
        mask = rows & inside
    return tl.load(pointer + place * step, mask=mask, other=0).to(COMPUTE)


@triton.jit
def _logits(tile, place, inside, COMPUTE: tl.constexpr):
    """Logits, -inf where there is no class, and their slopes."""
    x = _read(tile[0][0], tile[1][0], place, tile[5][0], inside, COMPUTE)
    logit, slope = _capped(x, tile[3])
    if inside is not None:
        logit = tl.where(inside, logit, float("-inf"))
    return logit, slope


@triton.jit
def _coefficients(tile, place, inside, COMPUTE: tl.constexpr):
    """What the loss multiplies -log p by, beside the label's own part; the probabilities."""
    _, target, weight = tile[0]
    factor, flat = tile[4]
    exists = tile[5][1]
    coefficient = flat
    if target is not None:
        t = _read(target, tile[1][1], place, exists, inside, COMPUTE)
        coefficient = t * factor
        if flat is not None:
            coefficient += flat
    if coefficient is not None:
        if weight is not None:
            coefficient *= _read(weight, tile[1][2], place, exists, inside, COMPUTE)
        if inside is not None:
            coefficient = tl.where(inside, coefficient, 0.0)
    mixed: tl.constexpr = flat is not None or target is not None
    return coefficient if mixed else None, t if target is not None else None


@triton.jit
def _largest(best, value, c, inside, classes):
    """Updates (value, its first class, first class of a NaN): a NaN counts as the largest."""
    if inside is not None:
        value = tl.where(inside, value, float("-inf"))
    top = tl.max(value, 1, keep_dims=True)
    is_top = value == top
    if inside is not None:
        is_top = is_top & inside
    first = tl.min(tl.where(is_top, c, classes), 1, keep_dims=True)
    first = tl.where(top == best[0], tl.minimum(first, best[1]), first)
    first = tl.where(top >= best[0], first, best[1])
    nan = tl.min(tl.where(value != value, c, classes), 1, keep_dims=True)
    return tl.maximum(best[0], top), first, tl.minimum(best[2], nan)


@triton.jit
def _add(sums, logit, coefficient, inside, SPREAD: tl.constexpr):
    """Takes a block of logits into the sums of a tile; returns exp(logit - base) too.

    The sums: the maximum, whose base is what is subtracted; then, by lane, those of
    e = exp(logit - base), of e * (base - logit), of the coefficients, and of these times
    (base - logit).
    """
    top, total, spread, weight, distance = sums
    before = _base(top)
    new_top = tl.maximum(top, tl.max(logit, 1, keep_dims=True))
    base = _base(new_top)
    shrink = tl.exp(top - base)
    e = tl.exp(logit - base)
    if SPREAD:
        spread = tl.where(shrink == 0.0, 0.0, shrink * (spread + total * (base - before)))
        spread += tl.where(e == 0.0, 0.0, e * (base - logit))
    total = total * shrink + e
    if coefficient is not None:
        step = coefficient * (base - logit)
        if inside is not None:
            step = tl.where(inside, step, 0.0)
        distance += weight * (base - before) + step
        weight += coefficient
    return (new_top, total, spread, weight, distance), e


@triton.jit
def _scan(
    tile,
    state,
    blocks,
    SPREAD: tl.constexpr,
    BEST: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The first pass, over range(*blocks)."""
    sums, largest, likeliest = state
    for block in range(blocks[0], blocks[1], blocks[2]):
        c, place, inside = _block(tile, block, MASKED, BLOCK)
        logit, _ = _logits(tile, place, inside, COMPUTE)
        coefficient, t = _coefficients(tile, place, inside, COMPUTE)
        sums, _ = _add(sums, logit, coefficient, inside, SPREAD)
        if BEST:
            largest = _largest(largest, logit, c, inside, tile[2][0])
            if t is not None:
                likeliest = _largest(likeliest, t, c, inside, tile[2][0])
    return sums, largest, likeliest


@triton.jit
def _put(tile, output, block, e, distance, slope, coefficient, factors, label, graded):
    """Writes a block of the gradient.

    block: classes, their places, which of them exist, and whether a label may be among them
    distance: logit - base, whose exp is e
    factors: of e; of e * (distance - center), and this center; of the coefficients
    label: the class, and what is subtracted there
    graded: rows that are not 0 throughout, or None
    """
    c, place, inside, has_label = block
    g = e * factors[0]
    if factors[1] is not None:
        g += tl.where(e == 0.0, 0.0, e * factors[1] * (distance - factors[2]))
    if factors[3] is not None:
        g -= coefficient * factors[3]
    if label is not None:
        if has_label:
            g = tl.where(c == label[0], g - label[1], g)
    g *= slope
    if graded is not None:
        g = tl.where(graded, g, 0.0)
    mask = tile[5][1]
    if inside is not None:
        mask = mask & inside
    tl.store(output[0] + place * output[1], cast(g, output[0].dtype.element_ty), mask=mask)


@triton.jit
def _rewrite(
    tile,
    output,
    blocks,
    base,
    factors,
    label,
    graded,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The second pass, over range(*blocks). Labels are in the blocks from label[2] to label[3]."""
    for i in range(blocks[0], blocks[1], blocks[2]):
        c, place, inside = _block(tile, i, MASKED, BLOCK)
        logit, slope = _logits(tile, place, inside, COMPUTE)
        coefficient, _ = _coefficients(tile, place, inside, COMPUTE)
        has_label = True
        if label is not None:
            has_label = (i >= label[2]) & (i <= label[3])
        block = (c, place, inside, has_label)
        distance = logit - base
        e = tl.exp(distance)
        _put(tile, output, block, e, distance, slope, coefficient, factors, label, graded)


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
        total = tl.zeros([BLOCK], tl.float64)
        for i in range(iterations):
            row = (program.to(INDEX) * iterations + i) * BLOCK + tl.arange(0, BLOCK)
            mask = row < rows
            label = load(target, row, sizes, mask).to(tl.int64)
            kept = mask & (label != ignore_index)
            if weight is None:
                total += kept.to(tl.float64)
            else:
                kept = kept & (label >= 0) & (label < classes)
                w = tl.load(weight + label * weight_step, mask=kept, other=0)
                total += w.to(tl.float64)
        tl.store(counts + program, tl.sum(total))


@triton.jit
def _start(operand, row, sizes, shift, UNIT: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to class 0 of rows (of one: a scalar), or to `shift` elements before it."""
    offset = offsets(operand[1], row, sizes)
    if shift is not None:
        offset -= shift.to(offset.dtype)
    if UNIT > 1:
        offset = tl.multiple_of(offset, UNIT if ROWS == 1 else [UNIT, UNIT])
    return operand[0] + offset


@triton.jit
def _put_by_row(operand, row, sizes, exists, value, ROWS: tl.constexpr):
    offset = offsets(operand[1], row, sizes)
    kind: tl.constexpr = operand[0].dtype.element_ty
    if kind.is_floating():
        value = cast(value, kind)
    if ROWS == 1:  # as a scalar: Triton's compiler runs out of memory over a tensor of one element
        tl.store(operand[0] + tl.sum(offset), tl.sum(value).to(kind))
    else:
        tl.store(operand[0] + offset, value.to(kind), mask=exists)


@triton.jit(do_not_specialize=["tiles", "ignore_index", "counters"])
def _rows(
    input,  # operand: of class 0 of every row, as gradient and probabilities
    target,  # operand: labels or probabilities
    gradient,  # operand or None: written; may be the input itself
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
    SHIFTED: tl.constexpr,
    SINGLE: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    CLASS: tl.constexpr,
):
    """OF_LOSS: the gradient is the loss's, too. SINGLE: one block has all classes, and MASKED: more
    than those. SHIFTED: a tile is one row, and its blocks start at multiples of UNIT elements of
    memory; else every row does."""
    BEST: tl.constexpr = prediction is not None or correct is not None
    SPREAD: tl.constexpr = entropy is not None or grad_entropy is not None
    STATS: tl.constexpr = lse is not None or entropy is not None or BEST
    MIXED: tl.constexpr = PROBABILITIES or SMOOTH
    classes = tl.full([], classes, CLASS)
    if UNIT > 1 and not SHIFTED:
        classes = tl.multiple_of(classes, UNIT)
    z_loss = tl.full([], z_loss, COMPUTE)
    factor = tl.full([], factor, COMPUTE)
    smooth = (factor, None)
    if SMOOTH:
        smooth = (factor, tl.full([], flat, COMPUTE))
    scale = tl.full([], logit_scale, COMPUTE)
    form = (None, None, None)
    if CAPPED:
        form = (tl.full([], softcap, COMPUTE), tl.full([], inner_scale, COMPUTE), scale)
    elif SCALED:
        form = (None, None, scale)
    if gradient is not None and OF_LOSS:
        divisor = mean_divisor(counts, counters, normalizer, denominator, COUNTERS)
        inverse = (1.0 / divisor).to(COMPUTE)
        if counts is not None and not ZERO_ON_EMPTY:
            # As torch's mean over labels of weight 0, with label smoothing too.
            inverse = tl.where(divisor == 0.0, float("nan"), inverse)

    losses = tl.zeros([ROWS, 1], COMPUTE)
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tl.full([], i, INDEX) * ROWS + tl.arange(0, ROWS)[:, None].to(INDEX)
        exists = row < rows
        start = row
        if ROWS == 1:
            start = tl.full([], i, INDEX)
        shift = None
        margin = tl.zeros([], CLASS)
        if SHIFTED:
            margin = (offsets(input[1], start, sizes) % UNIT).to(CLASS)
            shift = margin
        x = _start(input, start, sizes, shift, UNIT, ROWS)
        kept = exists
        if not PROBABILITIES:
            y = load(target, row, sizes, exists).to(tl.int64)
            kept = exists & (y != ignore_index)
            in_range = (y >= 0) & (y < classes)
            known = kept & in_range
            y = tl.where(known, y, 0).to(CLASS)
            at_label = tl.load(x + (y + margin) * steps[0], mask=known, other=0)
            at_label, _ = _capped(at_label.to(COMPUTE), form)
            label_weight = tl.zeros([ROWS, 1], COMPUTE) + factor
            if weight is not None:
                label_weight *= tl.load(weight + y * steps[2], mask=known, other=0).to(COMPUTE)
        row_weight = tl.full([ROWS, 1], 1.0, COMPUTE)
        if sample_weight is not None:
            row_weight *= load(sample_weight, row, sizes, exists).to(COMPUTE)

        # What reaches the gradient of a row, and which rows that leaves at 0: these are not read,
        # unless their statistics are wanted.
        on_loss = tl.zeros([ROWS, 1], COMPUTE)
        on_lse = tl.zeros([ROWS, 1], COMPUTE)
        graded = exists & False
        live = exists & False
        if OF_LOSS:
            live = kept
            graded = kept
        if gradient is not None and OF_LOSS:
            if ZERO_ON_EMPTY:
                graded = kept & (tl.zeros([ROWS, 1], tl.float64) + divisor != 0.0)
            on_loss = row_weight * inverse
            if grad_loss is not None:
                on_loss *= load(grad_loss, row, sizes, exists).to(COMPUTE)
            on_loss = tl.where(graded, on_loss, 0.0)
            if not PROBABILITIES:
                on_loss = tl.where(kept & (in_range == 0), float("nan"), on_loss)
        if grad_lse is not None:
            on_lse += load(grad_lse, row, sizes, exists).to(COMPUTE)
            graded = graded | (exists & (on_lse != 0.0))
        if grad_entropy is not None:
            on_entropy = load(grad_entropy, row, sizes, exists).to(COMPUTE)
            graded = graded | (exists & (on_entropy != 0.0))
        live = live | graded
        if STATS:
            live = exists

        places = (
            x,
            _start(target, start, sizes, shift, UNIT, ROWS) if PROBABILITIES else None,
            weight - margin * steps[2] if weight is not None else None,
        )
        tile = (places, steps, (classes, margin), form, smooth, (live, exists))
        lowest = tl.full([ROWS, 1], float("-inf"), COMPUTE)
        total = tl.zeros([ROWS, BLOCK], COMPUTE)
        spread = tl.zeros([ROWS, BLOCK if SPREAD else 1], COMPUTE)
        mixed = tl.zeros([ROWS, BLOCK if MIXED else 1], COMPUTE)
        sums_by_lane = (lowest, total, spread, mixed, mixed)
        first = tl.zeros([ROWS, 1], CLASS)
        largest = (lowest, first, first + classes)
        likeliest = largest
        if SINGLE:
            c, place_of_block, inside = _block(tile, 0, MASKED, BLOCK)
            logit, slope = _logits(tile, place_of_block, inside, COMPUTE)
            coefficient, p = _coefficients(tile, place_of_block, inside, COMPUTE)
            sums_by_lane, e = _add(sums_by_lane, logit, coefficient, inside, SPREAD)
            if BEST:
                largest = _largest(largest, logit, c, inside, classes)
                if PROBABILITIES:
                    likeliest = _largest(likeliest, p, c, inside, classes)
        else:
            blocks = (classes + margin + BLOCK - 1) // BLOCK
            edges = (0, blocks, tl.maximum(blocks - 1, 1))
            middle = (1, blocks - 1, 1)
            read = blocks
            if not STATS:
                read *= tl.max(live.to(CLASS))  # a tile of ignored rows is not gone through
            state = (sums_by_lane, largest, likeliest)
            first_pass = (0, read, edges[2])
            state = _scan(tile, state, first_pass, SPREAD, BEST, True, BLOCK, COMPUTE)
            first_pass = (1, read - 1, 1)
            state = _scan(tile, state, first_pass, SPREAD, BEST, False, BLOCK, COMPUTE)
            sums_by_lane, largest, likeliest = state
        base = _base(sums_by_lane[0])
        total = tl.sum(sums_by_lane[1], 1, keep_dims=True)
        log_total = precise_log(total, tl.zeros_like(total))
        row_lse = base + log_total
        if SPREAD:
            row_entropy = log_total + tl.sum(sums_by_lane[2], 1, keep_dims=True) / total

        pull = tl.zeros([ROWS, 1], COMPUTE)  # the sum of all that multiplies -log p
        if MIXED:
            pull += tl.sum(sums_by_lane[3], 1, keep_dims=True)
        if loss is not None or sums is not None:
            value = pull * log_total
            if MIXED:
                value += tl.sum(sums_by_lane[4], 1, keep_dims=True)
            if not PROBABILITIES:
                value += label_weight * ((base - at_label) + log_total)
            if SQUARED:
                value += z_loss * row_lse * row_lse
            value *= row_weight
            if not PROBABILITIES:
                value = tl.where(in_range, value, float("nan"))
            value = tl.where(kept, value, 0.0)
            if loss is not None:
                _put_by_row(loss, row, sizes, exists, value, ROWS)
            losses += value
        if lse is not None:
            _put_by_row(lse, row, sizes, exists, row_lse, ROWS)
        if entropy is not None:
            _put_by_row(entropy, row, sizes, exists, row_entropy, ROWS)
        if BEST:
            chosen = tl.where(largest[2] < classes, largest[2], largest[1])
            if prediction is not None:
                _put_by_row(prediction, row, sizes, exists, chosen, ROWS)
            if correct is not None:
                if PROBABILITIES:
                    right = chosen == tl.where(likeliest[2] < classes, likeliest[2], likeliest[1])
                else:
                    right = known & (chosen == y)
                _put_by_row(correct, row, sizes, exists, right.to(tl.int32), ROWS)

        if gradient is not None:
            label = None
            if not PROBABILITIES:
                pull += label_weight
            if SQUARED:
                pull += 2.0 * z_loss * row_lse
            on_e = (tl.where(on_loss == 0.0, 0.0, on_loss * pull) + on_lse) / total
            on_e = tl.where(graded, on_e, 0.0)
            factors = (on_e, None, None, None)
            if grad_entropy is not None:
                on_spread = tl.where(graded, -on_entropy / total, 0.0)
                factors = (on_e, on_spread, log_total - row_entropy, None)
            if MIXED and OF_LOSS:
                factors = (factors[0], factors[1], factors[2], on_loss)
            if not PROBABILITIES and OF_LOSS:
                place = y + margin
                own = tl.where(known, on_loss * label_weight, 0.0)
                label = (y, own, tl.min(place) // BLOCK, tl.max(place) // BLOCK)
            cleared = None
            if STATS or ZERO_ON_EMPTY:
                cleared = graded
            output = (_start(gradient, start, sizes, shift, UNIT, ROWS), steps[3])
            if SINGLE:
                block = (c, place_of_block, inside, True)
                distance = logit - base
                _put(tile, output, block, e, distance, slope, coefficient, factors, label, cleared)
            else:
                _rewrite(tile, output, edges, base, factors, label, cleared, True, BLOCK, COMPUTE)
                _rewrite(tile, output, middle, base, factors, label, cleared, False, BLOCK, COMPUTE)

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


def _layout(tensors: list[Tensor], classes: int, rows: int) -> tuple[dict[str, Any], int]:
    """How tiles cut the logits, which come first among the tensors with classes; and how many warps
    a program has."""
    input = tensors[0]
    dim = _class_dimension(input)
    steps = [t.stride(dim) for t in tensors]
    apart = [[s for d, s in enumerate(t.stride()) if d != dim and t.size(d) > 1] for t in tensors]
    block = triton.next_power_of_2(max(classes, 1))
    if any(0 < s < steps[0] for s in apart[0]):  # neighbours in memory are rows
        block = min(block, CLASSES_ACROSS)
        across = 2 * TILE // block
    else:
        block = min(block, ROW_BYTES // input.element_size())
        across = max(1, TILE // block)
    across = min(across, triton.next_power_of_2(max(rows, 1)))
    unit = math.gcd(16, classes, *(s for strides in apart for s in strides))
    single = classes <= block
    shifted = (
        not single
        and across == 1
        and block >= 16  # the first block has all of the margin
        and unit * input.element_size() < 16
        and all(s == 1 for s in steps)
        and all(t.stride() == input.stride() for t in tensors)
    )
    farthest = max(steps) * max(classes, block) + block
    layout = {
        "UNIT": 16 if shifted else unit,
        "SHIFTED": shifted,
        "SINGLE": single,
        "MASKED": classes < block,
        "ROWS": across,
        "BLOCK": block,
        "CLASS": tl.int32 if farthest < 2**31 else tl.int64,
    }
    return layout, max(1, min(8, across * block // (1024 if block >= 1024 else 512)))


def _run(
    grads: tuple[Tensor | None, ...],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    reduction: int,
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    denominator: float | None,
    zero_on_empty: bool,
    outputs: int,
    gradient: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Fills `gradient`, if given, and returns the results of the ops; or none where there are
    `grads`, of loss, lse and entropy, which backward has."""
    in_double = torch.float64 in (input.dtype, dtype)
    compute = torch.float64 if in_double else torch.float32
    dim = _class_dimension(input)
    classes = input.size(dim)
    shape = input.shape[:dim] + input.shape[dim + 1 :]
    rows = shape.numel()
    soft = target.is_floating_point()
    forward = not grads
    of_loss = forward or grads[0] is not None

    by_row = [
        input.new_empty(shape, dtype=kind) if wanted else None
        for wanted, kind in (
            (forward and reduction == NONE, dtype),
            (outputs & LSE, compute),
            (outputs & ENTROPY, compute),
            (outputs & PREDICTION, torch.int64),
            (outputs & CORRECT, torch.bool),
        )
    ]
    with_classes = [t for t in (input, target if soft else None, gradient) if t is not None]
    layout, warps = _layout(with_classes, classes, rows)
    tiles = triton.cdiv(rows, layout["ROWS"])
    programs = min(max(tiles, 1), PROGRAMS)
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
    weight_step = 0 if weight is None else weight.stride(0)
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
    with torch.cuda.device_of(input):
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
                *places,
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
    loss, *rest = (input.new_empty(0, dtype=dtype) if r is None else r for r in by_row)
    return (loss if result is None else result, *rest)


def softmax_ce(*arguments: Any) -> tuple[Tensor, ...]:
    """The ops `_softmax_ce` and, with a gradient to fill, `_softmax_ce_with_gradient`."""
    return _run((), *arguments)


def softmax_ce_backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    *arguments: Any,
) -> None:
    """The op `_softmax_ce_backward`."""
    *rest, _lse, _entropy, gradient = arguments
    _run((grad_loss, grad_lse, grad_entropy), *(*rest, 0, gradient))


OPS: dict[str, Callable[..., Any]] = {
    "_softmax_ce": softmax_ce,
    "_softmax_ce_with_gradient": softmax_ce,
    "_softmax_ce_backward": softmax_ce_backward,
}
