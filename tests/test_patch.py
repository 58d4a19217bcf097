from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fused_ce
from fused_ce.patch import patched_functional, replace_losses


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 3.0]), reduction="sum")
        self.labels = nn.CrossEntropyLoss(
            torch.rand(2), ignore_index=1, reduction="sum", label_smoothing=0.1
        )
        self.nested = nn.ModuleList([nn.BCELoss(weight=torch.tensor([1.0, 5.0]))])
        self.other = nn.MSELoss()


def test_replace_losses() -> None:
    x, t = torch.randn(4, 2), torch.rand(4, 2)
    before = Model().eval()
    after = replace_losses(copy.deepcopy(before))
    assert type(after.logits) is fused_ce.BCEWithLogitsLoss
    assert type(after.labels) is fused_ce.CrossEntropyLoss
    assert type(after.nested[0]) is fused_ce.BCELoss
    assert type(after.other) is nn.MSELoss
    assert not after.logits.training
    assert after.state_dict().keys() == before.state_dict().keys()
    torch.testing.assert_close(after.logits(x, t), before.logits(x, t))
    p, labels = x.sigmoid(), torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(after.nested[0](p, t), before.nested[0](p, t))
    torch.testing.assert_close(after.labels(x, labels), before.labels(x, labels))


def test_replace_a_loss_itself() -> None:
    assert type(replace_losses(nn.BCELoss())) is fused_ce.BCELoss
    assert type(replace_losses(nn.CrossEntropyLoss())) is fused_ce.CrossEntropyLoss


def test_shared_losses_stay_shared() -> None:
    model = nn.Module()
    model.a = model.b = nn.CrossEntropyLoss()
    model.list = nn.ModuleList([nn.BCELoss()] * 2)
    replace_losses(model)
    assert model.a is model.b
    assert model.list[0] is model.list[1]
    assert type(model.b) is fused_ce.CrossEntropyLoss
    assert type(model.list[1]) is fused_ce.BCELoss


def test_hooks_stay() -> None:
    model = nn.Sequential(nn.BCELoss())
    called = []
    handle = model[0].register_forward_hook(lambda *_: called.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: called.append("before"))
    model[0].register_full_backward_hook(lambda *_: called.append("backward"))
    loss = replace_losses(model)[0]
    loss(torch.rand(3, requires_grad=True) * 1, torch.ones(3)).backward()
    assert called == ["before", "forward", "backward"]
    handle.remove()
    loss(torch.rand(3), torch.ones(3))
    assert called[3:] == ["before"]


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.BCELoss])
def test_a_replaced_loss_is_a_whole_one(loss: type[nn.Module]) -> None:
    replaced = replace_losses(loss())
    assert vars(replaced).keys() == vars(type(replaced)()).keys()
    assert repr(copy.deepcopy(replaced)) == repr(loss())


def test_subclasses_are_left_alone() -> None:
    class Mine(nn.BCELoss):
        pass

    assert type(replace_losses(nn.Sequential(Mine()))[0]) is Mine


def test_patched_functional() -> None:
    original = nn.functional.binary_cross_entropy_with_logits
    x, t = torch.randn(4, 2, requires_grad=True), torch.rand(4, 2)
    # What torch refuses and ours takes shows which one ran.
    target = t > 0.5
    with pytest.raises(RuntimeError):
        nn.BCEWithLogitsLoss()(x, target)
    with patched_functional():
        loss = nn.BCEWithLogitsLoss()(x, target)
        # The composition of a second derivative calls torch's own function, not the patched one.
        p = x.sigmoid()
        (first,) = torch.autograd.grad(nn.BCELoss()(p, t), p, create_graph=True)
        first.sum().backward()
    torch.testing.assert_close(loss, original(x, target.float()))
    assert nn.functional.binary_cross_entropy_with_logits is original
    with pytest.raises(ZeroDivisionError), patched_functional():
        raise ZeroDivisionError
    assert nn.functional.binary_cross_entropy_with_logits is original


def test_patched_cross_entropy() -> None:
    x, t = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 1, 1])
    with pytest.raises(RuntimeError):
        nn.CrossEntropyLoss()(x, t.int())
    with patched_functional():
        loss = nn.CrossEntropyLoss()(x, t.int())
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        first.square().sum().backward()
    torch.testing.assert_close(loss, nn.functional.cross_entropy(x, t))
