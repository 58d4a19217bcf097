"""The Triton ops against formulas in float64, and their compilation for GPUs that need not be here.

Without a GPU the kernels run in Triton's interpreter, which has to be chosen before they are
defined: one test runs this file in a process of its own that does so.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from cases import (
    FLOATS,
    INTEGERS,
    LAYOUTS,
    dtype_id,
    exact_focal_loss,
    exact_logits_loss,
    exact_probability_loss,
    on,
    ulps,
)
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from fused_ce.arguments import defaults_of  # noqa: E402
from fused_ce.triton import bce as ops  # noqa: E402
from fused_ce.triton import common  # noqa: E402
from fused_ce.triton import softmax_ce as ops_ce  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

launches = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="needs a GPU or TRITON_INTERPRET=1; test_interpreted runs it so",
)

LOGITS, PROBABILITY, FOCAL = FORMS = (0, 1, 2)
NONE, MEAN, SUM = REDUCTIONS = (0, 1, 2)

SHAPES = [
    (),  # no dimension to walk along
    (1,),  # all dimensions drop out
    (7,),  # less than the 8 elements of a thread
    (1024,),  # one block exactly
    (1025,),  # a second block with a single element
    (3, 341),  # one short of a block, and odd
    (5, 16, 13),  # ends amid a block, but at a multiple of 16: wide accesses and a mask
]

# Units in the last place of the result. The float32 formulas are right to 2.5, focal loss loses
# some in the power; the interpreter cuts bfloat16 off instead of rounding it.
ULPS = {torch.float64: 16.0, torch.float32: 8.0, torch.float16: 1.0, torch.bfloat16: 1.0}


class Extras(NamedTuple):
    """What the ops take between dtype and gradient."""

    label_smoothing: float = 0.0
    ignore_index: int | None = None
    alpha: float = 0.25
    gamma: float = 2.0
    denominator: float | None = None
    zero_on_empty: bool = False


class Call(NamedTuple):
    """The tensors of a call, and which op it is."""

    input: Tensor
    target: Tensor
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    sample_weight: Tensor | None = None
    normalizer: Tensor | None = None
    form: int = LOGITS
    reduction: int = MEAN
    dtype: torch.dtype | None = None
    extras: Extras = Extras()

    def arguments(self) -> list[Any]:
        tensors = [None if t is None else on(t, DEVICE) for t in self[:6]]
        return [*tensors, self.form, self.reduction, self.dtype or self.input.dtype, *self.extras]


def make_input(form: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64) * 4
    return (torch.sigmoid(x).clamp(0.01, 0.99) if form == PROBABILITY else x).to(dtype)


def make_target(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Hard labels, and among floats soft ones too."""
    hard = torch.randint(2, shape, dtype=torch.float64)
    if dtype.is_floating_point:
        hard = torch.where(torch.rand(shape) < 0.5, hard, torch.rand(shape, dtype=torch.float64))
    return hard.to(dtype)


def exact(call: Call, upstream: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64; a gradient of what is ignored is 0."""
    extras = call.extras
    x = call.input.detach().double().clone().requires_grad_()
    raw = call.target.double()
    kept = torch.ones_like(raw, dtype=torch.bool)
    if extras.ignore_index is not None:
        kept = raw != extras.ignore_index
    t = raw * (1 - extras.label_smoothing) + extras.label_smoothing / 2
    p = torch.where(kept, x, 0.5)
    if call.form == LOGITS:
        pos_weight = 1 if call.pos_weight is None else call.pos_weight.double()
        loss = exact_logits_loss(p, t, pos_weight=pos_weight)
    elif call.form == PROBABILITY:
        loss = exact_probability_loss(p, t)
    else:
        loss = exact_focal_loss(p, t, extras.alpha, extras.gamma)
    for weight in (call.weight, call.sample_weight):
        if weight is not None:
            loss = loss * weight.double()
    loss = torch.where(kept, loss, 0.0)
    if call.reduction != NONE:
        divisor = torch.tensor(1.0, dtype=torch.float64)
        if call.reduction == MEAN:
            divisor = kept.sum().double()
            if extras.denominator is not None:
                divisor = divisor * 0 + extras.denominator
            if call.normalizer is not None:
                divisor = call.normalizer.double()
        loss = loss.sum()
        loss = loss / divisor
    (gradient,) = torch.autograd.grad(loss, x, torch.as_tensor(upstream).double().expand_as(loss))
    return loss.detach(), torch.where(kept, gradient, 0.0)


def check(call: Call, upstream: Tensor | None = None, limit: float | None = None) -> None:
    """The loss, the gradient written beside it and the one of the backward op."""
    arguments = call.arguments()
    x = arguments[0]
    loss, gradient = exact(call)
    dtype = call.dtype or call.input.dtype
    limit = limit or ULPS[dtype]
    # Terms of either sign cancel near the minimum of a soft label's loss: those of the size of the
    # largest gradient count.
    largest = gradient.abs().nan_to_num(0, 0, 0).max().item() if gradient.numel() else 0.0
    gradient_limit = limit if call.input.dtype == dtype else ULPS[call.input.dtype]

    out = ops.bce(*arguments)
    assert out is not None
    assert out.dtype == dtype
    assert ulps(out.cpu(), loss) <= limit
    if call.reduction == NONE:
        assert out.stride() == torch.empty_like(x).stride()
    else:
        written = torch.full_like(x, math.nan)
        again = ops.bce_with_gradient(written, *arguments)
        assert again is not None
        assert ulps(again.cpu(), loss) <= limit
        assert ulps(written.cpu(), gradient, scale=largest) <= gradient_limit

    if upstream is None:
        upstream = torch.rand(loss.shape).to(dtype) + 0.5
    _, gradient = exact(call, upstream)
    largest = gradient.abs().nan_to_num(0, 0, 0).max().item() if gradient.numel() else 0.0
    written = torch.full_like(x, math.nan)
    ops.bce_backward(written, False, on(upstream, DEVICE), *arguments)
    assert ulps(written.cpu(), gradient, scale=largest) <= gradient_limit


@launches
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_shapes(form: int, reduction: int, shape: tuple[int, ...]) -> None:
    check(Call(make_input(form, shape), make_target(shape), form=form, reduction=reduction))


@launches
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("target_dtype", [*FLOATS, *INTEGERS], ids=dtype_id)
def test_dtypes(target_dtype: torch.dtype, dtype: torch.dtype, form: int) -> None:
    shape = (3, 29)
    x, t = make_input(form, shape, dtype), make_target(shape, target_dtype)
    # float64 labels come with a float64 loss: 1 - t needs their digits
    loss_dtype = torch.float64 if target_dtype == torch.float64 else dtype
    check(Call(x, t, form=form, dtype=loss_dtype))
    check(Call(x, t, form=form, reduction=NONE, dtype=loss_dtype))


@launches
@pytest.mark.parametrize("loss_dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_loss_dtypes(dtype: torch.dtype, loss_dtype: torch.dtype) -> None:
    shape = (37,)
    x, t = make_input(LOGITS, shape, dtype), make_target(shape, loss_dtype)
    for reduction in REDUCTIONS:
        check(Call(x, t, reduction=reduction, dtype=loss_dtype))


@launches
@pytest.mark.parametrize("weight_dtype", [*FLOATS, torch.bool, torch.int64], ids=dtype_id)
def test_weight_dtypes(weight_dtype: torch.dtype) -> None:
    shape = (3, 5)
    weight, pos_weight = torch.randint(4, shape).to(weight_dtype), torch.ones(5).to(weight_dtype)
    check(Call(make_input(LOGITS, shape), make_target(shape), weight, pos_weight))


IMAGE = (2, 3, 4, 5)
BROADCASTS = [
    (),  # a scalar
    (1, 1, 1, 1),  # the same, with dimensions
    (5,),  # the last dimension
    (3, 1, 1),  # a class weight: the middle of a contiguous image, the last of channels_last
    (2, 1, 1, 1),  # a sample weight
    (2, 1, 4, 1),  # every other dimension: nothing merges
    (2, 3, 4, 5),  # the logits' own
]


@launches
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_broadcasting(shape: tuple[int, ...], layout: str) -> None:
    x = LAYOUTS[layout](make_input(LOGITS, IMAGE))
    weight, pos_weight = torch.rand(shape) + 0.5, torch.rand(3, 1, 1) * 3
    t = make_target(IMAGE)
    check(Call(x, LAYOUTS[layout](t), weight, pos_weight))
    check(Call(x, t, pos_weight, weight, reduction=NONE))
    check(Call(x, t, weight, sample_weight=pos_weight))


@launches
def test_every_operand_a_scalar() -> None:
    x, t = torch.tensor(0.3).expand(3, 50), torch.tensor(1.0).expand(3, 50)
    for reduction in REDUCTIONS:
        check(Call(x, t, torch.tensor(2.0), reduction=reduction))


@launches
@pytest.mark.parametrize("upstream", ["expanded", "transposed", "half"])
def test_upstream_of_none(upstream: str) -> None:
    shape = (6, 9)
    grad_output = {
        "expanded": torch.tensor(3.0).expand(shape),  # what sum() sends
        "transposed": torch.rand(9, 6).t(),
        "half": torch.rand(shape).half(),
    }[upstream]
    check(Call(make_input(LOGITS, shape), make_target(shape), reduction=NONE), grad_output)


@launches
@pytest.mark.parametrize("reduction", [NONE, MEAN])
@pytest.mark.parametrize(
    "extras",
    [
        Extras(label_smoothing=0.1),
        Extras(denominator=7.0),
        Extras(denominator=-2.5, label_smoothing=1.0),
        Extras(alpha=0.999, label_smoothing=0.999),  # 1 - 0.999 is off by 1e-5 in float32
        Extras(alpha=-1.0, gamma=0.0),
        Extras(alpha=0.1, gamma=1.0),  # 0.1 rounds in float32
        Extras(gamma=3.0, label_smoothing=0.3),
        Extras(gamma=9.0),  # whole, but too large to multiply out
        Extras(gamma=0.5),  # its slope is infinite at u = 0
        Extras(gamma=2.7, alpha=1.0),
    ],
    ids=str,
)
def test_extras(extras: Extras, reduction: int) -> None:
    shape = (3, 50)
    for form in FORMS:
        for dtype in (torch.float32, torch.float64):
            x, t = make_input(form, shape, dtype), make_target(shape, dtype)
            call = Call(x, t, form=form, reduction=reduction, extras=extras)
            # exp(gamma * log u) multiplies the rounding of log u
            check(call, limit=ULPS[dtype] * max(1.0, 4 * extras.gamma))


@launches
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("target_dtype", "ignore_index"),
    [
        (torch.float32, -100),
        (torch.float32, 1),  # a label, and the one number for which Triton compiles a constant
        (torch.float16, -1),
        (torch.float64, -100),
        (torch.uint8, 255),
        (torch.int8, 127),
        (torch.int64, -(2**40)),
        (torch.bool, 1),
    ],
    ids=str,
)
def test_ignore_index(target_dtype: torch.dtype, ignore_index: int, form: int) -> None:
    shape = (2, 600)  # two blocks
    x, t = make_input(form, shape), make_target(shape, target_dtype)
    if target_dtype != torch.bool:
        t[torch.rand(shape) < 0.4] = ignore_index
    ignored = t.double() == ignore_index
    assert ignored.any()
    x[ignored] = math.nan
    dtype = torch.float64 if target_dtype == torch.float64 else torch.float32
    extras = Extras(ignore_index=ignore_index)
    check(Call(x, t, form=form, dtype=dtype, extras=extras))
    check(Call(x, t, form=form, reduction=NONE, dtype=dtype, extras=extras))
    extras = extras._replace(denominator=11.0, label_smoothing=0.2)
    check(Call(x, t, form=form, dtype=dtype, extras=extras))


@launches
@pytest.mark.parametrize(
    ("label", "target_dtype", "ignore_index"),
    [
        (2**24, torch.float32, 2**24 + 1),  # which is no float32
        (2048, torch.float16, 2049),  # which is no float16
        (156, torch.uint8, -100),  # its bits in uint8
        (0, torch.int32, 2**32),  # 0 in 32 bits
    ],
)
def test_ignore_index_is_never_rounded(
    label: int, target_dtype: torch.dtype, ignore_index: int
) -> None:
    t = torch.tensor([label, 1]).to(target_dtype)
    call = Call(torch.tensor([0.5, -2.0]), t, extras=Extras(ignore_index=ignore_index))
    check(call)
    check(call._replace(reduction=NONE))


@launches
@pytest.mark.parametrize("zero_on_empty", [False, True])
@pytest.mark.parametrize("why", ["no element", "all ignored", "denominator", "normalizer"])
def test_nothing_to_divide_by(why: str, zero_on_empty: bool) -> None:
    shape = (0, 3) if why == "no element" else (4, 3)
    ignored = torch.arange(4)[:, None].expand(4, 3) % 2 == 0
    target = torch.full(shape, -1.0) if why != "denominator" else torch.where(ignored, -1.0, 1.0)
    call = Call(
        torch.ones(shape),
        torch.where(ignored, -1.0, 1.0) if why in ("denominator", "normalizer") else target,
        normalizer=torch.tensor(0) if why == "normalizer" else None,
        extras=Extras(
            ignore_index=-1,
            zero_on_empty=zero_on_empty,
            denominator=0.0 if why == "denominator" else None,
        ),
    )
    gradient = torch.full(shape, 5.0, device=DEVICE)
    for written in (None, gradient):
        loss = ops.bce_with_gradient(written, *call.arguments())
        assert loss is not None
        some = why in ("denominator", "normalizer")
        expected = 0.0 if zero_on_empty else math.inf if some else math.nan
        torch.testing.assert_close(loss.cpu(), torch.tensor(expected), equal_nan=True)
    kept = torch.zeros(shape, dtype=torch.bool) if not some else ~ignored
    if zero_on_empty:
        kept = torch.zeros_like(kept)
    assert (gradient.cpu()[~kept] == 0).all()
    assert not gradient.cpu()[kept].isfinite().any()
    assert ops.bce(*call._replace(reduction=SUM).arguments()) is not None


@launches
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_normalizer(dtype: torch.dtype) -> None:
    shape = (40,)
    call = Call(
        make_input(LOGITS, shape),
        make_target(shape),
        normalizer=torch.tensor(3).to(dtype),
        extras=Extras(ignore_index=0, denominator=5.0),  # neither of them counts beside it
    )
    check(call)


@launches
def test_empty() -> None:
    for reduction, expected in ((MEAN, math.nan), (SUM, 0.0)):
        call = Call(torch.zeros(3, 0), torch.zeros(3, 0), reduction=reduction)
        gradient = torch.zeros(3, 0, device=DEVICE)
        loss = ops.bce_with_gradient(gradient, *call.arguments())
        assert loss is not None
        torch.testing.assert_close(loss.cpu(), torch.tensor(expected), equal_nan=True)
        ops.bce_backward(gradient, False, torch.ones((), device=DEVICE), *call.arguments())
    loss = ops.bce(*call._replace(reduction=NONE).arguments())
    assert loss is not None
    assert loss.shape == (3, 0)
    ops.scale_(gradient, torch.ones((), device=DEVICE))


@launches
@pytest.mark.parametrize("form", [LOGITS, FOCAL])
def test_tails(form: int) -> None:
    # as far as float32 has normal losses; the subnormal ones follow in test_infinite
    x = torch.cat([torch.linspace(-86, 86, 1001), torch.logspace(-30, 0, 50)])
    if form == FOCAL:
        x = x[x.abs() < 29]  # the loss is about exp(-3 x)
    for target in (0.0, 1.0):
        t = torch.full_like(x, target)
        call = Call(x, t, form=form, reduction=NONE)
        loss, gradient = exact(call, 1.0)
        out = ops.bce(*call.arguments())
        assert out is not None
        limit = 2.5 if form == LOGITS else 9.0
        assert ulps(out.cpu(), loss) <= limit
        written = torch.empty_like(x, device=DEVICE)
        ops.bce_backward(written, False, torch.ones_like(x, device=DEVICE), *call.arguments())
        assert ulps(written.cpu(), gradient) <= limit


@launches
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("gamma", [-1.0, 0.0, 0.5, 2.0])  # -1: logits
def test_infinite(dtype: torch.dtype, gamma: float) -> None:
    inf, nan = math.inf, math.nan
    # logit, target, loss, gradient of cross entropy; the right side of an infinite logit is free
    table = [
        (inf, 1, 0, 0),
        (-inf, 0, 0, 0),
        (inf, 0, inf, 1),
        (-inf, 1, inf, -1),
        (inf, 0.5, inf, 0.5),
        (nan, 1, nan, nan),
        (nan, 0, nan, nan),
        (1000, 1, 0, 0),
        (-1000, 0, 0, 0),
        (1000, 0, 1000, 1),
        (-1000, 1, 1000, -1),
        (100, 1, math.exp(-100), -math.exp(-100)),  # subnormal in float32
    ]
    x, t, loss, gradient = (torch.tensor(c, dtype=torch.float64) for c in zip(*table, strict=True))
    x, t = x.to(dtype), t.to(dtype)
    form = LOGITS if gamma < 0 else FOCAL
    extras = Extras(alpha=-1.0, gamma=gamma)
    out = ops.bce(*Call(x, t, form=form, reduction=NONE, extras=extras).arguments())
    written = torch.full_like(x, 5.0, device=DEVICE)
    arguments = Call(x, t, form=form, reduction=SUM, extras=extras).arguments()
    ops.bce_backward(written, False, torch.ones((), dtype=dtype, device=DEVICE), *arguments)
    assert out is not None
    if form == FOCAL:  # what the power leaves as it is
        same = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 10])
        out, written, loss, gradient = (v.cpu()[same] for v in (out, written, loss, gradient))
    info = torch.finfo(dtype)
    # the interpreter has no subnormal bfloat16
    flushed = INTERPRETED and dtype == torch.bfloat16
    close = {"rtol": info.eps, "atol": info.tiny * (1 if flushed else 2**-20), "equal_nan": True}
    torch.testing.assert_close(out.cpu(), loss.to(dtype), **close)
    torch.testing.assert_close(written.cpu(), gradient.to(dtype), **close)


@launches
def test_focal_outside_of_the_unit_interval() -> None:
    # 1 - p_t is negative on one side: whole powers of it exist, others do not
    x = torch.tensor([-4.0, -3.0, 3.0, 4.0], dtype=torch.float64)
    t = torch.tensor([-0.5, 1.5, -0.5, 1.5], dtype=torch.float64)
    u = torch.sigmoid(-x) * t + torch.sigmoid(x) * (1 - t)
    assert (u < 0).sum() == 2
    for gamma in (3.0, 4.0, 9.0, 10.0):
        check(Call(x, t, form=FOCAL, reduction=NONE, extras=Extras(gamma=gamma)), limit=200.0)
    arguments = Call(x, t, form=FOCAL, reduction=NONE, extras=Extras(gamma=2.5)).arguments()
    out = ops.bce(*arguments)
    assert out is not None
    assert torch.equal(out.cpu().isnan(), u < 0)


@launches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_probabilities_at_and_beyond_the_ends(dtype: torch.dtype) -> None:
    nan = math.nan
    close = 1 - torch.finfo(dtype).eps / 2  # the number below 1
    steepest = 1 / torch.tensor(1e-12).double().item()  # torch's: of float32, in float64 too
    # probability, target, loss, gradient
    table = [
        (0, 1, 100, -steepest),  # both logs stop at -100, p (1 - p) at 1e-12
        (1, 0, 100, steepest),
        (0, 0, 0, 0),
        (1, 1, 0, 0),
        (1e-42, 1, 42 * math.log(10), -steepest),  # subnormal in float32
        (1e-30, 0, 1e-30, 1e-30 * steepest),
        (close, 1, 1 - close, None),
        (-1e-3, 0, nan, nan),
        (1.001, 1, nan, nan),
        (nan, 0, nan, nan),
        (0.5, 1.001, nan, nan),
        (0.5, -1e-3, nan, nan),
        (0.5, nan, nan, nan),
    ]
    p, t, loss = (torch.tensor(c, dtype=torch.float64) for c in list(zip(*table, strict=True))[:3])
    p, t = p.to(dtype), t.to(dtype)
    call = Call(p, t, form=PROBABILITY, reduction=NONE)
    out = ops.bce(*call.arguments())
    assert out is not None
    rtol = 4 * torch.finfo(dtype).eps
    if dtype == torch.float32:
        loss[4] = -math.log(p[4].double())  # few bits are left of 1e-42
    torch.testing.assert_close(out.cpu(), loss.to(dtype), rtol=rtol, atol=0, equal_nan=True)
    written = torch.empty_like(p, device=DEVICE)
    ops.bce_backward(written, False, torch.ones((), dtype=dtype, device=DEVICE), *call.arguments())
    for got, (*_, expected) in zip(written.cpu(), table, strict=True):
        if expected is not None:
            torch.testing.assert_close(
                got, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=0, equal_nan=True
            )


@launches
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_gradient_over_the_input(layout: str, dtype: torch.dtype) -> None:
    x, t = LAYOUTS[layout](make_input(LOGITS, IMAGE, dtype)), make_target(IMAGE, dtype)
    arguments = Call(x, t, extras=Extras(ignore_index=0)).arguments()
    apart = torch.empty_like(arguments[0])
    loss = ops.bce_with_gradient(apart, *arguments)
    assert loss is not None
    over = ops.bce_with_gradient(arguments[0], *arguments)
    assert over is not None
    assert torch.equal(over, loss)
    assert torch.equal(arguments[0], apart)


@launches
@pytest.mark.parametrize("factor", [1.0, -0.5, math.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_scale(dtype: torch.dtype, factor: float) -> None:
    for layout in ("contiguous", "channels_last", "sliced"):
        gradient = on(LAYOUTS[layout](torch.randn(IMAGE).to(dtype)), DEVICE)
        expected = gradient.double() * factor
        ops.scale_(gradient, torch.tensor(factor, device=DEVICE))
        assert torch.equal(gradient.double(), expected)


@launches
def test_scale_in_double() -> None:
    gradient = torch.ones(3, dtype=torch.float64, device=DEVICE)
    factor = torch.tensor(1 + 2.0**-40, dtype=torch.float64, device=DEVICE)
    ops.scale_(gradient, factor)
    assert torch.equal(gradient, factor.expand(3))


@launches
@pytest.mark.parametrize("numel", [5 * 1024, 5 * 1024 - 1], ids=["whole", "odd"])
def test_many_blocks_per_program(monkeypatch: pytest.MonkeyPatch, numel: int) -> None:
    # Otherwise that takes four million elements.
    monkeypatch.setattr(ops, "PROGRAMS", 4)
    monkeypatch.setattr(ops, "COUNTERS", 2)
    x, t = make_input(LOGITS, (numel,)), make_target((numel,))
    for extras in (Extras(), Extras(ignore_index=1)):
        for reduction in REDUCTIONS:
            check(Call(x, t, reduction=reduction, extras=extras))
    gradient = torch.randn(numel, device=DEVICE)
    doubled = gradient * 2
    ops.scale_(gradient, torch.tensor(2.0, device=DEVICE))
    assert torch.equal(gradient, doubled)


@launches
def test_sums_are_in_double_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # Partial sums of 2^24, and a last one of 8 or so: float32 would lose half of it.
    monkeypatch.setattr(ops, "BLOCK", 16)
    x = torch.full((40 * 16,), 2.0**20)
    x[-16:] = 0.5
    call = Call(x, torch.zeros_like(x), reduction=SUM)
    out = ops.bce(*call.arguments())
    assert out is not None
    assert ulps(out.cpu(), exact(call)[0]) <= 0.5


@launches
def test_same_bits_again() -> None:
    shape = (5000,)
    arguments = Call(make_input(LOGITS, shape), make_target(shape)).arguments()
    first, second = ops.bce(*arguments), ops.bce(*arguments)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


@launches
def test_64_bit_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    collapse = common.collapse
    monkeypatch.setattr(common, "collapse", lambda *a: (*collapse(*a)[:2], tl.uint64))
    x, t = make_input(LOGITS, IMAGE), make_target(IMAGE)
    check(Call(x, t, pos_weight=torch.rand(3, 1, 1), extras=Extras(ignore_index=0)))
    gradient = torch.ones(7, device=DEVICE)
    ops.scale_(gradient, torch.tensor(2.0, device=DEVICE))
    assert (gradient == 2).all()


# -- softmax cross entropy -------------------------------------------------------------------------


class CeCall(NamedTuple):
    """A call of the softmax cross entropy ops."""

    input: Tensor
    target: Tensor
    weight: Tensor | None = None
    sample_weight: Tensor | None = None
    normalizer: Tensor | None = None
    reduction: int = MEAN
    dtype: torch.dtype | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    z_loss: float = 0.0
    denominator: float | None = None
    zero_on_empty: bool = False

    def tensors(self) -> list[Tensor | None]:
        return [None if t is None else on(t, DEVICE) for t in self[:5]]

    def options(self) -> list[Any]:
        return [self.reduction, self.dtype or self.input.dtype, *self[7:]]

    def arguments(self, outputs: int) -> list[Any]:
        return [*self.tensors(), outputs, *self.options()]


LSE, ENTROPY, PREDICTION, CORRECT = 1, 2, 4, 8


def ce_exact(call: CeCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float64 leaf, loss, lse and entropy, all differentiable."""
    leaf = call.input.detach().double().clone().requires_grad_()
    dim = 1 if leaf.dim() > 1 else 0
    x, t = leaf.movedim(dim, -1), call.target
    classes = x.size(-1)
    kept = torch.ones(x.shape[:-1], dtype=torch.bool)
    if t.is_floating_point():
        t = t.double().movedim(dim, -1)
    else:
        kept = t != call.ignore_index
        t = torch.nn.functional.one_hot(torch.where(kept, t.long(), 0), classes).double()
    logits = x * call.logit_scale
    if call.softcap:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    log_p = torch.log_softmax(logits, -1)
    lse = torch.logsumexp(logits, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    w = torch.ones(classes).double() if call.weight is None else call.weight.double()
    e = call.label_smoothing
    count = (t * w).sum(-1).where(kept, 0.0).sum()
    if call.target.is_floating_point():
        count = kept.sum()
    log_p = torch.where(kept.unsqueeze(-1), log_p, 0.0)
    loss = -((t * (1 - e) + e / classes) * w * log_p).sum(-1)
    loss = loss + call.z_loss * torch.where(kept, lse, 0.0) ** 2
    if call.sample_weight is not None:
        loss = loss * call.sample_weight.double()
    loss = torch.where(kept, loss, 0.0)
    if call.reduction == NONE:
        return leaf, loss, lse, entropy
    loss = loss.sum()
    if call.reduction == MEAN:
        given = count if call.denominator is None else torch.tensor(call.denominator)
        loss = loss / (given if call.normalizer is None else call.normalizer).double()
    return leaf, loss, lse, entropy


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Within a few units in the last place of the largest: terms of either sign cancel."""
    # exp loses as many units as its argument is large (below 2^5 here), and so does the loss.
    units = {torch.float64: 64, torch.float32: 24}.get(dtype, 1.5)
    largest = expected.abs().nan_to_num(0, 0, 0).max().item() if expected.numel() else 0.0
    limit = units * torch.finfo(dtype).eps * max(largest, scale)
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.cpu().double(), expected.detach(), rtol=0, atol=limit, equal_nan=True
    )


def ce_check(call: CeCall) -> None:
    """Loss, statistics, the gradient written beside them, and those of the backward op."""
    tensors, options = call.tensors(), call.options()
    x, dtype = call.tensors()[0], options[1]
    assert x is not None
    real = torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32
    leaf, loss, lse, entropy = ce_exact(call)
    dim = 1 if leaf.dim() > 1 else 0
    written = torch.full_like(x, math.nan)
    (exact,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    for bits in (0, 15):
        if call.reduction == NONE:
            found = ops_ce.softmax_ce(*tensors, bits, *options)
        else:
            found = ops_ce.softmax_ce_with_gradient(written, *tensors, bits, *options)
        close(found[0], loss, dtype)
        if call.reduction != NONE:
            close(written, exact, x.dtype, scale=0.0)
            written.fill_(math.nan)
        for bit, output in zip((LSE, ENTROPY, PREDICTION, CORRECT), found[1:], strict=True):
            assert output.shape == (loss.new_empty(lse.shape).shape if bits & bit else (0,))
    close(found[1], lse, real)
    close(found[2], entropy, real)
    best = leaf.argmax(dim)
    labels = call.target
    soft = labels.is_floating_point()
    right = best == labels.argmax(dim) if soft else (best == labels) & (labels != call.ignore_index)
    assert torch.equal(found[3].cpu(), best)
    assert torch.equal(found[4].cpu(), right)

    upstream = torch.rand(loss.shape, dtype=torch.float64) + 0.5
    on_lse, on_entropy = torch.rand(lse.shape).double(), torch.rand(lse.shape).double()
    for grads in ((upstream, None, None), (None, on_lse, None), (upstream, on_lse, on_entropy)):
        outputs = [o for o, g in zip((loss, lse, entropy), grads, strict=True) if g is not None]
        given = [g for g in grads if g is not None]
        (exact,) = torch.autograd.grad(outputs, leaf, given, retain_graph=True)
        moved = [None if g is None else g.to(DEVICE) for g in grads]
        ops_ce.softmax_ce_backward(written, False, *moved, None, None, *tensors, *options)
        close(written, exact, x.dtype, scale=0.0)


def ce_call(shape: tuple[int, ...], kind: torch.dtype = torch.float32, **options: Any) -> CeCall:
    dim = 1 if len(shape) > 1 else 0
    labels = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :])
    # a grid of 1/8, exact in every dtype, so that float64 sees the same logits
    x = (torch.randn(shape) * 24).round() / 8
    return CeCall(x.to(kind), labels, **options)


CE_SHAPES = [
    (1,),  # a row of one class, whose loss is 0
    (7,),  # one row
    (5, 1),
    (130, 2),  # binary; more rows than a tile of 128 at 16 classes has
    (3, 10),  # fewer rows than a tile
    (3, 16),  # the classes fill the block
    (9, 1000),  # a multiple of 8, so that float32 loads are wide, and no block exactly
    (2, 4096),  # the largest row that is read once in float32
    (2, 4097),  # one more: a second pass, and no alignment at all
    (3, 8192 + 5),  # a block that needs no mask between the two that do
    (2, 5, 3),
    (2, 3, 4, 5),
    (2, 40, 33),  # more classes than a tile across has
]


@launches
@pytest.mark.parametrize("shape", CE_SHAPES, ids=str)
def test_ce_shapes(shape: tuple[int, ...]) -> None:
    ce_check(ce_call(shape))
    ce_check(ce_call(shape, reduction=NONE))


@launches
def test_ce_sum() -> None:
    ce_check(ce_call((5, 10), reduction=SUM, weight=torch.rand(10)))


CE_OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "all smoothing": {"label_smoothing": 1.0},
    "softcap": {"softcap": 5.0},
    "far softcap": {"softcap": 1e20},
    "softcap, scale": {"softcap": 3.0, "logit_scale": 0.25, "label_smoothing": 0.2},
    "scale": {"logit_scale": 0.5},
    "z": {"z_loss": 0.01},
    "denominator": {"denominator": 7.0, "z_loss": 0.1},
    "normalizer": {"normalizer": torch.tensor(3)},
}


@launches
@pytest.mark.parametrize("kind", ["labels", "ignored", "weight", "probabilities"])
@pytest.mark.parametrize("options", CE_OPTIONS, ids=str)
def test_ce_options(options: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_ce, "ROW_BYTES", 64)  # 16 float32: both passes, in few blocks
    monkeypatch.setattr(ops_ce, "WARP", 16)
    for shape, reduction in (((3, 9), NONE), ((2, 53), MEAN), ((1, 21, 2), MEAN)):
        call = ce_call(shape, reduction=reduction, **CE_OPTIONS[options])
        call = call._replace(sample_weight=torch.rand(call.target.shape))
        if kind == "ignored":
            call.target.view(-1)[0] = -100
        elif kind != "labels":
            call = call._replace(weight=torch.rand(shape[1]) + 0.5)
        if kind == "probabilities":
            call = call._replace(target=torch.softmax(torch.randn(shape), 1))
        ce_check(call)


@launches
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_ce_dtypes(dtype: torch.dtype) -> None:
    for loss_dtype in {dtype, torch.float32, torch.float64}:
        ce_check(ce_call((5, 37), dtype, dtype=loss_dtype))
    for label_dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        call = ce_call((5, 37), dtype, dtype=torch.float32)
        ce_check(call._replace(target=call.target.to(label_dtype)))
    soft = torch.softmax(torch.randn(5, 37), 1)
    for other in FLOATS:
        call = ce_call((5, 37), dtype, dtype=torch.float32, weight=torch.rand(37).to(other))
        ce_check(call._replace(target=soft.to(other)))


@launches
@pytest.mark.parametrize("layout", [*LAYOUTS, "classes last"])
def test_ce_layouts(layout: str) -> None:
    call = ce_call((4, 6, 3, 5))
    x = call.input
    if layout == "classes last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    else:
        x = LAYOUTS[layout](x)
    ce_check(call._replace(input=x, target=call.target.mT.contiguous().mT))
    ce_check(call._replace(input=x, target=torch.tensor(2).expand(4, 3, 5)))


@launches
@pytest.mark.parametrize("classes", [37, 4099])  # one block, and two
def test_ce_over_the_input(classes: int) -> None:
    arguments = ce_call((5, classes), label_smoothing=0.1).arguments(0)
    apart = torch.empty_like(arguments[0])
    loss = ops_ce.softmax_ce_with_gradient(apart, *arguments)[0]
    assert torch.equal(ops_ce.softmax_ce_with_gradient(arguments[0], *arguments)[0], loss)
    assert torch.equal(arguments[0], apart)


@launches
@pytest.mark.parametrize("classes", [3, 37])
def test_ce_special_rows(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_ce, "ROW_BYTES", 64)
    monkeypatch.setattr(ops_ce, "WARP", 16)
    inf, nan = math.inf, math.nan
    x = torch.zeros(11, classes)
    labels = torch.zeros(11, dtype=torch.int64)
    x[0, 1] = -inf  # not the target: finite
    x[1, 0] = -inf  # the target
    x[2] = -inf
    x[3, 2] = nan
    x[4], labels[4] = nan, -100  # ignored
    labels[5] = classes  # out of range
    labels[6] = -1
    x[7] = -200.0
    x[8, : classes - 1] = torch.finfo(torch.float32).min  # what masks leave, first blocks of it
    labels[8] = classes - 1
    x[9, 1] = inf
    x[10, 0], x[10, 2] = inf, nan
    expected = [math.log(classes - 1), inf, nan, nan, 0.0, nan, nan, math.log(classes), 0.0]
    call = CeCall(x, labels, reduction=NONE)
    loss, lse, entropy, prediction, correct = ops_ce.softmax_ce(*call.arguments(15))
    torch.testing.assert_close(loss.cpu(), torch.tensor([*expected, nan, nan]), equal_nan=True)
    torch.testing.assert_close(lse.cpu(), torch.logsumexp(x, 1), equal_nan=True)
    assert entropy[0].item() == pytest.approx(math.log(classes - 1), rel=1e-6)
    assert entropy[8].item() == 0
    best = x.argmax(1)
    assert torch.equal(prediction.cpu(), best)
    assert torch.equal(correct.cpu(), best == labels)
    gradient = torch.full_like(x, 5.0, device=DEVICE)
    ops_ce.softmax_ce_with_gradient(gradient, *call._replace(reduction=SUM).arguments(15))
    g = gradient.cpu()
    assert g[0, 1] == 0
    assert g[2].isnan().all()
    assert g[3].isnan().all()
    assert (g[4] == 0).all()
    assert g[5:7].isnan().all()
    torch.testing.assert_close(g[7, 1:], torch.full((classes - 1,), 1 / classes))
    assert (g[8] == 0).all()
    assert g[9:].isnan().all()
    smoothed = call._replace(label_smoothing=0.1)
    assert ops_ce.softmax_ce(*smoothed.arguments(0))[0][0].item() == inf


@launches
@pytest.mark.parametrize("shape", [(4, 5), (4, 53), (2, 5, 2)], ids=str)
@pytest.mark.parametrize("outputs", [0, LSE])  # for which the row is read
def test_ce_nan_in_an_ignored_row(
    outputs: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops_ce, "ROW_BYTES", 64)  # 53 classes: many blocks, and unaligned
    call = ce_call(shape)
    clean = torch.full_like(call.input, math.nan, device=DEVICE)
    call.target.view(-1)[1] = -100
    loss = ops_ce.softmax_ce_with_gradient(clean, *call.arguments(outputs))[0]
    row = (1,) if len(shape) == 2 else (0, slice(None), 1)
    call.input[row] = math.nan
    gradient = torch.full_like(clean, math.nan)
    assert torch.equal(ops_ce.softmax_ce_with_gradient(gradient, *call.arguments(outputs))[0], loss)
    assert (gradient[row] == 0).all()
    assert torch.equal(gradient, clean)


@launches
@pytest.mark.parametrize("zero_on_empty", [False, True])
@pytest.mark.parametrize("why", ["no row", "all ignored", "normalizer", "weight"])
def test_ce_nothing_to_divide_by(why: str, zero_on_empty: bool) -> None:
    rows = 0 if why == "no row" else 3
    call = ce_call((rows, 5), zero_on_empty=zero_on_empty)
    if why == "all ignored":
        call.target.fill_(-100)
        call.input.fill_(math.nan)
    elif why == "normalizer":
        call = call._replace(normalizer=torch.tensor(0))
    elif why == "weight":
        call = call._replace(weight=torch.zeros(5))
    gradient = torch.full_like(call.input, 5.0, device=DEVICE)
    loss = ops_ce.softmax_ce_with_gradient(gradient, *call.arguments(0))[0].item()
    if zero_on_empty:
        assert loss == 0
        assert (gradient == 0).all()
    else:
        assert loss == math.inf if why == "normalizer" else math.isnan(loss)
        assert (gradient == 0).all() if why == "all ignored" else not gradient.isfinite().any()
    assert ops_ce.softmax_ce(*call._replace(reduction=SUM).arguments(0))[0].isfinite().all() or (
        why == "all ignored"
    )


@launches
@pytest.mark.parametrize("reduction", [NONE, SUM])
def test_ce_no_classes(reduction: int) -> None:
    """Each loss is a sum of no terms: 0, as torch's."""
    call = CeCall(torch.empty(3, 0), torch.empty(3, 0), reduction=reduction)
    assert (ops_ce.softmax_ce(*call.arguments(0))[0] == 0).all()


@launches
def test_ce_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # several tiles a program, blocks of labels and of partial sums
    for name, value in {"WARPS": 4, "WARP": 16, "LABELS": 8, "COUNTERS": 4, "FINISH": 2}.items():
        monkeypatch.setattr(ops_ce, name, value)
    for reduction in REDUCTIONS:
        call = ce_call((31, 10), reduction=reduction, weight=torch.rand(10) + 0.1)
        call.target[::3] = -100
        ce_check(call)


@launches
def test_ce_wide_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    collapse, layout = common.collapse, ops_ce._layout
    monkeypatch.setattr(common, "collapse", lambda *a: (*collapse(*a)[:2], tl.uint64))

    def wide(*arguments: Any) -> Any:
        found, warps = layout(*arguments)
        return {**found, "CLASS": tl.int64}, warps

    monkeypatch.setattr(ops_ce, "_layout", wide)
    monkeypatch.setattr(ops_ce, "ROW_BYTES", 64)
    for shape in ((4, 3), (2, 37), (2, 5, 3)):
        ce_check(ce_call(shape))


@launches
def test_ce_same_bits_again() -> None:
    arguments = ce_call((300, 10)).arguments(0)
    first, second = (ops_ce.softmax_ce(*arguments)[0] for _ in range(2))
    assert torch.equal(first, second)


# -- layouts and compilation -----------------------------------------------------------------------

DENSE = (60, 20, 5, 1)
CHANNELS_LAST = (60, 1, 15, 3)
ZERO = common.NO_STRIDE


@pytest.mark.parametrize(
    ("shape", "strides", "sizes", "simple"),
    [
        ((2, 3, 4, 5), [DENSE, DENSE], (), ((1,), (1,))),
        ((2, 3, 4, 5), [CHANNELS_LAST, CHANNELS_LAST], (), ((1,), (1,))),
        ((2, 3, 4, 5), [DENSE, (0, 0, 0, 0)], (), ((1,), ())),
        ((2, 3, 4, 5), [DENSE, (0, 0, 0, 1)], (5,), ((1, 5), (1, ZERO))),
        ((2, 3, 4, 5), [DENSE, (0, 1, 0, 0)], (20, 3), ((1, 20, 60), (ZERO, 1, ZERO))),
        ((2, 3, 4, 5), [CHANNELS_LAST, (0, 1, 0, 0)], (3,), ((1, 3), (1, ZERO))),
        ((2, 3, 4, 5), [CHANNELS_LAST, DENSE], (3, 20), ((1, 3, 60), (20, 1, 60))),
        ((4, 6), [(14, 2)], (6,), ((2, 14),)),
        ((), [(), ()], (), ((1,), (1,))),
        ((1, 1), [(7, 7)], (), ((1,),)),
    ],
)
def test_dimensions_merge(
    shape: tuple[int, ...],
    strides: list[tuple[int, ...]],
    sizes: tuple[int, ...],
    simple: tuple[common.Strides, ...],
) -> None:
    assert common.collapse(shape, tuple(strides)) == (sizes, simple, tl.uint32)


def test_index_type() -> None:
    # by number of elements, and by how far the last one lies
    assert common.collapse((2**31 - 1,), ((1,),))[2] == tl.uint32
    assert common.collapse((2**31,), ((1,),))[2] == tl.uint64
    assert common.collapse((3, 2), ((2**30, 1), (2, 1)))[2] == tl.uint64
    assert common.collapse((2**16, 2**16), ((0, 0), (1, 0)))[2] == tl.uint64


def compile_for(chip: int | str, kernel: Any, warps: int = 4, **parameters: Any) -> None:
    """For a compute capability, or a chip of AMD's. A str is the type of an argument or of an
    element of a tuple, everything else is constant."""
    names = kernel.arg_names
    assert set(parameters) == set(names)
    constants: dict[tuple[int, ...], Any] = {}

    def type_of(value: Any, *path: int) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of(v, *path, i) for i, v in enumerate(value))
        if isinstance(value, str):
            return value
        constants[path] = value
        return "constexpr"

    signature = {n: type_of(parameters[n], i) for i, n in enumerate(names)}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    amd = isinstance(chip, str)
    target = GPUTarget("hip", chip, 64) if amd else GPUTarget("cuda", chip, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    assert compiled.asm["hsaco" if amd else "cubin"]


compiles = pytest.mark.skipif(INTERPRETED, reason="kernels of the interpreter cannot be compiled")

# An operand with elements of its own, and those with one row or one element for all
WHOLE, *SHARED = (
    ("*fp32", strides) for strides in common.collapse((8, 16), ((16, 1), (0, 1), (0, 0)))[1]
)

BCE_INDEXING = {"ALIGNED": True, "INDEX": tl.uint32, "BLOCK": ops.BLOCK}
BCE_MEAN = {"counts": None, "counters": "i32", "normalizer": None, "denominator": "fp64"}


def bce_parameters(dtype: str) -> dict[str, Any]:
    """Of the kernel of contiguous elements, with no option."""
    flat = (f"*{dtype}", ("i32",))
    return {
        "input": flat,
        "target": flat,
        **dict.fromkeys(
            (
                "weight",
                "pos_weight",
                "sample_weight",
                "upstream",
                "gradient",
                "unless_one",
                "loss",
                "sums",
            )
        ),
        **BCE_MEAN,
        **dict.fromkeys(("numel", "iterations"), "i32"),
        "sizes": (),
        "ignore_index": None,
        **dict.fromkeys(("smooth_scale", "smooth_shift", "alpha", "beta"), "fp64"),
        **dict.fromkeys(("gamma", "parity"), "fp64"),
        "FORM": LOGITS,
        "SMOOTH": False,
        "POWER": 2,
        "ZERO_ON_EMPTY": False,
        "COUNTERS": ops.COUNTERS,
        "COMPUTE": tl.float64 if dtype == "fp64" else tl.float32,
        **BCE_INDEXING,
    }


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_compiles(dtype: str, capability: int) -> None:
    """Every kernel, form and branch, for GPUs that need not be here."""
    compute = tl.float64 if dtype == "fp64" else tl.float32
    flat, wide = (f"*{dtype}", ("i32",)), (f"*{dtype}", ("i32", "i64"))
    partial = "*fp64" if dtype == "fp64" else "*fp32"

    def compile_(kernel: Any, **parameters: Any) -> None:
        compile_for(capability, kernel, **parameters)

    elements = bce_parameters(dtype)
    for form in FORMS:
        compile_(ops._elements, **{**elements, "FORM": form, "gradient": flat, "sums": partial})
    everything = {
        "weight": wide,
        "pos_weight": wide,
        "upstream": ("*bf16", ()),
        "input": wide,
        "target": ("*u8", ("i32", "i64")),
        "gradient": wide,
        "unless_one": "*bf16",
        "counts": "*i32",
        "numel": "i64",
        "sizes": ("i32",),
        "ignore_index": "i32",
        "SMOOTH": True,
        "POWER": -1,
        "ZERO_ON_EMPTY": True,
        "ALIGNED": False,
        "INDEX": tl.uint64,
    }
    for form in FORMS:
        compile_(ops._elements, **{**elements, **everything, "FORM": form})
    counted = {"loss": flat, "sums": partial, "counts": "*i32", "ignore_index": "i64"}
    compile_(ops._elements, **{**elements, **counted})
    compile_(
        ops._count,
        target=flat,
        counts="*i32",
        unless_one="*fp32",
        numel="i32",
        iterations="i32",
        sizes=(),
        ignore_index="i32",
        **BCE_INDEXING,
    )
    for divisor in ({}, {"counts": "*i32"}, {"normalizer": "*i64"}):
        compile_(
            ops._finish,
            result=f"*{dtype}",
            sums=partial,
            programs="i32",
            ZERO_ON_EMPTY=True,
            PROGRAMS=ops.PROGRAMS,
            **{**BCE_MEAN, **divisor},
        )
    compile_(
        ops._scale,
        gradient=flat,
        scale="*fp32",
        numel="i32",
        iterations="i32",
        sizes=(),
        COMPUTE=compute,
        **BCE_INDEXING,
    )


@compiles
@pytest.mark.parametrize(
    "option",
    [
        {},
        {"gradient": WHOLE},
        *(
            {name: one, "gradient": WHOLE}
            for name in ("input", "target", "weight", "pos_weight", "sample_weight", "upstream")
            for one in SHARED
        ),
        {"loss": WHOLE},
        {"sums": "*fp32"},
        {"counts": "*i32"},
        {"counts": "*i32", "gradient": WHOLE},
        {"normalizer": "*i64", "gradient": WHOLE},
        {"ignore_index": "i32"},
        {"ignore_index": "i32", "gradient": WHOLE},
    ],
    ids=str,
)
def test_compiles_with_one_option(option: dict[str, Any]) -> None:
    base = {**bce_parameters("fp32"), "input": WHOLE, "target": WHOLE, "sizes": ("i32",)}
    for form in FORMS:
        compile_for(90, ops._elements, **{**base, **option, "FORM": form})


def ce_parameters(dtype: str) -> dict[str, Any]:
    """Of the kernel of contiguous rows, with no option; how rows are cut is left open."""
    operands = "input target gradient unless_one sample_weight grad_loss grad_lse grad_entropy loss"
    results = "lse entropy prediction correct weight normalizer"
    return {
        **dict.fromkeys([*operands.split(), *results.split()]),
        **dict.fromkeys(["sums", "result", "counts"]),
        **dict.fromkeys(["counters", "rows", "tiles", "classes", "ignore_index"], "i32"),
        **dict.fromkeys(["denominator", "factor", "flat", "softcap", "inner_scale"], "fp64"),
        **dict.fromkeys(["logit_scale", "z_loss"], "fp64"),
        **dict.fromkeys(["SMOOTH", "CAPPED", "SCALED", "SQUARED", "PROBABILITIES"], False),
        **dict.fromkeys(["ZERO_ON_EMPTY", "ACROSS"], False),
        "input": (f"*{dtype}", ("i32",)),
        "target": ("*i64", ("i32",)),
        "steps": ("i32",) * 4,
        "ticket": "*i32",
        "sizes": (),
        "OF_LOSS": True,
        "COUNTERS": ops_ce.COUNTERS,
        "FINISH": ops_ce.FINISH,
        "COMPUTE": tl.float64 if dtype == "fp64" else tl.float32,
        "INDEX": tl.uint32,
        "CLASS": tl.int32,
        "EDGES": 0,
    }


@compiles
@pytest.mark.parametrize(
    ("dtype", "chip"),
    [("fp64", 90), ("fp32", 90), ("bf16", 90), ("bf16", 80), ("fp32", "gfx942")],
)
def test_ce_compiles(dtype: str, chip: int | str) -> None:
    if isinstance(chip, str) and "amd" not in triton.backends.backends:
        pytest.skip("this Triton does not compile for AMD")
    real = "*fp64" if dtype == "fp64" else "*fp32"
    labels, row = ("*i64", ("i32",)), (real, ("i32",))
    base = {
        **ce_parameters(dtype),
        "gradient": (f"*{dtype}", ("i32",)),
        "sums": real,
        "result": f"*{dtype}",
        "counts": "*fp64",
    }
    long = ops_ce.ROW_BYTES // {"fp64": 8, "fp32": 4, "bf16": 2}[dtype]
    # Several rows, of one block or many, with classes and with rows as neighbours; one row, of one
    # block or many, aligned or not; and the warps of each
    layouts = [
        (4, {"UNIT": 1, "SINGLE": True, "ROWS": 256, "BLOCK": 16}),
        (1, {"UNIT": 2, "SINGLE": True, "ROWS": 8, "BLOCK": 128}),
        (4, {"UNIT": 1, "SINGLE": False, "ROWS": 512, "BLOCK": 8, "ACROSS": True}),
        (1, {"UNIT": 16, "SINGLE": True, "ROWS": 1, "BLOCK": 1024}),
        (8, {"UNIT": 16, "SINGLE": False, "ROWS": 1, "BLOCK": long}),
        (8, {"UNIT": 16, "SINGLE": False, "ROWS": 1, "BLOCK": long, "EDGES": 2048}),
    ]
    stats = {"lse": row, "entropy": row, "prediction": labels, "correct": ("*u8", ("i32",))}
    options = dict.fromkeys(["SMOOTH", "CAPPED", "SQUARED", "ZERO_ON_EMPTY"], True)
    backward = {
        **dict.fromkeys(["sample_weight", "grad_loss", "grad_lse", "grad_entropy"], row),
        **dict.fromkeys(["sums", "result"]),
    }
    wide = {"INDEX": tl.uint64, "CLASS": tl.int64, "rows": "i64", "sizes": ("i32",)}
    many = {"input": (f"*{dtype}", ("i32", "i64")), "target": (real, ("i32", "i64"))}
    for warps, layout in layouts:
        for chosen in (
            {},
            {**stats, **options, "weight": "*bf16"},
            {**backward, **options, "normalizer": "*i64", "counts": None, "unless_one": "*fp32"},
            {**wide, **many, **stats, "PROBABILITIES": True, "SCALED": True, "gradient": None},
        ):
            compile_for(chip, ops_ce._rows, warps, **{**base, **layout, **chosen})
    compile_for(
        chip,
        ops_ce._prepare,
        weight=real,
        **dict.fromkeys(["weight_step", "rows", "iterations", "classes", "ignore_index"], "i32"),
        target=labels,
        counts="*fp64",
        ticket="*i32",
        sizes=(),
        INDEX=tl.uint64,
        BLOCK=ops_ce.LABELS,
    )


@compiles
@pytest.mark.parametrize(
    "option",
    [
        {},
        *({"input": one} for one in SHARED),
        *(
            {"target": (dtype, strides), "PROBABILITIES": dtype != "*i64"}
            for dtype in ("*i64", "*fp32")
            for _, strides in SHARED
        ),
        *(
            {name: one, "gradient": WHOLE}
            for name in ("sample_weight", "grad_loss", "grad_lse", "grad_entropy")
            for one in SHARED
        ),
        {"gradient": WHOLE},
        {"gradient": WHOLE, "grad_lse": WHOLE, "OF_LOSS": False},
        {"gradient": WHOLE, "grad_entropy": WHOLE, "OF_LOSS": False},
        {"gradient": WHOLE, "weight": "*bf16"},
        {"gradient": WHOLE, "counts": "*fp64"},
        {"gradient": WHOLE, "normalizer": "*i64"},
        *(
            {"gradient": WHOLE, name: True}
            for name in ("SMOOTH", "CAPPED", "SCALED", "SQUARED", "ZERO_ON_EMPTY")
        ),
        *({name: WHOLE} for name in ("loss", "lse", "entropy")),
        {"prediction": ("*i64", WHOLE[1])},
        {"correct": ("*u8", WHOLE[1])},
        {"sums": "*fp32", "result": "*fp32"},
    ],
    ids=str,
)
def test_ce_compiles_with_one_option(option: dict[str, Any]) -> None:
    base = {**ce_parameters("fp32"), "input": WHOLE, "sizes": ("i32",)}
    base["target"] = ("*i64", WHOLE[1])
    for warps, layout in (
        (1, {"UNIT": 2, "SINGLE": True, "ROWS": 8, "BLOCK": 128}),
        (4, {"UNIT": 16, "SINGLE": False, "ROWS": 1, "BLOCK": 4096, "EDGES": 1024}),
    ):
        compile_for(90, ops_ce._rows, warps, **{**base, **layout, **option})


def test_defaults() -> None:
    """A call that leaves options out must mean the same to the kernels and to the ops."""
    assert ops._run.__defaults__ == defaults_of(torch.ops.fused_ce._bce.default)
    assert ops_ce._run.__defaults__ == defaults_of(torch.ops.fused_ce._softmax_ce.default)


@launches
def test_ce_results_that_are_not_wanted() -> None:
    """They are empty, of the dtypes that compiled code expects."""
    x, t = torch.randn(3, 5), torch.tensor([0, 4, 2])
    arguments = (x, t, None, None, None, 0, 1, torch.float32)
    results = ops_ce.OPS["_softmax_ce"](*arguments)
    native = torch.ops.fused_ce._softmax_ce.default(*arguments)
    assert [(r.dtype, r.shape) for r in results] == [(r.dtype, r.shape) for r in native]


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the tests above have run already")
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
