"""Train one classifier of digits with torch's CrossEntropyLoss and with ours, and compare the two.

python examples/train_multiclass.py --epochs 40 --plot train_multiclass.png
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fused_ce

BATCH = 64
CLASSES = 10
SMOOTHING = 0.1
REPEATS = 3

LossFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # loss, right predictions


@dataclass
class Split:
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Run:
    losses: Tensor  # one per step, float32
    accuracies: Tensor  # of the batches, before each step
    test_accuracy: float
    seconds: float


def load(seed: int, device: str) -> Split:
    """1797 digits of 8 x 8 pixels; of 0 to 4 every third only, so that the classes differ."""
    x, y = load_digits(return_X_y=True)
    kept = (y > 4) | (torch.arange(len(y)).numpy() % 3 == 0)
    arrays = train_test_split(x[kept], y[kept], test_size=0.25, stratify=y[kept], random_state=seed)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, arrays)
    scaled = train_x.float() / 16, train_y.long(), test_x.float() / 16, test_y.long()
    return Split(*(tensor.to(device) for tensor in scaled))


def train(loss_fn: LossFunction, data: Split, epochs: int, seed: int) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    model.to(data.train_x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, accuracies = [], []
    start = perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train_x)).split(BATCH):
            rows = rows.to(data.train_x.device)
            loss, correct = loss_fn(model(data.train_x[rows]), data.train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())  # no .item() here: it would wait for the GPU every step
            accuracies.append(correct.float().mean())
    curves = torch.stack(losses).cpu(), torch.stack(accuracies).cpu()
    seconds = perf_counter() - start
    with torch.no_grad():
        right = model(data.test_x).argmax(1) == data.test_y
    return Run(*curves, right.float().mean().item(), seconds)


def plot(runs: dict[str, Run], path: Path) -> None:
    figure = Figure(figsize=(7, 7), layout="constrained")
    curves, accuracy, difference = figure.subplots(3, sharex=True, height_ratios=(3, 2, 1))
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        curves.plot(run.losses, style, label=name)
        accuracy.plot(run.accuracies, style, label=name)
    curves.set(ylabel="loss of the batch", title="Digits, same seed")
    curves.legend()
    accuracy.set(ylabel="accuracy of the batch")
    first, second = (run.losses for run in runs.values())
    difference.plot((first - second).abs(), color="black", linewidth=0.8)
    difference.set(xlabel="step", ylabel="|difference|")
    figure.savefig(path, dpi=150)


def main(
    epochs: Annotated[int, typer.Option(min=1)] = 40,
    plot_path: Annotated[Path, typer.Option("--plot", dir_okay=False, writable=True)] = Path(
        "train_multiclass.png"
    ),
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Compare torch's CrossEntropyLoss and ours on scikit-learn's digits."""
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise typer.BadParameter(f"{device} is not available", param_hint="--device")
    if not os.access(plot_path.parent, os.W_OK) or plot_path.suffix not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"cannot write {plot_path} as png, pdf, svg", param_hint="--plot")
    torch.set_num_threads(1)  # the matrices are too small to share out
    data = load(seed, device)
    counts = torch.bincount(data.train_y, minlength=CLASSES)
    weight = len(data.train_y) / (CLASSES * counts)  # rare digits count more
    theirs = nn.CrossEntropyLoss(weight, label_smoothing=SMOOTHING)
    ours = fused_ce.CrossEntropyLoss(weight, label_smoothing=SMOOTHING, stats=("correct",))

    def torch_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return theirs(logits, target), logits.detach().argmax(1) == target

    def fused_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = ours(logits, target)  # one pass finds both
        return loss, stats.correct

    losses: dict[str, LossFunction] = {"torch": torch_loss, "fused_ce": fused_loss}
    runs: dict[str, Run] = {}
    for _ in range(REPEATS):  # equal but for the time: keep the fastest, the first also warms up
        for name, loss_fn in losses.items():
            run = train(loss_fn, data, epochs, seed)
            if name not in runs or run.seconds < runs[name].seconds:
                runs[name] = run

    difference = (runs["fused_ce"].losses - runs["torch"].losses).abs().max().item()
    # Two correct float32 losses round differently by a few eps in a step, and at this learning rate
    # the network does not amplify it: after k steps the runs are at most about k eps (of the
    # largest loss) apart. A wrong weight or sign is larger by orders of magnitude.
    steps = len(runs["torch"].losses)
    bound = steps * torch.finfo(torch.float32).eps * runs["torch"].losses.max().item()

    title = f"{len(data.train_y)} digits, smoothing {SMOOTHING}, {steps} steps"
    columns = "loss", "final loss", "last batches", "test accuracy", "training time"
    table = Table(*columns, title=title)
    for name, run in runs.items():
        recent = run.accuracies[-10:].mean()
        times = f"{run.seconds * 1e3:.0f} ms"
        table.add_row(
            name, f"{run.losses[-1]:.7f}", f"{recent:.2%}", f"{run.test_accuracy:.2%}", times
        )
    Console().print(table)
    print(f"largest difference of the loss curves: {difference:.1e} (bound {bound:.1e})")
    print(f"time: the fastest of {REPEATS}; {BATCH} rows a step are too few to judge a loss by")
    assert difference <= bound, "the two losses disagree by more than rounding"
    plot(runs, plot_path)
    print(f"plot: {plot_path}")


if __name__ == "__main__":
    typer.run(main)
