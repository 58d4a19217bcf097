"""Train one byte-level transformer with torch's CrossEntropyLoss and with ours, and compare.

The text is what Python's standard library says about itself: its documentation strings.

python examples/train_lm.py --steps 100 --plot train_lm.png
"""

from __future__ import annotations

import ast
import ctypes
import os
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fused_ce

VOCABULARY = 256  # bytes
CONTEXT = 128
BATCH = 16
WIDTH = 64
LAYERS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Loss = Callable[[Tensor, Tensor], Tensor]


def text(limit: int = 1 << 20) -> Tensor:
    """The documentation strings of the standard library's modules, classes and functions."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, documented):
                found.append(ast.get_docstring(node) or "")
    joined = "\n\n".join(filter(None, found)).encode()[:limit]
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.before(x)).view(n, t, 3, 4, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, WIDTH))
        return x + self.mlp(self.after(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.bytes(x) + self.places)))


@dataclass
class Run:
    losses: Tensor  # one per step, float32
    milliseconds: float  # median of the steps


class Trainer:
    def __init__(self, loss_fn: Loss, data: Tensor, dtype: torch.dtype, seed: int) -> None:
        torch.manual_seed(seed)
        self.loss_fn, self.data, self.dtype = loss_fn, data, dtype
        self.model = Model().to(data.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def step(self) -> Tensor:
        starts = torch.randint(len(self.data) - CONTEXT, (BATCH, 1))
        places = (starts + torch.arange(CONTEXT + 1)).to(self.data.device)
        chunk = self.data[places].long()
        half = self.dtype != torch.float32
        with torch.autocast(self.data.device.type, self.dtype) if half else nullcontext():
            logits = self.model(chunk[:, :-1])
            loss = self.loss_fn(logits.view(-1, VOCABULARY), chunk[:, 1:].reshape(-1))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


def train(trainer: Trainer, steps: int) -> Run:
    losses, times = [], []
    for _ in range(steps):
        start = perf_counter()
        losses.append(trainer.step())
        if trainer.data.is_cuda:
            torch.cuda.synchronize()
        times.append((perf_counter() - start) * 1e3)
    return Run(torch.stack(losses).cpu(), median(times))


def peak_bytes(trainer: Trainer) -> int:
    """What one step needs beyond what lives between steps."""
    trainer.step()
    if trainer.data.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.step()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    resident = kilobytes(status, "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the maximum starts again from here
    trainer.step()
    return (kilobytes(status, "VmHWM") - resident) * 1024


def peak_in_child(name: str, data: Tensor, dtype: torch.dtype, seed: int) -> int | None:
    """In a process that gives every large tensor pages of its own and back when it is freed."""
    try:
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
        return peak_bytes(Trainer(loss_functions()[name], data, dtype, seed))
    except (OSError, AttributeError):
        return None  # not Linux with glibc


def find_peaks(data: Tensor, seed: int) -> dict[tuple[str, str], int | None]:
    every = [(dtype, name) for dtype in DTYPES for name in loss_functions()]
    if data.is_cuda:
        return {
            (dtype, name): peak_bytes(Trainer(loss_functions()[name], data, DTYPES[dtype], seed))
            for dtype, name in every
        }
    if sys.platform != "linux":
        return dict.fromkeys(every)
    # Forked before this process has started threads, which a fork would lose.
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return {
            (dtype, name): pool.submit(peak_in_child, name, data, DTYPES[dtype], seed).result()
            for dtype, name in every
        }


def loss_functions() -> dict[str, Loss]:
    return {
        "torch": nn.CrossEntropyLoss(),
        "fused_ce": fused_ce.CrossEntropyLoss(),
        "fused_ce in place": fused_ce.CrossEntropyLoss(inplace_backward=True),
    }


def kilobytes(status: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().split("\n") if key in line)


def plot(
    runs: dict[tuple[str, str], Run], peaks: dict[tuple[str, str], int | None], path: Path
) -> None:
    names = list(dict.fromkeys(name for _, name in runs))
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, len(DTYPES))
    for axis, dtype in zip(axes[0], DTYPES, strict=True):
        for name, style in zip(names, ("-", "--", ":"), strict=True):
            axis.plot(runs[dtype, name].losses, style, label=name)
        axis.set(title=f"{dtype}, same seed", xlabel="step", ylabel="loss (nats a byte)")
        axis.legend()
    measures = {
        "step time (ms)": {key: run.milliseconds for key, run in runs.items()},
        "peak memory of a step (MB)": {key: (peak or 0) / 1e6 for key, peak in peaks.items()},
    }
    for axis, (label, measure) in zip(axes[1], measures.items(), strict=True):
        for index, name in enumerate(names):
            heights = [measure[dtype, name] for dtype in DTYPES]
            places = [place + 0.27 * (index - 1) for place in range(len(DTYPES))]
            bars = axis.bar(places, heights, 0.25, label=name)
            axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.set_xticks(range(len(DTYPES)), list(DTYPES))
        axis.set_ylabel(label)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main(
    steps: Annotated[int, typer.Option(min=2)] = 100,
    plot_path: Annotated[Path, typer.Option("--plot", dir_okay=False, writable=True)] = Path(
        "train_lm.png"
    ),
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Compare torch's CrossEntropyLoss and ours on a byte-level language model."""
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise typer.BadParameter(f"{device} is not available", param_hint="--device")
    if not os.access(plot_path.parent, os.W_OK) or plot_path.suffix not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"cannot write {plot_path} as png, pdf, svg", param_hint="--plot")
    data = text().to(device)
    peaks = find_peaks(data, seed)
    losses = loss_functions()
    for loss_fn in losses.values():  # starts threads, loads code: no part of a step's time
        train(Trainer(loss_fn, data, torch.float32, seed), 2)
    title = f"{len(data)} bytes of text, {BATCH} x {CONTEXT} x {VOCABULARY} logits, {steps} steps"
    table = Table("dtype", "loss", "final loss", "step", "peak memory", title=title)
    runs: dict[tuple[str, str], Run] = {}
    for key, peak in peaks.items():
        dtype, name = key
        run = runs[key] = train(Trainer(losses[name], data, DTYPES[dtype], seed), steps)
        memory = "not known" if peak is None else f"{peak / 1e6:.1f} MB"
        table.add_row(*key, f"{run.losses[-1]:.6f}", f"{run.milliseconds:.1f} ms", memory)
    Console().print(table)
    for (dtype, name), run in runs.items():
        theirs = runs[dtype, "torch"].losses
        difference = (run.losses - theirs).abs().max().item()
        # Correct float32 losses round differently by a few eps a step. Of bfloat16 gradients, which
        # are rounded from float32, a few fall on the other side: less than one eps of the loss.
        roundings = steps if dtype == "float32" else 1
        bound = roundings * torch.finfo(DTYPES[dtype]).eps * theirs.max().item()
        if name != "torch":
            print(f"{dtype}, {name}: largest difference {difference:.1e} (bound {bound:.1e})")
        assert difference <= bound, "the two losses disagree by more than rounding"
    plot(runs, peaks, plot_path)
    print(f"plot: {plot_path}")


if __name__ == "__main__":
    typer.run(main)
