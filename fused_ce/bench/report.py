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
from fused_ce.bench.losses import LOSSES, RIVALS
from fused_ce.bench.measure import Record
from fused_ce.bench.rows import OURS, parse_size

# torch's own switch for 2 MiB pages: it changes what fresh buffers cost its own operators.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
VERSIONS = {"fused_ce": "version", "torch": "torch", "Python": "python"}  # in the title


def circumstances(
    device: str, copy: float, load: float | None, absent: list[str]
) -> dict[str, Any]:
    return {
        "device": device,
        "machine": _machine(device),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "build": backends.build_info(),
        "backends": backends.table(),
        "environment": {HUGE_PAGES: os.environ.get(HUGE_PAGES)},
        "copy_gb_per_s": copy,
        "absent": absent,
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
        "in multiples of the logits.\n! is further from float64 than fused_ce may be."
        + "".join(f"\nabsent: {line}" for line in about["absent"]),
    )
    for name in ("case", "pass", "dtype", "size"):
        table.add_column(name, no_wrap=True)
    for name in (OURS, *(n for rival in rivals for n in (rival, f"÷ {rival}")), "GB/s", "copy"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in (OURS, *rivals):
        table.add_column(f"memory\n{name}", justify="right", no_wrap=True)
    for (case, one, dtype, size), by_name in _lines(records):
        ours = by_name[OURS]
        speed = [cell for rival in rivals for cell in _speed(by_name.get(rival))]
        bandwidth = [f"{ours['gb_per_s']:.1f}", f"{ours['copy_share']:.0%}"]
        memory = [_multiple(by_name.get(name)) for name in (OURS, *rivals)]
        table.add_row(case, one, dtype, size, _ms(ours), *speed, *bandwidth, *memory)
    # Lines that a narrow terminal breaks can still be read; columns cut short cannot.
    wanted = Console(width=1000).measure(table).maximum
    Console(width=max(wanted, Console().width)).print(table)


def _ms(record: Record) -> str:
    return f"{record['ms']:.4g}{'' if record['accurate'] else '!'}"


def _speed(record: Record | None) -> tuple[str, str]:
    return ("-", "-") if record is None else (_ms(record), f"[bold]{_ratio(record['ratio'])}[/]")


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"


def _multiple(record: Record | None) -> str:
    value = None if record is None else record["peak_logits"]
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
    """Over the number of classes, where that differs between rows alike in all else; else bars."""
    by_classes = [
        (r, parse_size(r["size"])[1])
        for r in records
        if LOSSES[r["loss"]].over_classes and len(parse_size(r["size"])) == 2
    ]
    numbers: dict[tuple[str, str, str], set[int]] = {}
    for record, classes in by_classes:
        numbers.setdefault(_column(record), set()).add(classes)
    lines = [(r, classes) for r, classes in by_classes if len(numbers[_column(r)]) > 1]
    if lines:
        _plot_over_classes(lines, about, path)
    else:
        _plot_bars(records, about, path)


def _column(record: Record) -> tuple[str, str, str]:
    return record["case"], record["pass"], record["dtype"]


def _plot_over_classes(
    records: list[tuple[Record, int]], about: dict[str, Any], path: Path
) -> None:
    """Speed and peak memory of every contender, a column for each case, pass and dtype."""
    columns: dict[tuple[str, str, str], dict[str, list[tuple[int, Record]]]] = {}
    for record, classes in records:
        column = columns.setdefault(_column(record), {})
        column.setdefault(record["contender"], []).append((classes, record))
    # The same in every column, whoever is absent there.
    colours = {name: f"C{i}" for i, name in enumerate((OURS, *RIVALS))}
    figure = Figure(figsize=(2 + 3.5 * len(columns), 6), layout="constrained")
    figure.suptitle(title(about), fontsize=9)
    speeds, memories = figure.subplots(2, len(columns), sharex="col", squeeze=False)
    for speed, memory, (names, by_name) in zip(speeds, memories, columns.items(), strict=True):
        for name, points in by_name.items():
            points.sort(key=lambda point: point[0])
            places = [c for c, _ in points]
            style = {"color": colours[name], "marker": "o", "label": name}
            speed.plot(places, [r["gb_per_s"] for _, r in points], **style)
            known = [(c, r["peak_logits"]) for c, r in points if r["peak_logits"] is not None]
            memory.plot([c for c, _ in known], [m for _, m in known], **style)
        speed.set(title=", ".join(names), xscale="log", yscale="log")
        memory.set(xlabel="classes", ylim=(0, None))
    speeds[0].set_ylabel("GB/s: inputs once, gradient once")
    memories[0].set_ylabel("peak memory / logits")
    handles = {
        label: handle
        for axis in speeds
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


def _plot_bars(records: list[Record], about: dict[str, Any], path: Path) -> None:
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
            # An absent rival has no bar.
            ratios = [by_name[rival]["ratio"] if rival in by_name else 1 for _, by_name in inside]
            # A logarithmic bar has no zero: it grows from 1, up where we are faster.
            heights = [ratio - 1 for ratio in ratios]
            bars = axis.bar(places, heights, bar, bottom=1, label=rival)
            labels = [
                _ratio(ratio) if rival in by_name else ""
                for ratio, (_, by_name) in zip(ratios, inside, strict=True)
            ]
            axis.bar_label(bars, labels, fontsize=8)
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
