"""PyTorch's own test samples for its cross entropy functions and modules, through ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FLOATS, LOGITS, PROBABILITY, SOFTMAX, Form, dtype_id, form_id, on
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_map

import fused_ce

OPINFOS = {
    LOGITS: "nn.functional.binary_cross_entropy_with_logits",
    PROBABILITY: "nn.functional.binary_cross_entropy",
    SOFTMAX: "nn.functional.cross_entropy",
}
MODULES = {
    nn.BCEWithLogitsLoss: fused_ce.BCEWithLogitsLoss,
    nn.BCELoss: fused_ce.BCELoss,
    nn.CrossEntropyLoss: fused_ce.CrossEntropyLoss,
}

each_op = pytest.mark.parametrize("form", OPINFOS, ids=form_id)
each_module = pytest.mark.parametrize("theirs", MODULES, ids=lambda module: module.__name__)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)

# some samples use torch's deprecated arguments
pytestmark = pytest.mark.filterwarnings("ignore")


def op_samples(form: Form, dtype: torch.dtype) -> list[Any]:
    (info,) = (info for info in op_db if info.name == OPINFOS[form])
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    return samples


def module_info(theirs: type[nn.Module]) -> Any:
    (info,) = (info for info in module_db if info.module_cls is theirs)
    return info


def module_samples(theirs: type[nn.Module], dtype: torch.dtype) -> list[Any]:
    info = module_info(theirs)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=True
    )
    assert samples
    return samples


def doubled(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def placed(device: str) -> Callable[[Any], Any]:
    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return on(value.detach(), device).requires_grad_(value.requires_grad)

    return place


def loss_and_gradients(
    function: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any]
) -> list[Tensor]:
    loss = function(*arguments, **options)
    leaves = [
        a for a in (*arguments, *options.values()) if isinstance(a, Tensor) and a.requires_grad
    ]
    upstream = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape).to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def check(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    device: str,
) -> None:
    """Ours in the sample's dtype beside torch's in float64."""
    moved = tree_map(placed(device), (arguments, options))
    found = loss_and_gradients(ours, *moved)
    right = loss_and_gradients(theirs, *tree_map(doubled, (arguments, options)))
    assert len(found) == len(right)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a.cpu(), b.to(a.dtype), equal_nan=True)


@each_dtype
@each_op
def test_functions(form: Form, dtype: torch.dtype, device: str) -> None:
    for sample in op_samples(form, dtype):
        check(form.ours, form.theirs, *op_call(sample), device)


@each_dtype
@each_module
def test_modules(theirs: type[nn.Module], dtype: torch.dtype, device: str) -> None:
    for sample in module_samples(theirs, dtype):
        made, called = sample.constructor_input, sample.forward_input
        modules = []
        for kind, change in ((MODULES[theirs], placed(device)), (theirs, doubled)):
            args, kwargs = tree_map(change, (made.args, made.kwargs))
            modules.append(kind(*args, **kwargs))
        check(*modules, called.args, called.kwargs, device)


# Higher derivatives and forward mode are composed from torch's operations on every device.
@each_op
def test_second_derivatives(form: Form) -> None:
    for sample in op_samples(form, torch.float64):
        assert gradgradcheck(*of_leaves(form.ours, *op_call(sample)), fast_mode=True)


@each_op
def test_forward_mode(form: Form) -> None:
    for sample in op_samples(form, torch.float64):
        function, leaves = of_leaves(form.ours, *op_call(sample))
        assert gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)


@each_module
def test_higher_derivatives_of_modules(theirs: type[nn.Module]) -> None:
    for sample in module_samples(theirs, torch.float64):
        function, leaves = of_leaves(*module_call(theirs, sample))
        if function(*leaves).isnan().any():
            continue  # the mean of no rows, whose derivative by the upstream gradient is none
        assert gradgradcheck(function, leaves, fast_mode=True)
        assert gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)


# Of these modules, torch has wrong calls for softmax cross entropy alone, and for no function.
def test_errors_of_modules() -> None:
    theirs = nn.CrossEntropyLoss
    info = module_info(theirs)
    if info.module_error_inputs_func is None:
        pytest.skip("torch 2.10 has none")
    samples = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    assert samples
    for sample in samples:
        wrong = sample.module_error_input
        made, called = wrong.constructor_input, wrong.forward_input
        with pytest.raises(sample.error_type, match=sample.error_regex):
            MODULES[theirs](*made.args, **made.kwargs)(*called.args, **called.kwargs)


def op_call(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (sample.input, *sample.args), sample.kwargs


def module_call(
    theirs: type[nn.Module], sample: Any
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    made, called = sample.constructor_input, sample.forward_input
    module = MODULES[theirs](*made.args, **made.kwargs)
    return module, called.args, called.kwargs


def of_leaves(
    function: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The call as a function of those of its tensors that require a gradient."""
    places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]
    assert places

    def of(*leaves: Tensor) -> Tensor:
        values = list(arguments)
        for i, leaf in zip(places, leaves, strict=True):
            values[i] = leaf
        return function(*values, **options)

    return of, tuple(arguments[i] for i in places)
