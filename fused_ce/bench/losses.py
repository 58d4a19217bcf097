"""What is measured. A new loss is one more entry of LOSSES; a new rival, one more of RIVALS."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

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
    torch: Function  # what plain torch has to do for the same inputs; takes a `reduction` too
    inplace: bool = False  # the gradient overwrites the logits


@dataclass(frozen=True)
class Rival:
    function: Callable[[Case, Any], Function] | None  # of the case and of what was imported
    module: str | None = None  # of another package, which needs a GPU
    cases: tuple[str, ...] = ()  # that such a package can do
    unless: str = "has no such option"  # why not the others

    def contender(self, case: Case) -> Function:
        assert self.function is not None
        return self.function(case, self.module and importlib.import_module(self.module))

    def missing(self, case: str, dimensions: int, device: str) -> str | None:
        """Why it cannot take part, if it cannot."""
        if self.module is None:
            return None
        if self.function is None:
            return self.unless
        if importlib.util.find_spec(self.module.split(".")[0]) is None:
            return "not installed"
        if torch.device(device).type == "cpu":
            return "needs a GPU"
        if case not in self.cases:
            return self.unless
        if dimensions != 2:
            return "takes rows x classes only"
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return f"cannot be imported: {error}"
        return None


@dataclass(frozen=True)
class Loss:
    cases: dict[str, Case]
    rivals: tuple[str, ...]  # of RIVALS
    count: Callable[[Inputs], float]  # what the mean divides by
    sizes: str  # measured when none are asked for
    over_classes: bool = False  # plotted over the number of classes, the second dimension


def exact(case: Case, loss: Loss, inputs: Inputs) -> tuple[float, Tensor]:
    """Loss and gradient by plain torch in float64."""
    logits = inputs.logits.detach()
    count = loss.count(inputs)
    gradient = torch.empty_like(logits, dtype=torch.float64)
    # In pieces, since float64 copies of everything would need many times the memory of the case.
    rows = max(1, (1 << 22) * len(logits) // logits.numel())
    total = 0.0
    for start in range(0, len(logits), rows):
        piece = slice(start, start + rows)
        leaf = logits[piece].double().requires_grad_()
        target = inputs.target[piece]
        options = {
            name: (t[piece] if t.shape == logits.shape else t).double()
            for name, t in inputs.options.items()
        }
        part = case.torch(
            leaf,
            target.double() if target.is_floating_point() else target,
            reduction="sum",
            **options,
        )
        gradient[piece] = torch.autograd.grad(part, leaf)[0]
        total += part.item()
    return total / count, gradient.div_(count)


def _eager(case: Case, _: None) -> Function:
    return case.torch


def _compile(case: Case, _: None) -> Function:
    # A kernel for exactly this shape, which is the fastest; the reset keeps dynamo from counting
    # earlier sizes against its limit of recompilations.
    torch.compiler.reset()
    return torch.compile(case.torch, fullgraph=True, dynamic=False)


def _liger(_: Case, module: Any) -> Function:
    return module.liger_cross_entropy  # type: ignore[no-any-return]


def _quack(case: Case, module: Any) -> Function:
    return partial(module.cross_entropy, inplace_backward=case.inplace)


def _flash_attn(case: Case, module: Any) -> Function:
    smoothing = case.torch.keywords if isinstance(case.torch, partial) else {}
    return module.CrossEntropyLoss(inplace_backward=case.inplace, **smoothing)  # type: ignore[no-any-return]


RIVALS = {
    "eager": Rival(_eager),
    "compile": Rival(_compile),
    "liger-kernel": Rival(
        _liger,
        "liger_kernel.transformers.functional",
        ("inplace",),
        "always overwrites the logits",
    ),
    "cut-cross-entropy": Rival(
        None, "cut_cross_entropy", (), "takes embeddings and a classifier, not logits"
    ),
    "quack-kernels": Rival(_quack, "quack.cross_entropy", ("plain", "ignored", "inplace")),
    "flash-attn": Rival(
        _flash_attn,
        "flash_attn.losses.cross_entropy",
        ("plain", "smoothing", "ignored", "inplace"),
    ),
}


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


def _torch_bce_on_bool(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction=reduction)


def _ce_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    weight: bool = False,
    ignored: bool = False,
    probabilities: bool = False,
) -> Inputs:
    logits = torch.empty(shape, dtype=dtype, device=device).normal_(std=3)
    if probabilities:
        return Inputs(logits, torch.softmax(torch.empty_like(logits).normal_(), 1))
    target = torch.randint(shape[1], shape[:1] + shape[2:], device=device)
    if ignored:  # as where the loss skips a prompt
        target.view(-1)[: target.numel() // 2] = -100
    options = {}
    if weight:
        options["weight"] = torch.empty(shape[1], dtype=dtype, device=device).uniform_(0.5, 1.5)
    return Inputs(logits, target, options)


def _torch_softcapped(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    capped = _SOFTCAP * torch.tanh(logits / _SOFTCAP)
    return F.cross_entropy(capped, target, reduction=reduction)


def _torch_z_loss(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    squares = torch.logsumexp(logits, 1).square()
    squares = squares.mean() if reduction == "mean" else squares.sum()
    return F.cross_entropy(logits, target, reduction=reduction) + _Z_LOSS * squares


def _ce_count(inputs: Inputs) -> float:
    if inputs.target.is_floating_point():
        return inputs.logits.numel() / inputs.logits.size(1)
    labels = inputs.target[inputs.target != -100]
    if "weight" in inputs.options:
        return inputs.options["weight"].double()[labels].sum().item()
    return labels.numel()


_fused_bce = fused_ce.functional.binary_cross_entropy_with_logits
_torch_bce = F.binary_cross_entropy_with_logits
_fused_ce = fused_ce.functional.cross_entropy
_torch_ce = F.cross_entropy
_SMOOTHING = 0.1
_SOFTCAP = 30.0  # Gemma 2's for its last logits: arXiv:2408.00118
_Z_LOSS = 1e-4  # PaLM's: arXiv:2204.02311

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
        rivals=("eager", "compile"),
        count=lambda inputs: inputs.logits.numel(),
        sizes="1000000,64Mi",
    ),
    "ce": Loss(
        cases={
            "plain": Case(_ce_inputs, _fused_ce, _torch_ce),
            "smoothing": Case(
                _ce_inputs,
                partial(_fused_ce, label_smoothing=_SMOOTHING),
                partial(_torch_ce, label_smoothing=_SMOOTHING),
            ),
            "weight": Case(partial(_ce_inputs, weight=True), _fused_ce, _torch_ce),
            "softcap": Case(_ce_inputs, partial(_fused_ce, softcap=_SOFTCAP), _torch_softcapped),
            "z_loss": Case(_ce_inputs, partial(_fused_ce, z_loss=_Z_LOSS), _torch_z_loss),
            "ignored": Case(partial(_ce_inputs, ignored=True), _fused_ce, _torch_ce),
            "probabilities": Case(partial(_ce_inputs, probabilities=True), _fused_ce, _torch_ce),
            "inplace": Case(
                _ce_inputs, partial(_fused_ce, inplace_backward=True), _torch_ce, inplace=True
            ),
        },
        rivals=tuple(RIVALS),
        count=_ce_count,
        sizes="65536x10,8192x1000,1024x32768,512x128256,8x21x512x512",
        over_classes=True,
    ),
}
