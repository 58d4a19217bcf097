"""Softmax cross entropy against PyTorch and float64: numbers, dtypes, shapes, strides, extras,
statistics, the life of the gradient, and the defects that other implementations have had."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    FLOATS,
    LAYOUTS,
    LEGACY_REDUCTIONS,
    REDUCTIONS,
    Result,
    allocated,
    allocated_with_gradient,
    can_force_native,
    capped,
    double,
    dtype_id,
    exact_cross_entropy,
    far_memory,
    is_native,
    on,
    positional,
    require_memory,
    run,
    skip_where_slow,
    ulps,
    zeros,
)
from torch import Tensor, nn

import fused_ce
from fused_ce.functional import CrossEntropyStats, cross_entropy

F64, F32, F16, BF16 = FLOATS
LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
IGNORED = -100

# What a result may be off by, in units of its last place, where torch happens to be closer. Half
# types are rounded once, from float32: half a unit. A float32 result is rounded a few times: in
# e^(x - max), in their sum, its logarithm or inverse, and by the factor of the mean. For float64 it
# is the oracle that is off.
FLOOR = {F64: 32.0, F32: 5.0, F16: 0.6, BF16: 0.6}

each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def make_logits(shape: tuple[int, ...], dtype: torch.dtype = F32) -> Tensor:
    """Of a spread at which the largest class holds most of a row, and others underflow in half."""
    return (torch.randn(shape) * 4).to(dtype)


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def make_labels(shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    """One for each row of logits of the shape."""
    classes = shape[1] if len(shape) > 1 else shape[0]
    return torch.randint(classes, rows_of(shape)).to(dtype)


def make_probabilities(shape: tuple[int, ...], dtype: torch.dtype = F32) -> Tensor:
    """Distributions over the classes."""
    return torch.softmax(torch.randn(shape) * 2, 1 if len(shape) > 1 else 0).to(dtype)


def make_target(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    make = make_probabilities if dtype.is_floating_point else make_labels
    return make(shape, dtype)


def ignoring(labels: Tensor, index: int = IGNORED) -> Tensor:
    """The labels, some of them ignored, but not the first."""
    ignored = torch.rand(labels.shape) < 0.3
    ignored.view(-1)[0] = False
    return labels.masked_fill(ignored, index)


def check(
    x: Tensor,
    t: Tensor,
    device: str,
    upstream: Any = 1.0,
    beside_torch: bool = True,
    floor: float = 1.0,
    **options: Any,
) -> Result:
    """Same dtypes and shapes as torch, and errors at most torch's own, or FLOOR, which is `floor`
    times as much for float32 and float64. Where torch has no such loss, it is composed of torch's
    operations.

    A gradient's unit is that of its largest element, since terms of both signs cancel. A loss's is
    at least that of 1, since a row that is nearly right costs next to nothing.
    """
    options = {"reduction": "mean"} | options
    ours = run(cross_entropy, x, t, device=device, upstream=upstream, **options)
    right = run(
        exact_cross_entropy,
        x.double(),
        double(t),
        upstream=torch.as_tensor(upstream).to(ours.loss.dtype).double(),
        **{k: double(v) for k, v in options.items()},
    )
    target = t if t.is_floating_point() else t.long()  # torch has no narrow labels
    function = F.cross_entropy if beside_torch else exact_cross_entropy
    theirs = run(function, x, target, upstream=upstream, **options)
    for i, name in enumerate(Result._fields):
        a, b = ours[i], right[i]
        allowed = FLOOR[a.dtype] * (floor if a.dtype in (F32, F64) else 1)
        if device == "cuda":
            allowed *= 1.5  # an exponential may be 2 ulp off
        scale = 1.0
        if name == "gradient" and b.numel():
            single = x.size(min(1, x.dim() - 1)) == 1  # whose gradient is 0
            scale = 0.1 if single else b.abs().max().item()
        if beside_torch:
            assert (a.dtype, a.shape) == (theirs[i].dtype, theirs[i].shape)
        allowed = max(allowed, ulps(theirs[i], b, scale))
        error = ulps(a, b, scale)
        assert error <= allowed, f"{name}: {error:.2f} ulp of {allowed:.2f}"
    return ours


# ---- numbers -------------------------------------------------------------------------------------


@each_reduction
@pytest.mark.parametrize("target_dtype", LABELS + FLOATS, ids=dtype_id)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_dtypes(dtype: torch.dtype, target_dtype: torch.dtype, reduction: str, device: str) -> None:
    shape = (7, 37)  # whole vectors of 16, 8 or 4 lanes, and a tail
    x, t = make_logits(shape, dtype), make_target(shape, target_dtype)
    upstream = torch.randn(7).half() if reduction == "none" else 0.5
    check(x, t, device, upstream, reduction=reduction)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=dtype_id)
@pytest.mark.parametrize(
    ("rows", "classes"),
    [
        (5, 1),  # the loss is 0 whatever the logit
        (1, 2),
        (67, 2),  # rows for whole vectors, and a tail
        (33, 3),
        (67, 10),
        (1030, 16),  # as many terms as one thread of a GPU adds up of a row
        (1030, 21),  # squares of rows and classes turned over, and what is left of both
        (3, 15),
        (3, 16),
        (3, 17),  # around a vector of AVX-512
        (5, 31),
        (5, 32),
        (5, 33),  # around a warp
        (1030, 64),  # more rows than a block has threads
        (37, 8),
        (37, 32),
        (37, 128),  # powers of two, whose rows would share banks of a GPU's shared memory
        (70, 2),
        (70, 3),
        (70, 4),  # few classes, whose rows a CPU turns by whole vectors, and rows left over
        (70, 127),  # the most that a CPU takes by rows
        (5, 129),
        (7, 300),  # rows that eight lanes take
        (3, 1000),
        (3, 1023),
        (3, 1024),
        (3, 1025),  # around the threads of a block
        (9, 2500),
        (9, 3570),  # the longest float32 rows that a warp takes
        (2, 4095),
        (2, 8193),
        (2, 32000),
        (3, 50257),  # odd: every row starts at another alignment
        (2, 128256),
        (1, 256000),
    ],
)
def test_classes(rows: int, classes: int, dtype: torch.dtype, device: str) -> None:
    x = make_logits((rows, classes), dtype)
    for t in (make_labels(x.shape), make_probabilities(x.shape)):
        for reduction in REDUCTIONS:
            check(x, t, device, reduction=reduction)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=dtype_id)
@pytest.mark.parametrize(
    "classes", [2, 8, 10, 16, 64, 100, 129, 300, 442, 1000, 2500, 3570, 8193, 19001, 50257]
)
def test_without_gradient(classes: int, dtype: torch.dtype, device: str) -> None:
    """Then rows that would be kept for it, in registers or shared memory, are not."""
    x = make_logits((5, classes), dtype)  # a row more than half a warp takes
    t = ignoring(make_labels(x.shape))
    for reduction in REDUCTIONS:
        loss = cross_entropy(x.to(device), t.to(device), reduction=reduction).cpu()
        theirs = F.cross_entropy(x, t, reduction=reduction)
        right = F.cross_entropy(x.double(), t, reduction=reduction)
        floor = FLOOR[dtype] * (1.5 if device == "cuda" else 1)
        assert ulps(loss, right, 1.0) <= max(floor, ulps(theirs, right, 1.0))


# Four times the largest vocabulary of the benchmarks; a second of float64 on the CPU.
def test_million_classes(device: str) -> None:
    x = make_logits((2, 1_000_000), BF16)
    check(x, make_labels(x.shape), device)


SHAPES = [
    (5,),
    (3, 5),
    (3, 5, 7),
    (3, 5, 7, 11),  # primes: no dimension hides behind another
    (2, 3, 2, 3, 5),
    (2, 3, 1, 1),
    (1, 3, 4),
    (4, 1, 3),
    (2, 21, 700),  # positions for more than a chunk, of which one reaches into the next image
]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, weight = make_logits(shape, dtype), torch.rand(shape[min(1, len(shape) - 1)]).to(dtype)
    for t in (make_labels(shape), make_labels(shape, torch.uint8), make_probabilities(shape)):
        for reduction in REDUCTIONS:
            upstream = torch.randn(rows_of(shape)) if reduction == "none" else 1.0
            result = check(x, t, device, upstream, reduction=reduction, weight=weight)
            assert result.loss.shape == (rows_of(shape) if reduction == "none" else ())


@pytest.mark.parametrize("target_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, target_layout: str, device: str) -> None:
    shape = (3, 5, 7, 11)
    x = LAYOUTS[layout](make_logits(shape))
    labels = make_labels(shape)
    if target_layout != "channels_last":  # labels of images have three dimensions
        labels = LAYOUTS[target_layout](labels)
    sample_weight = LAYOUTS[target_layout](torch.rand(shape))[:, 0]
    for t in (labels, LAYOUTS[target_layout](make_probabilities(shape))):
        for reduction in REDUCTIONS:
            upstream = torch.randn(rows_of(shape)).transpose(0, 2).contiguous().transpose(0, 2)
            seed = upstream if reduction == "none" else 1.0
            check(x, t, device, seed, reduction=reduction)
            options = {"sample_weight": sample_weight, "reduction": reduction}
            check(x, t, device, seed, beside_torch=False, **options)


def test_strides_of_half_types(device: str) -> None:
    shape = (2, 37, 5, 7)
    x, t = make_logits(shape, BF16), make_labels(shape)
    for layout in LAYOUTS.values():
        for reduction in REDUCTIONS:
            check(layout(x), t, device, reduction=reduction)


@pytest.mark.parametrize("step", [2, 3], ids=["even", "odd"])
def test_rows_and_columns_apart(step: int, device: str) -> None:
    """Every `step`th class of rows that are wider than that."""
    wide = make_logits((9, 131 * step + 5), BF16)
    x = wide[:, 2 : 2 + 131 * step : step]
    weight = torch.rand(131 * step).to(BF16)[::step]
    check(x, make_labels(x.shape), device, weight=weight)
    check(wide[::2, 3:100], make_labels((5, 97)), device)


# Rows that are columns of memory: whole groups of a CPU's chunks and one row more, of classes that
# no buffer holds, or hardly.
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
@pytest.mark.parametrize("shape", [(64, 3001), (65, 20_001), (17, 1025)], ids=str)
def test_many_classes_in_columns(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x = make_logits(shape, dtype).t().contiguous().t()
    for t in (ignoring(make_labels(shape)), make_probabilities(shape, dtype)):
        for reduction in REDUCTIONS:
            check(x, t, device, reduction=reduction)


# Logits whose rows lie side by side: (shape, strides, storage offset). A GPU's thread takes two
# rows where each class of both is one aligned access; of the 98568 rows here there are enough for
# that on up to 192 multiprocessors. From "odd images" on, pairs would reach across an end or be
# unaligned.
SIDE = 222
AREA = SIDE * SIDE
SIDE_BY_SIDE = {
    "in pairs": ((2, 15, SIDE, SIDE), (15 * AREA, AREA, SIDE, 1), 0),  # 15: 8 + 4 + 2 + 1 classes
    "one image": ((1, 3, 2 * SIDE, SIDE), (1, 2 * AREA, SIDE, 1), 0),
    "even gaps": ((2, 3, SIDE, SIDE), (3 * AREA + 8, AREA + 2, SIDE, 1), 2),
    "lines of two": ((2, 3, AREA // 2, 2), (6 * AREA, 2 * AREA, 4, 1), 0),
    "odd images": ((2, 3, 221, 223), (3 * 221 * 223, 221 * 223, 223, 1), 0),
    "lines of three": ((2, 3, AREA // 3, 3), (4 * AREA, 4 * AREA // 3, 4, 1), 0),
    "odd offset": ((2, 3, SIDE, SIDE), (3 * AREA, AREA, SIDE, 1), 1),
    "odd class stride": ((2, 3, SIDE, SIDE), (3 * AREA + 4, AREA + 1, SIDE, 1), 0),
    "odd image stride": ((2, 3, SIDE, SIDE), (3 * AREA + 1, AREA, SIDE, 1), 0),
    "odd line stride": ((2, 3, SIDE, SIDE), (3 * AREA + 666, AREA + SIDE, SIDE + 1, 1), 0),
    "every second position": ((2, 3, SIDE, SIDE), (6 * AREA, 2 * AREA, 2 * SIDE, 2), 0),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_rows_side_by_side(name: str, dtype: torch.dtype, device: str) -> None:
    shape, strides, offset = SIDE_BY_SIDE[name]
    end = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    x = torch.full((end,), math.nan, dtype=dtype).as_strided(shape, strides, offset)
    t = ignoring(make_labels(shape))  # in all pairs of kept and ignored ones
    everything = {
        "weight": torch.rand(shape[1]).to(dtype),
        "sample_weight": torch.rand(rows_of(shape)),
        "logit_scale": 0.7,
        "z_loss": 0.1,
        "reduction": "none",
    }
    smoothed = {"label_smoothing": 0.1, "reduction": "sum"}
    each = torch.randn(rows_of(shape))
    for labels, upstream, options in (
        (t, 1.0, {}),
        (t, 1.0, smoothed),
        (t.int(), each, everything),
    ):
        x.copy_(make_logits(shape, dtype))
        right = check(x, labels, device, upstream, beside_torch=not options, floor=3, **options)
        x.masked_fill_((t == IGNORED)[:, None], math.nan)
        result = run(cross_entropy, x, labels, device=device, upstream=upstream, **options)
        assert torch.equal(result.loss, right.loss)
        assert torch.equal(result.gradient, right.gradient)
        if not options:  # the gradient in the place of the logits
            logits = on(x, device)
            numbers = (0, 1, dtype, IGNORED)
            op = torch.ops.fused_ce._softmax_ce_with_gradient
            op(logits, logits, t.to(device), None, None, None, *numbers)
            assert torch.equal(logits.cpu(), right.gradient)


def test_lse_of_rows_side_by_side(device: str) -> None:
    """Ignored rows, too, have one, and a gradient from it."""
    x = make_logits((2, 3, SIDE, SIDE))
    t = ignoring(make_labels(x.shape))
    leaf = x.to(device).requires_grad_()
    loss, stats = cross_entropy(leaf, t.to(device), reduction="sum", stats=("lse",))
    (gradient,) = torch.autograd.grad(stats.lse.sum(), leaf, retain_graph=True)
    exact = x.double().requires_grad_()
    lse = torch.logsumexp(exact, 1)
    (right,) = torch.autograd.grad(lse.sum(), exact, retain_graph=True)
    torch.testing.assert_close(
        stats.lse.detach().cpu().double(), lse.detach(), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(gradient.cpu().double(), right, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, leaf)
    (right,) = torch.autograd.grad(F.cross_entropy(exact, t, reduction="sum"), exact)
    torch.testing.assert_close(gradient.cpu().double(), right, rtol=1e-6, atol=1e-6)


def test_mode_is_chosen_by_shape(device: str) -> None:
    """Square cases, in which labels and probabilities have as many dimensions."""
    x = make_logits((3, 3))
    check(x, make_probabilities((3, 3)), device)
    check(x, make_labels((3, 3)), device)
    check(make_logits((3, 3, 3)), make_labels((3, 3, 3)), device)
    check(make_logits((1, 1)), torch.ones(1, 1), device)
    check(make_logits((1,)), torch.ones(1), device)


def test_one_label_for_one_dimension(device: str) -> None:
    x, t = make_logits((5,)), torch.tensor([3])
    for reduction in REDUCTIONS:
        result = run(cross_entropy, x, t, device=device, reduction=reduction)
        right = check(x, t[0], device, reduction=reduction)
        assert result.loss.shape == F.cross_entropy(x, t, reduction=reduction).shape == ()
        assert torch.equal(result.loss, right.loss)
        assert torch.equal(result.gradient, right.gradient)  # which torch fails to compute


# ---- torch's options -----------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_options(dtype: torch.dtype, weighted: bool, label_smoothing: float, device: str) -> None:
    shape = (9, 37, 3)
    x = make_logits(shape, dtype)
    weight = (torch.rand(37) * 3).to(dtype) if weighted else None
    for t in (make_labels(shape), ignoring(make_labels(shape)), make_probabilities(shape)):
        for reduction in REDUCTIONS:
            options = {"weight": weight, "label_smoothing": label_smoothing}
            # Torch's operations on smoothed labels are off by up to 20 units themselves.
            floor = 2 if is_native(device) else 5
            check(x, t, device, floor=floor, reduction=reduction, **options)


def test_negative_weights_and_targets_of_any_value(device: str) -> None:
    x, weight = make_logits((33, 17)), torch.randn(17)
    for t in (make_labels((33, 17)), torch.randn(33, 17) * 3):
        for reduction in REDUCTIONS:
            for label_smoothing in (0.0, 0.3):
                # Terms of both signs cancel in the loss too.
                ours = run(
                    cross_entropy,
                    x,
                    t,
                    device=device,
                    weight=weight,
                    reduction=reduction,
                    label_smoothing=label_smoothing,
                )
                right = run(
                    exact_cross_entropy,
                    x.double(),
                    double(t),
                    weight=weight.double(),
                    reduction=reduction,
                    label_smoothing=label_smoothing,
                )
                torch.testing.assert_close(ours.loss.double(), right.loss, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(
                    ours.gradient.double(), right.gradient, rtol=1e-4, atol=1e-5
                )


# Torch smooths where label_smoothing is above 0.
@pytest.mark.parametrize("label_smoothing", [-0.5, math.nan, torch.tensor(0.0)])
def test_no_smoothing(label_smoothing: Any, device: str) -> None:
    x, t = make_logits((3, 5)), make_labels((3, 5))
    theirs = F.cross_entropy(x, t, label_smoothing=label_smoothing)
    ours = cross_entropy(x.to(device), t.to(device), label_smoothing=label_smoothing)
    torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize(
    ("dtype", "index"),
    [
        (torch.int64, -100),
        (torch.int64, 2**40),
        (torch.int64, -(2**63)),
        (torch.int64, 3),  # a class
        (torch.int32, -(2**31)),
        (torch.int16, -1),
        (torch.int8, -128),
        (torch.uint8, 255),
        (torch.uint8, 0),
    ],
)
def test_ignored_rows(dtype: torch.dtype, index: int, device: str) -> None:
    """They cost nothing, get a gradient of exactly 0, and are not counted, whatever they hold."""
    n = 1030  # past one block
    x, t = make_logits((n, 7)), make_labels((n, 7), dtype)
    t[torch.rand(n) < 0.4] = index
    ignored = t == index
    options = {"weight": torch.rand(7), "label_smoothing": 0.1}
    for extra in ({}, options):
        kept = run(cross_entropy, x[~ignored], t[~ignored], device=device, **extra)
        poisoned = x.masked_fill(ignored[:, None], math.nan)
        got = run(cross_entropy, poisoned, t, device=device, ignore_index=index, **extra)
        torch.testing.assert_close(got.loss, kept.loss)
        torch.testing.assert_close(got.gradient[~ignored], kept.gradient)
        assert (got.gradient[ignored] == 0).all()
        each = run(
            cross_entropy,
            poisoned,
            t,
            device=device,
            ignore_index=index,
            reduction="none",
            upstream=torch.where(ignored, math.nan, 1.0),
            **extra,
        )
        assert (each.loss[ignored] == 0).all()
        assert (each.gradient[ignored] == 0).all()
        assert each.gradient.isfinite().all()


def test_index_that_no_label_can_be(device: str) -> None:
    """300 is no uint8, and is not its 44."""
    x, t = make_logits((5, 50)), torch.full((5,), 44, dtype=torch.uint8)
    for index in (300, -212):
        ours = run(cross_entropy, x, t, device=device, ignore_index=index)
        torch.testing.assert_close(ours.loss, F.cross_entropy(x, t.long()))


EMPTY = {
    "no rows": ((0, 5), None),
    "no rows of probabilities": ((0, 5), "probabilities"),
    "no positions": ((2, 5, 0, 3), None),
    "no positions of probabilities": ((2, 5, 0, 3), "probabilities"),
    "no classes": ((4, 0), None),
    "no classes of probabilities": ((4, 0), "probabilities"),
    "no classes and no rows": ((0, 0), None),
    "all rows ignored": ((4, 5), None),
    "one row, ignored": ((5,), None),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty(name: str, device: str) -> None:
    shape, kind = EMPTY[name]
    x = torch.randn(shape)
    t = torch.rand(shape) if kind else torch.full(rows_of(shape), IGNORED)
    # Torch's smoothing divides by the number of classes even for ignored rows.
    for reduction in REDUCTIONS:
        for label_smoothing in (0.0, 0.1) if "no classes" not in name else (0.0,):
            for weight in (None, torch.rand(shape[min(1, len(shape) - 1)])):
                options = {"reduction": reduction, "label_smoothing": label_smoothing}
                ours = run(cross_entropy, x, t, device=device, weight=weight, **options)
                theirs = F.cross_entropy(x, t, weight, **options)
                torch.testing.assert_close(ours.loss, theirs, equal_nan=True)
                assert ours.gradient.shape == shape
                assert (ours.gradient == 0).all()
    result = run(cross_entropy, x, t, device=device, on_empty="zero")
    assert result.loss.item() == 0
    assert (result.gradient == 0).all()


def test_total_weight_zero(device: str) -> None:
    x, t, weight = make_logits((4, 5)), torch.tensor([0, 1, IGNORED, 1]), torch.zeros(5)
    weight[4] = 1.0  # of a class that is nobody's label
    for label_smoothing in (0.0, 0.1):
        options = {"weight": weight, "label_smoothing": label_smoothing}
        ours = run(cross_entropy, x, t, device=device, **options)
        assert run(F.cross_entropy, x, t, **options).loss.isnan()
        assert ours.loss.isnan()
        kept = t != IGNORED
        assert ours.gradient[kept].isnan().all()
        assert (ours.gradient[~kept] == 0).all()
        zero = run(cross_entropy, x, t, device=device, on_empty="zero", **options)
        assert zero.loss.item() == 0
        assert (zero.gradient == 0).all()


INF, NAN = math.inf, math.nan
# (logits, label or probabilities, options)
SPECIAL: dict[str, tuple[list[float], Any, dict[str, Any]]] = {
    "-inf": ([-INF, 0, 1], 1, {}),
    "-inf at the label": ([-INF, 0, 1], 0, {}),
    "-inf, weighted": ([-INF, 0, 1], 1, {"weight": torch.tensor([0.0, 2, 1])}),
    "-inf, smoothed": ([-INF, 0, 1], 1, {"label_smoothing": 0.1}),
    "-inf at weight 0, smoothed": (
        [-INF, 0, 1],
        1,
        {"weight": torch.tensor([0.0, 1, 1]), "label_smoothing": 0.1},
    ),
    "-inf at a label of weight 0": ([-INF, 0, 1], 0, {"weight": torch.tensor([0.0, 1, 1])}),
    "-inf, all smoothed": ([2, -INF, 1], 1, {"label_smoothing": 1.0}),
    "all -inf": ([-INF, -INF, -INF], 1, {}),
    "+inf at the label": ([0, INF, 0], 1, {}),
    "+inf": ([0, INF, 0], 0, {}),
    "+inf, smoothed": ([0, INF, 0], 0, {"label_smoothing": 0.1}),
    "both": ([-INF, INF, 0], 2, {}),
    "NaN": ([0, NAN, 0], 0, {}),
    "largest": ([3e38, -3e38, 0], 1, {}),
    "probability 0 at -inf": ([-INF, 0, 1], [0, 0.5, 0.5], {}),
    "probability at -inf": ([-INF, 0, 1], [0.2, 0.5, 0.3], {}),
    "probability 0 at -inf, smoothed": ([-INF, 0, 1], [0, 0.5, 0.5], {"label_smoothing": 0.1}),
    "probability at -inf of weight 0": (
        [-INF, 0, 1],
        [0.2, 0.5, 0.3],
        {"weight": torch.tensor([0.0, 1, 1])},
    ),
    "probabilities, all -inf": ([-INF, -INF, -INF], [0, 0.5, 0.5], {}),
    "probabilities, +inf": ([0, INF, 0], [0, 0.5, 0.5], {}),
    "NaN probability": ([0, 1, 2], [0, NAN, 0.5], {}),
    "infinite probability": ([0, 1, 2], [0, INF, 0.5], {}),
    "NaN weight": ([0, 1, 2], 1, {"weight": torch.tensor([1, NAN, 1])}),
    "two, -inf": ([-INF, 0], 1, {}),
    "two, -inf at the label": ([-INF, 0], 0, {}),
    "two, all -inf": ([-INF, -INF], 1, {}),
    "two, +inf": ([INF, 0], 1, {}),
    "two, +inf at the label": ([0, INF], 1, {}),
    "two, both": ([-INF, INF], 1, {}),
    "two, NaN": ([0, NAN], 0, {}),
    "two, NaN at the label": ([NAN, 0], 0, {}),
    "two, largest": ([3e38, -3e38], 1, {}),
    "two, weighted": ([3, -2], 1, {"weight": torch.tensor([0.5, 2])}),
}


@pytest.mark.parametrize("layout", ["rows", "classes in the middle"])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(name: str, layout: str, device: str) -> None:
    """What torch gives, among ordinary rows that feel nothing of it."""
    logits, target, options = SPECIAL[name]
    x = make_logits((5, len(logits)))
    x[2] = torch.tensor(logits)
    if isinstance(target, int):
        t = torch.tensor([0, 1, target, len(logits) - 1, 0])
    else:
        t = make_probabilities((5, 3))
        t[2] = torch.tensor(target)
    if layout == "classes in the middle":
        x = x.t()[None].contiguous()
        t = t[None] if isinstance(target, int) else t.t()[None].contiguous()
    for reduction in ("none", "sum"):
        ours = run(cross_entropy, x, t, device=device, reduction=reduction, **options)
        theirs = run(F.cross_entropy, x, t, reduction=reduction, **options)
        torch.testing.assert_close(ours.loss, theirs.loss, equal_nan=True)
        torch.testing.assert_close(ours.gradient, theirs.gradient, equal_nan=True)


# So large that float32's lse has no digits left below 1, or few.
@pytest.mark.parametrize("classes", [100, 128, 300, 5000])
@pytest.mark.parametrize(("dtype", "size"), [(BF16, 1e8), (BF16, 1e5), (F16, 6e4), (F16, 500.0)])
def test_large_logits_of_half_types(
    dtype: torch.dtype, size: float, classes: int, device: str
) -> None:
    x = torch.full((3, classes), size).to(dtype)
    x[1, ::3] *= 0.99
    t = make_labels(x.shape)
    for reduction in REDUCTIONS:
        ours = run(cross_entropy, x, t, device=device, reduction=reduction)
        right = run(F.cross_entropy, x.double(), t, reduction=reduction).gradient
        assert ulps(ours.gradient, right, right.abs().max().item()) <= FLOOR[dtype]


# Of many classes in columns, whose terms a lane or thread adds up one by one.
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 1.0}], ids=["soft", "smoothed"])
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_long_columns(spread: float, options: dict[str, Any], device: str) -> None:
    x = torch.randn(2, 1000, 33) * spread  # 66 rows: enough for a GPU of one multiprocessor
    t = make_labels(x.shape) if options else torch.softmax(torch.randn(x.shape), 1)
    ours = run(cross_entropy, x, t, device=device, reduction="none", **options).loss
    right = exact_cross_entropy(x.double(), double(t), reduction="none", **options)
    assert ulps(ours, right) <= 4


def test_one_smoothed_class(device: str) -> None:
    """1 - e and e add up to a little more or less than 1."""
    x, t, weight = make_logits((20, 1)), torch.zeros(20, dtype=torch.long), torch.tensor([3.0])
    for options in ({}, {"weight": weight}):
        ours = run(cross_entropy, x, t, device=device, label_smoothing=0.1, **options)
        assert (ours.loss == 0).all()
        assert (ours.gradient == 0).all()


# Rows of a block and, on newer devices, of a cluster. So many that a block takes several: what it
# leaves of one row is still there when it begins another, with ignored ones between them or not.
@pytest.mark.parametrize("shape", [(24, 5000), (7, 30_001)], ids=str)
@pytest.mark.parametrize("run_length", [1, 3])
def test_runs_of_ignored_rows(shape: tuple[int, int], run_length: int, device: str) -> None:
    x, t = make_logits(shape), make_labels(shape)
    t[torch.arange(shape[0]) // run_length % 2 == 1] = IGNORED
    check(x, t, device)


def test_upstream_gradient(device: str) -> None:
    x, t = make_logits((31, 5)), make_labels((31, 5))
    for reduction in REDUCTIONS:
        for upstream in (1.0, -3.0, 0.0):
            ours = run(cross_entropy, x, t, device=device, reduction=reduction, upstream=upstream)
            theirs = run(F.cross_entropy, x, t, reduction=reduction, upstream=upstream)
            torch.testing.assert_close(ours.gradient, theirs.gradient)


# On CUDA a kernel each: pairs, a few classes, rows of a warp, a block and a cluster, classes that
# lie apart (of so many rows that they fill the device) and, of so few rows, any.
@pytest.mark.parametrize(
    "shape",
    [(70, 2), (40, 10), (9, 301), (4, 20_003), (2, 80_005), (2, 3, 67, 67), (3, 5, 7)],
    ids=str,
)
def test_bfloat16_gradient_is_rounded_once(shape: tuple[int, ...], device: str) -> None:
    """Torch's under autocast is: the upstream gradient multiplies it in float32."""
    x, t = make_logits(shape, BF16), make_labels(shape)
    for reduction, upstream in itertools.product(("mean", "sum"), (1.0, -3.0, 1 / 3, 0.0)):
        seed = torch.tensor(upstream, dtype=BF16)
        ours = run(cross_entropy, x, t, device=device, reduction=reduction, upstream=seed)
        right = run(F.cross_entropy, x.double(), t, reduction=reduction, upstream=seed.double())
        largest = right.gradient.abs().max().item()
        assert ulps(ours.gradient, right.gradient, largest) <= 0.52  # a half, and 2e-5 of the value


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
def test_logits_far_from_zero(offset: float, device: str) -> None:
    """Only differences count, and they are exact here."""
    x, t = torch.randint(-20, 20, (9, 37)).float(), make_labels((9, 37))
    near = run(cross_entropy, x, t, device=device)
    far = run(cross_entropy, x + offset, t, device=device)
    torch.testing.assert_close(far.loss, near.loss)
    torch.testing.assert_close(far.gradient, near.gradient)


def test_same_bits_twice(device: str) -> None:
    x, t = make_logits((513, 301)), make_labels((513, 301))
    first, *others = [run(cross_entropy, x, t, device=device) for _ in range(3)]
    for other in others:
        assert torch.equal(first.loss, other.loss)
        assert torch.equal(first.gradient, other.gradient)


# Threads are the CPU's.
@pytest.mark.skipif(not is_native("cpu"), reason="torch's own sums depend on the threads")
def test_same_bits_on_any_number_of_threads(restore_threads: None) -> None:
    for shape in ((40_000, 3), (700, 301), (4, 50257), (2, 21, 128, 128)):
        x, t = make_logits(shape), ignoring(make_labels(shape))
        weight = torch.rand(shape[1])
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(cross_entropy, x, t, weight=weight))
        assert torch.equal(results[0].loss, results[1].loss)
        assert torch.equal(results[0].gradient, results[1].gradient)


# ---- defects of other implementations ------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_gradient_of_unreduced_loss(dtype: torch.dtype, device: str) -> None:
    """Wrong where a gradient is written in the forward pass as for an upstream gradient of 1."""
    shape = (9, 33)
    for t in (ignoring(make_labels(shape)), make_probabilities(shape, dtype)):
        check(make_logits(shape, dtype), t, device, torch.randn(9), reduction="none")
    # `.sum()` sends its gradient back as one element expanded.
    x, t = make_logits(shape, dtype), make_labels(shape)
    leaf = x.to(device, copy=True).requires_grad_()
    cross_entropy(leaf, t.to(device), reduction="none").sum().backward()
    right = run(cross_entropy, x, t, device=device, reduction="none").gradient
    assert torch.equal(leaf.grad.cpu(), right)


@each_reduction
@pytest.mark.parametrize("dtype", [F32, F16], ids=dtype_id)
def test_second_backward(dtype: torch.dtype, reduction: str, device: str) -> None:
    """Wrong where backward scales the stored gradient, or the logits in its place, once more."""
    x, t = make_logits((7, 33), dtype), make_labels((7, 33))
    right = run(cross_entropy, x, t, device=device, reduction=reduction)
    leaf = x.to(device).requires_grad_()
    loss = cross_entropy(leaf, t.to(device), reduction=reduction)
    seed = torch.ones(loss.shape, dtype=dtype).to(device)
    for times in (1, 3, 1):
        (gradient,) = torch.autograd.grad(loss, leaf, seed * times, retain_graph=True)
        torch.testing.assert_close(gradient.cpu(), right.gradient * times)
    loss.backward(seed)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward(seed)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("masked", [1, 8, 64, 1024, 4096, 65536])
def test_first_block_of_classes_all_minus_inf(masked: int, dtype: torch.dtype, device: str) -> None:
    """NaN where a running maximum of -inf is subtracted from -inf."""
    x = make_logits((2, masked + 9), dtype)
    x[0, :masked] = -math.inf
    x[1, -masked:] = -math.inf
    t = torch.tensor([masked + 3, 5])
    result = check(x, t, device)
    assert result.loss.isfinite()
    assert (result.gradient[x == -math.inf] == 0).all()


# Rows of several blocks of classes: of whole ones and a tail of 13, and one class past the longest
# row that keeps its exponentials.
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("classes", [8205, 40_000, 262_145])
def test_rising_logits(classes: int, dtype: torch.dtype, device: str) -> None:
    """What is kept of a block is relative to the largest logit so far, which others exceed."""
    shape = (3, classes)
    rise = torch.linspace(0, 60, classes)
    x = (make_logits(shape).float() + torch.stack([rise, -rise, rise])).to(dtype)
    x[2, : classes // 2] = torch.finfo(dtype).min
    x[:, -1] = 90
    t = torch.tensor([classes - 1, 3, classes - 3])
    check(x, t, device)
    # What a capped row, or one whose classes lie apart, keeps: not in the place of its gradient.
    check(x, t, device, beside_torch=False, softcap=80.0)
    check(x.repeat_interleave(2, dim=1)[:, ::2], t, device)
    if dtype != F64:  # of which torch, the oracle, is up to 6,000 units off
        check(x[:2], t[:2], device, label_smoothing=0.1)  # the cost of finfo.min overflows


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_label_smoothing_at_a_logit_gap_of_200(dtype: torch.dtype, device: str) -> None:
    """Infinite where the logarithm is taken of a probability that underflows."""
    x = torch.tensor([[200.0, 0.0, 0.0], [0.0, 0.0, 200.0]]).to(dtype)
    result = check(x, torch.tensor([0, 1]), device, label_smoothing=0.1, reduction="none")
    # two classes of three are 200 away, each with a probability of 0.1 / 3; then the label is, too
    right = torch.tensor([200 * 0.2 / 3, 200 * (0.9 + 0.2 / 3)], dtype=F64)
    assert ulps(result.loss, right) <= FLOOR[dtype]


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_all_logits_at_minus_200(dtype: torch.dtype, device: str) -> None:
    """log(0) where the maximum starts at 0."""
    for classes in (3, 37, 1025):
        x = torch.full((4, classes), -200.0).to(dtype)
        result = check(x, make_labels(x.shape), device, reduction="none")
        right = torch.full((4,), math.log(classes), dtype=F64)
        assert ulps(result.loss, right) <= FLOOR[dtype]


# 5 classes are a thread's or a warp's, 5000 a block's.
@pytest.mark.parametrize("classes", [5, 5000])
@pytest.mark.parametrize("distance", [2**31 + 8, 2**32 + 24], ids=["2^31", "2^32"])
def test_offsets_beyond_32_bits(distance: int, classes: int, device: str) -> None:
    """Two rows, or two classes, that far apart: memory that nobody touches costs nothing."""
    storage = far_memory(distance + 2 * classes, device)
    values, t = make_logits((2, classes), BF16), torch.tensor([1, 3])
    for strides in [(distance, 1), (7, distance // 4)][: 2 if classes == 5 else 1]:
        x = storage.as_strided((2, classes), strides)
        # Each run of memory by itself: a copy of all may be a copy of what lies between, too.
        runs = list(x) if strides[1] == 1 else [x[i, c] for i in range(2) for c in range(classes)]
        for softcap in (0.0, 30.0):
            options = {"softcap": softcap} if softcap else {}
            right = run(cross_entropy, values, t, device=device, **options)
            for place, value in zip(runs, values.view(len(runs), -1), strict=True):
                place.copy_(value.view(place.shape))
            leaf = x.detach().requires_grad_()
            loss = cross_entropy(leaf, t.to(device), **options)
            (gradient,) = torch.autograd.grad(loss, leaf)
            torch.testing.assert_close(loss.detach().cpu(), right.loss)
            torch.testing.assert_close(gradient.cpu(), right.gradient)
            # The gradient as far apart, in the place of the logits.
            numbers = (0, 1, F32, IGNORED, 0.0, softcap)
            op = torch.ops.fused_ce._softmax_ce_with_gradient
            op(x, x, t.to(device), None, None, None, *numbers)
            found = torch.cat([place.cpu().view(-1) for place in runs]).view(2, classes)
            torch.testing.assert_close(found, right.gradient)


def test_more_than_32_bits_count_of_which_few_are_read(device: str) -> None:
    """Of rows between the first and the last, which are ignored, no memory is touched."""
    if not is_native(device):
        pytest.skip("plain PyTorch copies the logits")
    rows, classes = 2**11 + 1, 2**20
    x = far_memory(rows * classes, device).view(rows, classes)
    values, labels = make_logits((2, classes), BF16), torch.tensor([1, classes - 1])
    t = torch.full((rows,), IGNORED)
    for row, value, label in zip((0, -1), values, labels, strict=True):
        x[row].copy_(value)
        t[row] = label
    for options in ({}, {"softcap": 30.0}):
        loss = cross_entropy(x, t.to(device), **options)
        right = run(cross_entropy, values, labels, device=device, **options).loss
        torch.testing.assert_close(loss.cpu(), right)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_more_logits_than_32_bits_count(reduction: str, device: str) -> None:
    rows, classes = 2**21 + 1, 1024
    skip_where_slow(cross_entropy, (2**10, classes), rows * classes, device)
    x, t = torch.zeros(1, 1).expand(rows, classes), torch.zeros(1, dtype=torch.uint8).expand(rows)
    loss = cross_entropy(on(x, device), on(t, device), reduction=reduction).item()
    right = math.log(classes) * (rows if reduction == "sum" else 1)
    assert loss == pytest.approx(right, rel=1e-7)


@pytest.mark.parametrize("shape", [(2**21 + 1, 1024), (2, 3, 357_913_943)], ids=str)
def test_more_gradients_than_32_bits_count(shape: tuple[int, ...], device: str) -> None:
    skip_where_slow(cross_entropy, (2**10, *shape[1:2]), math.prod(shape), device)
    size = 2 * math.prod(shape)
    require_memory(size if device == "cpu" else 3 * size, device)
    x, t = zeros(shape, BF16, device), zeros(rows_of(shape), torch.uint8, device)
    odd, label = make_logits((1, shape[1]), BF16), torch.tensor([2], dtype=torch.uint8)
    places = [(0, 12345), (1, shape[2] - 1)] if len(shape) == 3 else [(12345,), (shape[0] - 1,)]
    for place in places:
        x.movedim(1, -1)[place], t[place] = odd[0].to(device), 2
    leaf = x.requires_grad_()
    loss = cross_entropy(leaf, t, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    of_odd = run(cross_entropy, odd, label, device=device, reduction="sum")
    others = run(cross_entropy, odd * 0, label * 0, device=device, reduction="sum")
    right = 2 * of_odd.loss.item() + (t.numel() - 2) * math.log(shape[1])
    assert loss.item() == pytest.approx(right, rel=2**-8)
    for place in places:
        row = gradient.movedim(1, -1)[place]
        torch.testing.assert_close(row.cpu(), of_odd.gradient[0])
        row.copy_(others.gradient[0])
    for part in gradient.chunk(64, 0 if len(shape) == 2 else 2):  # of which aminmax makes copies
        for found, value in (
            (part[:, 0], others.gradient[0, 0]),
            (part[:, 1:], others.gradient[0, 1]),
        ):
            assert [v.cpu() for v in found.aminmax()] == [value, value]


def test_logits_under_no_grad_are_left_alone(device: str) -> None:
    """Overwritten by a gradient, or by zeros, where a kernel works in place regardless."""
    x, t = make_logits((5, 7)).to(device), make_labels((5, 7)).to(device)
    before = x.clone()
    for inplace_backward in (False, True):
        cross_entropy(x, t, inplace_backward=inplace_backward)
        with torch.no_grad():
            cross_entropy(x.clone().requires_grad_(), t, inplace_backward=inplace_backward)
            cross_entropy(x.requires_grad_(), t, inplace_backward=inplace_backward)
        x = x.detach()
    assert x._version == 0
    assert torch.equal(x, before)


# On CUDA rows of a thread, a few lanes, a warp, a block and several blocks, and classes apart.
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("classes", [2, 10, 33, 1000, 5003, 40_009])
@each_reduction
# Ignored rows have statistics too, whose pass must not make them part of the gradient.
@pytest.mark.parametrize("stats", [(), ("correct",), ("lse", "entropy")], ids=str)
def test_ignored_rows_poison_no_others(
    reduction: str, classes: int, layout: str, stats: tuple[str, ...], device: str
) -> None:
    """NaN everywhere where what an ignored row holds enters a sum, times zero or not."""

    def loss_of(*arguments: Tensor, **options: Any) -> Tensor:
        result = cross_entropy(*arguments, stats=stats, **options)
        return result[0] if stats else result

    x, t = make_logits((9, classes)), make_labels((9, classes))
    t[::2] = IGNORED
    x[0], x[2], x[4], x[6:9:2] = math.nan, math.inf, -math.inf, 0.0
    x[6, -1], x[8, classes // 2] = math.nan, math.inf
    for dtype in (F32, BF16):
        logits = LAYOUTS[layout](x.to(dtype))
        result = run(loss_of, logits, t, device=device, reduction=reduction)
        kept = run(loss_of, logits[1::2], t[1::2], device=device, reduction=reduction)
        loss = result.loss
        if reduction == "none":
            assert (loss[::2] == 0).all()
            loss = loss[1::2]
        torch.testing.assert_close(loss, kept.loss)
        torch.testing.assert_close(result.gradient[1::2], kept.gradient)
        assert (result.gradient[::2] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=dtype_id)
def test_sum_over_many_rows_is_rounded_once(
    dtype: torch.dtype, reduction: str, device: str
) -> None:
    """Off by far more than a rounding where losses of a half type are added up in that type."""
    rows = 1000 if dtype == F16 and reduction == "sum" else 100_000  # float16 ends at 65504
    x, t = make_logits((rows, 8), dtype), make_labels((rows, 8))
    ours = run(cross_entropy, x, t, device=device, reduction=reduction).loss
    right = exact_cross_entropy(x.double(), t, reduction=reduction)
    assert ulps(ours, right) <= 0.51


# ---- dtypes of the result ------------------------------------------------------------------------


@pytest.mark.parametrize("weight_dtype", [None, torch.int64, *FLOATS], ids=str)
@pytest.mark.parametrize("target_dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_probabilities_promote(
    dtype: torch.dtype, target_dtype: torch.dtype, weight_dtype: torch.dtype | None, device: str
) -> None:
    x, t = make_logits((5, 7), dtype), make_probabilities((5, 7), target_dtype)
    weight = None if weight_dtype is None else (torch.rand(7) * 4).to(weight_dtype)
    for reduction in REDUCTIONS:
        ours = run(cross_entropy, x, t, device=device, reduction=reduction, weight=weight)
        theirs = run(F.cross_entropy, x, t, reduction=reduction, weight=weight)
        assert (ours.loss.dtype, ours.gradient.dtype) == (theirs.loss.dtype, dtype)
        rtol = 1e-2 if {F16, BF16} & {dtype, target_dtype} else 1e-5  # torch's rounding
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=rtol, atol=1e-2)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    x, weight = make_logits((33, 17), dtype), torch.rand(17).to(dtype)
    for t in (make_labels(x.shape), make_probabilities(x.shape, dtype)):
        with torch.autocast(device, BF16):
            ours = run(cross_entropy, x, t, device=device, weight=weight)
        with torch.autocast("cpu", BF16):
            theirs = run(F.cross_entropy, x, t, weight=weight)
        assert ours.loss.dtype == theirs.loss.dtype == (F64 if dtype == F64 else F32)
        assert ours.gradient.dtype == dtype
        # Torch computes on float32 copies of the half tensors: the same numbers.
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(ours.gradient, theirs.gradient)


# Rows of a thread (as many as it takes on a GPU), of a warp, and of a block.
@pytest.mark.parametrize("shape", [(33, 17), (8501, 17), (2, 5, 65, 67), (33, 1003), (3, 20_001)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_autocast_takes_float32_weights_with_half_logits(
    label_smoothing: float, shape: tuple[int, ...], device: str
) -> None:
    x, t, weight = make_logits(shape, BF16), make_labels(shape), torch.rand(shape[1])
    options = {"weight": weight, "label_smoothing": label_smoothing}
    with torch.autocast(device, BF16):
        ours = run(cross_entropy, x, t, device=device, **options)
    with torch.autocast("cpu", BF16):
        theirs = run(F.cross_entropy, x, t, **options)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.gradient, theirs.gradient)


# On the CPU, where the profiler sees each allocation.
@pytest.mark.skipif(not is_native("cpu"), reason="plain PyTorch computes on float32 copies")
@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int16, BF16], ids=dtype_id)
def test_autocast_copies_nothing(target_dtype: torch.dtype) -> None:
    x, t = make_logits((100, 100), BF16), make_target((100, 100), target_dtype)

    def loss() -> None:
        with torch.autocast("cpu", BF16):
            assert cross_entropy(x, t).dtype == F32

    assert allocated(loss) <= 256


@each_reduction
def test_float16_gradient_under_a_loss_scale(reduction: str, device: str) -> None:
    # As GradScaler sends it: 65536 * gradient / 1e8 is a float16, gradient / 1e8 is none.
    x, t = make_logits((33, 17), F16), make_labels((33, 17))
    options = (
        {"normalizer": 1e8} if reduction == "mean" else {"sample_weight": torch.full((33,), 1e-8)}
    )
    with torch.autocast(device, F16):
        ours = run(
            cross_entropy, x, t, device=device, upstream=65536.0, reduction=reduction, **options
        )
    right = torch.softmax(x.double(), 1) - F.one_hot(t, 17)
    assert ulps(ours.gradient, right * 65536 / 1e8, scale=1e-4) < 0.6


# ---- extras --------------------------------------------------------------------------------------

EXTRAS: dict[str, dict[str, Any]] = {
    "weights of rows": {"sample_weight": torch.linspace(0, 2, 6)},
    "weights of positions": {"sample_weight": torch.linspace(-1, 2, 30).view(6, 5)},
    "one weight": {"sample_weight": torch.tensor(3.0)},
    "half weights": {"sample_weight": torch.linspace(0, 2, 6, dtype=F16)},
    "whole weights": {"sample_weight": torch.arange(6)},
    "normalizer": {"normalizer": 7},
    "normalizer of 0 dimensions": {"normalizer": torch.tensor(7.5)},
    "normalizer of 1 dimension": {"normalizer": torch.tensor([7])},
    "normalizer of a half type": {"normalizer": torch.tensor(7.5, dtype=F16)},
    "softcap": {"softcap": 5.0},
    "logit_scale": {"logit_scale": 0.3},
    "negative logit_scale": {"logit_scale": -1.5},
    "scaled and capped": {"logit_scale": 1.7, "softcap": 3},
    "z_loss": {"z_loss": 0.1},
    "z_loss of weighted rows": {"z_loss": 0.1, "sample_weight": torch.linspace(0, 2, 6)},
    "everything": {
        "label_smoothing": 0.2,
        "sample_weight": torch.linspace(0, 2, 6),
        "normalizer": torch.tensor(7.5, dtype=F64),
        "softcap": 10.0,
        "logit_scale": 0.5,
        "z_loss": 1e-2,
    },
}


@each_reduction
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_extras(extras: dict[str, Any], reduction: str, device: str) -> None:
    shape = (6, 7, 5)
    for dtype in (F64, F32, BF16):
        x, weight = make_logits(shape, dtype), torch.rand(7).to(dtype)
        for t in (ignoring(make_labels(shape)), make_probabilities(shape, dtype)):
            for w in (None, weight):
                options = extras | {"weight": w, "reduction": reduction}
                # tanh and the square of lse are roundings of their own
                check(x, t, device, beside_torch=False, floor=3, **options)


def test_softcap_saturates(device: str) -> None:
    x, t = torch.tensor([[1e4, -1e4, 3.0], [-math.inf, math.inf, 0.0]]), torch.tensor([1, 0])
    ours = run(cross_entropy, x, t, device=device, softcap=20.0, reduction="none")
    right = F.cross_entropy(
        torch.tensor([[20, -20, capped(x, 20.0)[0, 2]], [-20, 20, 0]]), t, reduction="none"
    )
    torch.testing.assert_close(ours.loss, right)
    assert (ours.gradient[x.abs() > 100] == 0).all()


@pytest.mark.parametrize("on_empty", ["nan", "zero"])
def test_denominator_zero(on_empty: str, device: str) -> None:
    x, t = make_logits((5, 7)), make_labels((5, 7))
    for normalizer in (0, torch.tensor(0.0)):
        result = run(cross_entropy, x, t, device=device, normalizer=normalizer, on_empty=on_empty)
        assert result.loss.item() == (0 if on_empty == "zero" else math.inf)
        if on_empty == "zero":
            assert (result.gradient == 0).all()
    # What is not empty is what it was.
    plain = run(cross_entropy, x, t, device=device)
    assert torch.equal(run(cross_entropy, x, t, device=device, on_empty=on_empty).loss, plain.loss)
    # Whatever is added up: the label's logit is infinite, and its weight is 0.
    loss = run(
        cross_entropy,
        torch.tensor([[-math.inf, 0.0, 1.0]]),
        torch.tensor([0]),
        weight=torch.tensor([0.0, 1.0, 1.0]),
        device=device,
        on_empty=on_empty,
    ).loss
    assert loss.item() == pytest.approx(0 if on_empty == "zero" else math.nan, nan_ok=True)


def test_normalizer_makes_gradient_accumulation_exact(device: str) -> None:
    # parts of unequal size, whose own means would not add up
    x, t = make_logits((100, 9)), ignoring(make_labels((100, 9)))
    count = (t != IGNORED).sum()
    whole = run(cross_entropy, x, t, device=device)
    parts = [
        run(cross_entropy, a, b, device=device, normalizer=count)
        for a, b in zip(x.split([10, 70, 20]), t.split([10, 70, 20]), strict=True)
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(torch.cat([part.gradient for part in parts]), whole.gradient)


@each_reduction
@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.3, "z_loss": 0.01}], ids=str)
@pytest.mark.parametrize("mode", ["labels", "probabilities"])
def test_gradients_of_all_arguments(
    mode: str, extra: dict[str, Any], reduction: str, device: str
) -> None:
    shape = (6, 5, 3)
    tensors = {"input": make_logits(shape), "weight": torch.rand(5), "sample_weight": torch.rand(6)}
    if mode == "probabilities":
        tensors["target"] = make_probabilities(shape)
        constant = {}
    else:
        constant = {"target": ignoring(make_labels(shape))}
    if reduction == "mean":
        check_gradients(tensors | {"normalizer": torch.tensor(3.5)}, constant, device, **extra)
    check_gradients(tensors, constant, device, reduction=reduction, **extra)
    for name in tensors.keys() - {"input"}:  # without the input's
        others = {k: v for k, v in tensors.items() if k != name}
        check_gradients({name: tensors[name]}, constant | others, device, **extra)


def check_gradients(
    wanted: dict[str, Tensor], constant: dict[str, Tensor], device: str, **options: Any
) -> None:
    found = []
    for function, where, change in (
        (cross_entropy, device, lambda t: t),
        (exact_cross_entropy, "cpu", double),
    ):
        leaves = {k: change(v).to(where, copy=True).requires_grad_() for k, v in wanted.items()}
        others = {k: change(v).to(where) for k, v in constant.items()}
        arguments = leaves | others
        loss = function(arguments.pop("input"), arguments.pop("target"), **arguments, **options)
        found.append(torch.autograd.grad(loss, list(leaves.values()), torch.ones_like(loss)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-6)


# ---- statistics ----------------------------------------------------------------------------------

ALL_STATS = ("lse", "entropy", "prediction", "correct")


def named(*stats: CrossEntropyStats) -> list[tuple[Any, ...]]:
    return [(name, *(getattr(s, name) for s in stats)) for name in ALL_STATS]


def exact_stats(x: Tensor, t: Tensor, **options: Any) -> CrossEntropyStats:
    dim = 1 if x.dim() > 1 else 0
    logits = capped(x.double(), **options)
    p, best = torch.softmax(logits, dim), logits.argmax(dim)
    label = t.argmax(dim) if t.is_floating_point() else t
    return CrossEntropyStats(
        torch.logsumexp(logits, dim), torch.special.entr(p).sum(dim), best, best == label
    )


@pytest.mark.parametrize("shape", [(5,), (9, 37), (67, 2), (3, 5, 7), (4, 1025)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_stats(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    x = make_logits(shape, dtype)
    for t in (make_labels(shape), ignoring(make_labels(shape)), make_probabilities(shape)):
        for options in ({}, {"softcap": 5.0, "logit_scale": 0.7}):
            right = exact_stats(x, t, **options)
            for reduction in REDUCTIONS:
                plain = run(cross_entropy, x, t, device=device, reduction=reduction, **options)
                leaf = x.to(device).requires_grad_()
                loss, stats = cross_entropy(
                    leaf, t.to(device), reduction=reduction, stats=ALL_STATS, **options
                )
                torch.testing.assert_close(loss.detach().cpu(), plain.loss)
                for name, found, value in named(stats, right):
                    assert found.shape == rows_of(shape)
                    assert found.requires_grad == (name in ("lse", "entropy"))
                    if not found.is_floating_point():
                        assert torch.equal(found.cpu(), value)
                        continue
                    assert found.dtype == (F64 if dtype == F64 else F32)
                    torch.testing.assert_close(
                        found.detach().cpu().double(), value, rtol=1e-5, atol=1e-5
                    )
                (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
                torch.testing.assert_close(gradient.cpu(), plain.gradient)


def test_stats_asked_for_alone(device: str) -> None:
    x, t = make_logits((4, 5)), make_labels((4, 5))
    right = exact_stats(x, t)
    for name in ALL_STATS:
        for leaf in (x.to(device), x.to(device).requires_grad_()):
            loss, stats = cross_entropy(leaf, t.to(device), stats=[name])
            torch.testing.assert_close(loss.detach().cpu(), F.cross_entropy(x, t))
            value = getattr(stats, name).detach().cpu()
            torch.testing.assert_close(value, getattr(right, name).to(value.dtype))
            assert [n for n in ALL_STATS if getattr(stats, n) is not None] == [name]


def test_stats_of_ignored_rows(device: str) -> None:
    """They have all but a label."""
    x, t = make_logits((6, 5)), torch.tensor([0, IGNORED, 1, IGNORED, 2, 3])
    x[1] = 0.0
    x[3, 2] = math.nan
    loss, stats = cross_entropy(x.to(device), t.to(device), stats=ALL_STATS)
    assert loss.isfinite()
    assert stats.lse[1].item() == pytest.approx(math.log(5))
    assert stats.entropy[1].item() == pytest.approx(math.log(5))
    assert stats.lse[3].isnan()
    assert stats.entropy[3].isnan()
    assert stats.prediction[[1, 3]].tolist() == [0, 2]
    assert stats.correct[[1, 3]].tolist() == [False, False]
    # An index that is a class: the prediction is that class, and still not counted as right.
    _, stats = cross_entropy(
        torch.eye(3).to(device), torch.arange(3).to(device), ignore_index=1, stats=("correct",)
    )
    assert stats.correct.tolist() == [True, False, True]


# From 5003 on a row is a block's, from 40009 on several blocks'; neither is whole vectors.
@pytest.mark.parametrize("classes", [2, 7, 40, 1500, 5003, 40_009])
def test_prediction_is_the_first_of_the_largest(classes: int, device: str) -> None:
    x = torch.randint(-1, 2, (50 if classes < 5000 else 9, classes)).float()
    x[3, classes // 2] = x[4, 1] = math.nan  # which counts as the largest
    x[5] = -math.inf
    x[6, -1] = math.inf
    x[7] = -math.inf
    x[7, -1] = x[8, -1] = 2.0  # behind the last vector
    t = make_labels(x.shape)
    _, stats = cross_entropy(x.to(device), t.to(device), stats=("prediction", "correct"))
    right = x.argmax(1)
    assert torch.equal(stats.prediction.cpu(), right)
    assert torch.equal(stats.correct.cpu(), right == t)


# A kernel each on CUDA, two of them in Triton.
@pytest.mark.parametrize("classes", [2, 3, 40, 9000])
@pytest.mark.parametrize("backend", fused_ce.backends.BACKENDS)
def test_lse_of_an_infinite_logit(backend: str, classes: int, device: str) -> None:
    """Infinite, as torch.logsumexp has it, where the loss is NaN, as torch's."""
    if backend == "triton" and device == "cpu":
        pytest.skip("test_triton.py has this case for Triton's interpreter")
    if backend == "native" and not can_force_native():
        pytest.skip("not every device has native kernels here")
    x = make_logits((5, classes))
    x[0, 1] = x[1, -1] = math.inf
    x[2, 1] = math.nan
    x[3] = -math.inf
    t = make_labels(x.shape)
    # Without a prediction two classes are computed in a way of their own on the CPU.
    for wanted in (("lse", "prediction"), ("lse",)):
        with fused_ce.backend(backend):
            loss, stats = cross_entropy(x.to(device), t.to(device), reduction="none", stats=wanted)
        torch.testing.assert_close(stats.lse.cpu(), torch.logsumexp(x, 1), equal_nan=True)
        right = F.cross_entropy(x, t, reduction="none")
        torch.testing.assert_close(loss.cpu(), right, equal_nan=True)
        if "prediction" in wanted:
            assert torch.equal(stats.prediction.cpu(), x.argmax(1))


def test_entropy_of_improbable_classes(device: str) -> None:
    """A probability of 0 counts as 0, with derivatives that are no NaN."""
    x = torch.tensor([[0.0, -math.inf, 0.0, -math.inf], [200.0, 0.0, -200.0, 0.0]])
    leaf = x.to(device).requires_grad_()
    _, stats = cross_entropy(leaf, torch.tensor([0, 0]).to(device), stats=("entropy",))
    assert stats.entropy[0].item() == pytest.approx(math.log(2))
    assert stats.entropy[1].item() == 0
    (gradient,) = torch.autograd.grad(stats.entropy.sum(), leaf)
    assert gradient.abs().max() < 1e-6


def entangled(loss: Tensor, lse: Tensor, entropy: Tensor, which: tuple[str, ...]) -> Tensor:
    """A sum in which every row has another weight."""
    factor = torch.linspace(-1, 2, lse.numel(), device=lse.device).view(lse.shape).to(lse.dtype)
    total = (loss * (1 if loss.dim() == 0 else factor.flip(0))).sum() * 0.5 * ("loss" in which)
    total = total + (lse * factor).sum() * ("lse" in which)
    return total + (entropy * factor.square()).sum() * ("entropy" in which)


@pytest.mark.parametrize("inplace_backward", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize(
    "which",
    [("lse",), ("entropy",), ("loss", "lse"), ("loss", "entropy"), ("loss", "lse", "entropy")],
)
@each_reduction
def test_gradients_of_stats(
    reduction: str, which: tuple[str, ...], inplace_backward: bool, device: str
) -> None:
    shape = (6, 7, 3)
    stats = tuple(name for name in which if name != "loss")
    for dtype in (F64, F32, F16):
        x = make_logits(shape, dtype)
        for t in (ignoring(make_labels(shape)), make_probabilities(shape, dtype)):
            for options in ({}, {"softcap": 6.0, "logit_scale": 0.8, "z_loss": 0.02}):
                leaf = x.to(device, copy=True).requires_grad_()
                loss, found = cross_entropy(
                    leaf * 1,
                    t.to(device),
                    reduction=reduction,
                    stats=stats,
                    inplace_backward=inplace_backward,
                    **options,
                )
                nothing = torch.zeros(rows_of(shape), device=device)
                lse = nothing if found.lse is None else found.lse
                entropy = nothing if found.entropy is None else found.entropy
                entangled(loss.double(), lse, entropy, which).backward()
                other = x.double().clone().requires_grad_()
                loss = exact_cross_entropy(other, double(t), reduction=reduction, **options)
                cap = {k: v for k, v in options.items() if k != "z_loss"}
                logits = capped(other, **cap)
                p = torch.softmax(logits, 1)
                entropy = -(p * torch.log_softmax(logits, 1)).sum(1)
                entangled(loss, torch.logsumexp(logits, 1), entropy, which).backward()
                tolerance = 2e-3 if dtype == F16 else 1e-5
                torch.testing.assert_close(
                    leaf.grad.cpu().double(), other.grad, rtol=tolerance, atol=tolerance
                )


# Rows of a thread, dense and with their classes apart (15 is 8 + 4 + 2 + 1), as many as it takes
# on a GPU of 132 multiprocessors; of a warp, a block, several blocks, and one that these cannot
# keep in float32; none of whole vectors, so that they begin at any address.
@pytest.mark.parametrize(
    "shape",
    [(8501, 7), (2, 15, 65, 67), (5, 203), (3, 5003), (3, 40_009), (2, 480_003)],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "target_dtype"),
    [(F32, torch.int64), (F32, F32), (BF16, torch.int64), (BF16, BF16), (BF16, F32)],
    ids=dtype_id,
)
def test_options_by_number_of_classes(
    dtype: torch.dtype, target_dtype: torch.dtype, shape: tuple[int, ...], device: str
) -> None:
    x, weight = make_logits(shape, dtype), torch.rand(shape[1]).to(dtype)
    t = (
        ignoring(make_labels(shape))
        if target_dtype is torch.int64
        else make_probabilities(shape, target_dtype)
    )
    for options in (
        {"softcap": 20.0, "logit_scale": 0.5, "z_loss": 1e-2},
        {"label_smoothing": 0.2, "weight": weight},
        {"label_smoothing": 0.2, "softcap": 30.0},
    ):
        # tanh is a rounding of its own
        plain = check(x, t, device, beside_torch=False, floor=3, **options)
        leaf = x.to(device, copy=True).requires_grad_()
        arguments = {k: on(v, device) if v is weight else v for k, v in options.items()}
        loss, found = cross_entropy(leaf, t.to(device), stats=ALL_STATS, **arguments)
        torch.testing.assert_close(loss.detach().cpu(), plain.loss)
        entangled(loss.double(), found.lse, found.entropy, ("loss", "lse", "entropy")).backward()

        cap = {k: v for k, v in options.items() if k in ("softcap", "logit_scale")}
        for name, stat, value in named(found, exact_stats(x, t, **cap)):
            if name == "correct" and target_dtype is torch.int64:
                value = value & (t != IGNORED)
            tolerance = 1e-5 if value.is_floating_point() else 0.0
            stat = stat.detach().cpu().to(value.dtype)
            torch.testing.assert_close(stat, value, rtol=tolerance, atol=tolerance)

        other = x.double().requires_grad_()
        options = {k: double(v) for k, v in options.items()}
        loss = exact_cross_entropy(other, double(t), **options)
        logits = capped(other, **cap)
        lse, p = torch.logsumexp(logits, 1), torch.softmax(logits, 1)
        entropy = -(p * torch.log_softmax(logits, 1)).sum(1)
        entangled(loss, lse, entropy, ("loss", "lse", "entropy")).backward()
        most = other.grad.abs().max().item()
        tolerance = 5e-3 if dtype == BF16 else 1e-5
        torch.testing.assert_close(
            leaf.grad.cpu().double(), other.grad, rtol=tolerance, atol=tolerance * most
        )


def test_stats_backward_one_after_another(device: str) -> None:
    x, t = make_logits((4, 5)), make_labels((4, 5))
    leaf = x.to(device).requires_grad_()
    loss, stats = cross_entropy(leaf, t.to(device), stats=("lse",))
    p, right = torch.softmax(x, 1), run(cross_entropy, x, t, device=device).gradient
    for output, expected in (
        (stats.lse.sum(), p),
        (loss, right),
        (stats.lse.sum(), p),
        (loss, right),
    ):
        (gradient,) = torch.autograd.grad(output, leaf, retain_graph=True)
        torch.testing.assert_close(gradient.cpu(), expected)


def test_stats_of_constant_logits(device: str) -> None:
    """Where the weight alone needs a gradient, lse has none."""
    weight = torch.rand(5).to(device).requires_grad_()
    loss, stats = cross_entropy(
        make_logits((4, 5)).to(device), make_labels((4, 5)).to(device), weight, stats=ALL_STATS
    )
    assert loss.requires_grad
    assert not stats.lse.requires_grad
    loss.backward()
    assert weight.grad.isfinite().all()


def test_stats_that_were_not_asked_for(device: str) -> None:
    loss, stats = cross_entropy(
        torch.eye(3).to(device), torch.arange(3).to(device), stats=("correct", "lse")
    )
    assert isinstance(stats, CrossEntropyStats)
    assert stats.entropy is stats.prediction is None
    assert stats.correct.all()
    assert loss.shape == ()


# ---- signatures and modules ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (cross_entropy, F.cross_entropy),
        (fused_ce.CrossEntropyLoss.__init__, nn.CrossEntropyLoss.__init__),
        (fused_ce.CrossEntropyLoss.forward, nn.CrossEntropyLoss.forward),
    ],
)
def test_signature(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    assert positional(ours) == positional(theirs)


def test_arguments_by_position(device: str) -> None:
    x, t, w = make_logits((4, 5)), make_labels((4, 5)), torch.rand(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = F.cross_entropy(x, t, w, None, 2, False, "sum", 0.1)
        ours = cross_entropy(*(a.to(device) for a in (x, t, w)), None, 2, False, "sum", 0.1)
    torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize(("legacy", "means"), LEGACY_REDUCTIONS, ids=str)
def test_legacy_reductions_warn(legacy: dict[str, Any], means: str) -> None:
    x, t = make_logits((4, 5)), make_labels((4, 5))
    expected = cross_entropy(x, t, reduction=means)
    with pytest.warns(UserWarning, match=r"deprecated|reduction='mean' instead"):
        assert torch.equal(cross_entropy(x, t, **legacy), expected)
    with pytest.warns(UserWarning, match=r"deprecated|reduction='mean' instead"):
        assert torch.equal(fused_ce.CrossEntropyLoss(**legacy)(x, t), expected)


def test_module(device: str) -> None:
    options = {"ignore_index": 2, "reduction": "sum", "label_smoothing": 0.1}
    module = fused_ce.CrossEntropyLoss(torch.rand(7), **options).to(device)
    other = nn.CrossEntropyLoss(module.weight.cpu(), **options)
    assert isinstance(module, nn.CrossEntropyLoss)
    assert repr(module) == repr(other)
    assert dict(module.named_buffers()).keys() == {"weight"}
    # State dicts go both ways, and the copy is as good as the original.
    assert module.state_dict().keys() == other.state_dict().keys()
    twin = fused_ce.CrossEntropyLoss(torch.zeros(7), **options).to(device)
    twin.load_state_dict(other.state_dict())
    other.load_state_dict(module.state_dict())
    x, t = make_logits((5, 7)), make_labels((5, 7))
    expected = cross_entropy(x.to(device), t.to(device), module.weight, **options)
    for loss_module in (module, twin, copy.deepcopy(module)):
        assert torch.equal(loss_module(x.to(device), t.to(device)), expected)
    torch.testing.assert_close(expected.cpu(), other(x, t))


def test_module_passes_every_option_on(device: str) -> None:
    options = {
        "ignore_index": 1,
        "label_smoothing": 0.1,
        "on_empty": "zero",
        "softcap": 5.0,
        "logit_scale": 0.5,
        "z_loss": 0.1,
        "stats": ("lse", "correct"),
        "inplace_backward": True,
    }
    module = fused_ce.CrossEntropyLoss(**options)
    for name, value in options.items():
        assert getattr(module, name) == value
    x = make_logits((5, 7)).to(device).requires_grad_()
    t = torch.tensor([1, 0, 2, 3, 1]).to(device)
    extras = {"sample_weight": torch.rand(5).to(device), "normalizer": 3.0}
    logits = x + 0
    loss, stats = module(logits, t, **extras)
    assert logits._version > 0
    right, right_stats = cross_entropy(x + 0, t, **options, **extras)
    assert torch.equal(loss, right)
    assert torch.equal(stats.lse, right_stats.lse)
    assert torch.equal(stats.correct, right_stats.correct)
    assert stats.prediction is None
    assert module(x + 0, t * 0 + 1)[0].item() == 0


# ---- the gradient that overwrites the logits -----------------------------------------------------


@each_reduction
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_inplace_backward(dtype: torch.dtype, reduction: str, device: str) -> None:
    for shape in ((7, 37), (67, 2), (3, 5, 7), (3, 1025), (2, 8205)):
        for t in (ignoring(make_labels(shape)), make_probabilities(shape, dtype)):
            x = make_logits(shape, dtype)
            right = run(cross_entropy, x, t, device=device, reduction=reduction, upstream=0.5)
            leaf = x.to(device).requires_grad_()
            logits = leaf * 1
            version = logits._version
            loss = cross_entropy(logits, t.to(device), reduction=reduction, inplace_backward=True)
            assert logits._version > version
            assert torch.equal(loss.detach().cpu(), right.loss)
            loss.backward(torch.full(loss.shape, 0.5, dtype=loss.dtype).to(device))
            assert torch.equal(leaf.grad.cpu(), right.gradient)
            assert torch.equal(logits.detach().cpu(), right.gradient)  # the memory holds it


# Classes that begin with a line of memory and that do not, rows of a vector's width at most, rows
# that end anywhere in a line or with one, of few classes and of many.
@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 2**21),
        (1, 3, 2**21 + 3),
        (2**20 + 5, 4),
        (2**18 + 1, 21),
        (43_001, 100),
        (27_963, 150),
        (4_201, 999),
        (4_100, 1_024),
    ],
    ids=str,
)
def test_large_gradient(shape: tuple[int, ...], device: str) -> None:
    """One that no cache holds is written past them."""
    for t in (make_labels(shape), ignoring(make_labels(shape))):
        leaf = make_logits(shape).to(device).requires_grad_()
        other = leaf.detach().clone().requires_grad_()
        cross_entropy(leaf, t.to(device)).backward()
        cross_entropy(other * 1, t.to(device), inplace_backward=True).backward()
        assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced"])
def test_inplace_backward_of_strided_logits(layout: str, device: str) -> None:
    x, t = LAYOUTS[layout](make_logits((3, 5, 7, 11))), make_labels((3, 5, 7, 11))
    right = run(cross_entropy, x, t, device=device)
    leaf = on(x, device).requires_grad_()
    logits = leaf.clone(memory_format=torch.preserve_format)
    cross_entropy(logits, t.to(device), inplace_backward=True).backward()
    torch.testing.assert_close(leaf.grad.cpu(), right.gradient)


def test_inplace_backward_of_a_shifted_view(device: str) -> None:
    """As language models shift their logits by one token."""
    x, tokens = make_logits((2, 9, 11)), torch.randint(11, (2, 9))
    gradients = []
    for inplace_backward in (False, True):
        leaf = x.to(device, copy=True).requires_grad_()
        logits = (leaf * 1)[:, :-1].flatten(0, 1)
        target = tokens.to(device)[:, 1:].flatten()
        cross_entropy(logits, target, inplace_backward=inplace_backward).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


# On the CPU, where the profiler sees each allocation; the Python that allocates is the same.
@pytest.mark.skipif(not is_native("cpu"), reason="plain PyTorch makes copies")
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=dtype_id)
@pytest.mark.parametrize(
    ("options", "buffers"),
    [
        ({}, 1),  # the gradient
        ({"reduction": "sum", "label_smoothing": 0.1}, 1),
        ({"stats": ALL_STATS}, 1),
        ({"inplace_backward": True}, 0),
    ],
    ids=str,
)
def test_memory(dtype: torch.dtype, options: dict[str, Any], buffers: int) -> None:
    """One buffer of the logits' size, or none: no float copy of half logits, no one-hot, no saved
    log-probabilities."""
    leaf = torch.randn(50, 200).to(dtype).requires_grad_()
    logits, t = leaf * 1, torch.randint(200, (50,), dtype=torch.int16)
    size, few = logits.numel() * logits.element_size(), 50 * 32  # statistics of the rows
    losses = []

    def forward() -> None:
        result = cross_entropy(logits, t, **options)
        losses.append(result[0] if "stats" in options else result)

    total = allocated(forward)
    # d loss / d logits goes on through `leaf * 1`, which allocates a buffer of its own.
    total += allocated(lambda: losses[0].backward()) - size
    assert total <= buffers * size + few
    with torch.no_grad():
        assert allocated(forward) <= few


# On the CPU, where the profiler sees each allocation.
@pytest.mark.skipif(not is_native("cpu"), reason="plain PyTorch makes copies")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_memory_of_strided_logits(layout: str, dtype: torch.dtype) -> None:
    """No copy with the classes side by side: the gradient's buffer, or none without a gradient."""
    shape = (5, 31, 7, 11)
    rows = 5 * 7 * 11
    leaf = LAYOUTS[layout](make_logits(shape, dtype)).requires_grad_()
    size = leaf.numel() * leaf.element_size()
    probabilities = LAYOUTS[layout](make_probabilities(shape, dtype))
    for t in (make_labels(shape, torch.int16), probabilities):
        for reduction in REDUCTIONS:
            few = rows * (8 + 8 * (reduction == "none"))  # sums of rows, and their losses
            loss = partial(cross_entropy, leaf, t, reduction=reduction)
            assert size <= allocated_with_gradient(loss, leaf) <= size + few
            with torch.no_grad():
                assert allocated(loss) <= few


# ---- backward ------------------------------------------------------------------------------------


@each_reduction
def test_gradients_add_up(reduction: str, device: str) -> None:
    x, t = make_logits((7, 5)), make_labels((7, 5))
    right = run(cross_entropy, x, t, device=device, reduction=reduction).gradient
    leaf = x.to(device).requires_grad_()
    for _ in range(2):
        loss = cross_entropy(leaf, t.to(device), reduction=reduction)
        loss.backward(torch.ones(loss.shape).to(device))
    torch.testing.assert_close(leaf.grad.cpu(), 2 * right)


def test_saved_tensor_hooks(device: str) -> None:
    x, t = make_logits((7, 5)), make_labels((7, 5))
    right = run(cross_entropy, x, t, device=device)
    packed = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.cpu()

    leaf = x.to(device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.to(device)):
        loss = cross_entropy(leaf, t.to(device))
    loss.backward()
    assert {p.data_ptr() for p in packed} >= {leaf.data_ptr()}
    torch.testing.assert_close(leaf.grad.cpu(), right.gradient)


def test_no_graph_without_need(device: str) -> None:
    x, t = make_logits((4, 5)).to(device), make_labels((4, 5)).to(device)
    assert cross_entropy(x, t).grad_fn is None
    with torch.no_grad():
        assert cross_entropy(x.requires_grad_(), t).grad_fn is None
    with torch.inference_mode():
        assert cross_entropy(x, t).is_inference()


# ---- deliberate deviations from torch ------------------------------------------------------------


def test_nan_in_an_ignored_row(device: str) -> None:
    x, t = torch.tensor([[math.nan, 0.0], [0.0, 0.0]]), torch.tensor([IGNORED, 1])
    assert run(F.cross_entropy, x, t).gradient[0].isnan().all()
    ours = run(cross_entropy, x, t, device=device)
    assert ours.loss.item() == pytest.approx(math.log(2))
    assert ours.gradient.tolist() == [[0, 0], [0.5, -0.5]]


def test_extras_accept_what_torch_rejects(device: str) -> None:
    x, t, weight = make_logits((4, 5)), make_labels((4, 5)), torch.rand(5, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"(Long or Byte, but got|Long but found) Int"):
        F.cross_entropy(x, t.int())
    with pytest.raises(RuntimeError, match="not differentiable"):
        F.cross_entropy(x, t, weight)
    moved = weight.detach().to(device).requires_grad_()
    loss = cross_entropy(x.to(device), t.int().to(device), moved, reduction="sum")
    loss.backward()
    right = torch.zeros(5).index_add(0, t, F.cross_entropy(x, t, reduction="none"))
    torch.testing.assert_close(moved.grad.cpu(), right)


def test_half_types_are_computed_in_float32(device: str) -> None:
    """Torch rounds log-probabilities to the half type before it multiplies and adds them."""
    x, t = make_logits((64, 33), BF16), make_probabilities((64, 33), BF16)
    right = run(exact_cross_entropy, x.double(), t.double())
    theirs = run(F.cross_entropy, x, t)
    ours = run(cross_entropy, x, t, device=device)
    assert ulps(ours.loss, right.loss) <= 0.51
    scale = right.gradient.abs().max().item()
    assert ulps(ours.gradient, right.gradient, scale) <= 0.51
    assert ulps(theirs.gradient, right.gradient, scale) > 0.51


# ---- the plain PyTorch fallback ------------------------------------------------------------------


@each_reduction
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_reference_backend(extras: dict[str, Any], reduction: str, device: str) -> None:
    """What runs on devices without kernels, and under transforms, is the same function."""
    shape = (6, 7)
    options = {"reduction": reduction} | extras
    rows = options.get("sample_weight")
    if rows is not None and rows.dim() == 2:
        options["sample_weight"] = rows[:, 0]
    for dtype in (F64, F32, BF16):
        x = make_logits(shape, dtype)
        for t in (ignoring(make_labels(shape)), make_probabilities(shape, dtype)):
            ours = run(cross_entropy, x, t, device=device, **options)
            with fused_ce.backend("reference"):
                theirs = run(cross_entropy, x, t, device=device, **options)
            for a, b in zip(ours, theirs, strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b)
