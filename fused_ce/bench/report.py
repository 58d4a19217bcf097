"""The measurements as a table, CSV, JSON and a plot."""

from __future__ import annotations

import csv
import json
import os
import platform
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fused_ce import backends
from fused_ce.bench.measure import Record
from fused_ce.bench.rows import OURS

# torch's own switch for 2 MiB pages: it changes what fresh buffers cost its own operators.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
VERSIONS = {"fused_ce": "version", "torch": "torch", "Python": "python"}  # in the title


def circumstances(device: str, copy: float, load: float | None) -> dict[str, Any]:
    return {
        "device": device,
        "machine": _machine(device),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "build": backends.build_info(),
        "backends": backends.table(),
        "environment": {HUGE_PAGES: os.environ.get(HUGE_PAGES)},
        "copy_gb_per_s": copy,
        "load_before": load,  # what other processes do shows in every number
    }


def _machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def title(about: dict[str, Any]) -> str:
    build = about["build"]
    machine = [
        about["machine"],
        f"{about['threads']} threads",
        f"copies at {about['copy_gb_per_s']:.0f} GB/s",
    ]
    if about["load_before"] is not None:
        machine.append(f"load {about['load_before']:.1f} before")
    software = [f"{name} {build[key]}" for name, key in VERSIONS.items()]
    if about["environment"][HUGE_PAGES]:
        software.append(f"{HUGE_PAGES}={about['environment'][HUGE_PAGES]}")
    return f"{', '.join(machine)}\n{', '.join(software)}"


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def show(records: list[Record], about: dict[str, Any]) -> None:
    rivals = _rivals(records)
    table = Table(
        title=title(about),
        caption="Medians in ms; GB/s of fused_ce: inputs read once, gradient written once; "
        "copy: share of the copy bandwidth (above 100 %: cached); memory: peak beyond the inputs "
        "in multiples of the logits.\n! is further from float64 than fused_ce may be.",
    )
    for name in ("case", "pass", "dtype", "size"):
        table.add_column(name, no_wrap=True)
    for name in (OURS, *(n for rival in rivals for n in (rival, f"÷ {rival}")), "GB/s", "copy"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in (OURS, *rivals):
        table.add_column(f"memory\n{name}", justify="right", no_wrap=True)
    for (case, one, dtype, size), by_name in _lines(records):
        ours = by_name[OURS]
        speed = [
            cell
            for rival in rivals
            for cell in (_ms(by_name[rival]), f"[bold]{_ratio(by_name[rival]['ratio'])}[/]")
        ]
        bandwidth = [f"{ours['gb_per_s']:.1f}", f"{ours['copy_share']:.0%}"]
        memory = [_multiple(by_name[name]["peak_logits"]) for name in (OURS, *rivals)]
        table.add_row(case, one, dtype, size, _ms(ours), *speed, *bandwidth, *memory)
    # Lines that a narrow terminal breaks can still be read; columns cut short cannot.
    wanted = Console(width=1000).measure(table).maximum
    Console(width=max(wanted, Console().width)).print(table)


def _ms(record: Record) -> str:
    return f"{record['ms']:.4g}{'' if record['accurate'] else '!'}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"


def _multiple(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _rivals(records: list[Record]) -> list[str]:
    return [name for name in dict.fromkeys(r["contender"] for r in records) if name != OURS]


def _lines(
    records: list[Record],
) -> list[tuple[tuple[str, str, str, str], dict[str, Record]]]:
    groups = groupby(records, key=lambda r: (r["case"], r["pass"], r["dtype"], r["size"]))
    return [(key, {r["contender"]: r for r in group}) for key, group in groups]


def write_csv(records: list[Record], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Record.__annotations__))
        writer.writeheader()
        writer.writerows(records)


def write_json(records: list[Record], about: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps({**about, "rows": records}, indent=1) + "\n")


def write_plot(records: list[Record], about: dict[str, Any], path: Path) -> None:
    """Bars of rival's time / ours, one panel for each pass and dtype."""
    rivals = _rivals(records)
    lines = _lines(records)
    panels = list(dict.fromkeys(key[1:3] for key, _ in lines))
    shown = {panel: [line for line in lines if line[0][1:3] == panel] for panel in panels}
    width = max(0.5 * len(rivals), 0.8) * max(map(len, shown.values()))
    figure = Figure(figsize=(2 + max(width, 5), 1 + 2.6 * len(panels)), layout="constrained")
    figure.suptitle(title(about), fontsize=9)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    bar = 0.8 / len(rivals)
    for axis, (panel, inside) in zip(axes, shown.items(), strict=True):
        for index, rival in enumerate(rivals):
            places = [place + (index + 0.5) * bar - 0.4 for place in range(len(inside))]
            ratios = [by_name[rival]["ratio"] for _, by_name in inside]
            # A logarithmic bar has no zero: it grows from 1, up where we are faster.
            heights = [ratio - 1 for ratio in ratios]
            bars = axis.bar(places, heights, bar, bottom=1, label=rival)
            axis.bar_label(bars, [_ratio(ratio) for ratio in ratios], fontsize=8)
        ticks = [f"{size}\n{case}" for (case, _, _, size), _ in inside]
        axis.set_xticks(range(len(inside)), ticks, fontsize=8)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.margins(y=0.2)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel("rival's time / ours")
        axis.set_title(", ".join(panel), fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)
