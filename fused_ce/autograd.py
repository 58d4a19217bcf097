"""What the losses' autograd functions share: where transforms take over, derivatives composed from
differentiable operations, and the gradient that overwrites the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class Overwritten:
    """Logits whose memory the gradient takes over, and the version they must still have then."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.detach()
        self.version = logits._version
        self.holds_gradient = False

    def check(self, has_gradient: bool) -> None:
        """Whether backward may go on: it has the gradient still, or can compute it."""
        if self.holds_gradient and not has_gradient:
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


def apply_overwriting(apply: Callable[[Overwritten], Any], input: Tensor) -> Any:
    """`apply`, whose gradient overwrites `input` and whose result makes a later use raise."""
    if input.is_leaf:
        raise RuntimeError(
            "a leaf Variable that requires grad is being used in an in-place operation "
            "(inplace_backward=True overwrites the logits)."
        )
    if torch._debug_has_internal_overlap(input) == 1:
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a "
            "single memory location. Please clone() the tensor before performing the operation "
            "(inplace_backward=True overwrites the logits)."
        )
    overwritten = Overwritten(input)
    result = apply(overwritten)
    _RaiseOnUse.apply(input)  # type: ignore[no-untyped-call]
    overwritten.version = input._version
    return result


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
    it, and under saved-tensor hooks (checkpointing, offloading), which are there to keep nothing.
    """
    if input.dtype == torch.float16:
        return None
    if overwritten is not None:
        overwritten.holds_gradient = True
        return overwritten.logits
    if (
        torch.compiler.is_compiling()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    ):
        return torch.empty_like(input)
    return None


def is_composed(grad_outputs: Sequence[Tensor | None], overwritten: Overwritten | None) -> bool:
    """Whether this backward has to be differentiable, or batched."""
    # is_grads_batched=True comes with the batched tensors that functorch's replaced elsewhere.
    composed = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    for grad in grad_outputs:
        if grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad):
            composed = True
    if composed and overwritten is not None:
        raise RuntimeError(
            "a loss with inplace_backward=True has no second derivative and no batched gradient: "
            "its logits are overwritten"
        )
    return composed


def composed_gradients(
    function: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of the tensors that need one, as differentiable torch operations where a graph
    is wanted."""
    differentiable = torch.is_grad_enabled()
    leaves: Sequence[Any] = tensors
    if not differentiable:
        leaves = [
            t if t is None else t.detach().requires_grad_(need)
            for t, need in zip(tensors, needs, strict=True)
        ]
    with torch.enable_grad():
        outputs = function(*leaves)
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
