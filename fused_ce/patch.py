"""Puts the losses of this package in the place of torch's inside code that is not yours to edit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from fused_ce import functional, modules


def replace_losses(module: nn.Module) -> nn.Module:
    """Replaces every `torch.nn.CrossEntropyLoss`, `BCEWithLogitsLoss` and `BCELoss` below `module`
    by ours, with its weights and settings. Subclasses are left alone. Returns the module, or the
    replacement if `module` is itself such a loss.
    """
    if type(module) is nn.CrossEntropyLoss:
        return _like(
            module,
            modules.CrossEntropyLoss(
                module.weight,
                ignore_index=module.ignore_index,
                reduction=module.reduction,
                label_smoothing=module.label_smoothing,
            ),
        )
    if type(module) is nn.BCEWithLogitsLoss:
        return _like(
            module,
            modules.BCEWithLogitsLoss(
                module.weight, reduction=module.reduction, pos_weight=module.pos_weight
            ),
        )
    if type(module) is nn.BCELoss:
        return _like(module, modules.BCELoss(module.weight, reduction=module.reduction))
    for name, child in list(module.named_children()):
        setattr(module, name, replace_losses(child))
    return module


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    return new.train(old.training)


@contextlib.contextmanager
def patched_functional() -> Iterator[None]:
    """Within the block, `torch.nn.functional.cross_entropy`, `binary_cross_entropy` and
    `binary_cross_entropy_with_logits` are ours, and so are the modules of torch.nn that call them.
    Names that other modules have imported before keep what they hold.
    """
    names = ("cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits")
    before = {name: getattr(nn.functional, name) for name in names}
    for name in names:
        setattr(nn.functional, name, getattr(functional, name))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(nn.functional, name, function)
