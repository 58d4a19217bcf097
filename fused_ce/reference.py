"""Every loss in plain PyTorch, differentiable to any order.

This is what `torch.func` transforms, forward-mode differentiation, second derivatives and exported
training are composed from, and the last fallback on devices without kernels. The arguments are
those of the ops in csrc/ops.cpp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Held here, since fused_ce.patch may put ours in its place.
_torch_bce = F.binary_cross_entropy

LOGITS, PROBABILITY, FOCAL = 0, 1, 2
NONE, MEAN, SUM = 0, 1, 2


def _logits_loss(x: Tensor, negative: Tensor, positive: Tensor, total: Tensor | float) -> Tensor:
    """positive softplus(-x) + negative softplus(x), as `BceLogits` of csrc/math.h has it: the
    derivative for a target comes out as -x, not as a difference of two logarithms."""
    y = torch.where(x >= 0, x, -x)
    m = torch.where(x >= 0, negative, positive)
    # An infinite logit on the right side costs nothing, but its target's derivative is infinite.
    free = (m == 0) & (y == torch.inf)
    greatest = torch.finfo(m.dtype).max
    wrong_side = torch.where(free, m * greatest * greatest, m * torch.where(free, 1.0, y))
    return wrong_side + total * torch.log1p(torch.exp(-y))


def _focal_modulation(x: Tensor, target: Tensor, gamma: float) -> Tensor:
    """u^gamma of u = 1 - p_t, through log u where the target lies in [0, 1], since u may underflow.

    With y = |x|, and m = 1 - t where x >= 0, else t, u is sigmoid(y) (m + (1 - m) e^-y), which is
    sigmoid(-y) (1 + m (e^y - 1)) too: the second is used where m is 0, so that the derivatives for
    both x and t come out right and finite.
    """
    if gamma == 0:
        return torch.ones_like(x)
    y = torch.where(x >= 0, x, -x)
    m = torch.where(x >= 0, 1 - target, target)
    right = m == 0
    near, far = 1 + m * torch.expm1(y.clamp(max=80)), m + (1 - m) * torch.exp(-y)
    factor = torch.where(right, near, far)
    inside = factor > 0
    log_sigmoid = -torch.where(right, y, 0.0) - torch.log1p(torch.exp(-y))
    log_u = log_sigmoid + torch.log(torch.where(inside, factor, 1.0))
    outside = torch.where(inside, 1.0, torch.sigmoid(y) * factor)
    return torch.where(inside, torch.exp(gamma * log_u), outside**gamma)


def _is_kept(target: Tensor, ignore_index: int) -> Tensor:
    # In the target's own dtype the comparison would round or wrap the index.
    if target.is_floating_point():
        return target.double() != ignore_index
    return target.long() != ignore_index


def bce(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    form: int,
    reduction: int,
    dtype: torch.dtype,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    alpha: float = -1.0,
    gamma: float = 0.0,
    denominator: float | None = None,
    zero_on_empty: bool = False,
) -> Tensor:
    """The loss of the op `_bce`; see fused_ce.bce for shapes and meaning."""
    in_double = torch.float64 in (input.dtype, dtype)
    compute = torch.float64 if in_double else torch.float32
    x = input.to(compute)
    t = target.to(compute)
    kept = None if ignore_index is None else _is_kept(target, ignore_index)
    if kept is not None:
        x = torch.where(kept, x, 0.5)  # where all derivatives are finite
        t = torch.where(kept, t, 0.0)
    # 1 - t is smoothed by itself: formed from a smoothed t it would lose digits.
    negative = (1 - t) * (1 - label_smoothing) + label_smoothing / 2
    smoothed = t * (1 - label_smoothing) + label_smoothing / 2
    if form == PROBABILITY and label_smoothing:  # a target out of range is left for torch to find
        t = torch.where((t >= 0) & (t <= 1), smoothed, t)
    else:
        t = smoothed
    if form == PROBABILITY:
        loss = _torch_bce(x, t, reduction="none")
    else:
        total: Tensor | float = 1.0
        positive = t
        if pos_weight is not None:
            positive = pos_weight.to(compute) * t
            total = negative + positive
        loss = _logits_loss(x, negative, positive, total)
    if form == FOCAL:
        modulation = _focal_modulation(x, t, gamma)
        # Where the loss is infinite, the product's derivative would be inf * 0.
        infinite = loss == torch.inf
        finite_loss = torch.where(infinite, 0.0, loss)
        loss = torch.where(infinite, loss * modulation.detach(), finite_loss * modulation)
        if alpha >= 0:
            loss = loss * (alpha * t + (1 - alpha) * negative)
    for factor in (weight, sample_weight):
        if factor is not None:
            loss = loss * factor.to(compute)
    if kept is not None:
        loss = torch.where(kept, loss, 0.0)
    if reduction == NONE:
        return loss.to(dtype)
    total = loss.sum()
    if reduction == MEAN:
        count = input.numel() if kept is None else kept.sum()
        total = _divide(total, count, normalizer, denominator, zero_on_empty)
    return total.to(dtype)


LSE, ENTROPY, PREDICTION, CORRECT = 1, 2, 4, 8


def _capped(x: Tensor, logit_scale: float, softcap: float) -> Tensor:
    logits = x if logit_scale == 1 else x * logit_scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _of_label(log_p: Tensor, label: Tensor, kept: Tensor, dim: int) -> Tensor:
    """log_p of each row's label. A label out of range raises on the CPU; elsewhere, where torch's
    gather would end the process's CUDA context, the row becomes NaN with its gradient."""
    classes, on_cpu = log_p.size(dim), log_p.device.type == "cpu"
    if classes == 0:  # gather refuses the ignored rows' label too
        if on_cpu and kept.any():
            raise IndexError(f"Target {label[kept][0]} is out of bounds.")
        return torch.where(kept, torch.nan, log_p.sum(dim))
    if on_cpu:
        return log_p.gather(dim, label.unsqueeze(dim)).squeeze(dim)
    inside = (label >= 0) & (label < classes)
    found = log_p.gather(dim, torch.where(inside, label, 0).unsqueeze(dim)).squeeze(dim)
    return found * torch.where(inside, 1.0, torch.nan)


def softmax_ce(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    outputs: int,
    reduction: int,
    dtype: torch.dtype,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    denominator: float | None = None,
    zero_on_empty: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, lse, entropy, prediction and correctness of the op `_softmax_ce`; see
    fused_ce.softmax_ce for shapes and meaning. What `outputs` does not ask for is empty.
    """
    in_double = torch.float64 in (input.dtype, dtype)
    compute = torch.float64 if in_double else torch.float32
    x = input.to(compute)
    dim = 1 if x.dim() > 1 else 0
    shape = [1] * x.dim()
    shape[dim] = classes = x.size(dim)
    w = None if weight is None else weight.to(compute).reshape(shape)
    has_probabilities = target.is_floating_point()
    stats = _softmax_stats(x, target, ignore_index, softcap, logit_scale, outputs)

    kept = None if has_probabilities else _is_kept(target, ignore_index)
    if kept is not None:
        x = torch.where(kept.unsqueeze(dim), x, 0.0)
    logits = _capped(x, logit_scale, softcap)
    log_p = torch.log_softmax(logits, dim)
    count: Tensor | int
    if kept is None:
        t = target.to(compute) * (1 - label_smoothing) + label_smoothing / max(classes, 1)
        loss = -(log_p * (t if w is None else t * w)).sum(dim)
        count = loss.numel()
    else:
        label = torch.where(kept, target.long(), 0)
        loss = -_of_label(log_p, label, kept, dim)
        row_weight = kept.to(compute)
        if w is not None:
            row_weight = torch.where(kept, _of_label(w.expand_as(log_p), label, kept, dim), 0.0)
            loss = loss * row_weight
        if label_smoothing:
            smooth = -(log_p if w is None else log_p * w).sum(dim)
            loss = loss * (1 - label_smoothing) + smooth * (label_smoothing / max(classes, 1))
        count = row_weight.sum()
        if not zero_on_empty:  # NaN as torch's mean is, and with label smoothing too
            count = torch.where(count == 0, torch.nan, count)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(logits, dim).square()
    if sample_weight is not None:
        loss = loss * sample_weight.to(compute)
    if kept is not None:
        loss = torch.where(kept, loss, 0.0)
    if reduction != NONE:
        loss = loss.sum()
    if reduction == MEAN:
        loss = _divide(loss, count, normalizer, denominator, zero_on_empty)
    return (loss.to(dtype), *stats)


def _softmax_stats(
    x: Tensor,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    outputs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, entropy, prediction and correctness of every row, ignored ones too."""
    dim = 1 if x.dim() > 1 else 0
    lse, entropy, prediction, correct = (
        x.new_empty(0, dtype=dtype) for dtype in (x.dtype, x.dtype, torch.int64, torch.bool)
    )
    if outputs:
        logits = _capped(x, logit_scale, softcap)
    if outputs & LSE:
        lse = torch.logsumexp(logits, dim)
    if outputs & ENTROPY:
        log_p = torch.log_softmax(logits, dim)
        # A class of probability 0 counts nothing, and its derivatives must not be 0 * inf.
        entropy = -(log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(dim)
    if outputs & (PREDICTION | CORRECT):
        best = logits.argmax(dim)
        if outputs & PREDICTION:
            prediction = best
        if outputs & CORRECT and target.is_floating_point():
            correct = best == target.argmax(dim)
        elif outputs & CORRECT:
            correct = (best == target) & _is_kept(target, ignore_index)
    return lse, entropy, prediction, correct


def _divide(
    total: Tensor,
    count: Tensor | int,
    normalizer: Tensor | None,
    denominator: float | None,
    zero_on_empty: bool,
) -> Tensor:
    """The mean: `total` by the normalizer, the denominator, or what the loss itself counts."""
    if normalizer is not None:
        divisor = normalizer.reshape(()).to(total.dtype)
    elif denominator is not None:
        divisor = total.new_full((), denominator)
    elif isinstance(count, Tensor):
        divisor = count.to(total.dtype)
    else:
        divisor = total.new_full((), count)  # which may be a symbol
    if zero_on_empty:
        empty = divisor == 0
        return torch.where(empty, 0.0, total / torch.where(empty, 1.0, divisor))
    return total / divisor
