"""Higher derivatives, forward mode, torch.func, torch.compile, torch.export, checkpointing and CUDA
graphs: everything that torch's own losses can be put through."""

from __future__ import annotations

import copy
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import (
    FOCAL,
    FORMS,
    LOGITS,
    PROBABILITY,
    REDUCTIONS,
    SOFTMAX,
    Form,
    exact,
    form_id,
    make_input,
    make_target,
    run,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fused_ce

bce_with_logits = LOGITS.ours
cross_entropy = SOFTMAX.ours
F64 = torch.float64
OPS = torch.ops.fused_ce

each_form = pytest.mark.parametrize("form", FORMS, ids=form_id)
each_loss = pytest.mark.parametrize("form", [*FORMS, SOFTMAX], ids=form_id)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(autouse=True)
def _no_compiled_code_from_before() -> None:
    torch._dynamo.reset()


# ---- derivatives ---------------------------------------------------------------------------------


def differentiable_arguments(form: Form) -> dict[str, Tensor]:
    """float64 tensors of shape (3, 4), off the places where a derivative has a kink."""
    tensors = {
        "input": make_input(form, (3, 4), F64),
        "target": torch.rand(3, 4, dtype=F64) * 0.8 + 0.1,
        "sample_weight": torch.rand(3, dtype=F64),
        "normalizer": torch.tensor(7.5, dtype=F64),
    }
    shapes = {"weight": (4,), "pos_weight": (3, 1)}
    return tensors | {name: torch.rand(shapes[name], dtype=F64) for name in form.weights}


def as_function(form: Form, names: list[str], **options: Any) -> Callable[..., Tensor]:
    def function(*tensors: Tensor) -> Tensor:
        arguments = options | dict(zip(names, tensors, strict=True))
        return form.ours(arguments.pop("input"), arguments.pop("target"), **arguments)

    return function


# The derivatives are composed from torch's operations on every device, so the CPU speaks for all.
@each_reduction
@pytest.mark.parametrize("extra", [{}, {"ignore_index": 0, "label_smoothing": 0.2}], ids=str)
@each_form
def test_every_argument_to_second_order(form: Form, extra: dict[str, Any], reduction: str) -> None:
    tensors = differentiable_arguments(form)
    if "ignore_index" in extra:
        # a step of the numerical derivative would take an ignored target from its index
        target = tensors.pop("target").index_fill(0, torch.tensor([0]), 0)
        extra = extra | {"target": target}
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    function = as_function(form, list(tensors), reduction=reduction, **extra)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves, check_batched_grad=True, fast_mode=True)


@each_reduction
@each_loss
def test_input_alone_to_second_order(form: Form, reduction: str) -> None:
    """Where the op, and not the composition, gives the first derivative."""
    x = make_input(form, (3, 4), F64).requires_grad_()
    t = torch.rand(3, 4, dtype=F64).round()  # hard labels
    assert gradcheck(lambda x: form.ours(x, t, reduction=reduction), x, check_batched_grad=True)
    assert gradgradcheck(lambda x: form.ours(x, t, reduction=reduction), x)


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5])
def test_focal_targets_to_second_order(gamma: float) -> None:
    """Also at hard labels, where the power is taken of a single sigmoid."""
    x = make_input(FOCAL, (12,), F64).requires_grad_()
    t = torch.tensor([0.0, 1.0, 0.4] * 4, dtype=F64).requires_grad_()
    # one-sided where t is 0 or 1, since a little outside [0, 1] the power does not exist
    tensors = (x, t)

    def ours(x: Tensor, t: Tensor) -> Tensor:
        return FOCAL.ours(x, t, gamma=gamma, reduction="sum")

    def right(x: Tensor, t: Tensor) -> Tensor:
        return FOCAL.exact(x, t, gamma=gamma).sum()

    for argnums in (0, 1):
        gradients = [torch.func.grad(f, argnums)(*tensors) for f in (ours, right)]
        torch.testing.assert_close(*gradients)
        tangent = torch.randn(12, dtype=F64)
        for f_argnums in (0, 1):
            # forward over reverse; the tangent belongs to the one and the gradient to the other
            mixed = []
            for f in (ours, right):
                gradient = torch.func.grad(f, argnums)
                primal = tensors[f_argnums]

                def of_one(v: Tensor, gradient: Any = gradient, place: int = f_argnums) -> Tensor:
                    return gradient(*(v if i == place else a for i, a in enumerate(tensors)))

                mixed.append(torch.func.jvp(of_one, (primal,), (tangent,))[1])
            torch.testing.assert_close(*mixed)


@each_loss
def test_create_graph(form: Form, device: str) -> None:
    """A gradient penalty, with another upstream gradient than 1."""
    x, t = make_input(form, (5,), F64), torch.rand(5, dtype=F64)
    found = []
    for function, where in ((form.ours, device), (form.theirs, "cpu")):
        leaf = x.to(where, copy=True).requires_grad_()
        loss = function(leaf, t.to(where), reduction="mean") * 3
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (gradient.square().sum() + loss).backward()
        found.append(leaf.grad.cpu())
    torch.testing.assert_close(*found)


def probabilities(x: Tensor) -> Tensor:
    return 0.1 + 0.8 * torch.sigmoid(x)


# name: the arguments, made of one tensor
DEPENDENT: dict[str, Callable[[Form, Tensor], dict[str, Tensor]]] = {
    "target of the logits": lambda form, x: {"target": probabilities(x)},
    "target of what the logits are of": lambda form, x: {"target": probabilities(2 * x)},
    "sample_weight of the logits": lambda form, x: {"sample_weight": x[:, 0].square()},
    "weight of the logits": lambda form, x: {"weight": x[0].square()},
}


@pytest.mark.parametrize("name", DEPENDENT)
@each_loss
def test_create_graph_where_one_argument_is_made_of_another(
    form: Form, name: str, device: str
) -> None:
    if name == "weight of the logits" and form is FOCAL:
        pytest.skip("focal loss has no weight")
    x, t = torch.randn(3, 4, dtype=F64), torch.rand(3, 4, dtype=F64)
    found = []
    for differentiable in (False, True):
        leaf = x.to(device, copy=True).requires_grad_()
        source = leaf * 1
        logits = probabilities(source) if form is PROBABILITY else source
        arguments = {"target": t.to(device)} | DEPENDENT[name](form, source)
        loss = form.ours(logits, arguments.pop("target"), reduction="mean", **arguments)
        found.append(torch.autograd.grad(loss, leaf, create_graph=differentiable)[0])
    assert found[1].requires_grad
    torch.testing.assert_close(found[1].detach(), found[0])


def test_one_graph_in_two_threads(device: str) -> None:
    for _ in range(20):  # the gradient is handed out once, whichever thread comes first
        x, t = (torch.rand(64, 50).to(device).requires_grad_() for _ in range(2))
        loss = bce_with_logits(x, t)
        right = run(bce_with_logits, x.detach().cpu(), t.detach().cpu()).gradient
        barrier, found = threading.Barrier(2), {}

        def differentiate(
            upstream: float,
            barrier: threading.Barrier = barrier,
            found: dict[float, Tensor] = found,
            loss: Tensor = loss,
            tensors: tuple[Tensor, ...] = (x, t),
        ) -> None:
            barrier.wait()
            seed = torch.tensor(upstream).to(loss.device)
            found[upstream] = torch.autograd.grad(loss, tensors, seed, retain_graph=True)[0]

        threads = [threading.Thread(target=differentiate, args=(u,)) for u in (2.0, 3.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for upstream, gradient in found.items():
            torch.testing.assert_close(gradient.cpu(), right * upstream)


@each_reduction
@each_loss
def test_upstream_gradient_with_a_tangent(form: Form, reduction: str, device: str) -> None:
    """Of a loss that was computed outside of forward mode."""
    x = make_input(form, (3, 4), F64).to(device).requires_grad_()
    t = torch.rand(3, 4, dtype=F64).to(device).requires_grad_()
    loss = form.ours(x, t, reduction=reduction)
    for inputs in ((x,), (x, t)):
        upstream, tangent = torch.randn(2, *loss.shape, dtype=F64).to(device)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(upstream, tangent)
            gradients = torch.autograd.grad(loss, inputs, dual, retain_graph=True)
            tangents = [forward_ad.unpack_dual(g).tangent for g in gradients]
        right = torch.autograd.grad(loss, inputs, tangent, retain_graph=True)  # it is linear
        for found, expected in zip(tangents, right, strict=True):
            torch.testing.assert_close(found, expected)


@each_reduction
@each_loss
def test_gradient_under_vmap(form: Form, reduction: str, device: str) -> None:
    """Rows of a Jacobian, of a loss that was computed outside of vmap."""
    x, t = make_input(form, (5,)).to(device).requires_grad_(), make_target((5,)).to(device)
    loss = form.ours(x, t, reduction=reduction)
    upstream = torch.randn(3, *loss.shape).to(device)

    def gradient(v: Tensor) -> Tensor:
        return torch.autograd.grad(loss, x, v, retain_graph=True)[0]

    batched = torch.vmap(gradient)(upstream)
    for one, found in zip(upstream, batched, strict=True):
        torch.testing.assert_close(found, gradient(one))


@each_reduction
@each_form
def test_second_derivative_at_ignored_elements(form: Form, reduction: str, device: str) -> None:
    x = make_input(form, (3,), F64).to(device)
    t = torch.tensor([0.3, 7.0, 0.9], dtype=F64).to(device).requires_grad_()
    weight = torch.ones(3, dtype=F64).to(device).requires_grad_()
    loss = form.ours(x, t, sample_weight=weight, ignore_index=7, reduction=reduction).sum()
    (of_target,) = torch.autograd.grad(loss, t, create_graph=True)
    (mixed,) = torch.autograd.grad(of_target.sum(), weight)
    assert mixed[1] == 0
    assert mixed.isfinite().all()


@each_loss
def test_inference_mode_with_enable_grad(form: Form, device: str) -> None:
    """Autograd does not record, as in torch's losses."""
    x = make_input(form, (4, 5)).to(device).requires_grad_()
    t = torch.rand(4, 5).to(device)
    for reduction in REDUCTIONS:
        with torch.inference_mode(), torch.enable_grad():
            assert not form.ours(x, t, reduction=reduction).requires_grad


@each_loss
def test_is_grads_batched(form: Form, device: str) -> None:
    x, t = make_input(form, (5,)), make_target((5,))
    for reduction in REDUCTIONS:
        leaf = x.to(device).requires_grad_()
        loss = form.ours(leaf, t.to(device), reduction=reduction)
        upstream = torch.randn(3, *loss.shape)
        (batched,) = torch.autograd.grad(
            loss, leaf, upstream.to(device), is_grads_batched=True, retain_graph=True
        )
        for one, gradient in zip(upstream, batched, strict=True):
            right = run(form.ours, x, t, upstream=one, reduction=reduction).gradient
            torch.testing.assert_close(gradient.cpu(), right)


@each_loss
def test_forward_mode(form: Form, device: str) -> None:
    x, t, tangent = make_input(form, (5,)), make_target((5,)), torch.randn(5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.to(device), tangent.to(device))
        loss = form.ours(dual, t.to(device), reduction="sum")
        derivative = forward_ad.unpack_dual(loss).tangent
    right = (run(form.ours, x, t, reduction="sum").gradient * tangent).sum()
    torch.testing.assert_close(derivative.cpu(), right)


CLASSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ignored": {"ignore_index": 1},
    "weighted and smoothed": {
        "weight": torch.linspace(0.5, 2, 4, dtype=F64),
        "label_smoothing": 0.2,
    },
    "capped": {"softcap": 3.0, "logit_scale": 0.7, "z_loss": 0.05},
    "weights of rows": {"sample_weight": torch.linspace(-1, 2, 5, dtype=F64)},
}


@each_reduction
@pytest.mark.parametrize("options", CLASSES.values(), ids=CLASSES)
def test_classes_to_second_order(options: dict[str, Any], reduction: str) -> None:
    x, t = torch.randn(5, 4, dtype=F64, requires_grad=True), torch.tensor([0, 1, 3, 1, 2])

    def function(x: Tensor) -> Tensor:
        return cross_entropy(x, t, reduction=reduction, **options)

    assert gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, x, check_batched_grad=True)


@each_reduction
@pytest.mark.parametrize("mode", ["labels", "probabilities"])
def test_every_argument_of_classes_to_second_order(mode: str, reduction: str) -> None:
    tensors = {"input": torch.randn(3, 4, 2, dtype=F64)}
    constant: dict[str, Any] = {"target": torch.tensor([[0, 3], [-100, 1], [2, 2]])}
    if mode == "probabilities":
        tensors["target"], constant = torch.rand(3, 4, 2, dtype=F64), {}
    tensors |= {
        "weight": torch.rand(4, dtype=F64),
        "sample_weight": torch.rand(3, dtype=F64),
    }
    if reduction == "mean":
        tensors["normalizer"] = torch.tensor(7.5, dtype=F64)
    options = {"reduction": reduction, "label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01}
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    function = as_function(SOFTMAX, list(tensors), **constant, **options)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves, check_batched_grad=True, fast_mode=True)


@each_reduction
def test_statistics_to_second_order(reduction: str) -> None:
    x, t = torch.randn(5, 4, dtype=F64, requires_grad=True), torch.tensor([0, 1, -100, 1, 2])

    def function(x: Tensor) -> tuple[Tensor, ...]:
        loss, stats = cross_entropy(x, t, reduction=reduction, stats=("lse", "entropy"))
        return loss, stats.lse, stats.entropy

    assert gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, x, check_batched_grad=True)


def test_derivatives_at_minus_infinity(device: str) -> None:
    """No NaN from a branch that is not taken, at a class that is masked out."""
    x, t = torch.randn(3, 5, dtype=F64), torch.tensor([0, 3, 4])
    masked = x.index_fill(1, torch.tensor([1]), -torch.inf)
    without = x[:, [0, 2, 3, 4]]
    found = []
    for logits, labels in ((masked, t), (without, t.sub(1).clamp(min=0))):
        leaf = logits.to(device).requires_grad_()
        loss, stats = cross_entropy(leaf, labels.to(device), stats=("lse", "entropy"))
        total = loss + stats.lse.square().sum() + stats.entropy.square().sum()
        (first,) = torch.autograd.grad(total, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), leaf)
        found.append((first.detach().cpu(), second.cpu()))
    for with_it, without_it in zip(*found, strict=True):
        assert (with_it[:, 1] == 0).all()
        torch.testing.assert_close(with_it[:, [0, 2, 3, 4]], without_it)


# ---- torch.func ----------------------------------------------------------------------------------


class TestFunc:
    """Each transform of ours beside the same of what it replaces."""

    @pytest.fixture(params=[*FORMS, SOFTMAX], ids=form_id)
    def form(self, request: pytest.FixtureRequest) -> Form:
        return request.param

    def compare(
        self, form: Form, transform: Callable[..., Any], device: str, *tensors: Tensor
    ) -> None:
        ours = transform(lambda x, t: form.ours(x, t, reduction="mean"))
        theirs = transform(lambda x, t: form.theirs(x, t, reduction="mean"))
        found = ours(*(tensor.to(device) for tensor in tensors))
        torch.testing.assert_close(found.cpu(), theirs(*tensors))

    def tensors(self, form: Form, *shape: int) -> tuple[Tensor, Tensor]:
        return make_input(form, shape, F64), torch.rand(shape, dtype=F64)

    def test_grad(self, form: Form, device: str) -> None:
        self.compare(form, torch.func.grad, device, *self.tensors(form, 5))

    def test_grad_of_target(self, form: Form, device: str) -> None:
        self.compare(form, lambda f: torch.func.grad(f, 1), device, *self.tensors(form, 5))

    def test_vmap(self, form: Form, device: str) -> None:
        self.compare(form, torch.func.vmap, device, *self.tensors(form, 3, 5))

    def test_vmap_over_one_argument(self, form: Form, device: str) -> None:
        x, _ = self.tensors(form, 3, 5)
        t = torch.rand(5, dtype=F64)
        self.compare(form, lambda f: torch.func.vmap(f, (0, None)), device, x, t)

    def test_vmap_of_grad(self, form: Form, device: str) -> None:
        self.compare(
            form, lambda f: torch.func.vmap(torch.func.grad(f)), device, *self.tensors(form, 3, 5)
        )

    def test_hessian(self, form: Form, device: str) -> None:
        self.compare(form, torch.func.hessian, device, *self.tensors(form, 5))

    def test_jvp(self, form: Form, device: str) -> None:
        def transform(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda x, t: torch.func.jvp(f, (x, t), (x.sin(), t.cos()))[1]

        self.compare(form, transform, device, *self.tensors(form, 5))


def test_vmap_with_extras(device: str) -> None:
    x, t = make_input(LOGITS, (3, 6)), make_target((3, 6))
    t[:, 0] = -1
    options = {"ignore_index": -1, "label_smoothing": 0.1, "normalizer": 4.0}
    found = torch.func.vmap(
        lambda x, t, w: bce_with_logits(x, t, sample_weight=w, on_empty="zero", **options)
    )(x.to(device), t.to(device), torch.ones(3, 6).to(device))
    right = torch.stack([exact(LOGITS, a, b, **options) for a, b in zip(x, t, strict=True)])
    torch.testing.assert_close(found.cpu(), right)


class TestFuncOfClasses:
    """Each transform beside the same of torch's function, on labels."""

    def compare(
        self, transform: Callable[..., Any], device: str, *tensors: Tensor, **options: Any
    ) -> None:
        ours = transform(lambda x, t: cross_entropy(x, t, **options))
        theirs = transform(lambda x, t: torch.nn.functional.cross_entropy(x, t, **options))
        found = ours(*(tensor.to(device) for tensor in tensors))
        torch.testing.assert_close(found.cpu(), theirs(*tensors), equal_nan=True)

    def tensors(self) -> tuple[Tensor, Tensor]:
        return torch.randn(3, 6, 4, dtype=F64), torch.randint(-1, 4, (3, 6))

    @each_reduction
    def test_vmap(self, reduction: str, device: str) -> None:
        options = {"reduction": reduction, "ignore_index": -1, "label_smoothing": 0.1}
        x, t = self.tensors()
        self.compare(torch.func.vmap, device, x, t, **options)
        self.compare(lambda f: torch.func.vmap(f, (0, None)), device, x, t[0], **options)
        self.compare(lambda f: torch.func.vmap(f, (2, 0)), device, x.movedim(0, 2), t, **options)
        del options["label_smoothing"]  # which torch cannot vmap over labels alone
        self.compare(lambda f: torch.func.vmap(f, (None, 0)), device, x[0], t, **options)

    @each_reduction
    def test_vmap_over_rows(self, reduction: str, device: str) -> None:
        x, t = self.tensors()
        self.compare(torch.func.vmap, device, x[0], t[0], reduction=reduction, ignore_index=-1)

    def test_grad(self, device: str) -> None:
        x, t = self.tensors()
        self.compare(torch.func.grad, device, x[0], t[0], ignore_index=-1)
        self.compare(lambda f: torch.func.vmap(torch.func.grad(f)), device, x, t, ignore_index=-1)

    def test_hessian(self, device: str) -> None:
        x, t = self.tensors()
        self.compare(torch.func.hessian, device, x[0], t[0], ignore_index=-1)

    def test_jvp(self, device: str) -> None:
        def transform(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda x, t: torch.func.jvp(lambda x: f(x, t), (x,), (x.sin(),))[1]

        x, t = self.tensors()
        self.compare(transform, device, x[0], t[0], ignore_index=-1)


def test_vmap_of_statistics(device: str) -> None:
    x, t = torch.randn(3, 6, 4), torch.randint(4, (3, 6))
    names = ("lse", "entropy", "prediction", "correct")
    loss, stats = torch.func.vmap(lambda x, t: cross_entropy(x, t, stats=names))(
        x.to(device), t.to(device)
    )
    for i in range(3):
        right, stats_of_one = cross_entropy(x[i], t[i], stats=names)
        torch.testing.assert_close(loss[i].cpu(), right)
        for name in names:
            found = getattr(stats, name)[i].cpu()
            torch.testing.assert_close(found, getattr(stats_of_one, name))


def test_func_of_some_statistics(device: str) -> None:
    """Those that are not there are no results of the transformed function."""
    x, t = torch.randn(3, 6, 4).to(device), torch.randint(4, (3, 6)).to(device)

    def loss(x: Tensor, t: Tensor) -> Any:
        return cross_entropy(x, t, stats=("lse", "correct"))

    found, stats = torch.func.vmap(loss)(x, t)
    gradient, of_one = torch.func.grad(loss, has_aux=True)(x[0], t[0])
    right, right_stats = loss(x[0], t[0])
    torch.testing.assert_close(found[0], right)
    torch.testing.assert_close(gradient.cpu(), run(cross_entropy, x[0].cpu(), t[0].cpu()).gradient)
    for name in ("lse", "correct"):
        torch.testing.assert_close(getattr(stats, name)[0], getattr(right_stats, name))
        torch.testing.assert_close(getattr(of_one, name), getattr(right_stats, name))
    assert stats.entropy is None


# ---- torch.compile -------------------------------------------------------------------------------


class Graphs:
    """A backend that keeps the graphs of forward and backward, and how many there were."""

    def __init__(self) -> None:
        self.code: list[str] = []

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
            self.code.append(graph.code)
            return make_boxed_func(graph.forward)

        return torch.compile(
            function, fullgraph=True, backend=aot_autograd(fw_compiler=keep), **options
        )

    def ops(self) -> set[str]:
        names = fused_ce.backends.OPS
        return {n for n in names for code in self.code if f"fused_ce.{n}.default" in code}


COMPILED: dict[str, tuple[Form, dict[str, Any], torch.dtype, set[str]]] = {
    # the gradient comes with the loss, in one op
    "mean": (LOGITS, {}, torch.float32, {"_bce_with_gradient"}),
    "sum": (LOGITS, {"reduction": "sum"}, torch.float32, {"_bce_with_gradient"}),
    "weights": (
        LOGITS,
        {"weight": torch.rand(5), "pos_weight": torch.rand(1, 5)},
        torch.float32,
        {"_bce_with_gradient"},
    ),
    "extras": (
        LOGITS,
        {"ignore_index": 0, "label_smoothing": 0.1, "on_empty": "zero"},
        torch.float32,
        {"_bce_with_gradient"},
    ),
    "normalizer": (LOGITS, {"normalizer": torch.tensor(3)}, torch.float32, {"_bce_with_gradient"}),
    "sample_weight": (
        LOGITS,
        {"sample_weight": torch.tensor(0.5), "normalizer": 7},
        torch.float32,
        {"_bce_with_gradient"},
    ),
    "probability": (PROBABILITY, {}, torch.float32, {"_bce_with_gradient"}),
    "focal": (FOCAL, {"reduction": "mean", "gamma": 1.5}, torch.float32, {"_bce_with_gradient"}),
    # in backward, from the logits
    "none": (LOGITS, {"reduction": "none"}, torch.float32, {"_bce", "_bce_backward"}),
    "focal, none": (FOCAL, {}, torch.float32, {"_bce", "_bce_backward"}),
    "float16": (LOGITS, {}, torch.float16, {"_bce", "_bce_backward"}),
    "bfloat16": (LOGITS, {}, torch.bfloat16, {"_bce", "_bce_backward"}),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile(name: str, dynamic: bool, device: str) -> None:
    form, options, dtype, ops = COMPILED[name]
    graphs = Graphs()
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    compiled = graphs.compile(lambda x, t: form.ours(x, t, **moved), dynamic=dynamic)
    for rows in (4, 7) if dynamic else (4,):
        x, t = make_input(form, (rows, 5), dtype), torch.rand(rows, 5).round().to(dtype)
        right = run(form.ours, x, t, device=device, upstream=2.0, **options)
        found = run(compiled, x, t, device=device, upstream=2.0)
        for a, b in zip(found, right, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            torch.testing.assert_close(a, b)
    assert graphs.ops() == ops
    assert len(graphs.code) == 2  # one forward, one backward: the second size compiled nothing


def labels_of(x: Tensor) -> Tensor:
    return torch.arange(x.size(0)) % (x.size(1) + 1) - 1  # from -1 on


WITH_GRADIENT, IN_BACKWARD = {"_softmax_ce_with_gradient"}, {"_softmax_ce", "_softmax_ce_backward"}
COMPILED_CLASSES: dict[str, tuple[dict[str, Any], torch.dtype, set[str]]] = {
    "mean": ({}, torch.float32, WITH_GRADIENT),
    "sum": ({"reduction": "sum"}, torch.float32, WITH_GRADIENT),
    "weight": ({"weight": torch.rand(5)}, torch.float32, WITH_GRADIENT),
    "extras": (
        {"label_smoothing": 0.1, "softcap": 9.0, "z_loss": 0.01, "on_empty": "zero"},
        torch.float32,
        WITH_GRADIENT,
    ),
    "normalizer": (
        {"normalizer": torch.tensor(3), "sample_weight": torch.tensor(0.5)},
        torch.float32,
        WITH_GRADIENT,
    ),
    "prediction": ({"stats": ("prediction", "correct")}, torch.float32, WITH_GRADIENT),
    "lse": ({"stats": ("lse",)}, torch.float32, IN_BACKWARD),
    "none": ({"reduction": "none"}, torch.float32, IN_BACKWARD),
    "float16": ({}, torch.float16, IN_BACKWARD),
    "bfloat16": ({}, torch.bfloat16, IN_BACKWARD),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("mode", ["labels", "probabilities"])
@pytest.mark.parametrize("name", COMPILED_CLASSES)
def test_compile_classes(name: str, mode: str, dynamic: bool, device: str) -> None:
    options, dtype, ops = COMPILED_CLASSES[name]
    graphs = Graphs()
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}

    def function(x: Tensor, t: Tensor, **_: Any) -> Tensor:
        found = cross_entropy(x, t, ignore_index=-1, **moved)
        if "stats" not in options:
            return found
        loss, stats = found
        return loss if stats.lse is None else loss + (stats.lse * 0.1).sum()

    compiled = graphs.compile(function, dynamic=dynamic)
    for rows in (4, 7) if dynamic else (4,):
        x = make_input(LOGITS, (rows, 5), dtype)
        t = labels_of(x) if mode == "labels" else torch.rand(rows, 5).to(dtype)
        right = run(function, x, t, device=device, upstream=2.0)
        found = run(compiled, x, t, device=device, upstream=2.0)
        for a, b in zip(found, right, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            torch.testing.assert_close(a, b)
    assert graphs.ops() == ops
    assert len(graphs.code) == 2  # one forward, one backward: the second size compiled nothing


def test_compile_statistics(device: str) -> None:
    """As values and under derivatives, within a model under autocast."""
    model = nn.Linear(5, 3).to(device)
    module = fused_ce.CrossEntropyLoss(
        torch.rand(3), stats=("lse", "entropy", "prediction", "correct"), inplace_backward=True
    ).to(device)

    def step(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device, torch.bfloat16):
            loss, stats = module(model(x), t)
        total = loss + 0.1 * stats.lse.sum() - (stats.entropy * stats.correct).sum()
        return total, stats.prediction, stats.lse

    x, t = torch.randn(4, 5).to(device), torch.tensor([0, 2, 1, -100]).to(device)
    found = []
    for f in (step, Graphs().compile(step)):
        total, *stats = f(x, t)
        gradients = torch.autograd.grad(total, list(model.parameters()))
        found.append([total.detach(), *(s.detach() for s in stats), *gradients])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inductor_of_classes(reduction: str, device: str) -> None:
    def function(x: Tensor, t: Tensor) -> Tensor:
        image = (x * 2).view(2, 3, 5, 2)
        rows = x[:1].expand(20, 3)  # no dense strides to keep
        return cross_entropy(image, t.view(2, 5, 2), reduction=reduction).sum() + cross_entropy(
            rows, t, reduction=reduction
        )

    x, t = torch.randn(20, 3), torch.randint(3, (20,))
    right = run(function, x, t, device=device)
    found = run(torch.compile(function, fullgraph=True), x, t, device=device)
    torch.testing.assert_close(found.loss, right.loss)
    torch.testing.assert_close(found.gradient, right.gradient)


def test_compile_without_gradient(device: str) -> None:
    graphs = Graphs()
    x, t = make_input(LOGITS, (4, 5)).to(device), make_target((4, 5)).to(device)
    for reduction in REDUCTIONS:
        compiled = graphs.compile(lambda x, t, r=reduction: bce_with_logits(x, t, reduction=r))
        torch.testing.assert_close(compiled(x, t), bce_with_logits(x, t, reduction=reduction))
    assert graphs.ops() == {"_bce"}


@each_loss
def test_compile_gradients_of_all_arguments(form: Form, device: str) -> None:
    """Composed from torch's operations, for the compiler to fuse."""
    tensors = {name: v.float() for name, v in differentiable_arguments(form).items()}
    function = as_function(form, list(tensors), reduction="mean")
    gradients = []
    for f in (function, Graphs().compile(function)):
        leaves = [v.to(device, copy=True).requires_grad_() for v in tensors.values()]
        gradients.append(torch.autograd.grad(f(*leaves), leaves))
    torch.testing.assert_close(*gradients)


def test_compile_module_around_a_model(device: str) -> None:
    """As in training: under autocast, pos_weight a buffer, inplace_backward asked for."""
    model = nn.Linear(5, 3).to(device)
    loss_module = fused_ce.BCEWithLogitsLoss(pos_weight=torch.rand(3), inplace_backward=True)
    loss_module.to(device)

    def step(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return loss_module(model(x), t)

    graphs = Graphs()
    x, t = torch.randn(4, 5).to(device), (torch.rand(4, 3) < 0.5).to(device)
    found = []
    for f in (step, graphs.compile(step)):
        loss = f(x, t)
        assert loss.dtype == torch.float32
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*found)
    assert graphs.ops() == {"_bce", "_bce_backward"}


def test_compile_normalizer_of_the_shape(device: str) -> None:
    compiled = Graphs().compile(
        lambda x, t: bce_with_logits(x, t, normalizer=x.shape[0]), dynamic=True
    )
    for rows in (4, 7):
        x, t = make_input(LOGITS, (rows, 5)).to(device), make_target((rows, 5)).to(device)
        torch.testing.assert_close(compiled(x, t), bce_with_logits(x, t, normalizer=rows))


@pytest.mark.parametrize("kind", [int, float])
def test_compile_normalizers_that_differ(kind: type, device: str) -> None:
    """As the number of tokens does from step to step: it is no constant of the code."""
    x, t = make_input(LOGITS, (4, 5)).to(device), make_target((4, 5)).to(device)
    graphs = Graphs()
    for loss in (bce_with_logits, cross_entropy):
        compiled = graphs.compile(lambda x, t, n, loss=loss: loss(x, t, normalizer=n))
        for n in range(17, 29):
            number = kind(n)
            torch.testing.assert_close(compiled(x, t, number), loss(x, t, normalizer=number))
    assert len(graphs.code) <= 4  # of one number, and of any


# One tensor in two arguments.
TWICE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weight of the targets": lambda x, t: bce_with_logits(x, t, weight=t),
    "one weight for both": lambda x, t: bce_with_logits(x, t, weight=t[0], pos_weight=t[0]),
    "probabilities": lambda x, t: PROBABILITY.ours(x.sigmoid(), t, weight=t),
    "softmax": lambda x, t: cross_entropy(x[0], t[0], weight=t[0]),
}


@pytest.mark.parametrize("name", TWICE)
def test_compile_of_one_tensor_twice(name: str, device: str) -> None:
    loss = TWICE[name]
    x, t = make_input(LOGITS, (4, 5)).to(device).requires_grad_(), torch.rand(4, 5).to(device)
    found = [torch.autograd.grad(f(x, t), x) for f in (loss, Graphs().compile(loss))]
    torch.testing.assert_close(*found)


@each_loss
def test_trace_and_save(form: Form, device: str) -> None:
    x, t = make_input(form, (4, 5)).to(device), torch.rand(4, 5).to(device)

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return form.ours(x, t, reduction="mean")

    traced = torch.jit.trace(loss, (x.requires_grad_(), t))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    found = [torch.autograd.grad(f(x, t), x) for f in (loss, torch.jit.load(buffer))]
    torch.testing.assert_close(*found)


@each_loss
def test_no_gradient_stays_behind(form: Form, device: str) -> None:
    """One that forward has written, where backward composes another."""
    x = make_input(form, (4, 5)).to(device).requires_grad_()
    loss = form.ours(x, torch.rand(4, 5).to(device), reduction="mean")
    torch.autograd.grad(loss, x, create_graph=True)
    assert "gradient" not in vars(loss.grad_fn)


def test_compile_of_grad(device: str) -> None:
    x, t = make_input(LOGITS, (4, 5)).to(device), make_target((4, 5)).to(device)
    compiled = torch.compile(torch.func.grad(bce_with_logits), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t), torch.func.grad(bce_with_logits)(x, t))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"reduction": "none", "normalizer": torch.tensor(3.0)},
        {"inplace_backward": True},
    ],
    ids=str,
)
@each_loss
def test_compiled_autograd_after_an_eager_forward(
    form: Form, options: dict[str, Any], device: str
) -> None:
    """Backward is compiled though forward was not, and has saved what it saves when eager."""
    if form is PROBABILITY and "inplace_backward" in options:
        pytest.skip("binary_cross_entropy has no such option")
    x, t = make_input(form, (4, 5)).to(device), make_target((4, 5)).to(device)
    if form is SOFTMAX:
        t = t.softmax(1)
    found = []
    for backward in (torch.Tensor.backward, torch.compile(torch.Tensor.backward, backend="eager")):
        leaf = x.clone().requires_grad_()
        loss = form.ours(leaf * 1, t, **{"reduction": "mean"} | options).sum()
        with torch._dynamo.config.patch(compiled_autograd=True):
            backward(loss)
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


@each_loss
def test_trace_with_symbolic_sizes(form: Form) -> None:
    """On the CPU, where the size decides where a gradient lies."""

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        return torch.autograd.grad(form.ours(x, t, reduction="mean"), x)[0]

    x, t = make_input(form, (4, 5)).requires_grad_(), make_target((4, 5))
    t = t.softmax(1) if form is SOFTMAX else t
    traced = make_fx(gradient, tracing_mode="symbolic")(x, t)
    torch.testing.assert_close(traced(x, t), gradient(x, t))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inductor(reduction: str, device: str) -> None:
    """The default backend, which checks the strides that the ops promise, and reuses memory."""

    def function(x: Tensor, t: Tensor) -> Tensor:
        rows = x[:1].expand(4, 5)  # no dense strides to keep
        return bce_with_logits(x * 2, t, reduction=reduction) + bce_with_logits(
            rows, t, reduction=reduction
        )

    x, t = make_input(LOGITS, (4, 5)), make_target((4, 5))
    right = run(function, x, t, device=device)
    found = run(torch.compile(function, fullgraph=True), x, t, device=device)
    torch.testing.assert_close(found.loss, right.loss)
    torch.testing.assert_close(found.gradient, right.gradient)


# ---- the ops and their fakes ---------------------------------------------------------------------


def op_arguments(
    x: Tensor, t: Tensor, form: int = 0, reduction: int = 1, **tensors: Tensor
) -> tuple[Any, ...]:
    names = ("weight", "pos_weight", "sample_weight", "normalizer")
    weights = [tensors.get(name) for name in names]
    return (x, t, *weights, form, reduction, torch.float32, 0.1, -1, 0.25, 2.0, None, False)


@pytest.mark.parametrize("reduction", [0, 1, 2], ids=REDUCTIONS)
@pytest.mark.parametrize("form", [0, 1, 2], ids=[f.name for f in FORMS])
def test_opcheck(form: int, reduction: int, device: str) -> None:
    x, t = make_input(FORMS[form], (4, 5)).to(device), make_target((4, 5)).to(device)
    weights = {"weight": torch.rand(5).to(device), "sample_weight": torch.rand(4, 1).to(device)}
    dense = op_arguments(x, t, form, reduction, **weights)
    if form == 0:
        dense = op_arguments(
            x, t, pos_weight=torch.rand(4, 1).to(device), normalizer=torch.tensor(3.0).to(device)
        )
    upstream = torch.ones(()).expand(4, 5) if reduction == 0 else torch.ones(())
    torch.library.opcheck(OPS._bce.default, dense)
    if reduction:
        torch.library.opcheck(OPS._bce_with_gradient.default, (torch.empty_like(x), *dense))
    torch.library.opcheck(
        OPS._bce_backward.default, (torch.empty_like(x), False, upstream.to(device), *dense)
    )


@pytest.mark.parametrize("outputs", [0, 1, 15])
@pytest.mark.parametrize("reduction", [0, 1, 2], ids=REDUCTIONS)
@pytest.mark.parametrize("mode", ["labels", "probabilities"])
def test_opcheck_of_classes(mode: str, reduction: int, outputs: int, device: str) -> None:
    for shape in ((4, 5), (5,), (2, 5, 3)):
        x = torch.randn(shape).to(device)
        rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
        t = torch.rand(shape) if mode == "probabilities" else torch.randint(5, rows)
        tensors = (x, t.to(device), torch.rand(5).to(device), torch.rand(rows).to(device))
        numbers = (reduction, torch.float32, -100, 0.1, 30.0, 0.5, 0.01, None, False)
        arguments = (*tensors, None, outputs, *numbers)
        torch.library.opcheck(OPS._softmax_ce.default, arguments)
        if reduction:
            torch.library.opcheck(
                OPS._softmax_ce_with_gradient.default, (torch.empty_like(x), *arguments)
            )
        upstream = torch.ones(rows if reduction == 0 else ()).to(device)
        of_rows = torch.rand(rows).to(device) if outputs else None
        lse = torch.logsumexp(30 * torch.tanh(x * 0.5 / 30), 1 if len(shape) > 1 else 0)
        grads = (upstream, of_rows, of_rows, lse, None)
        backward = (torch.empty_like(x), False, *grads, *tensors, None, *numbers)
        torch.library.opcheck(OPS._softmax_ce_backward.default, backward)


def test_opcheck_scale(device: str) -> None:
    gradient, scale = torch.rand(4, 5).to(device), torch.tensor(3.0).to(device)
    torch.library.opcheck(OPS._scale_.default, (gradient, scale))


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(6, 4),
        lambda x: x[:, :1].expand(6, 4),
        lambda x: x.view(3, 2, 2, 2).contiguous(memory_format=torch.channels_last),
        lambda x: x[:0],
        lambda x: x[0, 0],
    ],
)
def test_opcheck_strides(strided: Callable[[Tensor], Tensor], device: str) -> None:
    x = strided(make_input(LOGITS, (6, 4)).to(device))
    t = torch.rand(x.shape).to(device)
    arguments = op_arguments(x, t, reduction=0)
    torch.library.opcheck(OPS._bce.default, arguments)
    assert OPS._bce(*arguments).stride() == torch.empty_like(x).stride()


# ---- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(strict: bool, device: str) -> None:
    module = fused_ce.BCEWithLogitsLoss(pos_weight=torch.rand(5).to(device))
    x, t = make_input(LOGITS, (4, 5)).to(device), make_target((4, 5)).to(device)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(
        module, (x, t), dynamic_shapes=({0: rows}, {0: rows}), strict=strict
    )
    assert "fused_ce._bce.default" in exported.graph_module.code
    more_x, more_t = torch.cat([x, x]), torch.cat([t, t])
    torch.testing.assert_close(exported.module()(more_x, more_t), module(more_x, more_t))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_of_classes(strict: bool, device: str) -> None:
    module = fused_ce.CrossEntropyLoss(
        torch.rand(5).to(device), label_smoothing=0.1, stats=("correct",)
    )
    x, t = torch.randn(4, 5).to(device), torch.tensor([0, 2, -100, 4]).to(device)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(
        module, (x, t), dynamic_shapes=({0: rows}, {0: rows}), strict=strict
    )
    assert "fused_ce._softmax_ce.default" in exported.graph_module.code
    more_x, more_t = torch.cat([x, x]), torch.cat([t, t])
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    right, right_stats = module(more_x, more_t)
    for program in (exported, torch.export.load(buffer)):
        loss, stats = program.module()(more_x, more_t)
        torch.testing.assert_close(loss, right)
        assert torch.equal(stats.correct, right_stats.correct)


class WithLoss(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.loss = loss

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.linear(x)
        return self.loss(x.sigmoid() if isinstance(self.loss, nn.BCELoss) else x, t)


EXPORTED = {
    "labels": (fused_ce.CrossEntropyLoss(), nn.CrossEntropyLoss(), "labels"),
    "probabilities of classes": (
        fused_ce.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        "probabilities",
    ),
    "logits": (
        fused_ce.BCEWithLogitsLoss(inplace_backward=True),
        nn.BCEWithLogitsLoss(),
        "probabilities",
    ),
    "probability": (fused_ce.BCELoss(), nn.BCELoss(), "probabilities"),
    "sum": (
        fused_ce.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(reduction="sum"),
        "labels",
    ),
}


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", EXPORTED)
def test_export_of_training(name: str, strict: bool, device: str) -> None:
    """The exported module has gradients, for another number of rows too."""
    ours, theirs, kind = EXPORTED[name]
    model = WithLoss(ours).to(device)
    x = torch.randn(8, 5).to(device)
    t = torch.rand(8, 3) if kind == "probabilities" else torch.tensor([0, 2, -100, 1] * 2)
    t = t.to(device)
    rows = {0: torch.export.Dim("rows", min=2)}
    exported = torch.export.export(
        model, (x[:4], t[:4]), dynamic_shapes=(rows, rows), strict=strict
    ).module()
    exported(x, t).backward()
    right = WithLoss(theirs).to(device)
    right.load_state_dict(model.state_dict())
    right(x, t).backward()
    for p, q in zip(exported.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_without_gradient_keeps_the_op(strict: bool, device: str) -> None:
    x, t = torch.randn(4, 5).to(device), torch.tensor([0, 2, -100, 1]).to(device)
    for ours, target, op in (
        (fused_ce.CrossEntropyLoss(), t, "_softmax_ce"),
        (fused_ce.BCEWithLogitsLoss(), torch.rand(4, 3).to(device), "_bce"),
    ):
        with torch.no_grad():
            exported = torch.export.export(WithLoss(ours).to(device), (x, target), strict=strict)
        assert f"fused_ce.{op}.default" in exported.graph_module.code


# Torch's own deprecated switches, which compiled code takes without their warning.
@pytest.mark.parametrize("strict", [None, False, True], ids=["compile", "non-strict", "strict"])
@pytest.mark.parametrize(
    ("options", "reduction"),
    [
        ({"size_average": True}, "mean"),
        ({"size_average": False}, "sum"),
        ({"reduce": False}, "none"),
        ({"reduction": "elementwise_mean"}, "mean"),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", [LOGITS, PROBABILITY, SOFTMAX], ids=form_id)
@pytest.mark.filterwarnings("ignore:size_average and reduce", "ignore:reduction='elementwise_mean'")
def test_deprecated_switches_when_compiled(
    form: Form, options: dict[str, Any], reduction: str, strict: bool | None, device: str
) -> None:
    class Loss(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return form.ours(x, t, **options)

    x, t = make_input(form, (4, 5)).to(device), make_target((4, 5)).to(device)
    if strict is None:
        found = Graphs().compile(Loss())(x, t)
    else:
        found = torch.export.export(Loss(), (x, t), strict=strict).module()(x, t)
    torch.testing.assert_close(found, form.ours(x, t, reduction=reduction))


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_reduction
def test_checkpoint(reduction: str, use_reentrant: bool, device: str) -> None:
    x, t = make_input(LOGITS, (4, 5)), make_target((4, 5))
    right = run(bce_with_logits, x, t, device=device, reduction=reduction).gradient
    leaf = x.to(device, copy=True).requires_grad_()
    moved = t.to(device)
    loss = checkpoint(
        lambda x: bce_with_logits(x * 1, moved, reduction=reduction),
        leaf,
        use_reentrant=use_reentrant,
    )
    loss.backward(torch.ones(loss.shape).to(device))
    torch.testing.assert_close(leaf.grad.cpu(), right)


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_reduction
def test_checkpoint_of_classes(reduction: str, use_reentrant: bool, device: str) -> None:
    x, t = torch.randn(4, 5), torch.tensor([0, 2, -100, 4])
    for inplace_backward in (False, True):
        right = run(cross_entropy, x, t, device=device, reduction=reduction).gradient
        leaf, moved = x.to(device, copy=True).requires_grad_(), t.to(device)

        def function(x: Tensor, t: Tensor = moved, inplace: bool = inplace_backward) -> Tensor:
            return cross_entropy(x * 1, t, reduction=reduction, inplace_backward=inplace)

        loss = checkpoint(function, leaf, use_reentrant=use_reentrant)
        loss.backward(torch.ones(loss.shape).to(device))
        torch.testing.assert_close(leaf.grad.cpu(), right)


def test_inplace_backward_under_checkpoint(device: str) -> None:
    x, t = make_input(LOGITS, (4, 5)), make_target((4, 5))
    right = run(bce_with_logits, x, t, device=device).gradient
    leaf, moved = x.to(device, copy=True).requires_grad_(), t.to(device)
    loss = checkpoint(
        lambda x: bce_with_logits(x * 1, moved, inplace_backward=True), leaf, use_reentrant=False
    )
    loss.backward()
    torch.testing.assert_close(leaf.grad.cpu(), right)


@pytest.mark.parametrize(
    "module",
    [
        fused_ce.BCEWithLogitsLoss(torch.rand(5), pos_weight=torch.rand(5), ignore_index=-1),
        fused_ce.BCELoss(torch.rand(5), label_smoothing=0.1),
        fused_ce.SigmoidFocalLoss(0.5, 1.5, "mean"),
        fused_ce.CrossEntropyLoss(torch.rand(5), label_smoothing=0.1, softcap=9.0),
    ],
    ids=lambda module: type(module).__name__,
)
def test_deepcopy_and_conversions(module: nn.Module, device: str) -> None:
    x, t = torch.rand(4, 5).to(device), make_target((4, 5)).to(device)
    module = copy.deepcopy(module).to(device)
    twin = copy.deepcopy(module)
    assert torch.equal(module(x, t), twin(x, t))
    for buffer in twin.buffers():
        buffer.zero_()
    assert all(buffer.any() for buffer in module.buffers())
    # A model's .half() takes the weights along; they do not promote.
    assert module.half()(x, t).dtype == torch.float32


can_capture = pytest.mark.skipif(
    not torch.cuda.is_available() or "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ,
    reason="CUDA graphs need CUDA and torch's caching allocator",
)


def check_cuda_graph(
    function: Callable[..., Tensor], make: Callable[[], tuple[Tensor, Tensor]]
) -> None:
    """Forward and backward captured: no wait, no allocation outside the pool; replayed."""
    static_x, static_t = (tensor.cuda() for tensor in make())
    static_x.requires_grad_()
    one = torch.ones((), device="cuda", dtype=static_x.dtype)

    def step() -> tuple[Tensor, Tensor]:
        loss = function(static_x, static_t)
        return loss, torch.autograd.grad(loss, static_x, one)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # the first call may load kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    for seed in (1, 2):
        torch.manual_seed(seed)
        x, t = make()
        with torch.no_grad():
            static_x.copy_(x)
        static_t.copy_(t)
        graph.replay()
        right = run(function, x, t)
        torch.testing.assert_close(loss.cpu(), right.loss)
        torch.testing.assert_close(gradient.cpu(), right.gradient)


# The gradient of float16 logits is computed in backward, that of the others in forward.
captured_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str
)


@can_capture
@captured_dtypes
@each_form
def test_cuda_graph(form: Form, dtype: torch.dtype) -> None:
    def function(x: Tensor, t: Tensor) -> Tensor:
        return form.ours(x, t, reduction="mean")

    def make() -> tuple[Tensor, Tensor]:
        return make_input(form, (1030,)).to(dtype), make_target((1030,)).to(dtype)

    check_cuda_graph(function, make)


@can_capture
@captured_dtypes
@pytest.mark.parametrize("classes", [2, 37, 1025, 50257])
def test_cuda_graph_of_classes(classes: int, dtype: torch.dtype) -> None:
    check_cuda_graph(
        lambda x, t: cross_entropy(x, t, label_smoothing=0.1),
        lambda: (torch.randn(33, classes).to(dtype), torch.randint(classes, (33,))),
    )


def _losses_of_distributed_tensors(rank: int, folder: str) -> None:
    from torch.distributed import tensor as distributed

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    mesh = distributed.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, soft, labels = torch.randn(4, 6), torch.rand(4, 6), torch.tensor([5, 0, 2, -100])
    rows, classes, copied = distributed.Shard(0), distributed.Shard(1), distributed.Replicate()
    cases: list[tuple[Form, Tensor, dict[str, Any]]] = [
        (LOGITS, soft, {}),
        (LOGITS, soft, {"inplace_backward": True}),
        (FOCAL, soft, {}),
        (SOFTMAX, soft, {"z_loss": 0.1}),
        (SOFTMAX, labels, {"ignore_index": -100}),
    ]
    for form, t, options in cases:
        for placement in (rows, classes, copied):
            of_target = copied if t is labels and placement is classes else placement
            for reduction in REDUCTIONS:
                leaf = distributed.distribute_tensor(x, mesh, [placement]).detach()
                loss = form.ours(
                    leaf.requires_grad_() * 1,
                    distributed.distribute_tensor(t, mesh, [of_target]),
                    reduction=reduction,
                    **options,
                )
                loss.sum().backward()
                plain = {k: v for k, v in options.items() if k != "inplace_backward"}
                right = run(form.ours, x, t, reduction=reduction, **plain)
                torch.testing.assert_close(loss.full_tensor(), right.loss)
                torch.testing.assert_close(leaf.grad.full_tensor(), right.gradient)
    torch.distributed.destroy_process_group()


# Torch's own operations are what is sharded, so the CPU speaks for all devices.
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_tensors(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_losses_of_distributed_tensors, (str(tmp_path),), nprocs=2)
