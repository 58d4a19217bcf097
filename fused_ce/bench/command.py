"""The options of `bench`, and the run from rows to reports."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fused_ce.bench.losses import LOSSES
from fused_ce.bench.measure import TOLERANCE, Record, UnmeasurableError, copy_bandwidth, measure
from fused_ce.bench.rows import PASSES, STANDARD_PASSES, Row, parse_size, rows


def add_loss(parser: argparse.ArgumentParser, name: str) -> None:
    loss = LOSSES[name]

    def chosen(options: argparse.Namespace) -> int:
        fields = options.case, options.dtype, options.size, options.passes, options.device
        return run(rows(name, *fields), options)

    parser.set_defaults(run=chosen)
    parser.add_argument("--case", **_list("case", loss.cases), default="plain")
    parser.add_argument("--dtype", **_list("dtype", TOLERANCE), default="float32")
    sizes = partial(_sizes, dimensions=2 if loss.over_classes else 1)
    parser.add_argument("--size", type=sizes, default=loss.sizes, help="list of sizes")
    parser.add_argument("--pass", dest="passes", **_list("pass", PASSES), default="forward,both")
    add_options(parser, name)


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """The options that a fixed list of rows shares with `bench`."""
    rivals = LOSSES[name].rivals
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--device", type=_device, default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--against", **_list("rival", rivals), default=",".join(rivals))
    positive = partial(_number, kind=int, least=1)
    parser.add_argument("--threads", type=positive, help="on the CPU; None: as torch chooses")
    parser.add_argument("--repeats", type=positive, default=20, help="samples, at least")
    seconds = partial(_number, kind=float, least=0)
    parser.add_argument(
        "--seconds", type=seconds, default=2, help="of wall time for each contender, at least"
    )
    parser.add_argument("--plot", type=_image, metavar="PNG", help="file of bars of the ratios")
    parser.add_argument("--csv", type=_file, metavar="CSV", help="file of one line per contender")
    parser.add_argument("--json", type=_file, metavar="JSON", help="the same, and the machine")


def run_cases(
    name: str, description: str | None, cases: dict[str, list[tuple[str, str, str]]]
) -> int:
    """A fixed list for each kind of device, of (case, dtype, size)."""
    parser = argparse.ArgumentParser(description=description)
    add_options(parser, name)
    options = parser.parse_args()
    device = options.device
    chosen = (
        row
        for case, dtype, size in cases[torch.device(device).type]
        for row in rows(name, [case], [dtype], [size], STANDARD_PASSES, device)
    )
    return run(chosen, options)


def run(chosen: Iterable[Row], options: argparse.Namespace) -> int:
    try:
        from fused_ce.bench import report
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in ("rich", "matplotlib"):
            raise
        print(f"bench needs {package}: pip install fused-ce[bench]", file=sys.stderr)
        return 2
    # Inductor's worker processes would take cores from what is being timed.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    todo = list(chosen)
    if not todo:
        print("nothing to measure: inplace has no forward pass of its own", file=sys.stderr)
        return 2
    absent = _absent(todo, options.against)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    copy = copy_bandwidth(options.device)
    about = report.circumstances(options.device, copy, load, absent)
    records: list[Record] = []
    with report.progress() as bar:
        task = bar.add_task("", total=len(todo))
        for row in todo:
            bar.update(task, description=row.label)
            try:
                measured, failures = measure(
                    row, options.against, options.repeats, options.seconds, copy
                )
            except (UnmeasurableError, torch.OutOfMemoryError) as error:
                print(error, file=sys.stderr)
                return 1
            records += measured
            about["absent"] += [f"{name}, {row.label}: {why}" for name, why in failures.items()]
            bar.advance(task)
    report.show(records, about)
    if options.csv:
        report.write_csv(records, options.csv)
    if options.json:
        report.write_json(records, about, options.json)
    if options.plot:
        report.write_plot(records, about, options.plot)
    return 0


def _absent(todo: list[Row], rivals: list[str]) -> list[str]:
    """Who was asked for and does not take part, in how many rows, and why."""
    reasons = Counter((name, row.missing(name)) for name in rivals for row in todo)
    return [
        f"{name}, {count} of {len(todo)} rows: {why}"
        for (name, why), count in reasons.items()
        if why is not None
    ]


def _list(kind: str, known: Collection[str]) -> dict[str, Any]:
    """What argparse needs for a comma-separated list of known names."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"unknown {kind} {name!r} (choose from {', '.join(known)})"
                )
        return chosen

    return {"type": parse, "metavar": kind.upper(), "help": f"list of {', '.join(known)}"}


def _sizes(text: str, dimensions: int) -> list[str]:
    chosen = text.split(",")
    try:
        for size in chosen:
            if len(parse_size(size)) < dimensions:
                raise ValueError(f"not rows x classes: {size!r}")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return chosen


def _device(text: str) -> str:
    device = None
    with suppress(RuntimeError):
        device = torch.device(text)
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"unknown device {text!r} (choose from cpu, cuda)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch finds no {text} here")
    return text


def _file(text: str) -> Path:
    path = Path(text)
    # Said now rather than after the last row.
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot be written: {text}")
    return path


def _image(text: str) -> Path:
    if not text.lower().endswith((".png", ".pdf", ".svg")):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png, .pdf or .svg")
    return _file(text)


def _number(text: str, kind: type[int] | type[float], least: int) -> float:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        what = "an integer" if kind is int else "a finite number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} of at least {least}")
    return number
