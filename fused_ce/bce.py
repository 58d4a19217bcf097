"""Binary cross entropy: checks, autograd, and the ops of csrc/{cpu,cuda}/bce.cpp.

A call goes through three steps: the public function reads its arguments into the op's own
(`_prepare`), `apply` of autograd.py decides between the op, the op under autograd (`_BCE`), and the
composition of reference.py that transforms need, and the op runs on the tensors' device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fused_ce import reference
from fused_ce.arguments import (
    FLOATS,
    HALVES,
    REALS,
    REDUCTIONS,
    check_tensors,
    defaults_of,
    dtype_name,
    is_autocast_enabled,
    is_zero_on_empty,
    on_device,
    raise_index_error,
    read_index,
    read_normalizer,
    read_sample_weight,
    reduction_code,
    refuse_gradient,
)
from fused_ce.autograd import (
    LossFunction,
    Overwritten,
    apply,
    forward_gradient,
    gradients,
)
from fused_ce.reference import FOCAL, LOGITS, NONE, PROBABILITY

_bce_op = torch.ops.fused_ce._bce.default
_bce_with_gradient_op = torch.ops.fused_ce._bce_with_gradient.default
_bce_backward_op = torch.ops.fused_ce._bce_backward.default

_DEFAULTS = defaults_of(_bce_op)  # from label_smoothing on


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    on_empty: str = "nan",
    inplace_backward: bool = False,
) -> Tensor:
    r"""Binary cross entropy between logits and targets, as `torch's function of this name
    <https://pytorch.org/docs/stable/generated/torch.nn.functional.binary_cross_entropy_with_logits.html>`_.

    .. math::
        \ell = w \left[ p\, t \log(1 + e^{-x}) + (1 - t) \log(1 + e^{x}) \right]

    Args:
        input: logits :math:`x` of any shape and strides; float64, float32, float16 or bfloat16.
        target: :math:`t`, of the input's shape: float of any value (soft labels), bool or integer.
        weight: :math:`w`, broadcast to the input (trailing-aligned, never enlarging it); of any
            float dtype, integer or bool.
        size_average, reduce: torch's deprecated switches; they override `reduction`.
        reduction: "none", "mean" (over the number of elements, whatever the weights) or "sum".
        pos_weight: :math:`p`, broadcast as `weight` is.
        ignore_index: elements whose target equals it cost nothing, get a gradient of zero and are
            not counted by "mean".
        label_smoothing: e in [0, 1]; the target becomes t (1 - e) + e / 2.
        sample_weight: one more weight, for each row (shape of the input's leading dimensions) or
            each element; differentiable.
        normalizer: a number or a one-element tensor that replaces the denominator of "mean".
        on_empty: "nan" or "zero", what a mean over nothing is.
        inplace_backward: the gradient overwrites the logits, so that backward allocates nothing; a
            later use of the logits in autograd raises. Writes only when the logits need a gradient.
            If target or a weight requires one too, backward raises for "mean" and "sum", except of
            float16 logits. Under torch.compile and torch.export, which plan memory themselves,
            under torch.func, in forward mode, and where `normalizer` requires a gradient, it
            changes nothing.

    Returns:
        The loss: of the input's shape for "none", else 0-D. Its dtype is the target's if that is a
        float, else the input's; float32 under autocast. Arithmetic is float32, or float64 if the
        input or the loss is float64. Gradients reach every tensor argument.

    Raises:
        ValueError: target and input differ in shape; unknown reduction or on_empty.
        TypeError: a weight that is no tensor.
        RuntimeError: a weight that cannot be broadcast; tensors on different devices;
            label_smoothing outside [0, 1]; `inplace_backward` on a leaf or on overlapping memory.
        NotImplementedError: logits or targets of another dtype or layout.
    """
    tensors = (input, target, weight, pos_weight, sample_weight, normalizer)
    if has_torch_function(tensors):
        overridden: Tensor = handle_torch_function(
            binary_cross_entropy_with_logits,
            tensors,
            input,
            target,
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            pos_weight=pos_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            sample_weight=sample_weight,
            normalizer=normalizer,
            on_empty=on_empty,
            inplace_backward=inplace_backward,
        )
        return overridden
    code = reduction_code(reduction, size_average, reduce)
    if target.shape != input.shape:
        raise ValueError(
            f"Target size ({target.size()}) must be the same as input size ({input.size()})"
        )
    check_tensors("binary_cross_entropy_with_logits", input, target)
    if weight is not None:
        weight = _checked_weight(
            "binary_cross_entropy_with_logits(): argument 'weight' (position 3)", weight, input
        )
    if pos_weight is not None:
        pos_weight = _checked_weight(
            "binary_cross_entropy_with_logits(): argument 'pos_weight' (position 4)",
            pos_weight,
            input,
            swapped=True,
        )
    return _prepare(
        "binary_cross_entropy_with_logits",
        input,
        target,
        weight,
        pos_weight,
        LOGITS,
        code,
        ignore_index,
        label_smoothing,
        sample_weight,
        normalizer,
        on_empty,
        inplace_backward,
    )


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    on_empty: str = "nan",
) -> Tensor:
    r"""Binary cross entropy between probabilities and targets, as `torch's function of this name
    <https://pytorch.org/docs/stable/generated/torch.nn.functional.binary_cross_entropy.html>`_.

    .. math::
        \ell = -w \left[ t \max(\log p, -100) + (1 - t) \max(\log(1 - p), -100) \right]

    Args:
        input: probabilities :math:`p` in [0, 1], of any shape and strides.
        target: :math:`t`, of the input's shape and dtype, or bool or integer.
        weight, size_average, reduce, reduction, ignore_index, label_smoothing, sample_weight,
            normalizer, on_empty: as for :func:`binary_cross_entropy_with_logits`.

    Returns:
        The loss in the input's dtype, of the input's shape for "none", else 0-D.

    Raises:
        RuntimeError: a probability outside [0, 1] or NaN (on the CPU at once; on CUDA the element's
            loss is NaN, and the next call, or :func:`fused_ce.check`, raises); a float target of
            another dtype; under autocast on CUDA; and as the function on logits.
        ValueError, TypeError, NotImplementedError: as the function on logits.
    """
    tensors = (input, target, weight, sample_weight, normalizer)
    if has_torch_function(tensors):
        overridden: Tensor = handle_torch_function(
            binary_cross_entropy,
            tensors,
            input,
            target,
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            sample_weight=sample_weight,
            normalizer=normalizer,
            on_empty=on_empty,
        )
        return overridden
    code = reduction_code(reduction, size_average, reduce)
    if target.shape != input.shape:
        raise ValueError(
            f"Using a target size ({target.size()}) that is different to the input size "
            f"({input.size()}) is deprecated. Please ensure they have the same size."
        )
    check_tensors("binary_cross_entropy", input, target)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        raise RuntimeError(
            "binary_cross_entropy and BCELoss are unsafe to autocast: a probability of a half type "
            "rounds to 0 or 1. Use binary_cross_entropy_with_logits or BCEWithLogitsLoss."
        )
    is_extra = target.dtype in REALS and not target.is_floating_point()
    if input.dtype != target.dtype and not (is_extra and input.is_floating_point()):
        found, expected = target.dtype, input.dtype
        if is_autocast_enabled(input):
            found, expected = (torch.float32 if d in HALVES else d for d in (found, expected))
        if found != expected:
            raise RuntimeError(
                f"Found dtype {dtype_name(found)} but expected {dtype_name(expected)}"
            )
    if weight is not None:
        weight = _checked_weight(
            "binary_cross_entropy(): argument 'weight' (position 3)", weight, input
        )
    return _prepare(
        "binary_cross_entropy",
        input,
        target,
        weight,
        None,
        PROBABILITY,
        code,
        ignore_index,
        label_smoothing,
        sample_weight,
        normalizer,
        on_empty,
        False,
    )


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    on_empty: str = "nan",
    inplace_backward: bool = False,
) -> Tensor:
    r"""Focal loss of `Lin et al. 2017 <https://arxiv.org/abs/1708.02002>`_ on logits, as
    `torchvision's function of this name
    <https://pytorch.org/vision/stable/generated/torchvision.ops.sigmoid_focal_loss.html>`_.

    .. math::
        \ell = \alpha_t (1 - p_t)^\gamma \, \mathrm{ce}(x, t), \quad
        p_t = \sigma(x)\, t + (1 - \sigma(x)) (1 - t)

    Args:
        inputs: logits of any shape and strides.
        targets: labels of the same shape: float, bool or integer.
        alpha: weight of the positive class in [0, 1], 1 - alpha that of the negative; -1 for none.
        gamma: exponent of the modulating factor, at least 0.
        reduction: "none", "mean" or "sum".
        ignore_index, label_smoothing, sample_weight, normalizer, on_empty, inplace_backward: as for
            :func:`binary_cross_entropy_with_logits`.

    Returns:
        The loss, of the inputs' shape for "none", else 0-D; its dtype is what inputs and float
        targets promote to, or float32 under autocast. The gradient is finite for every gamma.

    Raises:
        ValueError: alpha outside [0, 1] that is not -1; negative gamma; unknown reduction; shapes
            that differ. Otherwise as :func:`binary_cross_entropy_with_logits`.
    """
    tensors = (inputs, targets, sample_weight, normalizer)
    if has_torch_function(tensors):
        overridden: Tensor = handle_torch_function(
            sigmoid_focal_loss,
            tensors,
            inputs,
            targets,
            alpha=alpha,
            gamma=gamma,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            sample_weight=sample_weight,
            normalizer=normalizer,
            on_empty=on_empty,
            inplace_backward=inplace_backward,
        )
        return overridden
    refuse_gradient(alpha, "alpha")
    refuse_gradient(gamma, "gamma")
    if not 0 <= alpha <= 1 and alpha != -1:
        raise ValueError(
            f"Invalid alpha value: {alpha}. alpha must be in the range [0,1] or -1 for ignore."
        )
    if not gamma >= 0:
        raise ValueError(f"Invalid gamma value: {gamma}. gamma must not be negative.")
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(
            f"Invalid Value for arg 'reduction': '{reduction} \n Supported reduction modes: "
            "'none', 'mean', 'sum'"
        )
    if targets.shape != inputs.shape:
        raise ValueError(
            f"Target size ({targets.size()}) must be the same as input size ({inputs.size()})"
        )
    check_tensors("sigmoid_focal_loss", inputs, targets)
    return _prepare(
        "sigmoid_focal_loss",
        inputs,
        targets,
        None,
        None,
        FOCAL,
        REDUCTIONS[reduction],
        ignore_index,
        label_smoothing,
        sample_weight,
        normalizer,
        on_empty,
        inplace_backward,
        float(alpha),
        float(gamma),
    )


def _checked_weight(argument: str, weight: Tensor, input: Tensor, swapped: bool = False) -> Tensor:
    """The weight in dense memory. `swapped`: torch names it first where sizes differ."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{argument} must be Tensor, not {type(weight).__name__}")
    shape, full = weight.shape, input.shape
    if len(shape) != len(full) or shape != full:  # the lengths first: sizes may be symbols
        _check_broadcast(shape, full, swapped)
    if weight.dtype not in REALS:
        raise NotImplementedError(f"{argument} of dtype {weight.dtype} is not supported")
    if weight.layout is not torch.strided:
        weight = weight.to_dense()
    return on_device(weight, input)


def _check_broadcast(shape: torch.Size, full: torch.Size, swapped: bool) -> None:
    """Raises torch's errors, which call torch's operands a and b, unless `shape` fits `full`."""
    enlarges = len(shape) > len(full)
    for i in range(1, min(len(shape), len(full)) + 1):
        a, b = full[-i], shape[-i]
        if a == b or b == 1:
            continue
        if a != 1:
            a, b = (b, a) if swapped else (a, b)
            raise RuntimeError(
                f"The size of tensor a ({a}) must match the size of tensor b ({b}) at "
                f"non-singleton dimension {max(len(shape), len(full)) - i}"
            )
        enlarges = True
    if enlarges:
        broadcast = torch.broadcast_shapes(shape, full)
        raise RuntimeError(
            f"output with shape {list(full)} doesn't match the broadcast shape {list(broadcast)}"
        )


def _prepare(
    name: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    form: int,
    reduction: int,
    ignore_index: int | None,
    label_smoothing: float,
    sample_weight: Tensor | None,
    normalizer: float | Tensor | None,
    on_empty: str,
    inplace: bool,
    alpha: float = -1.0,
    gamma: float = 0.0,
) -> Tensor:
    dtype = input.dtype
    target_dtype = target.dtype
    if dtype not in FLOATS or target_dtype not in REALS:
        kind, wrong = ("input", dtype) if dtype not in FLOATS else ("target", target_dtype)
        raise NotImplementedError(f"{name} is not implemented for {kind} of dtype {wrong}")
    if input.layout is not torch.strided or target.layout is not torch.strided:
        raise NotImplementedError(
            f"{name} needs strided tensors, not {input.layout}, {target.layout}"
        )
    if target.device != input.device:
        target = on_device(target, input)
    if type(label_smoothing) is not float:
        refuse_gradient(label_smoothing, "label_smoothing")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    zero_on_empty = is_zero_on_empty(on_empty)
    if ignore_index is not None:
        ignore_index = read_index(ignore_index, "ignore_index")
    if target_dtype in FLOATS and target_dtype != dtype:
        # torchvision's formula promotes where torch's function takes the target's dtype.
        dtype = torch.promote_types(dtype, target_dtype) if form == FOCAL else target_dtype
    if dtype in HALVES and is_autocast_enabled(input):
        dtype = torch.float32
    if sample_weight is not None:
        sample_weight = read_sample_weight(sample_weight, input, input.shape)
    normalizer, denominator = read_normalizer(normalizer, input)
    extras = (label_smoothing, ignore_index, alpha, gamma, denominator, zero_on_empty)
    options: tuple[Any, ...] = (form, reduction, dtype)
    if extras != _DEFAULTS:
        options += extras
    try:
        tensors = (input, target, weight, pos_weight, sample_weight, normalizer)
        return apply(_BCE, tensors, options, inplace)  # type: ignore[no-any-return]
    except RuntimeError as error:  # what an earlier call has found on CUDA
        raise_index_error(str(error))
        raise


class _BCE(LossFunction):
    """`_bce` under autograd.

    For "mean" and "sum" the gradient is written in the forward pass, while the logits are in
    registers, and backward only scales it (`forward_gradient` says when not). Backward takes that
    gradient once; a second backward computes it anew, and create_graph=True composes it from
    reference.py.
    """

    op = staticmethod(_bce_op)
    composed = staticmethod(reference.bce)

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        sample_weight: Tensor | None,
        normalizer: Tensor | None,
        options: tuple[Any, ...],
        overwritten: Overwritten | None,
    ) -> Tensor:
        gradient = None
        if options[1] != NONE and ctx.needs_input_grad[0]:
            gradient = forward_gradient(input, overwritten)
        tensors = (target, weight, pos_weight, sample_weight, normalizer)
        loss: Tensor
        if gradient is None:
            loss = _bce_op(input, *tensors, *options)
        else:
            loss = _bce_with_gradient_op(gradient, input, *tensors, *options)
        ctx.compiled = torch.compiler.is_compiling()
        ctx.options = options
        kept = input if overwritten is None else None
        if ctx.compiled:
            ctx.save_for_backward(kept, *tensors, gradient)
        else:
            ctx.gradient = gradient
            ctx.overwritten = overwritten
            ctx.save_for_backward(kept, *tensors)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.compiled:
            *tensors, gradient = ctx.saved_tensors
            if gradient is not None:
                return (gradient * grad_output, *(None,) * 7)
            gradient = torch.empty_like(tensors[0])
            _BCE.write_gradient(ctx, gradient, (grad_output,), False, *tensors)
            return (gradient, *(None,) * 7)
        return (*gradients(_BCE, ctx, ctx.saved_tensors, (grad_output,)), None, None, None)

    @staticmethod
    def write_gradient(
        ctx: Any,
        gradient: Tensor,
        grad_outputs: Sequence[Tensor | None],
        written: bool,
        *tensors: Any,
    ) -> None:
        _bce_backward_op(gradient, written, *grad_outputs, *tensors, *ctx.options)


def _bce_fake(*arguments: Any) -> Tensor:
    input, reduction, dtype = arguments[0], arguments[7], arguments[8]
    if reduction == NONE:
        return torch.empty_like(input, dtype=dtype)
    return input.new_empty((), dtype=dtype)  # type: ignore[no-any-return]


torch.library.register_fake("fused_ce::_bce", _bce_fake)
torch.library.register_fake(
    "fused_ce::_bce_with_gradient", lambda _, *arguments: _bce_fake(*arguments)
)
torch.library.register_fake("fused_ce::_bce_backward", lambda *_: None)
