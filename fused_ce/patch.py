"""Puts the losses of this package in the place of torch's inside code that is not yours to edit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from fused_ce import functional, modules

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.CrossEntropyLoss: modules.CrossEntropyLoss,
    nn.BCEWithLogitsLoss: modules.BCEWithLogitsLoss,
    nn.BCELoss: modules.BCELoss,
}


def replace_losses(module: nn.Module) -> nn.Module:
    """Turns `module`, or every module below it, that is a `torch.nn.CrossEntropyLoss`,
    `BCEWithLogitsLoss` or `BCELoss` into ours, in place: weights, settings and hooks stay, and so
    does every other reference to them. Subclasses are left alone. Returns the module.
    """
    for loss in module.modules():
        ours = _OURS.get(type(loss))
        if ours is not None:
            loss.__class__ = ours
            for name, default in vars(ours()).items():  # the settings that torch's has not
                vars(loss).setdefault(name, default)
    return module


@contextlib.contextmanager
def patched_functional() -> Iterator[None]:
    """Within the block, `torch.nn.functional.cross_entropy`, `binary_cross_entropy` and
    `binary_cross_entropy_with_logits` are ours, and so are the modules of torch.nn that call them.
    Names that other modules have imported before keep what they hold. Blocks may nest, but not
    overlap otherwise (in several threads, say): the last to end would leave ours behind.
    torch.jit.script refuses these functions within the block.
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
