"""The losses as functions, under the names of torch.nn.functional and torchvision.ops."""

from fused_ce.bce import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    sigmoid_focal_loss,
)
from fused_ce.softmax_ce import CrossEntropyStats, cross_entropy

__all__ = [
    "CrossEntropyStats",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "sigmoid_focal_loss",
]
