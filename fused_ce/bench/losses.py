"""What is measured. A new loss is one more entry of LOSSES: its cases, rivals and reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ce.functional

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Inputs:
    logits: Tensor
    target: Tensor
    options: dict[str, Tensor] = field(default_factory=dict)
    source: Tensor | None = None  # the leaf behind logits that are none

    @property
    def leaf(self) -> Tensor:
        return self.logits if self.source is None else self.source

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.logits, self.target, *self.options.values()))


@dataclass(frozen=True)
class Case:
    make: Callable[[tuple[int, ...], torch.dtype, torch.device], Inputs]
    fused: Function
    torch: Function  # what plain torch has to do for the same inputs
    inplace: bool = False  # the gradient overwrites the logits


@dataclass(frozen=True)
class Loss:
    cases: dict[str, Case]
    rivals: dict[str, Callable[[Case], Function]]
    reference: Callable[[Inputs], tuple[float, Tensor]]  # loss and gradient in float64
    sizes: str  # measured when none are asked for


def _eager(case: Case) -> Function:
    return case.torch


def _compile(case: Case) -> Function:
    # A kernel for exactly this shape, which is the fastest; the reset keeps dynamo from counting
    # earlier sizes against its limit of recompilations.
    torch.compiler.reset()
    return torch.compile(case.torch, fullgraph=True, dynamic=False)


def _bce_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    boolean: bool = False,
    weight: bool = False,
    pos_weight: bool = False,
) -> Inputs:
    def empty(kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device=device)

    target = empty(torch.bool).bernoulli_() if boolean else empty().uniform_()
    options = {}
    if weight:
        options["weight"] = empty().uniform_()
    if pos_weight:
        options["pos_weight"] = torch.tensor(3.0, dtype=dtype, device=device)
    return Inputs(empty().normal_(std=3), target, options)


def _torch_bce_on_bool(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))


def _bce_reference(inputs: Inputs) -> tuple[float, Tensor]:
    logits = inputs.logits.detach().flatten()
    weight = inputs.options.get("weight", logits.new_ones(())).expand(inputs.logits.shape)
    pos_weight = inputs.options.get("pos_weight")
    gradient = torch.empty_like(logits, dtype=torch.float64)
    total = 0.0
    # In pieces, since float64 copies of everything would need many times the memory of the case.
    for piece, x, t, w in zip(
        *(torch.split(t.flatten(), 1 << 22) for t in (gradient, logits, inputs.target, weight)),
        strict=True,
    ):
        leaf = x.double().requires_grad_()
        loss = F.binary_cross_entropy_with_logits(
            leaf,
            t.double(),
            w.double(),
            reduction="sum",
            pos_weight=None if pos_weight is None else pos_weight.double(),
        )
        piece.copy_(torch.autograd.grad(loss, leaf)[0])
        total += loss.item()
    count = logits.numel()
    return total / count, gradient.div_(count).view(inputs.logits.shape)


_fused_bce = fused_ce.functional.binary_cross_entropy_with_logits
_torch_bce = F.binary_cross_entropy_with_logits

LOSSES = {
    "bce": Loss(
        cases={
            "plain": Case(_bce_inputs, _fused_bce, _torch_bce),
            "weight": Case(partial(_bce_inputs, weight=True), _fused_bce, _torch_bce),
            "pos_weight": Case(partial(_bce_inputs, pos_weight=True), _fused_bce, _torch_bce),
            "bool": Case(partial(_bce_inputs, boolean=True), _fused_bce, _torch_bce_on_bool),
            "inplace": Case(
                _bce_inputs, partial(_fused_bce, inplace_backward=True), _torch_bce, inplace=True
            ),
        },
        rivals={"eager": _eager, "compile": _compile},
        reference=_bce_reference,
        sizes="1000000,64Mi",
    ),
}
