"""Softmax cross entropy: checks, autograd, and the ops of csrc/{cpu,cuda}/softmax_ce.cpp.

The steps of a call are those of bce.py: the public function reads its arguments into the op's own,
`apply` of autograd.py decides between the op, the op under autograd (`_SoftmaxCE`), and the
composition of reference.py that transforms need.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import _pytree

from fused_ce import reference
from fused_ce.arguments import (
    FLOATS,
    HALVES,
    LABELS,
    REALS,
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
from fused_ce.reference import CORRECT, ENTROPY, LSE, NONE, PREDICTION

_OUTPUTS = {"lse": LSE, "entropy": ENTROPY, "prediction": PREDICTION, "correct": CORRECT}
_FLOAT32 = torch.finfo(torch.float32)

_softmax_ce_op = torch.ops.fused_ce._softmax_ce.default
_softmax_ce_with_gradient_op = torch.ops.fused_ce._softmax_ce_with_gradient.default
_softmax_ce_backward_op = torch.ops.fused_ce._softmax_ce_backward.default

_DEFAULTS = defaults_of(_softmax_ce_op)  # from ignore_index on


@dataclass(frozen=True)
class CrossEntropyStats:
    """What `cross_entropy(..., stats=...)` returns beside the loss: a tensor for each statistic
    that was asked for, of the shape of an unreduced loss; None for the others."""

    lse: Tensor | None = None
    """log(sum(exp(logits))), in float32 or float64; differentiable."""
    entropy: Tensor | None = None
    """Entropy of the softmax in nats, in float32 or float64; differentiable."""
    prediction: Tensor | None = None
    """The class of the largest logit, int64, as torch.argmax finds it."""
    correct: Tensor | None = None
    """Whether the prediction is the label (or the most probable class of the target); False where
    the row is ignored."""


# Transforms and torch.export see the tensors that are there, and not None. (Of a named tuple they
# would see every field.)
_pytree.register_dataclass(
    CrossEntropyStats, serialized_type_name="fused_ce.functional.CrossEntropyStats"
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    on_empty: str = "nan",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    stats: Sequence[str] = (),
    inplace_backward: bool = False,
) -> Any:
    r"""Cross entropy between logits and labels or probabilities, as `torch's function of this name
    <https://pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html>`_.

    .. math::
        \ell = w_y \Big( \log \sum_c e^{x_c} - x_y \Big) \quad\text{or}\quad
        \sum_c w_c\, t_c \Big( \log \sum_{c'} e^{x_{c'}} - x_c \Big)

    Args:
        input: logits :math:`x` of shape (C), (N, C) or (N, C, d1, ..., dK), of any strides;
            float64, float32, float16 or bfloat16.
        target: the label :math:`y` of each row, of shape (), (N) or (N, d1, ..., dK); int64, int32,
            int16, int8 or uint8. Or probabilities :math:`t`, of the input's shape and a float type.
        weight: :math:`w`, one for each class; of the input's dtype if the target holds labels.
        size_average, reduce: torch's deprecated switches; they override `reduction`.
        ignore_index: rows with this label cost nothing, get a gradient of zero and are not counted.
        reduction: "none", "mean" or "sum". The mean divides by the weights of the labels, added up;
            with probabilities, by the number of rows.
        label_smoothing: e in [0, 1]; the target becomes t (1 - e) + e / C.
        sample_weight: a weight for each row (shape of the unreduced loss, or of its leading
            dimensions) that multiplies its loss and changes no denominator; differentiable.
        normalizer: a number or a one-element tensor that replaces the denominator of "mean".
        on_empty: "nan" or "zero", what a mean over nothing is.
        softcap: a positive number s, normal in float32, that makes the logits s tanh(x / s), after
            `logit_scale`.
        logit_scale: multiplies the logits.
        z_loss: this number times (log sum exp)^2 is added to the loss of each row.
        stats: names of statistics of the rows to return from the same pass, among "lse",
            "entropy", "prediction" and "correct"; ignored rows have them too.
        inplace_backward: the gradient overwrites the logits, so that backward allocates nothing; a
            later use of the logits in autograd raises. Writes only when the logits need a gradient.
            If target or a weight requires one too, backward raises for "mean" and "sum", except of
            float16 logits and with "lse" or "entropy" among `stats`. Under torch.compile and
            torch.export, which plan memory themselves, under torch.func, in forward mode, and where
            `normalizer` requires a gradient, it changes nothing.

    Returns:
        The loss, in the input's dtype (with probabilities, in what input, target and weight promote
        to; float32 under autocast), of the rows' shape for "none", else 0-D. With `stats`, a pair
        of it and :class:`CrossEntropyStats`. Arithmetic is float32, or float64 if the input or the
        loss is float64. Gradients reach every float argument.

    Raises:
        ValueError: batch sizes that differ; unknown reduction, on_empty or statistic; a softcap
            that is not positive and normal in float32.
        IndexError: a label outside [0, C) that is not `ignore_index` (on the CPU at once; on CUDA
            the row's loss is NaN, and the next call, or :func:`fused_ce.check`, raises).
        RuntimeError: other shapes; a target or weight of another dtype; tensors on different
            devices; label_smoothing above 1; `inplace_backward` on a leaf or on overlapping memory.
        TypeError: an argument of a wrong type.
        NotImplementedError: logits of another dtype or layout.
    """
    tensors = (input, target, weight, sample_weight, normalizer)
    if has_torch_function(tensors):
        return handle_torch_function(
            cross_entropy,
            tensors,
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            sample_weight=sample_weight,
            normalizer=normalizer,
            on_empty=on_empty,
            softcap=softcap,
            logit_scale=logit_scale,
            z_loss=z_loss,
            stats=stats,
            inplace_backward=inplace_backward,
        )
    code = reduction_code(reduction, size_average, reduce)
    check_tensors("cross_entropy_loss", input, target)
    if weight is not None and not isinstance(weight, Tensor):
        raise _type_error("weight", 3, "Tensor", weight)
    if type(ignore_index) is not int or ignore_index != -100:
        ignore_index = read_index(
            ignore_index, "cross_entropy_loss(): argument 'ignore_index' (position 5)"
        )
    if type(label_smoothing) is not float:
        label_smoothing = _read_smoothing(label_smoothing)
    if type(logit_scale) is not float or type(z_loss) is not float or softcap is not None:
        refuse_gradient(logit_scale, "logit_scale")
        refuse_gradient(z_loss, "z_loss")
        refuse_gradient(softcap, "softcap")
    shape, dtype = input.shape, input.dtype
    rows = shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]
    # The lengths first: sizes may be symbols.
    has_probabilities = len(shape) == len(target.shape) and shape == target.shape
    if has_probabilities:
        target = _read_probabilities(target, ignore_index)
    if label_smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if not label_smoothing > 0.0:  # so torch reads negative ones and NaN
        label_smoothing = 0.0
    if dtype not in FLOATS or input.layout is not torch.strided:
        raise NotImplementedError(
            f"cross_entropy is not implemented for input of dtype {dtype} and layout {input.layout}"
        )
    if len(shape) == 0:
        raise IndexError(
            "Dimension specified as 1 but tensor has no dimensions"
            if has_probabilities
            else "Dimension out of range (expected to be in range of [-1, 0], but got 1)"
        )
    if not has_probabilities:
        target = _read_labels(target, shape, rows)
        if label_smoothing and shape[min(1, len(shape) - 1)] == 1:
            label_smoothing = 0.0  # nothing to smooth: the gradient of one class is exactly 0
    if target.device != input.device:
        target = on_device(target, input)
    autocast = is_autocast_enabled(input)
    if has_probabilities:
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    if autocast and dtype in HALVES:
        dtype = torch.float32
    if weight is not None:
        weight = _read_weight(weight, input, dtype, has_probabilities, autocast)
    if sample_weight is not None:
        sample_weight = read_sample_weight(sample_weight, input, rows)
    normalizer, denominator = read_normalizer(normalizer, input)
    if has_probabilities and input.numel() == 0 and normalizer is None and denominator is None:
        denominator = 0.0  # Torch divides by the number of probabilities over that of classes.
    zero_on_empty = is_zero_on_empty(on_empty)
    if softcap is not None and not _FLOAT32.tiny <= softcap <= _FLOAT32.max:
        raise ValueError(f"softcap must be a positive, normal number of float32, not {softcap}")
    outputs = _read_stats(stats, shape) if stats else 0
    extras = (
        ignore_index,
        label_smoothing,
        softcap or 0.0,
        logit_scale,
        z_loss,
        denominator,
        zero_on_empty,
    )
    options: tuple[Any, ...] = (outputs, code, dtype)
    if extras != _DEFAULTS:
        options += extras
    tensors = (input, target, weight, sample_weight, normalizer)
    try:
        result = apply(_SoftmaxCE, tensors, options, inplace_backward)
    except RuntimeError as error:
        raise_index_error(str(error))
        raise
    if not outputs:
        return result if isinstance(result, Tensor) else result[0]
    loss, *found = result
    named = zip(_OUTPUTS.items(), found, strict=True)
    return loss, CrossEntropyStats(**{name: stat for (name, bit), stat in named if outputs & bit})


def _type_error(name: str, position: int, expected: str, found: Any) -> TypeError:
    return TypeError(
        f"cross_entropy_loss(): argument '{name}' (position {position}) must be {expected}, not "
        f"{type(found).__name__}"
    )


def _read_smoothing(smoothing: Any) -> float:
    # float() would take more: text, arrays and tensors of one element, and what requires grad.
    if isinstance(smoothing, (numbers.Real, torch.SymInt, torch.SymFloat)) or (
        isinstance(smoothing, Tensor) and smoothing.dim() == 0 and not smoothing.requires_grad
    ):
        return float(smoothing)
    raise _type_error("label_smoothing", 6, "float", smoothing)


def _read_probabilities(target: Tensor, ignore_index: int) -> Tensor:
    if not target.is_floating_point():
        raise RuntimeError(
            "Expected floating point type for target with class probabilities, got "
            f"{dtype_name(target.dtype)}"
        )
    if ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")
    if target.dtype not in FLOATS:
        raise RuntimeError(f"target of dtype {target.dtype} is not supported")
    return target if target.layout is torch.strided else target.to_dense()


def _read_labels(target: Tensor, shape: torch.Size, rows: torch.Size) -> Tensor:
    """The labels in the shape of the rows, or torch's error."""
    found = target.shape
    if len(found) != len(rows) or found != rows:
        if len(shape) > 1 and (len(found) == 0 or found[0] != shape[0]):
            raise ValueError(
                f"Expected input batch_size ({shape[0]}) to match target batch_size "
                f"({found[0] if found else 0})."
            )
        if len(shape) == 4 and len(found) == 3:
            _check_label_dtype(target)
            raise RuntimeError(f"size mismatch (got input: {list(shape)} , target: {list(found)}")
        if len(shape) == 4:
            raise RuntimeError(
                "only batches of spatial targets supported (3D tensors) but got targets of "
                f"dimension: {len(found)}"
            )
        if len(shape) > 2:
            raise RuntimeError(f"Expected target size {list(rows)}, got {list(found)}")
        if len(found) > 1:
            raise RuntimeError("0D or 1D target tensor expected, multi-target not supported")
        _check_label_dtype(target)
        if found[0] != 1:
            raise ValueError(
                f"For 1D input, 1D target must have size 1, but got target size: {found[0]}"
            )
        target = target.reshape(rows)
    _check_label_dtype(target)
    if target.layout is not torch.strided:
        raise NotImplementedError(f"cross_entropy needs strided labels, not {target.layout}")
    return target


def _check_label_dtype(target: Tensor) -> None:
    if target.dtype not in LABELS:
        raise RuntimeError(
            f"expected target dtype to be Long or Byte, but got {dtype_name(target.dtype)}"
        )


def _read_weight(
    weight: Tensor, input: Tensor, dtype: torch.dtype, has_probabilities: bool, autocast: bool
) -> Tensor:
    """The weights of the classes in one dimension."""
    dim = input.dim()
    classes = input.size(1 if dim > 1 else 0)
    if dim > 2 and not has_probabilities:
        if weight.numel() != classes:
            raise RuntimeError("weight tensor should be defined either for all or no classes")
        weight = weight.reshape(classes)
    elif weight.dim() != 1 or weight.numel() != classes:
        raise RuntimeError(
            ("cross_entropy: " if has_probabilities else "")
            + f"weight tensor should be defined either for all {classes} classes or no classes but "
            f"got weight tensor of shape: {list(weight.shape)}"
        )
    if has_probabilities:
        if weight.dtype not in REALS:
            raise NotImplementedError(f"weight of dtype {weight.dtype} is not supported")
        if weight.dtype not in FLOATS:
            weight = weight.to(dtype)
    elif (torch.float32 if autocast and weight.dtype in HALVES else weight.dtype) != dtype:
        raise RuntimeError(
            f"expected scalar type {dtype_name(dtype)} but found {dtype_name(weight.dtype)}"
        )
    if weight.layout is not torch.strided:
        raise NotImplementedError(f"cross_entropy needs a strided weight, not {weight.layout}")
    return on_device(weight, input)


def _read_stats(stats: Sequence[str], shape: torch.Size) -> int:
    outputs = 0
    for name in stats:
        if name not in _OUTPUTS:
            raise ValueError(
                f"unknown statistic {name!r}: choose among {', '.join(map(repr, _OUTPUTS))}"
            )
        outputs |= _OUTPUTS[name]
    if outputs & (PREDICTION | CORRECT) and shape[1 if len(shape) > 1 else 0] == 0:
        raise IndexError("stats: there is no prediction among no classes")
    return outputs


class _SoftmaxCE(LossFunction):
    """`_softmax_ce` under autograd.

    The gradient is written in the forward pass or in backward as in `_BCE`. Backward writes it too
    where there are upstream gradients of lse or entropy, and so, where the logits would be
    overwritten by then, wherever these are asked for.
    """

    op = staticmethod(_softmax_ce_op)
    composed = staticmethod(reference.softmax_ce)

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        normalizer: Tensor | None,
        options: tuple[Any, ...],
        overwritten: Overwritten | None,
    ) -> Any:
        outputs, reduction, *_ = options
        ctx.compiled = torch.compiler.is_compiling()
        needs_gradient = ctx.needs_input_grad[0]
        waits = outputs & (LSE | ENTROPY) and (ctx.compiled or overwritten is not None)
        gradient = None
        if needs_gradient and reduction != NONE and not waits:
            gradient = forward_gradient(input, overwritten)
        tensors = (target, weight, sample_weight, normalizer)
        computed = outputs
        if gradient is None:
            if needs_gradient:
                computed |= LSE
            results = _softmax_ce_op(input, *tensors, computed, *options[1:])
        else:
            results = _softmax_ce_with_gradient_op(gradient, input, *tensors, *options)
        loss, lse, entropy, prediction, correct = results
        ctx.options = options
        kept = input if overwritten is None else None
        row_terms = (lse if computed & LSE else None, entropy if computed & ENTROPY else None)
        if ctx.compiled:
            ctx.save_for_backward(kept, *tensors, *row_terms, gradient)
        else:
            ctx.gradient = gradient
            ctx.overwritten = overwritten
            ctx.save_for_backward(kept, *tensors, *row_terms)
        if not outputs:
            return loss
        ctx.set_materialize_grads(False)
        constant = [prediction, correct]
        constant += [] if needs_gradient and outputs & LSE else [lse]
        constant += [] if needs_gradient and outputs & ENTROPY else [entropy]
        ctx.mark_non_differentiable(*constant)
        return results

    @staticmethod
    def backward(
        ctx: Any,
        grad_loss: Tensor | None,
        grad_lse: Tensor | None = None,
        grad_entropy: Tensor | None = None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        outputs = ctx.options[0]
        # Dynamo gives results without a derivative an upstream gradient too.
        grads = (
            grad_loss,
            grad_lse if outputs & LSE else None,
            grad_entropy if outputs & ENTROPY else None,
        )
        if ctx.compiled:
            *tensors, lse, entropy, gradient = ctx.saved_tensors
            if gradient is not None:
                return (gradient * grad_loss, *(None,) * 6)
            gradient = torch.empty_like(tensors[0])
            results = (lse, entropy)
            _SoftmaxCE.write_gradient(ctx, gradient, grads, False, *results, *tensors)
            return (gradient, *(None,) * 6)
        *tensors, lse, entropy = ctx.saved_tensors
        found = gradients(_SoftmaxCE, ctx, tensors, grads, (lse, entropy))
        return (*found, None, None)

    @staticmethod
    def write_gradient(
        ctx: Any,
        gradient: Tensor,
        grad_outputs: Sequence[Tensor | None],
        written: bool,
        *tensors: Any,
    ) -> None:
        _softmax_ce_backward_op(gradient, written, *grad_outputs, *tensors, *ctx.options[1:])


def _softmax_ce_fake(input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    outputs, reduction, dtype = rest[4:7]
    shape = input.shape
    rows = shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]
    real = torch.float64 if torch.float64 in (input.dtype, dtype) else torch.float32
    dtypes = (real, real, torch.int64, torch.bool)
    return (
        input.new_empty(rows if reduction == NONE else (), dtype=dtype),
        *(
            input.new_empty(rows if outputs & bit else (0,), dtype=dtype)
            for bit, dtype in zip(_OUTPUTS.values(), dtypes, strict=True)
        ),
    )


torch.library.register_fake("fused_ce::_softmax_ce", _softmax_ce_fake)
torch.library.register_fake(
    "fused_ce::_softmax_ce_with_gradient", lambda _, *arguments: _softmax_ce_fake(*arguments)
)
torch.library.register_fake("fused_ce::_softmax_ce_backward", lambda *_: None)
