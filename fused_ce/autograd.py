"""What the losses' autograd functions share: where transforms take over, derivatives composed from
differentiable operations, and the gradient that overwrites the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_ce.arguments import HALVES, raise_index_error

_empty_gradient_op = torch.ops.fused_ce._empty_gradient.default
_scale_op = torch.ops.fused_ce._scale_.default


def transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_composed(input: Tensor) -> bool:
    """Whether a loss is composed from torch's operations: under transforms; for tensors made of
    others (DTensor), which know these operations but not ours; and by torch.jit.trace, which cannot
    save an autograd function."""
    if type(input) is not Tensor and is_traceable_wrapper_subclass(input):
        return True
    return transforms_active() or torch.jit._trace.is_tracing()


def is_recording() -> bool:
    """Whether autograd records: under inference_mode it does not, whatever enable_grad says (which
    Dynamo cannot trace)."""
    if not torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()


def is_exporting() -> bool:
    # In torch 2.10, torch.compiler.is_exporting() is true under torch.compile as well.
    return torch.compiler._is_exporting_flag


class LossFunction(torch.autograd.Function):
    """A loss's autograd function. Tensors are the loss's own: the logits first, the normalizer
    last."""

    op: Callable[..., Any]
    composed: Callable[..., Any]  # the same in torch's operations
    # Of (ctx, gradient, grad_outputs, written, *tensors): computes the gradient of the logits into
    # `gradient`, which holds it if it is `written` and the upstream one is 1.
    write_gradient: Callable[..., None]
    # `apply` without its layer for functorch's tensors, which go to `composed`: 1.5 of the 25
    # microseconds that forward and backward of a small loss take.
    call: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.call = super(torch.autograd.Function, cls).apply  # type: ignore[misc]


def apply(
    loss: type[LossFunction],
    tensors: tuple[Any, ...],
    options: tuple[Any, ...],
    inplace: bool,
) -> Any:
    """The results of the loss's op: by itself, under autograd, or composed. `inplace` is whether
    the gradient overwrites the logits."""
    input, *others, normalizer = tensors
    if is_composed(input) or (normalizer is not None and normalizer.requires_grad):
        return loss.composed(*tensors, *options)
    others_require_grad = False
    for tensor in others:
        if tensor is not None and tensor.requires_grad:
            others_require_grad = True
    if not (input.requires_grad or others_require_grad) or not is_recording():
        return loss.op(*tensors, *options)
    if torch.compiler.is_compiling():
        if others_require_grad or is_exporting():
            # Dynamo cannot trace the torch.autograd.grad of `gradients`, and export keeps no
            # backward pass: the exported module differentiates what it is made of.
            return loss.composed(*tensors, *options)
        return loss.apply(*distinct(tensors), options, None)  # type: ignore[no-untyped-call]
    if inplace and input.requires_grad:
        return apply_overwriting(lambda o: loss.call(*tensors, options, o), input)
    return loss.call(*tensors, options, None)


class Overwritten:
    """Logits whose memory the gradient takes over, and the version they must still have then."""

    def __init__(self, logits: Tensor) -> None:
        self.logits: Tensor | None = logits.detach()  # until the gradient is handed out
        self.version = logits._version

    def unchanged(self) -> Tensor:
        """The logits, or their gradient if the forward pass has written it."""
        if self.logits is None:
            raise RuntimeError(
                "Trying to backward through a loss with inplace_backward=True a second time, "
                "but its logits have been overwritten by the gradient."
            )
        if self.logits._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation: the logits given to a loss with inplace_backward=True, whose "
                "memory holds the gradient"
            )
        return self.logits


def apply_overwriting(apply: Callable[[Overwritten], Any], input: Tensor) -> Any:
    """`apply`, whose gradient overwrites `input` and whose result makes a later use raise."""
    if input.is_leaf:
        raise RuntimeError(
            "a leaf Variable that requires grad is being used in an in-place operation "
            "(inplace_backward=True overwrites the logits)."
        )
    if input.is_neg():
        raise RuntimeError(
            "inplace_backward=True cannot overwrite logits that are the lazy negative of their "
            "memory: give it input.resolve_neg()"
        )
    # Torch's own answer is 0 for none, 1 for some, and 2 where it did not look.
    if torch._debug_has_internal_overlap(input) and _overlaps(input):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a "
            "single memory location. Please clone() the tensor before performing the operation "
            "(inplace_backward=True overwrites the logits)."
        )
    overwritten = Overwritten(input)
    if input._is_view() and _refuses_writes(input):
        _RaiseOnUse.apply(input)  # type: ignore[no-untyped-call]  # which raises torch's error
    result = apply(overwritten)
    _RaiseOnUse.apply(input)  # type: ignore[no-untyped-call]
    overwritten.version = input._version
    return result


def _refuses_writes(view: Tensor) -> bool:
    """Whether torch would not have the view written to: that of a leaf, or one that is among
    several results of a function, or that of a custom one, such as a module's backward hook."""
    base = view._base
    is_of_leaf = base is not None and base.is_leaf and base.requires_grad
    meta = torch._C._autograd
    return is_of_leaf or meta._get_creation_meta(view) != meta.CreationMeta.DEFAULT


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory: some dimension steps no farther than those of smaller strides
    reach. (Strides that interleave, such as 2 and 3 of 2 by 2, count as an overlap too.)"""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return tensor.numel() > 0
            reach += stride * (size - 1)
    return False


class _RaiseOnUse(torch.autograd.Function):
    """Makes every later use of an overwritten tensor raise in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        raise RuntimeError(
            "the logits of a loss with inplace_backward=True were used again: their memory holds "
            "the gradient"
        )


def forward_gradient(input: Tensor, overwritten: Overwritten | None) -> Tensor | None:
    """The memory for a gradient that is written in the forward pass, or None where it is not: for
    float16, whose range cannot hold a gradient before the upstream one (a loss scale) multiplies
    it; for bfloat16 in compiled code, which always scales it; and under saved-tensor hooks
    (checkpointing, offloading), which are there to keep nothing.
    """
    if input.dtype == torch.float16:
        return None
    if torch.compiler.is_compiling():
        return None if input.dtype == torch.bfloat16 else torch.empty_like(input)
    if overwritten is not None:
        return overwritten.logits
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return _empty_gradient(input)
    return None


def _empty_gradient(logits: Tensor) -> Tensor:
    """`torch.empty_like`; on the CPU, from the size of a huge page on, in memory that is kept from
    one call to the next.

    Compiled code takes `torch.empty_like`: Inductor would copy the gradient that an op allocates.
    """
    if logits.is_cpu and logits.numel() * logits.element_size() >= 1 << 21:
        return _empty_gradient_op(logits)  # type: ignore[no-any-return]
    return torch.empty_like(logits)


def distinct(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors, all but the first as views, as arguments of an autograd function in compiled
    code, where Dynamo takes no tensor twice."""
    first, *others = tensors
    return (first, *(t if t is None else t.view_as(t) for t in others))


def gradients(*arguments: Any) -> Sequence[Tensor | None]:
    """`_gradients`. Compiled autograd, where the forward pass was not compiled, calls it instead of
    tracing it."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(_gradients)(*arguments)  # type: ignore[no-any-return]
    return _gradients(*arguments)


def _gradients(
    loss: type[LossFunction],
    ctx: Any,
    tensors: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    results: Sequence[Tensor | None] = (),
) -> Sequence[Tensor | None]:
    """The gradients of the tensors. `results` are those of the forward pass that `write_gradient`
    takes too.

    That of the logits is the one that the forward pass has written, scaled, if only the loss has
    an upstream gradient; else it is computed from the logits, as is one of a half type, which
    scaling would round a second time. The others, and all of them where they must be
    differentiable, are composed.
    """
    # A graph of this backward is wanted, or it is batched, for which is_grads_batched=True has
    # batched tensors of its own.
    composed = torch.is_grad_enabled() or transforms_active()
    count = 0
    for grad in grad_outputs:
        if grad is not None:
            count += 1
            composed = composed or torch._C._functorch.is_legacy_batchedtensor(grad)
    needs = ctx.needs_input_grad[: len(tensors)]
    found: list[Tensor | None] = [None] * len(tensors)
    if count == 0:
        return found
    overwritten = ctx.overwritten
    if overwritten is not None:
        tensors = (overwritten.unchanged(), *tensors[1:])
        if composed:
            raise RuntimeError(
                "a loss with inplace_backward=True has no second derivative and no batched "
                "gradient: its logits are overwritten"
            )
    if composed:
        ctx.__dict__.pop("gradient", None)  # as large as the logits, and unused from now on
        return _composed(loss, ctx, tensors, needs, grad_outputs)
    if True in needs[1:]:
        if overwritten is not None and ctx.__dict__.get("gradient") is not None:
            raise RuntimeError(
                "inplace_backward=True with a target or weight that requires grad: the logits "
                "that its gradient needs are overwritten"
            )
        found = _composed(loss, ctx, tensors, (False, *needs[1:]), grad_outputs)
    if not needs[0]:
        return found
    # At once, since another thread may differentiate the same graph.
    gradient = ctx.__dict__.pop("gradient", None)
    logits, grad_loss = tensors[0], grad_outputs[0]
    assert logits is not None
    written = gradient is not None and grad_loss is not None and count == 1
    if written and (overwritten is not None or logits.dtype not in HALVES):
        _scale_op(gradient, grad_loss)
    else:
        if gradient is None:
            gradient = _empty_gradient(logits) if overwritten is None else logits
        try:
            loss.write_gradient(ctx, gradient, grad_outputs, written, *results, *tensors)
        except RuntimeError as error:  # what an earlier call has found on CUDA
            raise_index_error(str(error))
            raise
    if overwritten is not None:
        overwritten.logits = None  # else the loss would keep that memory
    found[0] = gradient
    return found


def _composed(
    loss: type[LossFunction],
    ctx: Any,
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of the tensors that need one, as differentiable torch operations where a graph
    is wanted."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one tensor may be computed from another: the gradient of a view leaves
        # that out.
        leaves: Sequence[Any] = [t if t is None else t.view_as(t) for t in tensors]
        outputs = loss.composed(*leaves, *ctx.options)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        seeded = [
            (output, grad)
            for output, grad in zip(outputs, grad_outputs, strict=False)
            if grad is not None and output.requires_grad
        ]
        if not seeded:
            return [None] * len(needs)
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [output for output, _ in seeded],
                wanted,
                [grad for _, grad in seeded],
                create_graph=differentiable,
                allow_unused=True,
            )
        )
    return [next(found) if need else None for need in needs]


torch.library.register_fake("fused_ce::_empty_gradient", torch.empty_like)
torch.library.register_fake("fused_ce::_scale_", lambda gradient, scale: None)
