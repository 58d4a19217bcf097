"""Fused cross entropy for PyTorch: the losses of torch.nn in one pass over the logits."""

from fused_ce import backends, functional
from fused_ce.backends import backend, check, set_backend
from fused_ce.modules import BCELoss, BCEWithLogitsLoss, CrossEntropyLoss, SigmoidFocalLoss

__version__ = "0.1.0"

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "SigmoidFocalLoss",
    "backend",
    "backends",
    "check",
    "functional",
    "set_backend",
]
