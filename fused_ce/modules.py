"""The losses as modules: subclasses of torch.nn's, with their isinstance, repr and state dicts, and
one for the focal loss, which torch.nn has not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fused_ce import bce, softmax_ce


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    r"""`torch.nn.BCEWithLogitsLoss
    <https://pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html>`_ in one pass; see
    :func:`fused_ce.functional.binary_cross_entropy_with_logits` for formula, shapes, dtypes, the
    keyword-only extras and what is raised.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        on_empty: str = "nan",
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.on_empty = on_empty
        self.inplace_backward = inplace_backward

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return bce.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            pos_weight=self.pos_weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            normalizer=normalizer,
            on_empty=self.on_empty,
            inplace_backward=self.inplace_backward,
        )


class BCELoss(nn.BCELoss):
    r"""`torch.nn.BCELoss <https://pytorch.org/docs/stable/generated/torch.nn.BCELoss.html>`_ in one
    pass; see :func:`fused_ce.functional.binary_cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        on_empty: str = "nan",
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.on_empty = on_empty

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return bce.binary_cross_entropy(
            input,
            target,
            self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            normalizer=normalizer,
            on_empty=self.on_empty,
        )


class SigmoidFocalLoss(nn.Module):
    r"""Focal loss (`Lin et al. 2017 <https://arxiv.org/abs/1708.02002>`_) on logits, as a module;
    see :func:`fused_ce.functional.sigmoid_focal_loss`.
    """

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2,
        reduction: str = "none",
        *,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        on_empty: str = "nan",
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.on_empty = on_empty
        self.inplace_backward = inplace_backward

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return bce.sigmoid_focal_loss(
            inputs,
            targets,
            self.alpha,
            self.gamma,
            self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            normalizer=normalizer,
            on_empty=self.on_empty,
            inplace_backward=self.inplace_backward,
        )


class CrossEntropyLoss(nn.CrossEntropyLoss):
    r"""`torch.nn.CrossEntropyLoss
    <https://pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html>`_ in one pass; see
    :func:`fused_ce.functional.cross_entropy` for formula, shapes, dtypes, the keyword-only extras
    and what is raised. With `stats`, calls return a pair of loss and statistics.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        on_empty: str = "nan",
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        stats: Sequence[str] = (),
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.on_empty = on_empty
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.z_loss = z_loss
        self.stats = stats
        self.inplace_backward = inplace_backward

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        return softmax_ce.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            normalizer=normalizer,
            on_empty=self.on_empty,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            stats=self.stats,
            inplace_backward=self.inplace_backward,
        )
