"""Random calls against formulas in float64: shapes, strides, dtypes, broadcasts, options, tails."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as torch_functional
from cases import capped, exact_cross_entropy, is_native, torchvision_focal_loss
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_ce import functional

EXAMPLES = int(os.environ.get("FUSED_CE_FUZZ_EXAMPLES", "2000"))
# On CI every run tries the same cases; elsewhere each tries its own and prints how to repeat them.
SEED = int(os.environ.get("FUSED_CE_FUZZ_SEED", 0 if "CI" in os.environ else time.time_ns()))

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
LAYOUTS = ["", "permuted", "channels_last", "sliced", "expanded"]
LAYOUTS += ["sliced permuted", "expanded sliced"]
# Around the lanes of a vector (4, 8, 16), a block (1024) and a chunk (16384) of the kernels.
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65]
LONG = [(1023,), (1024,), (1025,), (2, 1024), (5, 1031), (16389,), (3, 13001), (20001, 2)]
SPECIAL = [0.0, -0.0] + [s * v for s in (1, -1) for v in (1e-30, 1e-4, 20, 88, 104, 200)]


class Operand(NamedTuple):
    dtype: torch.dtype
    layout: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    seed: int
    form: str
    shape: tuple[int, ...]
    input: Operand
    target: Operand
    labels: str
    weight: Operand | None
    pos_weight: Operand | None
    sample_weight: Operand | None
    options: dict[str, Any]
    normalizer_dtype: torch.dtype | None
    upstream: float
    upstream_layout: str
    gradients: str
    non_finite: bool


@st.composite
def cases(draw: st.DrawFn, most: int) -> Case:
    def rarely() -> bool:
        return draw(st.integers(0, 3)) == 3

    form = draw(st.sampled_from(["logits", "logits", "probability", "focal"]))
    shape: tuple[int, ...] = ()
    if most >= 1024 and draw(st.integers(0, 9)) == 9:
        shape = draw(st.sampled_from(LONG))
    else:
        left = most
        for _ in range(draw(st.integers(0, 5))):
            shape += (draw(st.sampled_from([n for n in SIZES if n <= left])),)
            left //= shape[-1]
        if shape and draw(st.integers(0, 19)) == 19:
            shape = (*shape[:-1], 0)

    layouts = st.sampled_from(LAYOUTS)
    input = Operand(draw(st.sampled_from(FLOATS)), draw(layouts), shape)
    whole = draw(st.integers(0, 2)) == 2
    floats = [input.dtype] if form == "probability" else [input.dtype, *FLOATS]
    target = Operand(draw(st.sampled_from(INTEGERS if whole else floats)), draw(layouts), shape)
    labels = "hard" if whole else draw(st.sampled_from(["hard", "soft", "any"]))

    def weight() -> Operand:
        kept = shape[draw(st.integers(0, len(shape))) :]
        kept = tuple(1 if draw(st.booleans()) else n for n in kept)
        return Operand(draw(st.sampled_from([*FLOATS, *INTEGERS])), draw(layouts), kept)

    options: dict[str, Any] = {"reduction": draw(st.sampled_from(["none", "mean", "sum"]))}
    if form == "focal":
        options["alpha"] = draw(st.sampled_from([0.25, 0.5, 0, 1, 0.1, 0.999, -1]))
        options["gamma"] = draw(st.sampled_from([2, 0, 0.5, 1, 1.7, 3, 5]))
    if rarely():
        values = [0, 1] if target.dtype == torch.bool else [1, 2, 100]
        if target.dtype in (torch.int32, torch.int64):
            values += [2**31 - 1]
        if target.dtype not in (torch.bool, torch.uint8):
            values += [-100, -1]
        options["ignore_index"] = draw(st.sampled_from(values))
    if rarely():
        options["label_smoothing"] = draw(st.sampled_from([0.1, 0.01, 1.0]))
    if rarely():
        options["on_empty"] = "zero"
    normalizer_dtype = None
    if rarely():
        options["normalizer"] = draw(st.sampled_from([7.0, 1.0, 1000.0, 2.0]))
        if options.get("on_empty") and rarely():
            options["normalizer"] = 0.0
        normalizer_dtype = draw(st.sampled_from([None, *FLOATS, torch.int64]))
    sample_weight = None
    if rarely():
        rows = shape[: draw(st.integers(0, len(shape)))]
        sample_weight = Operand(draw(st.sampled_from([*FLOATS, *INTEGERS])), draw(layouts), rows)
    gradients = draw(st.sampled_from(["none", "input", "input", "input", "inplace", "all"]))
    return Case(
        seed=draw(st.integers(0, 2**32 - 1)),
        form=form,
        shape=shape,
        input=input,
        target=target,
        labels=labels,
        weight=weight() if form != "focal" and draw(st.booleans()) else None,
        pos_weight=weight() if form == "logits" and draw(st.booleans()) else None,
        sample_weight=sample_weight,
        options=options,
        normalizer_dtype=normalizer_dtype,
        upstream=draw(st.sampled_from([1.0, 1.0, -2.0, 0.3, 1000.0])),
        upstream_layout=draw(layouts),
        gradients=gradients,
        non_finite=rarely(),
    )


def lay_out(values: Tensor, operand: Operand, rng: random.Random, device: Any) -> Tensor:
    """The values in the operand's dtype and layout (an expanded one repeats some of them)."""
    dim, full = values.dim(), values.shape
    order = list(range(dim))
    if "permuted" in operand.layout:
        rng.shuffle(order)
    if operand.layout == "channels_last" and dim >= 3:
        order = [0, *range(2, dim), 1]
    steps = [rng.choice((1, 2, 3)) if "sliced" in operand.layout else 1 for _ in range(dim)]
    for d in range(dim):
        if "expanded" in operand.layout and full[d] > 1 and rng.random() < 0.5:
            values = values.narrow(d, 0, 1)
    buffer = torch.zeros(
        [values.shape[d] * steps[d] for d in order], dtype=operand.dtype, device=device
    )
    view = buffer.permute([order.index(d) for d in range(dim)])
    view = view[tuple(slice(step - 1, None, step) for step in steps)]
    return view.copy_(values).expand(full)


class Call(NamedTuple):
    input: Tensor
    target: Tensor
    weight: Tensor | None
    pos_weight: Tensor | None
    sample_weight: Tensor | None
    normalizer: Tensor | float | None
    upstream: Tensor  # gradient of the loss, in its dtype


def build(case: Case, device: Any) -> Call:
    generator = torch.Generator().manual_seed(case.seed)
    rng = random.Random(case.seed)

    def uniform(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    def some(probability: float) -> Tensor:
        return uniform(case.shape) < probability

    t = uniform(case.shape)
    if case.labels == "hard":
        t = t.round()
    elif case.labels == "any" and case.form == "logits":
        t = 3 * t - 1
    ignore_index = case.options.get("ignore_index")
    if ignore_index is not None:
        t[some(rng.choice((0.2, 1.0)))] = ignore_index
    target = lay_out(t, case.target, rng, device)
    t = target.double().cpu()

    if case.form == "probability":
        x = uniform(case.shape)
        x = torch.where(some(0.2), x.round(), x)
        x = torch.where(some(0.2), uniform(case.shape) * rng.choice((1e-7, 1e-12, 1e-40)), x)
        if case.gradients == "all":  # torch's derivative by the target is infinite at 0 and at 1
            x = x.clamp(0.01, 0.99)
    else:
        x = torch.randn(case.shape, dtype=torch.float64, generator=generator)
        x *= rng.choice((1, 4, 30))
        special = torch.tensor([rng.choice(SPECIAL) for _ in range(64)], dtype=torch.float64)
        place = torch.randint(64, case.shape, generator=generator)
        x = torch.where(some(0.3), special[place], x)
        if case.form == "focal" and case.gradients == "all":
            # beyond, some of what the derivative by the target is made of underflows
            most = 80 if torch.float64 in (case.input.dtype, case.target.dtype) else 10
            x = x.clamp(-most, most)
    if case.non_finite and "expanded" not in case.input.layout:
        # at an infinite logit the derivative by the target is infinite too
        infinite = case.form != "probability" and case.gradients != "all"
        if infinite and "label_smoothing" not in case.options:
            x[some(0.1) & (t == 1)] = torch.inf
            x[some(0.1) & (t == 0)] = -torch.inf
        if ignore_index is not None:
            x[some(0.5) & (t == ignore_index)] = torch.nan
    input = lay_out(x, case.input, rng, device)

    def weights(operand: Operand | None) -> Tensor | None:
        if operand is None:
            return None
        values = 4 * uniform(operand.shape) - 0.5
        if operand.dtype not in FLOATS:
            values = values.clamp(min=0).floor()
        return lay_out(values, operand, rng, device)

    normalizer = case.options.get("normalizer")
    if case.normalizer_dtype is not None:
        normalizer = torch.tensor(normalizer, dtype=case.normalizer_dtype, device=device)
    dtype = target.dtype if target.is_floating_point() else input.dtype
    if case.form == "focal":  # torchvision's formula promotes
        dtype = torch.promote_types(dtype, input.dtype)
    upstream = torch.full((), case.upstream, dtype=dtype, device=device)
    if case.options["reduction"] == "none" and case.upstream != 1:
        values = case.upstream * uniform(case.shape)
        upstream = lay_out(values, Operand(dtype, case.upstream_layout, case.shape), rng, device)
    elif case.options["reduction"] == "none":
        upstream = upstream.expand(case.shape)  # as sum() sends it
    return Call(
        input,
        target,
        weights(case.weight),
        weights(case.pos_weight),
        weights(case.sample_weight),
        normalizer,
        upstream,
    )


class Elements(NamedTuple):
    """A result for each element, and the sum of the absolute values of what it is the sum of."""

    value: Tensor
    terms: Tensor

    def times(self, factor: Tensor) -> Elements:
        # 0 * inf is 0 here: what an ignored element or a coefficient of 0 costs.
        return Elements(
            torch.where(factor == 0, 0.0, self.value * factor),
            torch.where(factor == 0, 0.0, self.terms * factor.abs()),
        )

    def sum_to(self, shape: tuple[int, ...]) -> Elements:
        return Elements(self.value.sum_to_size(shape), self.terms.sum_to_size(shape))


def times(coefficient: Tensor, value: Tensor) -> Tensor:
    return torch.where(coefficient == 0, 0.0, coefficient * value)


def elements(case: Case, x: Tensor, t: Tensor, pos: Tensor) -> dict[str, Elements]:
    """Loss and derivatives of each element by input, target and pos_weight, unweighted, from
    formulas in which nothing cancels at hard labels."""
    smoothing = case.options.get("label_smoothing", 0.0)
    t_terms, a_terms = (v.abs() * (1 - smoothing) + smoothing / 2 for v in (t, 1 - t))
    t, a = (v * (1 - smoothing) + smoothing / 2 for v in (t, 1 - t))
    if smoothing and case.form != "logits":
        a_terms = 1 + t_terms  # where 1 - t is formed from the smoothed t
    if case.form == "probability":
        log_p, log_q = x.log().clamp(min=-100), torch.log1p(-x).clamp(min=-100)
        slope = 1 / (x * (1 - x)).clamp(min=torch.tensor(1e-12).item())  # as torch
        difference = x + t_terms if smoothing else (x - t).abs()
        return {
            "loss": Elements(-(t * log_p + a * log_q), -(t_terms * log_p + a_terms * log_q)),
            "input": Elements((x - t) * slope, difference * slope),
            "target": Elements(log_q - log_p, -log_q - log_p).times(torch.ones_like(x) - smoothing),
        }
    rise, fall = torch.logaddexp(x, 0 * t), torch.logaddexp(-x, 0 * t)  # softplus(x), softplus(-x)
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    b, b_terms = pos * t, pos.abs() * t_terms
    ce = Elements(times(a, rise) + times(b, fall), times(a_terms, rise) + times(b_terms, fall))
    # The coefficient of the wrong side, less the share of both that the sigmoid takes away.
    wrong = torch.where(x >= 0, a_terms, b_terms)
    ce_x = Elements(a * p - b * q, wrong + (a_terms + b_terms) * torch.minimum(p, q))
    ce_t = Elements(times(pos, fall) - rise, times(pos.abs(), fall) + rise)
    if case.form == "focal":
        alpha, gamma = case.options["alpha"], case.options["gamma"]
        alpha_t = alpha * t + (1 - alpha) * a if alpha >= 0 else torch.ones_like(t)
        alpha_terms = alpha * t_terms + (1 - alpha) * a_terms if alpha >= 0 else torch.ones_like(t)
        u = a * p + t * q
        hard = (t == 0) | (t == 1)
        log_u = torch.where(t == 0, -fall, torch.where(t == 1, -rise, u.log()))
        # d log u / dx, which stays finite where u underflows
        u_x = torch.where(t == 0, q, torch.where(t == 1, -p, (a - t) * p * q / u))
        u_t = q - p
        # gamma multiplies the rounding of log u, and that of u where it is a sum
        modulation = condition = torch.ones_like(u)
        if gamma:
            modulation = torch.exp(gamma * log_u)
            condition = 1 + gamma * torch.where(hard, -log_u, 1 - log_u)
            condition = torch.where(modulation == 0, 1.0, condition)
        factor, factor_terms = alpha_t * modulation, alpha_terms * modulation * condition
        alpha_slope = 2 * alpha - 1 if alpha >= 0 else 0.0
        bend = gamma * u ** (gamma - 1) if gamma else torch.zeros_like(u)
        ce_x = Elements(
            factor * (ce_x.value + ce.value * gamma * u_x),
            factor_terms * (ce_x.terms + ce.terms * gamma * u_x.abs()),
        )
        ce_t = Elements(
            (alpha_slope * ce.value + alpha_t * ce_t.value) * modulation
            + alpha_t * ce.value * bend * u_t,
            ((ce.terms + alpha_terms * ce_t.terms) * modulation + alpha_terms * ce.terms * bend)
            * condition,
        )
        ce = Elements(factor * ce.value, factor_terms * ce.terms)
    return {
        "loss": ce,
        "input": ce_x,
        "target": ce_t.times(torch.ones_like(x) - smoothing),
        "pos_weight": Elements(times(t, fall), times(t_terms, fall)),
    }


def expected(case: Case, call: Call) -> dict[str, Elements]:
    """The loss and all its gradients in float64, by the name of what they are the gradient of."""
    shape, dim = case.shape, len(case.shape)
    x, t, up = (v.double() for v in (call.input, call.target, call.upstream))
    ones = torch.ones_like(x)
    ignore_index = case.options.get("ignore_index")
    kept = ones.bool() if ignore_index is None else t != ignore_index
    x, t = torch.where(kept, x, 0.0), torch.where(kept, t, 0.0)

    def broadcast(v: Tensor | None) -> Tensor:
        return ones if v is None else v.double().expand(shape)

    rows = call.sample_weight
    if rows is not None:
        rows = rows.reshape(rows.shape + (1,) * (dim - rows.dim()))
    found = elements(case, x, t, broadcast(call.pos_weight))
    weight, row_weight = broadcast(call.weight), broadcast(rows)
    found["weight"] = found["loss"].times(row_weight)
    found["sample_weight"] = found["loss"].times(weight)
    both = weight * row_weight
    for name in ("loss", "input", "target", "pos_weight"):
        if name in found:
            found[name] = found[name].times(both)

    reduction, divisor = case.options["reduction"], 1.0
    if reduction == "mean":
        divisor = float(kept.sum() if call.normalizer is None else call.normalizer)
    inverse = torch.tensor(1 / divisor if divisor else 0.0, dtype=torch.float64)
    scale = torch.where(kept, up * inverse, 0.0)
    results = {}
    for name, of_each in found.items():
        of = getattr(call, name, None)
        if name == "loss":
            of_each = of_each.times(kept.double())
            results[name] = of_each if reduction == "none" else of_each.sum_to(()).times(inverse)
        elif of is not None:
            like = rows if name == "sample_weight" else of
            total = of_each.times(scale).sum_to(like.shape)
            results[name] = Elements(total.value.reshape(of.shape), total.terms.reshape(of.shape))
    if reduction == "mean" and divisor == 0 and case.options.get("on_empty") != "zero":
        nan = torch.full((), torch.nan, dtype=torch.float64)
        results["loss"] = Elements(nan, nan)
    return results


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of the dtype's numbers at a magnitude."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(magnitude.nan_to_num(0.0).clamp(info.tiny, info.max))
    return torch.ldexp(torch.full_like(magnitude, info.eps), exponent - 1)


def excess(
    actual: Tensor, wanted: Elements, compute: torch.dtype, ulps: float, factor: float
) -> Tensor:
    """The error in units of the floor.

    The floor is `ulps` units in the last place of the result's dtype at the result's magnitude or,
    if that is more, of the arithmetic's type at the magnitude of the terms that the result is the
    sum of: each term is rounded a few times by half a unit, and where they cancel the sum is
    smaller than its error. A half type's terms are right to 2e-5 (csrc/math.h). What underflows on
    the way is off by the smallest number, times what multiplies it later (`factor`).
    """
    value, terms = wanted
    info = torch.finfo(actual.dtype)
    floor = ulps * torch.maximum(ulp(value.abs(), actual.dtype), ulp(terms, compute))
    if info.bits == 16:
        floor = torch.maximum(floor, 2e-5 * terms)
    # A gradient is stored before the upstream one multiplies it, but not as float16.
    stored = {compute, actual.dtype} - {torch.float16}
    least = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps for dtype in stored)
    floor += factor * least
    # What would be the next number stands for infinity.
    limit = info.max * (1 + info.eps / 2)
    found, value = (v.double().clamp(-limit, limit) for v in (actual, value))
    same = (found == value) | (found.isnan() & value.isnan())
    return torch.where(same, 0.0, (found - value).abs() / floor).nan_to_num(torch.inf)


# What a half type's result may be off by where torch is closer, in units of its last place: it is
# rounded once. For float32, which is rounded a few times, that is the floor itself, and in float64
# torch's results are the oracle.
BESIDE_TORCH = 0.6


def assert_close(
    name: str,
    actual: Tensor,
    right: Elements,
    theirs: Tensor | None,
    compute: torch.dtype,
    ulps: float,
    upstream: float,
    inplace: bool,
) -> None:
    """Within the floor and, where torch has this result in this dtype, no further off than torch,
    or than the floor (BESIDE_TORCH in half types)."""
    arithmetic = compute, ulps, 1e3 * max(1, abs(upstream))
    error = excess(actual.cpu(), right, *arithmetic)
    if not error.numel():
        return
    allowed = 1.0
    if theirs is not None:
        assert (actual.dtype, actual.shape) == (theirs.dtype, theirs.shape)
    if theirs is not None and actual.element_size() == 2:
        # What overwrites the logits is scaled after it has been rounded.
        units = BESIDE_TORCH + (inplace and upstream != 1)
        units *= 1.5 if actual.is_cuda else 1  # an exponential may be 2 units off
        allowed = min(1.0, max(units / ulps, excess(theirs, right, *arithmetic).max().item()))
    if error.max() > allowed:
        at = error.flatten().argmax()
        got, value = (v.flatten()[at].item() for v in (actual, right.value))
        wrong = f"{error.max():.3g} of {allowed:.3g} floors off"
        raise AssertionError(f"{name}: {got!r} where {value!r} is right, {wrong}")


NAMES = {
    "logits": "binary_cross_entropy_with_logits",
    "probability": "binary_cross_entropy",
    "focal": "sigmoid_focal_loss",
}


def has_extras(case: Case) -> bool:
    extras = case.options.keys() - {"reduction", "on_empty", "alpha", "gamma"}
    return bool(extras) or case.sample_weight is not None


def torch_arguments(case: Case, call: Call) -> dict[str, Any]:
    if case.form == "focal":
        return {k: case.options[k] for k in ("alpha", "gamma", "reduction")}
    arguments = {"weight": call.weight, "reduction": case.options["reduction"]}
    return arguments | ({"pos_weight": call.pos_weight} if case.form == "logits" else {})


def torch_results(case: Case, call: Call) -> dict[str, Tensor]:
    """Torch's loss and gradient in the case's own dtypes, where torch has what it asks for."""
    if has_extras(case) or (call.pos_weight is not None and call.pos_weight.dtype == torch.bool):
        return {}
    function = torchvision_focal_loss
    if case.form != "focal":
        function = getattr(torch_functional, NAMES[case.form])
    target = call.target if call.target.is_floating_point() else call.target.to(call.input.dtype)
    leaf = call.input.detach().requires_grad_()
    loss = function(leaf, target, **torch_arguments(case, call))
    (gradient,) = torch.autograd.grad(loss, leaf, call.upstream.to(loss.dtype))
    return {"loss": loss.detach(), "input": gradient}


def check_oracle(case: Case, call: Call, loss: Tensor, right: dict[str, Elements]) -> None:
    """Where torch has what the case asks for, it agrees with the oracle in float64."""
    tensors = [v for v in call if isinstance(v, Tensor)]
    if case.form == "focal" or has_extras(case) or not all(v.isfinite().all() for v in tensors):
        return
    function = getattr(torch_functional, NAMES[case.form])
    arguments = torch_arguments(case, call)
    arguments = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    x = call.input.double().requires_grad_()
    theirs = function(x, call.target.double(), **arguments)
    if loss.numel() and case.options.get("on_empty") is None:
        torch.testing.assert_close(
            right["loss"].value, theirs, rtol=1e-8, atol=1e-9, equal_nan=True
        )
    gradient = torch.autograd.grad(theirs, x, call.upstream.double())
    torch.testing.assert_close(right["input"].value, *gradient, rtol=1e-8, atol=1e-9)


def check(case: Case, device: Any) -> None:
    call = build(case, device)
    options = case.options | {"normalizer": call.normalizer, "sample_weight": call.sample_weight}
    if case.form != "focal":
        options["weight"] = call.weight
    if case.form == "logits":
        options["pos_weight"] = call.pos_weight
    operands = dict(list(call._asdict().items())[: 1 if case.gradients != "all" else 5])
    wanted = {n: v for n, v in operands.items() if v is not None and v.is_floating_point()}
    if case.gradients == "none":
        wanted = {}
    for operand in wanted.values():
        operand.requires_grad_()
    logits = call.input
    inplace = case.gradients == "inplace" and "expanded" not in case.input.layout
    if inplace and case.form != "probability":
        logits = torch.empty_strided(
            logits.shape, logits.stride(), dtype=logits.dtype, device=device
        )
        logits = logits.copy_(call.input)
        options["inplace_backward"] = True
    loss = getattr(functional, NAMES[case.form])(logits, call.target, **options)
    assert (loss.dtype, loss.shape) == (call.upstream.dtype, call.upstream.shape)
    gradients = torch.autograd.grad(loss, [*wanted.values()], call.upstream) if wanted else ()

    host = Call(*(v.detach().cpu() if isinstance(v, Tensor) else v for v in call))
    right = expected(case, host)
    # Three units for the formula (and 2.5 for the focal factor: an exponential, two products and a
    # sum) and half a unit for each further rounding: of a weight and its product, for pos_weight a
    # sum too, of 1 / denominator and its product, of the upstream gradient's product. In float64 as
    # much again for the oracle, which is no better.
    weights = sum(v is not None for v in (call.weight, call.sample_weight))
    ulps = 3 + 2.5 * (case.form == "focal") + weights + 1.5 * (call.pos_weight is not None)
    ulps += 0.5 * (case.upstream != 1) + (case.options["reduction"] == "mean")
    compute = torch.float32
    if torch.float64 in (call.input.dtype, loss.dtype):
        compute, ulps = torch.float64, 2 * ulps
    results = {"loss": loss.detach()} | dict(zip(wanted, gradients, strict=True))
    theirs = torch_results(case, host)
    for name, actual in results.items():
        extra = 0
        if name != "loss":
            assert (actual.dtype, actual.shape) == (wanted[name].dtype, wanted[name].shape)
            # Torch adds up the gradient of a broadcast operand, dozens of equal numbers in a row.
            extra = 16 * (actual.numel() < call.input.numel())
        arithmetic = compute, ulps + extra, case.upstream, inplace
        assert_close(name, actual, right[name], theirs.get(name), *arithmetic)
    check_oracle(case, host, loss, right)


# ---- classes -------------------------------------------------------------------------------------

LABELS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
# Around the lanes of a vector, a warp, and the threads of a block.
CLASSES = [1, 2, 3, 4, 5, 7, 8, 10, 15, 16, 17, 31, 32, 33, 64, 65, 100, 129, 257, 1000, 1025, 4097]
STATS = ["lse", "entropy", "prediction", "correct"]


@dataclass(frozen=True)
class ClassCase:
    seed: int
    shape: tuple[int, ...]
    input: Operand
    target: Operand
    weight: Operand | None
    sample_weight: Operand | None
    options: dict[str, Any]
    normalizer_dtype: torch.dtype | None
    upstream: float
    stats: list[str]
    gradients: str
    spread: float
    non_finite: bool


@st.composite
def class_cases(draw: st.DrawFn, most: int) -> ClassCase:
    def rarely() -> bool:
        return draw(st.integers(0, 3)) == 3

    classes = draw(st.sampled_from([n for n in CLASSES if n <= most]))
    left = most // classes
    shape: tuple[int, ...] = (classes,)
    if draw(st.integers(0, 9)) > 0:
        rows = draw(st.sampled_from([n for n in [*SIZES, 257, 1031] if n <= left]))
        left //= rows
        shape = (rows, classes)
        for _ in range(draw(st.integers(0, 3))):
            shape += (draw(st.sampled_from([n for n in SIZES if n <= left])),)
            left //= shape[-1]
        if draw(st.integers(0, 19)) == 19:
            shape = (0, *shape[1:])
    rows_shape = shape[:1] + shape[2:] if len(shape) > 1 else ()
    layouts = st.sampled_from(LAYOUTS)
    input = Operand(draw(st.sampled_from(FLOATS)), draw(layouts), shape)
    with_labels = draw(st.integers(0, 2)) > 0
    labels = [dtype for dtype in LABELS if torch.iinfo(dtype).max >= classes]
    target = Operand(
        draw(st.sampled_from(labels if with_labels else FLOATS)),
        draw(layouts),
        rows_shape if with_labels else shape,
    )
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(["none", "mean", "sum"]))}
    if with_labels and rarely():
        options["ignore_index"] = draw(st.sampled_from([0, classes - 1, 100, -100, -1, 2**40]))
    if rarely():
        options["label_smoothing"] = draw(st.sampled_from([0.1, 0.01, 1.0]))
    if rarely():
        options["on_empty"] = "zero"
    if rarely():
        options["softcap"] = draw(st.sampled_from([2.0, 30.0]))
    if rarely():
        options["logit_scale"] = draw(st.sampled_from([0.1, 2.0, -1.0]))
    if rarely():
        options["z_loss"] = draw(st.sampled_from([1e-4, 0.1]))
    normalizer_dtype = None
    if rarely():
        options["normalizer"] = draw(st.sampled_from([7.0, 1.0, 1000.0]))
        normalizer_dtype = draw(st.sampled_from([None, *FLOATS, torch.int64]))
    weight = sample_weight = None
    if rarely():
        dtype = input.dtype if with_labels else draw(st.sampled_from(FLOATS))
        weight = Operand(dtype, draw(st.sampled_from(["", "sliced"])), (classes,))
    if rarely():
        kept = rows_shape[: draw(st.integers(0, len(rows_shape)))]
        sample_weight = Operand(draw(st.sampled_from([*FLOATS, *INTEGERS])), draw(layouts), kept)
    return ClassCase(
        seed=draw(st.integers(0, 2**32 - 1)),
        shape=shape,
        input=input,
        target=target,
        weight=weight,
        sample_weight=sample_weight,
        options=options,
        normalizer_dtype=normalizer_dtype,
        upstream=draw(st.sampled_from([1.0, 1.0, -2.0, 0.3, 1000.0])),
        stats=draw(st.lists(st.sampled_from(STATS), unique=True)) if rarely() else [],
        gradients=draw(st.sampled_from(["none", "input", "input", "inplace", "all"])),
        spread=draw(st.sampled_from([1.0, 4.0, 30.0])),
        non_finite=rarely(),
    )


class ClassCall(NamedTuple):
    input: Tensor
    target: Tensor
    weight: Tensor | None
    sample_weight: Tensor | None
    normalizer: Tensor | float | None


def build_classes(case: ClassCase, device: Any) -> ClassCall:
    generator = torch.Generator().manual_seed(case.seed)
    rng = random.Random(case.seed)

    def uniform(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    dim = min(1, len(case.shape) - 1)
    classes = case.shape[dim]
    x = torch.randn(case.shape, dtype=torch.float64, generator=generator) * case.spread
    ignore_index = case.options.get("ignore_index")
    if case.target.dtype in LABELS:
        labels = (uniform(case.target.shape) * classes).floor()
        holds = torch.iinfo(case.target.dtype)
        if ignore_index is not None and holds.min <= ignore_index <= holds.max:
            labels[uniform(labels.shape) < rng.choice((0.2, 1.0))] = ignore_index
        target = lay_out(labels, case.target, rng, device)
        label = target.long().cpu()
        ignored = label == (-100 if ignore_index is None else ignore_index)
        if case.non_finite and "expanded" not in case.input.layout:
            if not case.options.keys() & {"label_smoothing", "logit_scale", "softcap"}:
                x[uniform(case.shape) < 0.2] = -torch.inf
                at = torch.where(ignored, 0, label).unsqueeze(dim)
                x.scatter_(dim, at, 1.0)
            if not case.stats:
                x = torch.where(ignored.unsqueeze(dim), torch.nan, x)
    else:
        target = lay_out(uniform(case.shape) + 1e-3, case.target, rng, device)

    def weights(operand: Operand | None) -> Tensor | None:
        if operand is None:
            return None
        values = 4 * uniform(operand.shape) - 0.5 * (operand is case.sample_weight)
        if operand.dtype not in FLOATS:
            values = values.clamp(min=0).floor()
        return lay_out(values, operand, rng, device)

    normalizer = case.options.get("normalizer")
    if case.normalizer_dtype is not None:
        normalizer = torch.tensor(normalizer, dtype=case.normalizer_dtype, device=device)
    input = lay_out(x, case.input, rng, device)
    return ClassCall(input, target, weights(case.weight), weights(case.sample_weight), normalizer)


def expected_classes(
    case: ClassCase, call: ClassCall, upstream: dict[str, Tensor]
) -> dict[str, Elements]:
    """Loss, statistics and gradients in float64. What a result is the sum of, its terms, are
    multiplied by the largest logit, to which errors of a logarithm and of e^x are relative."""
    dim = min(1, len(case.shape) - 1)
    column = [1] * len(case.shape)
    column[dim] = classes = case.shape[dim]
    x, options = call.input.double(), case.options
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    w = torch.ones(classes, dtype=torch.float64) if call.weight is None else call.weight.double()
    kept = torch.ones(call.input.sum(dim).shape, dtype=torch.bool)
    q = call.target.double()
    count, labels = float(kept.numel()), None
    if not call.target.is_floating_point():
        label = call.target.long()
        kept = label != options.get("ignore_index", -100)
        label = torch.where(kept, label, 0)
        q = torch.nn.functional.one_hot(label, classes).movedim(-1, dim).double()
        count = (w[label] * kept).sum().item()
        labels = label[kept]
        x = torch.where(kept.unsqueeze(dim) | bool(case.stats), x, 0.0)
    cap, scale = options.get("softcap"), options.get("logit_scale", 1.0)
    logits = capped(x, cap, scale)
    slope = scale * (1.0 if cap is None else 1 - (logits / cap) ** 2)
    log_p = torch.log_softmax(logits, dim)
    surprise = torch.where(log_p == -torch.inf, 0.0, -log_p)  # which costs only other classes
    p, lse = log_p.exp(), torch.logsumexp(logits, dim)
    entropy = (p * surprise).sum(dim)
    finite = torch.where(logits.isfinite(), logits, 0.0)
    size = 1 + finite.abs().amax(dim) if classes else lse.abs()

    b = w.view(column) * (q * (1 - smoothing) + smoothing / classes)
    a = b.sum(dim)
    rows = torch.ones_like(lse) if call.sample_weight is None else call.sample_weight.double()
    rows = rows.reshape(rows.shape + (1,) * (lse.dim() - rows.dim())).expand(lse.shape)
    loss = (b * surprise).sum(dim) + z_loss * lse**2
    terms = (a + z_loss * lse.abs()) * size + loss
    divisor = 1.0
    if options["reduction"] == "mean":
        divisor = count if call.normalizer is None else float(call.normalizer)
    inverse = 1 / divisor if divisor else 0.0
    each = Elements(
        torch.where(kept, rows * loss, 0.0), torch.where(kept, (rows * terms).abs(), 0.0)
    )
    results = {"loss": each, "lse": Elements(lse, size), "entropy": Elements(entropy, size)}
    if options["reduction"] != "none":
        results["loss"] = each.sum_to(()).times(torch.tensor(inverse, dtype=torch.float64))
        if options["reduction"] == "mean" and divisor == 0 and options.get("on_empty") != "zero":
            results["loss"] = Elements(*(torch.full((), torch.nan, dtype=torch.float64),) * 2)

    up = torch.where(kept, upstream["loss"].double() * inverse, 0.0)
    outer = (up * rows).unsqueeze(dim)
    grad = outer * ((a + 2 * z_loss * lse).unsqueeze(dim) * p - b)
    most = (a + 2 * z_loss * (lse.abs() + size)).unsqueeze(dim) * p * size.unsqueeze(dim)
    grad_terms = outer.abs() * (most + b)
    for name, slope_of, at_most in (
        ("lse", p, p * size.unsqueeze(dim)),
        ("entropy", p * (surprise - entropy.unsqueeze(dim)), p * (surprise + 1) * 2),
    ):
        if name in upstream:
            of_rows = upstream[name].double().unsqueeze(dim)
            grad = grad + of_rows * slope_of
            grad_terms = grad_terms + of_rows.abs() * at_most * size.unsqueeze(dim)
    # The slope of tanh is 1 - tanh^2, whose error is one of 1.
    results["input"] = Elements(grad * slope, grad_terms * abs(scale))
    if call.target.is_floating_point():
        factor = outer * w.view(column) * (1 - smoothing)
        results["target"] = Elements(
            factor * surprise, factor.abs() * (surprise + size.unsqueeze(dim))
        )
    if call.sample_weight is not None:
        shape = call.sample_weight.shape
        like = shape + (1,) * (lse.dim() - len(shape))
        total = Elements(up * loss, up.abs() * terms).sum_to(like)
        results["sample_weight"] = Elements(*(v.reshape(shape) for v in total))
    if call.weight is not None:
        share = outer * (q * (1 - smoothing) + smoothing / classes)
        of_rows = Elements(share * surprise, share.abs() * (surprise + size.unsqueeze(dim)))
        total = of_rows.sum_to(tuple(column))
        if (
            options["reduction"] == "mean"
            and call.normalizer is None
            and count
            and labels is not None
        ):
            # the divisor is the sum of the labels' weights
            times_seen = torch.zeros_like(w).index_add(0, labels, torch.ones_like(labels).double())
            loss = results["loss"].times(upstream["loss"].double() * inverse)
            seen = loss.times(times_seen)
            total = Elements(total.value.flatten() - seen.value, total.terms.flatten() + seen.terms)
        results["weight"] = Elements(*(v.reshape(classes) for v in total))
    return results


def check_classes(case: ClassCase, device: Any) -> None:
    call = build_classes(case, device)
    options = case.options | {
        "weight": call.weight,
        "sample_weight": call.sample_weight,
        "normalizer": call.normalizer,
        "stats": case.stats,
    }
    names = {"none": (), "all": ("input", "target", "weight", "sample_weight")}
    wanted = {n: getattr(call, n) for n in names.get(case.gradients, ("input",))}
    wanted = {n: v for n, v in wanted.items() if v is not None and v.is_floating_point()}
    for tensor in wanted.values():
        tensor.requires_grad_()
    logits = call.input
    inplace = case.gradients == "inplace" and "expanded" not in case.input.layout
    if inplace:
        logits = torch.empty_strided(
            logits.shape, logits.stride(), dtype=logits.dtype, device=device
        ).copy_(call.input)
        options["inplace_backward"] = True
    result = functional.cross_entropy(logits, call.target, **options)
    loss, stats = result if case.stats else (result, functional.CrossEntropyStats())
    upstream = {"loss": torch.full(loss.shape, case.upstream, dtype=loss.dtype, device=device)}
    outputs = {"loss": loss}
    for name in {"lse", "entropy"} & set(case.stats):
        outputs[name] = getattr(stats, name)
        upstream[name] = torch.linspace(-1, 1, outputs[name].numel(), device=device).view(
            outputs[name].shape
        )
        upstream[name] = upstream[name].to(outputs[name].dtype)
    gradients: tuple[Tensor, ...] = ()
    if wanted:
        gradients = torch.autograd.grad(
            [*outputs.values()], [*wanted.values()], [upstream[name] for name in outputs]
        )

    host = ClassCall(*(v.detach().cpu() if isinstance(v, Tensor) else v for v in call))
    right = expected_classes(case, host, {k: v.cpu() for k, v in upstream.items()})
    # Half a unit for each rounding: in l, l - max, e^, the sum, its logarithm or inverse; of the
    # weights and their products; of 1 / denominator; of the upstream gradient's product.
    weights = sum(v is not None for v in (call.weight, call.sample_weight))
    capped_or_scaled = case.options.keys() & {"softcap", "logit_scale"}
    ulps = 4 + weights + 2 * len(capped_or_scaled) + 2 * ("z_loss" in case.options)
    if not is_native(torch.device(device).type):
        # Torch adds up a row in one chain of float32, of equal terms if it is smoothed.
        ulps += case.shape[min(1, len(case.shape) - 1)] / 4
    compute = torch.float32
    if torch.float64 in (call.input.dtype, loss.dtype):
        # What is right has been added up in float64 too.
        compute, ulps = torch.float64, 2 * (ulps + case.shape[min(1, len(case.shape) - 1)] ** 0.5)
    theirs = torch_class_results(case, host, upstream["loss"].cpu())
    results = {k: v.detach() for k, v in outputs.items()}
    results |= dict(zip(wanted, gradients, strict=True))
    for name, actual in results.items():
        if name in wanted:
            assert (actual.dtype, actual.shape) == (wanted[name].dtype, wanted[name].shape)
        assert actual.shape == right[name].value.shape
        # Torch adds up a weight's gradient over all rows in one chain of float32 if the logits are
        # expanded, and then of equal terms.
        chained = name == "weight" and "expanded" in case.input.layout
        units = ulps + (right["lse"].value.numel() / 16 if chained else 0.0)
        arithmetic = compute, units, case.upstream, inplace
        assert_close(name, actual, right[name], theirs.get(name), *arithmetic)
    check_prediction(case, host, stats)
    check_class_oracle(case, host, right, upstream["loss"].double().cpu())


def torch_class_results(case: ClassCase, call: ClassCall, upstream: Tensor) -> dict[str, Tensor]:
    """Torch's loss and gradient in the case's own dtypes, where torch has what it asks for."""
    known = {"reduction", "ignore_index", "label_smoothing", "on_empty"}
    if case.options.keys() - known or call.sample_weight is not None:
        return {}
    options = {k: v for k, v in case.options.items() if k != "on_empty"}
    target = call.target if call.target.is_floating_point() else call.target.long()
    leaf = call.input.detach().requires_grad_()
    loss = torch_functional.cross_entropy(leaf, target, call.weight, **options)
    if case.stats:
        return {"loss": loss.detach()}
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return {"loss": loss.detach(), "input": gradient}


def check_prediction(case: ClassCase, call: ClassCall, stats: Any) -> None:
    dim = min(1, len(case.shape) - 1)
    logits = capped(
        call.input.double(), case.options.get("softcap"), case.options.get("logit_scale", 1.0)
    )
    best = logits.argmax(dim)
    certain = torch.ones_like(best, dtype=torch.bool)
    if case.options.keys() & {"softcap", "logit_scale"}:  # which round, and may make equal
        most = logits.amax(dim, keepdim=True)
        certain = (logits >= most - 1e-6 * (1 + most.abs())).sum(dim) == 1
    if stats.prediction is not None:
        found = stats.prediction.cpu()
        assert torch.equal(found[certain], best[certain])
        at_found, at_best = (logits.gather(dim, i.unsqueeze(dim)) for i in (found, best))
        torch.testing.assert_close(at_found, at_best, rtol=1e-6, atol=1e-6)
        best, certain = found, torch.ones_like(certain)
    if stats.correct is not None:
        label = call.target
        if label.is_floating_point():
            label = label.argmax(dim)
            kept = torch.ones_like(label, dtype=torch.bool)
        else:
            kept = label.long() != case.options.get("ignore_index", -100)
        right = (best == label) & kept
        assert torch.equal(stats.correct.cpu()[certain], right[certain])


def check_class_oracle(
    case: ClassCase, call: ClassCall, right: dict[str, Elements], upstream: Tensor
) -> None:
    """The formulas agree with autograd through another one."""
    if not call.input.isfinite().all() or case.options.get("on_empty"):
        return
    x = call.input.double().requires_grad_()
    t = call.target.double() if call.target.is_floating_point() else call.target
    arguments = {
        "weight": None if call.weight is None else call.weight.double().requires_grad_(),
        "sample_weight": None if call.sample_weight is None else call.sample_weight.double(),
        "normalizer": call.normalizer,
    }
    loss = exact_cross_entropy(x, t, **case.options | arguments)
    torch.testing.assert_close(right["loss"].value, loss, rtol=1e-8, atol=1e-9, equal_nan=True)
    if not case.stats:
        leaves = {"input": x, "weight": arguments["weight"]}
        leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        gradients = torch.autograd.grad(loss, [*leaves.values()], upstream)
        if loss.isfinite().all():
            for name, gradient in zip(leaves, gradients, strict=True):
                torch.testing.assert_close(right[name].value, gradient, rtol=1e-8, atol=1e-9)


def fuzz(cases_of: st.SearchStrategy[Any], check: Callable[[Any, Any], None], device: Any) -> None:
    print(f"FUSED_CE_FUZZ_SEED={SEED}")

    @seed(SEED)
    @settings(
        max_examples=EXAMPLES if torch.device(device).type == "cpu" else min(EXAMPLES, 60),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases_of)
    def run(case: Any) -> None:
        check(case, device)

    run()


def test_fuzz_of_classes(device: Any) -> None:
    fuzz(class_cases(8194 if torch.device(device).type == "cpu" else 1030), check_classes, device)


def test_fuzz(device: Any) -> None:
    fuzz(cases(4096 if torch.device(device).type == "cpu" else 256), check, device)
