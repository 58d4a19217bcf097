"""The three forms of binary cross entropy against PyTorch and float64: numbers, dtypes, shapes,
strides, extras, and the life of the gradient."""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ALPHA,
    FLOATS,
    FOCAL,
    FORMS,
    GAMMA,
    INTEGERS,
    LAYOUTS,
    LEGACY_REDUCTIONS,
    LOGITS,
    PROBABILITY,
    REDUCTIONS,
    Form,
    Result,
    allocated,
    allocated_with_gradient,
    can_force_native,
    double,
    dtype_id,
    exact,
    exact_focal_loss,
    far_memory,
    form_id,
    make_input,
    make_target,
    on,
    positional,
    require_memory,
    run,
    skip_where_slow,
    torchvision_focal_loss,
    ulps,
    zeros,
)
from torch import Tensor, nn

import fused_ce
from fused_ce.arguments import defaults_of

bce_with_logits = LOGITS.ours
bce = PROBABILITY.ours
focal = FOCAL.ours
F64, F32, F16, BF16 = FLOATS

# What a result may be off by, in units of its last place, where torch happens to be closer. Half
# types are rounded once, from float32: half a unit. A float32 gradient is rounded a few times: in
# e^-x, in 1 / (1 + e^-x), and by the factor of the mean. For float64 it is the oracle that is off:
# mpmath agrees with us to 1.3 units where autograd of the formula is 10 away.
FLOOR = {F64: 32.0, F32: 3.0, F16: 0.6, BF16: 0.6}

each_form = pytest.mark.parametrize("form", FORMS, ids=form_id)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def is_bool(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


def check_against_torch(
    form: Form, x: Tensor, t: Tensor, device: str, upstream: Any = 1.0, **options: Any
) -> Result:
    """Same dtypes and shapes as torch, and errors at most torch's own, or FLOOR."""
    options = {"reduction": "mean"} | options
    ours = run(form.ours, x, t, device=device, upstream=upstream, **options)
    # Torch has no integer targets.
    float_target = t if t.is_floating_point() else t.to(x.dtype)
    theirs = run(
        form.theirs,
        x,
        float_target,
        upstream=upstream,
        # nor weights of bool
        **{k: v.float() if is_bool(v) else v for k, v in options.items()},
    )
    upstream = torch.as_tensor(upstream).to(ours.loss.dtype).double()
    right = run(
        lambda x, t, **k: exact(form, x, t, **k),
        x.double(),
        t.double(),
        upstream=upstream,
        **{k: double(v) for k, v in options.items()},
    )
    # Terms of both signs cancel in soft labels; hard ones must be right in every element.
    hard = not t.is_floating_point()
    for name in ("loss", "gradient"):
        a, b, c = (getattr(result, name) for result in (ours, theirs, right))
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        scale = 0.0 if hard or a.numel() == 0 else c.abs().max().item()
        if name == "loss" and scale and options["reduction"] != "none":
            # Where terms of both signs cancel, the unit is that of the largest one.
            terms = run(
                lambda x, t, **k: exact(form, x, t, **k),
                x.double(),
                t.double(),
                **{k: double(v) for k, v in options.items()} | {"reduction": "none"},
            ).loss
            scale = max(scale, scale * (terms.abs().max() / terms.sum().abs()).item())
        error, allowed = ulps(a, c, scale), max(ulps(b, c, scale), FLOOR[a.dtype])
        assert error <= allowed, f"{name}: {error:.2f} ulp, torch {ulps(b, c, scale):.2f}"
    return ours


# ---- numbers -------------------------------------------------------------------------------------


# BCELoss wants float targets of the input's dtype (test_bad_input.py).
DTYPES = [
    (form, dtype, target_dtype)
    for form in FORMS
    for dtype in FLOATS
    for target_dtype in FLOATS + INTEGERS
    if form is not PROBABILITY or target_dtype == dtype or target_dtype in INTEGERS
]


def case_id(value: Any) -> str | None:
    if isinstance(value, Form):
        return form_id(value)
    return dtype_id(value) if isinstance(value, torch.dtype) else None


@each_reduction
@pytest.mark.parametrize(("form", "dtype", "target_dtype"), DTYPES, ids=case_id)
def test_dtypes(
    form: Form, dtype: torch.dtype, target_dtype: torch.dtype, reduction: str, device: str
) -> None:
    shape = (7, 37)  # 259 elements: whole vectors of 16, 8 or 4 lanes, and a tail of 3
    x, t = make_input(form, shape, dtype), make_target(shape, target_dtype)
    upstream = torch.randn(shape).to(torch.float16) if reduction == "none" else 0.5
    check_against_torch(form, x, t, device, upstream, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(
    "n",
    [
        1,
        3,  # less than any vector
        15,
        16,
        17,  # around a vector of AVX-512
        1023,
        1024,
        1025,  # around a block of the CPU's loops
        16384 + 1,  # past one chunk, the unit of the CPU's threads
        3 * 16384 + 5,  # several chunks, which two threads share
    ],
)
@each_form
def test_sizes(form: Form, n: int, dtype: torch.dtype, device: str) -> None:
    x, t = make_input(form, (n,), dtype), make_target((n,), dtype)
    for reduction in REDUCTIONS:
        check_against_torch(form, x, t, device, reduction=reduction)


@pytest.mark.parametrize("target_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, target_layout: str, device: str) -> None:
    shape = (3, 5, 7, 11)  # primes: no dimension hides behind another
    x, t = LAYOUTS[layout](make_input(LOGITS, shape)), LAYOUTS[target_layout](make_target(shape))
    weight = LAYOUTS[target_layout](torch.rand(shape))
    upstream = LAYOUTS[layout](torch.randn(shape))
    for reduction in REDUCTIONS:
        seed = upstream if reduction == "none" else 1.0
        result = check_against_torch(LOGITS, x, t, device, seed, reduction=reduction, weight=weight)
        if reduction == "none":
            assert result.loss.stride() == torch.empty_like(x).stride()
    # The order of the elements in memory changes no element.
    dense = run(bce_with_logits, x.contiguous(), t.contiguous(), device=device, reduction="none")
    assert torch.equal(dense.loss, run(bce_with_logits, x, t, device=device, reduction="none").loss)


@each_form
def test_strides_of_half_types(form: Form, device: str) -> None:
    shape = (2, 3, 5, 7)
    x, t = make_input(form, shape, torch.bfloat16), make_target(shape, torch.bfloat16)
    for layout in LAYOUTS.values():
        check_against_torch(form, layout(x), t, device)


WEIGHT_SHAPES = [
    (2, 3, 5, 4),  # one each
    (4,),  # the last dimension
    (3, 1, 1),  # channels of NCHW
    (2, 1, 1, 1),  # rows
    (1, 3, 1, 4),  # two dimensions apart
    (1,),
    (),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", WEIGHT_SHAPES, ids=str)
@pytest.mark.parametrize(
    ("form", "name"),
    [(LOGITS, "weight"), (LOGITS, "pos_weight"), (PROBABILITY, "weight")],
    ids=case_id,
)
def test_weight_shapes(
    form: Form, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x, t = make_input(form, (2, 3, 5, 4), dtype), make_target((2, 3, 5, 4), dtype)
    weight = torch.rand(shape).mul(3).to(dtype)
    for reduction in REDUCTIONS:
        check_against_torch(form, x, t, device, reduction=reduction, **{name: weight})


@pytest.mark.parametrize("weight_dtype", FLOATS + INTEGERS, ids=dtype_id)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_weights_never_promote(dtype: torch.dtype, weight_dtype: torch.dtype, device: str) -> None:
    x, t = make_input(LOGITS, (5, 7), dtype), make_target((5, 7), torch.float32)
    weight, pos_weight = (
        (torch.rand(7) * 4).to(weight_dtype),
        (torch.rand(5, 1) * 4).to(weight_dtype),
    )
    result = run(bce_with_logits, x, t, device=device, weight=weight, pos_weight=pos_weight)
    assert result.loss.dtype == torch.float32
    assert result.gradient.dtype == dtype
    check_against_torch(LOGITS, x, t, device, weight=weight, pos_weight=pos_weight)


def test_negative_weights_and_targets_of_any_value(device: str) -> None:
    x, t = make_input(LOGITS, (259,)), torch.randn(259) * 3
    weight, pos_weight = torch.randn(259), torch.randn(259)
    for reduction in REDUCTIONS:
        check_against_torch(
            LOGITS, x, t, device, reduction=reduction, weight=weight, pos_weight=pos_weight
        )
        check_against_torch(FOCAL, x, t, device, reduction=reduction)  # gamma 2: (1 - p_t)^2 exists


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 5)], ids=str)
@each_form
def test_empty(form: Form, shape: tuple[int, ...], device: str) -> None:
    x, t = torch.zeros(shape), torch.zeros(shape)
    for reduction, value in (("mean", math.nan), ("sum", 0.0)):
        result = run(form.ours, x, t, device=device, reduction=reduction)
        assert result.loss.item() == pytest.approx(value, nan_ok=True)
        assert result.gradient.shape == shape
    assert run(form.ours, x, t, device=device, reduction="none").loss.shape == shape


@each_form
def test_zero_dimensional(form: Form, device: str) -> None:
    x, t = make_input(form, ()), make_target((), torch.float32)
    for reduction in REDUCTIONS:
        assert check_against_torch(form, x, t, device, reduction=reduction).loss.shape == ()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_more_elements_than_32_bits_count(reduction: str, device: str) -> None:
    skip_where_slow(bce_with_logits, (2**20,), 2**31, device)
    n = 2**31 + 7
    x, t = torch.zeros(1).expand(n), torch.ones(1, dtype=torch.bool).expand(n)
    loss = bce_with_logits(on(x, device), on(t, device), reduction=reduction).item()
    assert loss == pytest.approx(math.log(2) * (n if reduction == "sum" else 1), rel=1e-7)


def test_more_results_than_32_bits_count(device: str) -> None:
    """Losses of single elements and, in their memory, gradients."""
    skip_where_slow(bce_with_logits, (2**20,), 2**31, device)
    n = 2**31 + 7
    require_memory(2 * n if device == "cpu" else 5 * n, device)
    x, t = zeros(n, BF16, device), zeros(n, torch.bool, device)
    places = [12345, n - 2]
    x[places], t[places] = 3.0, True
    found = bce_with_logits(x, t, reduction="none")
    odd, others = math.log1p(math.exp(-3)), math.log(2)
    for name in ("loss", "gradient"):
        assert found[places].tolist() == pytest.approx([odd, odd], rel=2**-8), name
        found[places] = others
        assert [v.item() for v in found.aminmax()] == pytest.approx([others] * 2, rel=2**-8), name
        op = torch.ops.fused_ce._bce_with_gradient
        numbers = (FORMS.index(LOGITS), REDUCTIONS.index("sum"), F32, 0.0, None, ALPHA, GAMMA)
        total = op(found, x, t, None, None, None, None, *numbers)
        assert total.item() == pytest.approx(2 * odd + (n - 2) * math.log(2), rel=1e-7)
        odd, others = -1 / (1 + math.exp(3)), 0.5


@pytest.mark.parametrize("distance", [2**31 + 8, 2**32 + 24], ids=["2^31", "2^32"])
@each_form
def test_offsets_beyond_32_bits(form: Form, distance: int, device: str) -> None:
    """Two rows that far apart: memory that nobody touches costs nothing."""
    n = 37  # whole vectors of 16, 8 or 4 lanes, and a tail
    storage = far_memory(distance + 4 * n, device)
    values = [make_input(form, (2, n), BF16), make_target((2, n), BF16)]
    values += [torch.rand(2, n).to(BF16), torch.randn(2, n).to(BF16)]
    far = [storage.as_strided((2, n), (distance, 1), i * n) for i in range(4)]
    for operand, value in zip(far, values, strict=True):
        for row, numbers in zip(
            operand, value, strict=True
        ):  # a copy of both may be of the gap too
            row.copy_(numbers)
    x, t, sample_weight, upstream = far
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "sample_weight": values[2]}
        seed = values[3] if reduction == "none" else 1.0
        right = run(form.ours, *values[:2], device=device, upstream=seed, **options)
        leaf = x.detach().requires_grad_()
        loss = form.ours(leaf, t, reduction=reduction, sample_weight=sample_weight)
        seed = upstream if reduction == "none" else torch.ones_like(loss)
        (gradient,) = torch.autograd.grad(loss, leaf, seed)
        torch.testing.assert_close(loss.detach().cpu(), right.loss)
        torch.testing.assert_close(gradient.cpu(), right.gradient)
    # The gradient as far apart, in the place of the logits.
    numbers = (FORMS.index(form), REDUCTIONS.index("sum"), BF16, 0.0, None, ALPHA, GAMMA)
    op = torch.ops.fused_ce._bce_with_gradient
    op(x, x, t, None, None, sample_weight, None, *numbers)
    torch.testing.assert_close(torch.stack([row.cpu() for row in x]), right.gradient)


# Logits at which the two logarithms whose difference is the target's gradient are almost equal.
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_of_the_target(reduction: str, dtype: torch.dtype, device: str) -> None:
    x = torch.tensor([0.0, 1e-7, -1e-5, 1e-3, -0.3, 7, -60, math.inf, -math.inf]).to(dtype)
    t = torch.tensor([0.5, 0.0, 1.0, 0.3, 0.7, 1, 0, 1, 0]).to(dtype)
    for differentiable in (False, True):
        leaf = t.to(device, copy=True).requires_grad_()
        loss = bce_with_logits(x.to(device), leaf, reduction=reduction).sum()
        (found,) = torch.autograd.grad(loss, leaf, create_graph=differentiable)
        right = -x.double() / (x.numel() if reduction == "mean" else 1)
        right = torch.where(x.isinf(), -x.double(), right)
        infinite = x.isinf()
        assert torch.equal(found.detach().cpu()[infinite].double(), right[infinite])
        assert ulps(found.detach().cpu()[~infinite], right[~infinite]) <= 2


@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
def test_gradient_at_probabilities_of_0_and_1(dtype: torch.dtype, device: str) -> None:
    """Torch's least p (1 - p) is float32's 1e-12 in float64, too."""
    p = torch.tensor([0.0, 1.0, 1e-13, 1e-30, 0.5]).to(dtype)
    t = torch.tensor([1.0, 0.0, 1.0, 0.3, 0.2]).to(dtype)
    ours = run(bce, p, t, device=device, reduction="none")
    theirs = run(F.binary_cross_entropy, p, t, reduction="none")
    torch.testing.assert_close(ours.gradient, theirs.gradient)


@each_form
def test_upstream_gradient(form: Form, device: str) -> None:
    x, t = make_input(form, (31,)), make_target((31,))
    for reduction in REDUCTIONS:
        for upstream in (1.0, -3.0, 0.0, math.inf):
            if form is FOCAL and upstream == math.inf:
                continue  # torchvision's chain of products gives NaN
            ours = run(form.ours, x, t, device=device, reduction=reduction, upstream=upstream)
            theirs = run(form.theirs, x, t, reduction=reduction, upstream=upstream)
            torch.testing.assert_close(ours.gradient, theirs.gradient)
    # `.sum()` sends its gradient back as one element expanded.
    leaf, other = x.to(device, copy=True).requires_grad_(), x.requires_grad_()
    form.ours(leaf, t.to(device), reduction="none").sum().backward()
    form.theirs(other, t, reduction="none").sum().backward()
    torch.testing.assert_close(leaf.grad.cpu(), other.grad)


# Without options and with one: two kernels on CUDA.
@pytest.mark.parametrize("options", [{}, {"ignore_index": 0}], ids=["plain", "ignore_index"])
@each_form
def test_bfloat16_gradient_is_rounded_once(
    form: Form, options: dict[str, Any], device: str
) -> None:
    """Torch's under autocast is: the upstream gradient multiplies it in float32."""
    x, t = make_input(form, (259,), BF16), make_target((259,), BF16)  # vectors and a tail
    for reduction, upstream in itertools.product(("mean", "sum"), (1.0, -3.0, 1 / 3, 0.0)):
        options["reduction"] = reduction
        seed = torch.tensor(upstream, dtype=BF16)
        ours = run(form.ours, x, t, device=device, upstream=seed, **options)
        right = run(partial(exact, form), x.double(), t.double(), upstream=seed.double(), **options)
        largest = right.gradient.abs().max().item()
        assert ulps(ours.gradient, right.gradient, largest) <= 0.52  # a half, and 2e-5 of the value


def test_bfloat16_where_torch_loses_the_gradient(device: str) -> None:
    x = torch.tensor([8.0], dtype=torch.bfloat16)
    t = torch.ones(1, dtype=torch.bfloat16)
    right = -1 / (1 + math.exp(8))  # -3.35e-4
    assert run(F.binary_cross_entropy_with_logits, x, t).gradient.item() == 0
    ours = run(bce_with_logits, x, t, device=device).gradient
    assert ours.item() == pytest.approx(right, rel=2**-8)


def test_probabilities_clamp_logarithms_at_minus_100(device: str) -> None:
    # 2^-148 and 2^-149 are subnormal, where the logarithm is beyond -100
    p = torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0**-148, 2.0**-149, 1e-30, 1 - 2.0**-24])
    t = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    for dtype in FLOATS[:2]:
        ours = run(bce, p.to(dtype), t.to(dtype), device=device, reduction="none")
        theirs = run(F.binary_cross_entropy, p.to(dtype), t.to(dtype), reduction="none")
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(ours.gradient, theirs.gradient)


def test_extreme_logits_stay_finite(device: str) -> None:
    x = torch.tensor([-3e38, -1e4, -104.0, -88.0, 88.0, 104.0, 1e4, 3e38]).repeat(2)
    t = torch.tensor([0.0, 1.0]).repeat_interleave(8)
    ours = run(bce_with_logits, x, t, device=device, reduction="none")
    theirs = run(F.binary_cross_entropy_with_logits, x.double(), t.double(), reduction="none")
    torch.testing.assert_close(ours.loss, theirs.loss.float())
    torch.testing.assert_close(ours.gradient, theirs.gradient.float())


# The smallest is a vector's step, the largest many chunks.
@pytest.mark.parametrize("n", [32, 256, 2048, 100_000])
@pytest.mark.parametrize("x", [-0.3, -4.287016868591309, -9.415893554687500, -15.679332733154297])
def test_mean_of_equal_losses(x: float, n: int, device: str) -> None:
    """Whatever is lost in adding up equal numbers is lost to the same side each time."""
    logits = torch.full((n,), x, device=device)
    loss = fused_ce.BCEWithLogitsLoss()(logits, torch.zeros_like(logits))
    exact = math.log1p(math.exp(torch.tensor(x).item()))
    assert abs(loss.item() - exact) <= FLOOR[torch.float32] * 2**-23 * exact


def test_nan_goes_through(device: str) -> None:
    x, t = torch.tensor([math.nan, 0.0, 1.0]), torch.tensor([1.0, math.nan, 1.0])
    for form in (LOGITS, FOCAL):
        result = run(form.ours, x, t, device=device, reduction="none")
        assert result.loss.isnan().tolist() == [True, True, False]
        assert result.gradient.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_nan_of_every_kind_goes_through(dtype: torch.dtype, device: str) -> None:
    # Rounding to bfloat16 must not carry out of a NaN whose bits are all set. 700 elements are
    # whole groups of steps and a rest.
    normalizer = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    x, t = make_input(LOGITS, (700,)).to(dtype), torch.ones(700, dtype=dtype)
    for nan in normalizer.to(device):
        result = run(bce_with_logits, x, t, device=device, normalizer=nan)
        assert result.loss.isnan().item()
        assert result.gradient.isnan().all()


def test_same_bits_twice(device: str) -> None:
    x, t = make_input(LOGITS, (3 * 16384 + 5,)), make_target((3 * 16384 + 5,))
    first, *others = [run(bce_with_logits, x, t, device=device) for _ in range(3)]
    for other in others:
        assert torch.equal(first.loss, other.loss)
        assert torch.equal(first.gradient, other.gradient)


# Threads are the CPU's.
@each_form
def test_same_bits_on_any_number_of_threads(form: Form, restore_threads: None) -> None:
    n = 6 * 16384 + 5  # enough chunks for two threads
    x, t = make_input(form, (n,)), make_target((n,)).masked_fill(torch.rand(n) < 0.1, -1.0)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(form.ours, x, t, reduction="mean", ignore_index=-1))
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(results[0].gradient, results[1].gradient)


# ---- focal loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5])
@pytest.mark.parametrize("alpha", [-1, 0, 0.25, 1])
def test_focal_is_torchvisions(alpha: float, gamma: float, device: str) -> None:
    # float64, where torchvision's 1 - p_t has digits enough
    x, t = make_input(FOCAL, (259,), torch.float64), make_target((259,), torch.float64)
    for reduction in REDUCTIONS:
        ours = run(focal, x, t, device=device, alpha=alpha, gamma=gamma, reduction=reduction)
        theirs = run(torchvision_focal_loss, x, t, alpha=alpha, gamma=gamma, reduction=reduction)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5])
def test_focal_gradient_is_finite(gamma: float, dtype: torch.dtype, device: str) -> None:
    # in float32, 1 - p_t ends at 17, e^-x ceases to be a normal number at 89, and to be any at 104
    x = torch.tensor([0.0, 17, 89, 104, 745, 1e4, math.inf]).to(dtype)
    x = torch.cat([x, -x]).repeat(2)
    t = torch.tensor([0.0, 1.0]).repeat_interleave(14).to(dtype)
    right_side = (x > 0) == (t > 0.5)
    ours = run(focal, x, t, device=device, gamma=gamma)
    assert ours.loss[right_side].isfinite().all()
    assert ours.gradient.isfinite().all()
    near = x.abs() < 100  # beyond, the oracle's own powers are 0/0 for gamma < 1
    right = run(exact_focal_loss, x.double()[near], t.double()[near], gamma=gamma)
    torch.testing.assert_close(ours.gradient[near], right.gradient.to(dtype))
    with fused_ce.backend("reference"):  # what higher derivatives are composed of
        composed = run(focal, x, t, device=device, gamma=gamma)
    torch.testing.assert_close(composed.gradient, ours.gradient)


def test_focal_of_signed_power(device: str) -> None:
    # A target of 1.5 makes 1 - p_t negative: its power exists for whole gamma only.
    x, t = torch.tensor([3.0, -3.0]), torch.tensor([1.5, -0.5])
    for gamma in (1.0, 2.0, 3.0, 2.5):
        ours = run(focal, x, t, device=device, gamma=gamma)
        right = run(exact_focal_loss, x.double(), t.double(), gamma=gamma)
        torch.testing.assert_close(
            ours.loss.double(), right.loss, equal_nan=True, rtol=1e-5, atol=0
        )
        torch.testing.assert_close(
            ours.gradient.double(), right.gradient, equal_nan=True, rtol=1e-5, atol=0
        )


# ---- dtypes of the result ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "dtype", "target_dtype", "loss_dtype"),
    [
        (LOGITS, F32, F16, F16),  # the target's, as in torch
        (LOGITS, F16, F32, F32),
        (LOGITS, F64, F32, F32),
        (LOGITS, BF16, F64, F64),
        (LOGITS, BF16, torch.bool, BF16),  # the input's, where the target is no float
        (LOGITS, F64, torch.int64, F64),
        (PROBABILITY, F16, F16, F16),
        (PROBABILITY, BF16, torch.uint8, BF16),
        (FOCAL, F32, F16, F32),  # torchvision's formula promotes
        (FOCAL, F16, BF16, F32),
        (FOCAL, F16, torch.int32, F16),
    ],
)
def test_result_dtype(
    form: Form,
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    loss_dtype: torch.dtype,
    device: str,
) -> None:
    x, t = make_input(form, (5,), dtype), make_target((5,), target_dtype)
    for reduction in REDUCTIONS:
        result = run(form.ours, x, t, device=device, reduction=reduction)
        assert (result.loss.dtype, result.gradient.dtype) == (loss_dtype, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    x, t = make_input(LOGITS, (259,), dtype), make_target((259,), dtype)
    weight = torch.rand(259).to(dtype)
    with torch.autocast(device, torch.bfloat16):
        ours = run(bce_with_logits, x, t, device=device, weight=weight)
        mask = run(bce_with_logits, x, t > 0.5, device=device)
        focal_loss = run(focal, x, t, device=device)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run(F.binary_cross_entropy_with_logits, x, t, weight=weight)
    assert ours.loss.dtype == theirs.loss.dtype == (F64 if dtype == F64 else F32)
    assert ours.gradient.dtype == dtype
    assert mask.loss.dtype == focal_loss.loss.dtype == ours.loss.dtype
    # Torch computes on float32 copies of the half tensors: the same numbers.
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.gradient, theirs.gradient)


def test_autocast_of_probabilities(device: str) -> None:
    p, t = make_input(PROBABILITY, (9,), BF16), make_target((9,), F32)
    if device == "cuda":
        with torch.autocast("cuda"), pytest.raises(RuntimeError, match="unsafe to autocast"):
            run(bce, p, t, device=device)
        return
    with torch.autocast("cpu"):  # takes a target of another dtype, too
        ours, theirs = run(bce, p, t), run(F.binary_cross_entropy, p, t)
    assert ours.loss.dtype == theirs.loss.dtype == F32
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.gradient, theirs.gradient)


# On the CPU, where the profiler sees each allocation.
@pytest.mark.parametrize("dtype", [F16, BF16], ids=dtype_id)
def test_autocast_copies_nothing(dtype: torch.dtype) -> None:
    x, t = torch.randn(10_000).to(dtype), torch.rand(10_000).to(dtype)

    def loss() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert bce_with_logits(x, t).dtype == F32

    assert allocated(loss) <= 64


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradient_under_a_loss_scale(reduction: str, device: str) -> None:
    # As GradScaler sends it: 65536 * gradient / 1e8 is a float16, gradient / 1e8 is none.
    x, t = make_input(LOGITS, (259,), F16), make_target((259,), F32)
    scale = 1e-8 if reduction == "none" else 1.0
    weight = torch.tensor(scale)
    options = {"reduction": reduction, "weight": weight, "normalizer": 1e8}
    ours = run(bce_with_logits, x, t, device=device, upstream=65536.0, **options)
    right = torch.sigmoid(x.double()) - t.double()
    assert ulps(ours.gradient, right * 65536 / 1e8, scale=1e-4) < 0.6


# ---- signatures and modules ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (bce_with_logits, F.binary_cross_entropy_with_logits),
        (bce, F.binary_cross_entropy),
        (focal, torchvision_focal_loss),
        (fused_ce.BCEWithLogitsLoss.__init__, nn.BCEWithLogitsLoss.__init__),
        (fused_ce.BCELoss.__init__, nn.BCELoss.__init__),
        (fused_ce.BCEWithLogitsLoss.forward, nn.BCEWithLogitsLoss.forward),
        (fused_ce.BCELoss.forward, nn.BCELoss.forward),
    ],
)
def test_signature(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    assert positional(ours) == positional(theirs)


def test_arguments_by_position(device: str) -> None:
    x, t, w, p = make_input(LOGITS, (5,)), make_target((5,)), torch.rand(5), torch.rand(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = F.binary_cross_entropy_with_logits(x, t, w, None, False, "sum", p)
        ours = bce_with_logits(*(a.to(device) for a in (x, t, w)), None, False, "sum", p.to(device))
    torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize(("legacy", "means"), LEGACY_REDUCTIONS, ids=str)
@pytest.mark.parametrize("form", [LOGITS, PROBABILITY], ids=form_id)
def test_legacy_reductions_warn(form: Form, legacy: dict[str, Any], means: str) -> None:
    x, t = make_input(form, (5,)), make_target((5,))
    module = {LOGITS: fused_ce.BCEWithLogitsLoss, PROBABILITY: fused_ce.BCELoss}[form]
    expected = form.ours(x, t, reduction=means)
    with pytest.warns(UserWarning, match=r"deprecated|reduction='mean' instead"):
        assert torch.equal(form.ours(x, t, **legacy), expected)
    with pytest.warns(UserWarning, match=r"deprecated|reduction='mean' instead"):
        assert torch.equal(module(**legacy)(x, t), expected)


MODULES = [
    (fused_ce.BCEWithLogitsLoss, nn.BCEWithLogitsLoss, bce_with_logits),
    (fused_ce.BCELoss, nn.BCELoss, bce),
]


@pytest.mark.parametrize(("ours", "theirs", "function"), MODULES)
def test_module(
    ours: type[nn.Module], theirs: type[nn.Module], function: Callable[..., Tensor], device: str
) -> None:
    weights = {"weight": torch.rand(7)}
    if ours is fused_ce.BCEWithLogitsLoss:
        weights["pos_weight"] = torch.rand(7)
    module, other = ours(**weights, reduction="sum").to(device), theirs(**weights)
    assert isinstance(module, theirs)
    assert repr(module) == repr(other)
    assert dict(module.named_buffers()).keys() == weights.keys()
    # State dicts go both ways, and the copy is as good as the original.
    assert module.state_dict().keys() == other.state_dict().keys()
    twin = ours(**{name: torch.zeros(7) for name in weights}, reduction="sum").to(device)
    twin.load_state_dict(other.state_dict())
    other.load_state_dict(module.state_dict())
    x, t = torch.rand(5, 7).to(device), make_target((5, 7)).to(device)
    expected = function(x, t, **{k: w.to(device) for k, w in weights.items()}, reduction="sum")
    for loss_module in (module, twin, copy.deepcopy(module)):
        assert torch.equal(loss_module(x, t), expected)
    torch.testing.assert_close(expected.cpu(), theirs(**weights, reduction="sum")(x.cpu(), t.cpu()))


@each_form
def test_module_passes_every_option_on(form: Form, device: str) -> None:
    inplace = {"inplace_backward": True}
    kind, options = {
        "logits": (fused_ce.BCEWithLogitsLoss, inplace),
        "probability": (fused_ce.BCELoss, {}),
        "focal": (fused_ce.SigmoidFocalLoss, {"alpha": 0.6, "gamma": 1.5} | inplace),
    }[form.name]
    options |= {"reduction": "mean", "ignore_index": -1, "label_smoothing": 0.1, "on_empty": "zero"}
    module = kind(**options)
    for name, value in options.items():
        assert getattr(module, name) == value
    x = make_input(form, (5, 7)).to(device).requires_grad_()
    t = torch.tensor([0.0, 1, -1, 1, 0, -1, 1]).expand(5, 7).to(device)
    extras = {"sample_weight": torch.rand(5).to(device), "normalizer": 3.0}
    assert torch.equal(module(x + 0, t, **extras), form.ours(x + 0, t, **options, **extras))
    assert module(x + 0, t * 0 - 1).item() == 0
    if "inplace_backward" in options:
        logits = x + 0
        module(logits, t)
        assert logits._version > 0


def test_focal_module_repr() -> None:
    module = fused_ce.SigmoidFocalLoss(gamma=3)
    assert repr(module) == "SigmoidFocalLoss(alpha=0.25, gamma=3, reduction='none')"


# ---- extras --------------------------------------------------------------------------------------

IGNORED = -1.0


def target_with_ignored(shape: tuple[int, ...], index: float = IGNORED) -> Tensor:
    t = make_target(shape)
    return t.masked_fill(torch.rand(shape) < 0.3, index)


EXTRAS: dict[str, dict[str, Any]] = {
    "ignore_index": {"ignore_index": -1},
    "label_smoothing": {"label_smoothing": 0.1},
    "all smoothed": {"label_smoothing": 1.0},
    "weights of rows": {"sample_weight": torch.linspace(0, 2, 6)},
    "weights of rows and columns": {"sample_weight": torch.linspace(-1, 2, 42).view(6, 7)},
    "weights of elements": {"sample_weight": torch.linspace(-1, 2, 210).view(6, 7, 5)},
    "one weight": {"sample_weight": torch.tensor(3.0)},
    "half weights": {"sample_weight": torch.linspace(0, 2, 6, dtype=torch.float16)},
    "normalizer": {"normalizer": 7},
    "normalizer of 0 dimensions": {"normalizer": torch.tensor(7.5)},
    "normalizer of 1 dimension": {"normalizer": torch.tensor([7])},
    "normalizer of a half type": {"normalizer": torch.tensor(7.5, dtype=torch.float16)},
    "ignored and divided": {"ignore_index": -1, "normalizer": 9.5},
    "everything": {
        "ignore_index": -1,
        "label_smoothing": 0.2,
        "sample_weight": torch.linspace(0, 2, 6),
        "normalizer": torch.tensor(7.5, dtype=torch.float64),
    },
}


@each_reduction
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@each_form
def test_extras(form: Form, extras: dict[str, Any], reduction: str, device: str) -> None:
    shape = (6, 7, 5)
    ignores = extras.get("ignore_index") == IGNORED
    t = target_with_ignored(shape) if ignores else make_target(shape)
    options = extras | {"reduction": reduction}
    if form is not FOCAL:
        options |= {"weight": torch.rand(5)}
    for dtype in (F64, F32, BF16):
        x = make_input(form, shape, dtype)
        ours = run(form.ours, x, t.to(dtype), device=device, **options)
        right = run(
            lambda x, t, **k: exact(form, x, t, **k),
            x.double(),
            t.to(dtype).double(),
            **{k: double(v) for k, v in options.items()},
        )
        for a, b in zip(ours, right, strict=True):
            # focal's float32 power carries the error of gamma * log(1 - p_t): a few units
            floor = 4 if form is FOCAL and dtype is F32 else 1
            assert ulps(a, b, b.abs().max().item()) <= floor * FLOOR[a.dtype]


@pytest.mark.parametrize(
    ("dtype", "index"),
    [
        (F64, -100),
        (F32, -100),
        (F16, -100),
        (BF16, 255),
        (torch.uint8, 255),
        (torch.int8, -100),
        (torch.int16, -100),
        (torch.int32, 2**31 - 1),  # float32 has no such number
        (torch.int64, 2**24 + 1),
        (torch.int64, -(2**63)),
        (torch.bool, 0),
    ],
)
@each_form
def test_ignored_elements(form: Form, dtype: torch.dtype, index: int, device: str) -> None:
    """They cost nothing, get a gradient of exactly 0, and are not counted, whatever they hold."""
    n = 1030  # past one block
    ignored = torch.rand(n) < 0.4
    t = make_target((n,), torch.bool if not dtype.is_floating_point else dtype).to(dtype)
    if dtype is torch.bool:
        t = t | True
    t[ignored] = index
    x = make_input(form, (n,))
    target = t.to(x.dtype) if form is PROBABILITY and t.is_floating_point() else t
    kept = run(form.ours, x[~ignored], target[~ignored], device=device, reduction="mean")
    x[ignored] = math.nan
    got = run(form.ours, x, target, device=device, reduction="mean", ignore_index=index)
    torch.testing.assert_close(got.loss, kept.loss)
    torch.testing.assert_close(got.gradient[~ignored], kept.gradient)
    assert (got.gradient[ignored] == 0).all()
    each = run(form.ours, x, target, device=device, reduction="none", ignore_index=index)
    assert (each.loss[ignored] == 0).all()
    assert (each.gradient[ignored] == 0).all()


def test_ignored_elements_hide_weights_and_upstream(device: str) -> None:
    x, t = torch.zeros(40), torch.full((40,), IGNORED)
    t[0] = 1.0
    bad = torch.full((40,), math.nan)
    bad[0] = 1.0
    for name in ("weight", "pos_weight", "upstream"):
        options = {"upstream": torch.ones(40)} | {name: bad}
        ours = run(
            bce_with_logits, x, t, device=device, reduction="none", ignore_index=-1, **options
        )
        assert ours.gradient[0].item() == -0.5
        assert (ours.gradient[1:] == 0).all()
        assert (ours.loss[1:] == 0).all()


@pytest.mark.parametrize("on_empty", ["nan", "zero"])
@each_form
def test_on_empty(form: Form, on_empty: str, device: str) -> None:
    value = math.nan if on_empty == "nan" else 0.0
    options = {"on_empty": on_empty, "reduction": "mean"}
    x = make_input(form, (17,))
    nothing = {
        "all ignored": (x, torch.full((17,), IGNORED), {"ignore_index": -1}),
        "no elements": (x[:0], x[:0], {}),
    }
    for x_, t, extras in nothing.values():
        result = run(form.ours, x_, t, device=device, **options, **extras)
        assert result.loss.item() == pytest.approx(value, nan_ok=True)
        assert (result.gradient == 0).all()  # ignored elements, of a mean that is NaN too
    # A denominator of 0 over elements that do cost something: a number / 0, unless told otherwise.
    for normalizer in (0, torch.tensor(0.0)):
        result = run(
            form.ours, x, x * 0, device=device, upstream=1.0, normalizer=normalizer, **options
        )
        if on_empty == "zero":
            assert result.loss.item() == 0
            assert (result.gradient == 0).all()
        else:
            assert result.loss.item() == math.inf
    if form is LOGITS and on_empty == "zero":  # whatever is added up
        lost = x.index_fill(0, torch.tensor(5), math.nan)
        assert run(form.ours, lost, x * 0, device=device, normalizer=0, **options).loss == 0
    # What is not empty is what it was.
    assert torch.equal(
        run(form.ours, x, x * 0, device=device, **options).loss,
        run(form.ours, x, x * 0, device=device, reduction="mean").loss,
    )


@each_reduction
@pytest.mark.parametrize("extra", [{}, {"ignore_index": -1}, {"label_smoothing": 0.3}], ids=str)
@each_form
def test_gradients_of_all_arguments(
    form: Form, extra: dict[str, Any], reduction: str, device: str
) -> None:
    shape = (6, 5)
    t = target_with_ignored(shape) if "ignore_index" in extra else make_target(shape)
    if form is FOCAL:
        # where a target is exactly 0 or 1, too
        tensors = {"sample_weight": torch.rand(6)}
    else:
        tensors = {"sample_weight": torch.rand(6), "weight": torch.rand(5)}
    if form is LOGITS:
        tensors["pos_weight"] = torch.rand(6, 1)
    if reduction == "mean":
        tensors["normalizer"] = torch.tensor(3.5)
    arguments = [make_input(form, shape), t, *tensors.values()]

    def gradients(function: Callable[..., Tensor], values: list[Tensor]) -> list[Tensor]:
        leaves = [v.detach().requires_grad_() for v in values]
        loss = function(
            *leaves[:2], **dict(zip(tensors, leaves[2:], strict=True)), **extra, reduction=reduction
        )
        return torch.autograd.grad(loss, leaves, torch.ones_like(loss))

    ours = gradients(form.ours, [a.to(device) for a in arguments])
    right = gradients(lambda x, t, **k: exact(form, x, t, **k), [a.double() for a in arguments])
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [("target",), ("weight",), ("pos_weight",)], ids=str)
def test_gradient_without_the_inputs(names: tuple[str, ...], device: str) -> None:
    tensors = {
        "input": make_input(LOGITS, (6, 5)),
        "target": make_target((6, 5)),
        "weight": torch.rand(5),
        "pos_weight": torch.rand(5),
    }
    found = []
    for function, where in ((bce_with_logits, device), (LOGITS.exact, "cpu")):
        moved = {k: v.to(where, copy=True) for k, v in tensors.items()}
        wanted = [moved[name].requires_grad_() for name in names]
        x, t = moved.pop("input"), moved.pop("target")
        loss = function(x, t, **moved)
        loss = loss if loss.dim() == 0 else loss.mean()
        found.append(torch.autograd.grad(loss, wanted))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_product_of_half_weights_is_not_rounded(device: str) -> None:
    # 1 + 2^-7 in bfloat16: its square has a digit more than bfloat16
    w = torch.full((3,), 1 + 2.0**-7, dtype=BF16)
    x, t = torch.zeros(3, 3), torch.zeros(3, 3)
    loss = run(bce_with_logits, x, t, device=device, weight=w, sample_weight=w).loss
    assert loss.item() == pytest.approx((1 + 2.0**-7) ** 2 * math.log(2), rel=1e-6)


def test_normalizer_makes_gradient_accumulation_exact(device: str) -> None:
    # parts of unequal size, whose own means would not add up
    x, t = make_input(LOGITS, (100,)), target_with_ignored((100,))
    count = (t != IGNORED).sum()
    whole = run(bce_with_logits, x, t, device=device, ignore_index=-1)
    parts = [
        run(bce_with_logits, a, b, device=device, ignore_index=-1, normalizer=count)
        for a, b in zip(x.split([10, 70, 20]), t.split([10, 70, 20]), strict=True)
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(torch.cat([part.gradient for part in parts]), whole.gradient)


# ---- the gradient that overwrites the logits -----------------------------------------------------


@each_reduction
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=dtype_id)
@pytest.mark.parametrize("form", [LOGITS, FOCAL], ids=form_id)
def test_inplace_backward(form: Form, dtype: torch.dtype, reduction: str, device: str) -> None:
    x, t = make_input(form, (7, 37), dtype), make_target((7, 37), dtype)
    upstream = torch.full((7, 37), 0.5, dtype=dtype) if reduction == "none" else 0.5
    right = run(form.ours, x, t, device=device, reduction=reduction, upstream=upstream)
    leaf = x.to(device).requires_grad_()
    logits = leaf * 1
    version = logits._version
    loss = form.ours(logits, t.to(device), reduction=reduction, inplace_backward=True)
    assert logits._version > version
    assert torch.equal(loss.detach().cpu(), right.loss)
    loss.backward(torch.full(loss.shape, 0.5, dtype=loss.dtype).to(device))
    assert torch.equal(leaf.grad.cpu(), right.gradient)
    assert torch.equal(logits.detach().cpu(), right.gradient)  # the memory holds it


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced"])
def test_inplace_backward_of_strided_logits(layout: str, device: str) -> None:
    x, t = LAYOUTS[layout](make_input(LOGITS, (3, 5, 7, 11))), make_target((3, 5, 7, 11))
    right = run(bce_with_logits, x, t, device=device)
    leaf = on(x, device).requires_grad_()
    logits = leaf.clone(memory_format=torch.preserve_format)
    bce_with_logits(logits, t.to(device), inplace_backward=True).backward()
    # The clone is dense, so that another kernel may serve it than the logits themselves.
    torch.testing.assert_close(leaf.grad.cpu(), right.gradient)


def test_inplace_backward_of_view(device: str) -> None:
    layer = nn.Linear(5, 1).to(device)
    features, t = torch.randn(9, 5).to(device), make_target((9,)).to(device)
    gradients = []
    for inplace in (False, True):
        logits = layer(features).squeeze(-1)
        bce_with_logits(logits, t, inplace_backward=inplace).backward()
        gradients.append([p.grad for p in layer.parameters()])
        layer.zero_grad(set_to_none=True)
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# A gradient that begins with a line of memory, and one that does not; each ends within a step.
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bool], ids=dtype_id)
def test_large_gradient(
    target_dtype: torch.dtype, weighted: bool, offset: int, device: str
) -> None:
    """One that no cache holds is written past them."""
    n = 2**22 + 5
    x, t = make_input(LOGITS, (n,)).to(device), make_target((n,)).to(target_dtype).to(device)
    pos_weight = torch.tensor(2.0, device=device) if weighted else None
    gradient = torch.empty(offset + n, device=device)[offset:]
    op = torch.ops.fused_ce._bce_with_gradient
    numbers = (FORMS.index(LOGITS), REDUCTIONS.index("mean"), torch.float32)
    for place in (gradient, x):
        op(place, x, t, None, pos_weight, None, None, *numbers)
    assert torch.equal(gradient, x)


def test_inplace_backward_writes_only_for_a_gradient(device: str) -> None:
    x, t = make_input(LOGITS, (9,)).to(device), make_target((9,)).to(device)
    weight = torch.rand(9).to(device).requires_grad_()
    before = x.clone()
    bce_with_logits(x, t, inplace_backward=True)
    bce_with_logits(x, t, weight, inplace_backward=True).backward()
    with torch.no_grad():
        bce_with_logits(x.requires_grad_(), t, inplace_backward=True)
    assert x._version == 0
    assert torch.equal(x.detach(), before)


# On the CPU, where the profiler sees each allocation; the Python that allocates is the same.
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=dtype_id)
@pytest.mark.parametrize(
    ("options", "buffers"),
    [
        ({}, 1),  # the gradient
        ({"reduction": "sum"}, 1),
        ({"weight": torch.rand(100), "pos_weight": torch.rand(100)}, 1),
        # each a hundredth of the logits, their product as large as these
        ({"weight": torch.rand(100), "sample_weight": torch.rand(100)}, 1),
        ({"inplace_backward": True}, 0),
    ],
    ids=["mean", "sum", "weights", "sample_weight", "inplace"],
)
def test_memory(dtype: torch.dtype, options: dict[str, Any], buffers: int) -> None:
    """One buffer of the logits' size, or none: no float copy of half logits or of bool targets."""
    few = 64  # bytes of the loss and of the upstream gradient
    leaf = torch.randn(100, 100).to(dtype).requires_grad_()
    logits, t = leaf * 1, torch.rand(100, 100) < 0.5
    size = logits.numel() * logits.element_size()
    losses = []
    forward = allocated(lambda: losses.append(bce_with_logits(logits, t, **options)))
    # d loss / d logits goes on through `leaf * 1`, which allocates a buffer of its own.
    backward = allocated(lambda: losses[0].backward())
    assert forward + backward - size <= buffers * size + few
    with torch.no_grad():
        assert allocated(lambda: bce_with_logits(logits, t, **options)) <= few


# On the CPU, where the profiler sees each allocation.
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
@each_form
def test_memory_of_strided_logits(form: Form, layout: str, dtype: torch.dtype) -> None:
    """No copy in another order: the gradient's buffer, or none without a gradient."""
    shape = (5, 3, 7, 11)
    few = 64
    leaf = LAYOUTS[layout](make_input(form, shape, dtype)).requires_grad_()
    size = leaf.numel() * leaf.element_size()
    options = {} if form is FOCAL else {"weight": torch.rand(3, 1, 1)}
    for t in (make_target(shape, torch.bool), LAYOUTS[layout](make_target(shape, dtype))):
        for reduction in REDUCTIONS:
            result = size if reduction == "none" else 0
            loss = partial(form.ours, leaf, t, reduction=reduction, **options)
            assert size <= allocated_with_gradient(loss, leaf) - result <= size + few
            with torch.no_grad():
                assert allocated(loss) <= result + few


# ---- backward ------------------------------------------------------------------------------------


@each_reduction
@each_form
def test_second_backward(form: Form, reduction: str, device: str) -> None:
    x, t = make_input(form, (33,)), make_target((33,))
    right = run(form.ours, x, t, device=device, reduction=reduction)
    leaf = x.to(device).requires_grad_()
    loss = form.ours(leaf, t.to(device), reduction=reduction)
    seed = torch.ones(loss.shape).to(device)
    for times in (1, 3, 1):
        (gradient,) = torch.autograd.grad(loss, leaf, seed * times, retain_graph=True)
        torch.testing.assert_close(gradient.cpu(), right.gradient * times)
    loss.backward(seed)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward(seed)


@each_reduction
def test_gradients_add_up(reduction: str, device: str) -> None:
    x, t = make_input(LOGITS, (33,)), make_target((33,))
    right = run(bce_with_logits, x, t, device=device, reduction=reduction).gradient
    leaf = x.to(device).requires_grad_()
    for _ in range(2):
        loss = bce_with_logits(leaf, t.to(device), reduction=reduction)
        loss.backward(torch.ones(loss.shape).to(device))
    torch.testing.assert_close(leaf.grad.cpu(), 2 * right)


def test_saved_tensor_hooks(device: str) -> None:
    x, t = make_input(LOGITS, (33,)), make_target((33,))
    right = run(bce_with_logits, x, t, device=device)
    packed = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.cpu()

    leaf = x.to(device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.to(device)):
        loss = bce_with_logits(leaf, t.to(device))
    loss.backward()
    assert {p.data_ptr() for p in packed} >= {leaf.data_ptr()}
    torch.testing.assert_close(leaf.grad.cpu(), right.gradient)


# On the CPU, where the profiler sees each allocation.
def test_saved_tensor_hooks_leave_nothing_behind() -> None:
    leaf, t = torch.randn(10_000, requires_grad=True), torch.rand(10_000)
    with torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: None):
        assert allocated(lambda: bce_with_logits(leaf, t)) <= 200


def test_no_graph_without_need(device: str) -> None:
    x, t = make_input(LOGITS, (9,)).to(device), make_target((9,)).to(device)
    assert bce_with_logits(x, t).grad_fn is None
    with torch.no_grad():
        assert bce_with_logits(x.requires_grad_(), t).grad_fn is None
    with torch.inference_mode():
        assert bce_with_logits(x, t).is_inference()


# ---- deliberate deviations from torch ------------------------------------------------------------


def test_infinite_logits_on_the_right_side_cost_nothing(device: str) -> None:
    x, t = torch.tensor([math.inf, -math.inf]), torch.tensor([1.0, 0.0])
    theirs = run(F.binary_cross_entropy_with_logits, x, t, reduction="none")
    assert theirs.gradient.isnan().any() or theirs.loss.isnan().any()
    for form in (LOGITS, FOCAL):
        for target in (t, t.bool(), t.half()):
            for reduction in REDUCTIONS:
                ours = run(form.ours, x, target, device=device, reduction=reduction)
                assert ours.loss.abs().sum().item() == 0
                assert ours.gradient.tolist() == [0, 0]
    # On the wrong side they cost what they must, with the gradient of the limit.
    ours = run(bce_with_logits, x, 1 - t, device=device, reduction="none")
    assert ours.loss.tolist() == [math.inf, math.inf]
    assert ours.gradient.tolist() == [1, -1]


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_infinite_logits_among_many(dtype: torch.dtype, device: str) -> None:
    # 700 elements: whole groups of steps of every loop, and what is left over. An infinite logit on
    # the right side leaves the sum as if it were not there, on the wrong side it makes it infinite.
    x, t = make_input(LOGITS, (700,)).to(dtype), (torch.arange(700) % 3 == 0).to(dtype)

    def on_copy(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return bce_with_logits(x.clone(), *arguments, **options)

    finite = run(bce_with_logits, x, t, device=device, reduction="sum")
    places = torch.tensor([0, 77, 300, 511, 699])
    right_side = (t[places] * 2 - 1) * math.inf
    for in_place in (False, True):
        options: dict[str, Any] = {"reduction": "sum", "inplace_backward": in_place}
        ours = run(on_copy, x.index_copy(0, places, right_side), t, device=device, **options)
        rest = torch.ones(700, dtype=torch.bool).index_fill(0, places, False)
        kept = run(bce_with_logits, x[rest], t[rest], device=device, reduction="sum")
        torch.testing.assert_close(ours.loss, kept.loss)
        assert torch.equal(ours.gradient[rest], finite.gradient[rest])
        assert (ours.gradient[places] == 0).all()
        ours = run(on_copy, x.index_copy(0, places, -right_side), t, device=device, **options)
        assert ours.loss.item() == math.inf
        assert torch.equal(ours.gradient[rest], finite.gradient[rest])
        assert torch.equal(ours.gradient[places], 1 - 2 * t[places])


def test_nan_in_ignored_rows(device: str) -> None:
    x = torch.tensor([math.nan, 0.0])
    t = torch.tensor([IGNORED, 1.0])
    ours = run(bce_with_logits, x, t, device=device, ignore_index=-1)
    assert ours.loss.item() == pytest.approx(math.log(2))
    assert ours.gradient.tolist() == [0, -0.5]


def test_extras_accept_what_torch_rejects(device: str) -> None:
    x, t = make_input(LOGITS, (5,)), torch.tensor([0, 1, 1, 0, 1])
    weight = torch.rand(5, requires_grad=True)
    with pytest.raises(RuntimeError, match="can't be cast"):
        F.binary_cross_entropy_with_logits(x, t)
    with pytest.raises(RuntimeError, match="not differentiable"):
        F.binary_cross_entropy_with_logits(x, t.float(), weight)
    moved = weight.detach().to(device).requires_grad_()
    bce_with_logits(x.to(device), t.to(device), moved).backward()
    right = F.binary_cross_entropy_with_logits(x, t.float(), reduction="none") / 5
    torch.testing.assert_close(moved.grad.cpu(), right)


# ---- the plain PyTorch fallback ------------------------------------------------------------------


@each_reduction
@each_form
def test_reference_backend(form: Form, reduction: str, device: str) -> None:
    """What runs on devices without kernels, and under transforms, is the same function."""
    shape = (6, 7)
    for dtype in (F64, F32, BF16):
        # Strides unlike the target's show in an unreduced loss.
        x, t = make_input(form, (7, 6), dtype).t(), target_with_ignored(shape).to(dtype)
        options = {"reduction": reduction, "ignore_index": -1, "label_smoothing": 0.1}
        ours = run(form.ours, x, t, device=device, **options)
        with fused_ce.backend("reference"):
            theirs = run(form.ours, x, t, device=device, **options)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b)


def test_defaults_of_the_reference() -> None:
    """A call that leaves options out must mean the same to it and to the ops."""
    ops = torch.ops.fused_ce
    assert fused_ce.reference.bce.__defaults__ == defaults_of(ops._bce.default)
    assert fused_ce.reference.softmax_ce.__defaults__ == defaults_of(ops._softmax_ce.default)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_environment_variable_chooses_the_backend(name: str) -> None:
    """In another process, since it is read when the package is imported."""
    if name == "native" and not can_force_native():
        pytest.skip("not every device has native kernels here")
    code = """if True:
        import torch
        from fused_ce import backends, functional
        print(*sorted({backend for _, device, backend in backends.table() if device == "cpu"}))
        with torch.profiler.profile() as profile:
            loss = functional.binary_cross_entropy_with_logits(torch.zeros(3), torch.ones(3))
        print(loss.item(), "aten::mul" in {event.key for event in profile.key_averages()})
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"FUSED_CE_BACKEND": name},
        capture_output=True,
        text=True,
        check=True,
    )
    serving, loss, composed = done.stdout.split()
    assert (serving, composed) == (name, str(name == "reference"))
    assert float(loss) == pytest.approx(math.log(2))


def test_reference_alpha_and_gamma(device: str) -> None:
    x, t = make_input(FOCAL, (33,)), make_target((33,))
    for alpha, gamma in ((ALPHA, GAMMA), (-1, 0.5), (0.75, 3)):
        ours = run(focal, x, t, device=device, alpha=alpha, gamma=gamma)
        with fused_ce.backend("reference"):
            theirs = run(focal, x, t, device=device, alpha=alpha, gamma=gamma)
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(ours.gradient, theirs.gradient)
