"""Train the same small network with torch's BCEWithLogitsLoss and with ours, and compare the two.

python examples/train_binary.py --epochs 60 --plot train_binary.png
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import fused_ce

BATCH = 64
REPEATS = 3


@dataclass
class Split:
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Run:
    losses: Tensor  # one per step, float32
    accuracy: float
    seconds: float


def load(seed: int, device: str) -> Split:
    """569 tumours, 30 measurements each; the label is 1 for the rarer, malignant ones."""
    x, benign = load_breast_cancer(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        x, 1 - benign, test_size=0.25, stratify=benign, random_state=seed
    )
    scaler = StandardScaler().fit(train_x)
    arrays = scaler.transform(train_x), train_y, scaler.transform(test_x), test_y
    return Split(*(torch.tensor(a, dtype=torch.float32, device=device) for a in arrays))


def train(loss_fn: nn.Module, data: Split, epochs: int, seed: int) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 1)).to(data.train_x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    start = perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train_x)).split(BATCH):
            rows = rows.to(data.train_x.device)
            # squeeze: the targets are (N,), and the loss does not broadcast (N, 1) against them
            loss = loss_fn(model(data.train_x[rows]).squeeze(1), data.train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())  # no .item() here: it would wait for the GPU every step
    curve = torch.stack(losses).cpu()
    seconds = perf_counter() - start
    with torch.no_grad():
        predicted = model(data.test_x).squeeze(1) > 0  # logit 0 is probability 0.5
    return Run(curve, (predicted == data.test_y.bool()).float().mean().item(), seconds)


def plot(runs: dict[str, Run], path: Path) -> None:
    figure = Figure(figsize=(7, 5), layout="constrained")
    curves, difference = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        curves.plot(run.losses, style, label=name)
    curves.set(ylabel="loss of the batch", title="Breast cancer data, same seed")
    curves.legend()
    first, second = (run.losses for run in runs.values())
    difference.plot((first - second).abs(), color="black", linewidth=0.8)
    difference.set(xlabel="step", ylabel="|difference|")
    figure.savefig(path, dpi=150)


def main(
    epochs: Annotated[int, typer.Option(min=1)] = 60,
    plot_path: Annotated[Path, typer.Option("--plot", dir_okay=False, writable=True)] = Path(
        "train_binary.png"
    ),
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Compare torch's BCEWithLogitsLoss and ours on the breast cancer data."""
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise typer.BadParameter(f"{device} is not available", param_hint="--device")
    if not os.access(plot_path.parent, os.W_OK) or plot_path.suffix not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"cannot write {plot_path} as png, pdf, svg", param_hint="--plot")
    torch.set_num_threads(1)  # the matrices are too small to share out
    data = load(seed, device)
    positives = data.train_y.sum()
    pos_weight = (len(data.train_y) - positives) / positives
    losses: dict[str, nn.Module] = {
        "torch": nn.BCEWithLogitsLoss(pos_weight=pos_weight),
        "fused_ce": fused_ce.BCEWithLogitsLoss(pos_weight=pos_weight),
    }
    runs: dict[str, Run] = {}
    for _ in range(REPEATS):  # equal but for the time: keep the fastest, the first also warms up
        for name, loss_fn in losses.items():
            run = train(loss_fn, data, epochs, seed)
            if name not in runs or run.seconds < runs[name].seconds:
                runs[name] = run

    ours, theirs = runs["fused_ce"].losses, runs["torch"].losses
    difference = (ours - theirs).abs().max().item()
    # Two correct float32 losses round differently by a few eps in a step, and at this learning rate
    # the network does not amplify it: after k steps the runs are at most about k eps (of the
    # largest loss) apart. A wrong weight or sign is larger by orders of magnitude.
    bound = len(theirs) * torch.finfo(torch.float32).eps * theirs.max().item()

    title = f"{len(data.train_y)} training rows, pos_weight {pos_weight:.3f}, {len(theirs)} steps"
    table = Table("loss", "final loss", "test accuracy", "training time", title=title)
    for name, run in runs.items():
        table.add_row(
            name, f"{run.losses[-1]:.7f}", f"{run.accuracy:.2%}", f"{run.seconds * 1e3:.0f} ms"
        )
    Console().print(table)
    print(f"largest difference of the loss curves: {difference:.1e} (bound {bound:.1e})")
    print(f"time: the fastest of {REPEATS}; {BATCH} rows a step are too few to judge a loss by")
    assert difference <= bound, "the two losses disagree by more than rounding"
    plot(runs, plot_path)
    print(f"plot: {plot_path}")


if __name__ == "__main__":
    typer.run(main)
