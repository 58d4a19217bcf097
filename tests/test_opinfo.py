"""PyTorch's own test samples for its cross entropy functions and modules, through ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def module_samples(theirs: type[nn.Module], dtype: torch.dtype) -> Iterator[Any]:
    (info,) = (info for info in module_db if info.module_cls is theirs)
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
        check(form.ours, form.theirs, (sample.input, *sample.args), sample.kwargs, device)


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
        assert gradgradcheck(*sample_as_function(form, sample), fast_mode=True)


@each_op
def test_forward_mode(form: Form) -> None:
    for sample in op_samples(form, torch.float64):
        assert gradcheck(*sample_as_function(form, sample), check_forward_ad=True, fast_mode=True)


def sample_as_function(form: Form, sample: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The sample as a function of those of its tensors that require a gradient."""
    arguments = (sample.input, *sample.args)
    places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]

    def function(*leaves: Tensor) -> Tensor:
        values = list(arguments)
        for i, leaf in zip(places, leaves, strict=True):
            values[i] = leaf
        return form.ours(*values, **sample.kwargs)

    return function, tuple(arguments[i] for i in places)
