"""Which loss for which labels, with the identities between the losses checked on random numbers.

python examples/which_loss.py
"""

from __future__ import annotations

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.testing import assert_close
from torchmetrics import MeanMetric

import fused_ce
from fused_ce.functional import cross_entropy

N, C = 8, 5
bce = fused_ce.BCEWithLogitsLoss()


def describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def three_cases() -> None:
    table = Table("labels", "loss", "logits", "target", "value", title=f"N = {N}, C = {C}")

    def case(labels: str, loss_fn: nn.Module, logits: Tensor, target: Tensor) -> None:
        value = f"{loss_fn(logits, target).item():.4f}"
        table.add_row(labels, type(loss_fn).__name__, describe(logits), describe(target), value)

    yes_no = torch.randint(2, (N,)).float()
    case("one yes/no", bce, torch.randn(N), yes_no)
    case("one yes/no", bce, torch.randn(N, 1), yes_no.unsqueeze(1))
    case("one of C", fused_ce.CrossEntropyLoss(), torch.randn(N, C), torch.randint(C, (N,)))
    case("C yes/no", bce, torch.randn(N, C), torch.randint(2, (N, C)).float())
    Console().print(table)

    try:
        bce(torch.randn(N, 1), yes_no)
    except ValueError as error:
        print(f"(N, 1) logits with (N,) targets are refused: {error}\n")
    else:
        raise AssertionError("(N, 1) logits with (N,) targets must be refused")


def identities() -> None:
    x = torch.randn(N)
    target = torch.randint(2, (N,))
    soft = target.float()
    want = bce(x, soft)

    assert_close(fused_ce.BCELoss()(torch.sigmoid(x), soft), want)
    print("BCE with logits = BCE on sigmoid(logits)")

    # softmax over [0, x] gives class 1 the probability e^x / (1 + e^x), which is sigmoid(x)
    assert_close(cross_entropy(torch.stack([torch.zeros(N), x], dim=1), target), want)
    print("BCE with logits = cross entropy of the two classes [0, logit]")

    two = torch.randn(N, 2)
    assert_close(bce(two[:, 1] - two[:, 0], soft), cross_entropy(two, target))
    print("cross entropy of two classes = BCE on the difference of their logits")

    confident, wrong = torch.tensor([20.0]), torch.tensor([0.0])
    rounded = fused_ce.BCELoss()(torch.sigmoid(confident), wrong)
    exact = bce(confident, wrong)
    assert_close(exact, torch.tensor(20.0))
    assert_close(rounded, torch.tensor(100.0))
    print(
        f"but prefer logits: at logit 20, label 0 the loss is {exact:.0f}; sigmoid rounds to 1 in "
        f"float32, and BCELoss then gives its largest value, {rounded:.0f}\n"
    )


def average_over_batches() -> None:
    """The last batch is small: its mean must not count as much as the others'."""
    x, target = torch.randn(71), torch.randint(2, (71,)).float()
    x[64:] = -6 * (2 * target[64:] - 1)  # the last 7 are confidently wrong
    weighted, plain = MeanMetric(), MeanMetric()
    for x_batch, target_batch in zip(x.split(32), target.split(32), strict=True):
        loss = bce(x_batch, target_batch)
        weighted.update(loss, weight=len(x_batch))
        plain.update(loss)
    want = bce(x, target)
    right, wrong = weighted.compute(), plain.compute()
    assert_close(right, want)
    assert abs(wrong - want) > 0.1
    print(f"loss over all 71 rows:                  {want:.4f}")
    print(f"batch means weighted by the batch size: {right:.4f}")
    print(f"plain mean of the batch means (wrong):  {wrong:.4f}")


def main() -> None:
    """Which loss for which labels, with the identities between the losses checked."""
    torch.manual_seed(0)
    three_cases()
    identities()
    average_over_batches()


if __name__ == "__main__":
    typer.run(main)
