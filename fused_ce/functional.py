"""The losses as functions, under the names of torch.nn.functional and torchvision.ops."""

from fused_ce.bce import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    sigmoid_focal_loss,
)

__all__ = ["binary_cross_entropy", "binary_cross_entropy_with_logits", "sigmoid_focal_loss"]
