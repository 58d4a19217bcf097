"""Every loss in plain PyTorch, differentiable to any order.

This is the oracle of the tests (in float64), what `torch.func` transforms, forward-mode
differentiation and second derivatives are composed from, and the last fallback on devices without
kernels. The arguments are those of the ops in csrc/ops.cpp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Held here, since fused_ce.patch may put ours in its place.
_torch_bce = F.binary_cross_entropy

LOGITS, PROBABILITY, FOCAL = 0, 1, 2
NONE, MEAN, SUM = 0, 1, 2


def _times(coefficient: Tensor, x: Tensor, sign: int) -> Tensor:
    """coefficient * softplus(sign * x), where an infinite logit of coefficient 0 costs nothing."""
    x = torch.where((x == sign * torch.inf) & (coefficient == 0), 0.0, x)
    return coefficient * -F.logsigmoid(-sign * x)


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
    log_u = F.logsigmoid(torch.where(right, -y, y)) + torch.log(torch.where(inside, factor, 1.0))
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
    normalizer: Tensor | None,
    form: int,
    reduction: int,
    dtype: torch.dtype,
    label_smoothing: float,
    ignore_index: int | None,
    alpha: float,
    gamma: float,
    denominator: float | None,
    zero_on_empty: bool,
) -> Tensor:
    """The loss of the op `_bce`; see fused_ce.bce for shapes and meaning."""
    in_double = torch.float64 in (input.dtype, dtype)
    compute = torch.float64 if in_double else torch.float32
    x = input.to(compute)
    t = target.to(compute)
    kept = None if ignore_index is None else _is_kept(target, ignore_index)
    if kept is not None:
        x = torch.where(kept, x, 0.0)
        t = torch.where(kept, t, 0.0)
    # 1 - t is smoothed by itself: formed from a smoothed t it would lose digits.
    negative = (1 - t) * (1 - label_smoothing) + label_smoothing / 2
    t = t * (1 - label_smoothing) + label_smoothing / 2
    if form == PROBABILITY:
        loss = _torch_bce(x, t, reduction="none")
    else:
        positive = t if pos_weight is None else pos_weight.to(compute) * t
        loss = _times(negative, x, 1) + _times(positive, x, -1)
    if form == FOCAL:
        loss = loss * _focal_modulation(x, t, gamma)
        if alpha >= 0:
            loss = loss * (alpha * t + (1 - alpha) * negative)
    if weight is not None:
        loss = loss * weight.to(compute)
    if kept is not None:
        loss = torch.where(kept, loss, 0.0)
    if reduction == NONE:
        return loss.to(dtype)
    total = loss.sum()
    if reduction == MEAN:
        total = _divide(total, kept, input.numel(), normalizer, denominator, zero_on_empty)
    return total.to(dtype)


def _divide(
    total: Tensor,
    kept: Tensor | None,
    numel: int,
    normalizer: Tensor | None,
    denominator: float | None,
    zero_on_empty: bool,
) -> Tensor:
    if normalizer is not None:
        divisor = normalizer.reshape(()).to(total.dtype)
    elif denominator is not None:
        divisor = total.new_tensor(denominator)
    elif kept is not None:
        divisor = kept.sum().to(total.dtype)
    else:
        divisor = total.new_tensor(float(numel))
    if zero_on_empty:
        empty = divisor == 0
        return torch.where(empty, 0.0, total / torch.where(empty, 1.0, divisor))
    return total / divisor
