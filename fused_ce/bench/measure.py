"""Times the contenders of a row in turn, after checking each one's loss and gradient."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from statistics import median
from typing import Any, TypedDict

import torch
from torch import Tensor

from fused_ce.bench.losses import Function, exact
from fused_ce.bench.peak import peak_bytes
from fused_ce.bench.rows import OURS, Feed, Row

# The largest relative error we may have against float64; rivals beyond it are timed but marked.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of terminals, in messages of rivals

Record = TypedDict(
    "Record",
    {
        "loss": str,
        "case": str,
        "pass": str,
        "dtype": str,
        "size": str,
        "contender": str,
        "ms": float,  # median
        "ms_quartile_1": float,
        "ms_quartile_3": float,
        "repeats": int,
        "steps_per_repeat": int,
        "ratio": float,  # of this contender's time to ours
        "gb_per_s": float,  # inputs read once, gradient written once
        "copy_share": float,  # of the measured copy bandwidth; above 1 where caches hold the data
        "peak_bytes": int | None,
        "peak_logits": float | None,  # peak_bytes in multiples of the logits
        "loss_error": float,  # relative, against float64
        "gradient_error": float | None,  # of the largest gradient
        "accurate": bool,
    },
)


class UnmeasurableError(Exception):
    """Our own result is off, or there is no memory: there is nothing worth timing."""


def measure(
    row: Row, rivals: list[str], repeats: int, seconds: float, copy: float
) -> tuple[list[Record], dict[str, str]]:
    """A record of each contender, and why those rivals that have none raised an error."""
    contenders = row.contenders(rivals)
    try:
        feed = Feed(row)
    except (RuntimeError, TypeError) as error:  # more bytes than can be had, or counted
        raise UnmeasurableError(f"no inputs for {row.label}: {_first_line(error)}") from None
    errors, failures = _check(row, contenders, feed)
    contenders = {name: function for name, function in contenders.items() if name in errors}
    rounds, steps = _time(row, contenders, feed, repeats, seconds)
    ours = median(rounds[OURS])
    logits = feed.inputs.logits.nbytes
    moved = feed.inputs.nbytes + (logits if row.passes != "forward" else 0)
    del feed  # the child that finds the peaks makes its own
    peaks = peak_bytes(row, [name for name in rivals if name in errors])
    records = []
    for name, times in rounds.items():
        ordered = sorted(times)
        middle = median(ordered)
        rate = moved / middle / 1e6
        loss_error, gradient_error = errors[name]
        records.append(
            Record(
                {
                    "loss": row.loss,
                    "case": row.case,
                    "pass": row.passes,
                    "dtype": row.dtype,
                    "size": row.size,
                    "contender": name,
                    "ms": middle,
                    "ms_quartile_1": ordered[len(ordered) // 4],
                    "ms_quartile_3": ordered[-1 - len(ordered) // 4],
                    "repeats": len(ordered),
                    "steps_per_repeat": steps[name],
                    "ratio": middle / ours,
                    "gb_per_s": rate,
                    "copy_share": rate / copy,
                    "peak_bytes": peaks.get(name),
                    "peak_logits": peaks[name] / logits if name in peaks else None,
                    "loss_error": loss_error,
                    "gradient_error": gradient_error,
                    "accurate": _accurate(row, errors[name]),
                }
            )
        )
    return records, failures


def _check(
    row: Row, contenders: dict[str, Function], feed: Feed
) -> tuple[dict[str, tuple[float, float | None]], dict[str, str]]:
    """Errors of loss and gradient; of a rival that raises, the message instead."""
    loss_entry, case = row.entry()
    right_loss, right_gradient = exact(case, loss_entry, feed.inputs)

    def errors_of(function: Function) -> tuple[float, float | None]:
        # All sets hold the same numbers.
        (inputs,) = feed.take(1)
        loss = function(inputs.logits, inputs.target, **inputs.options)
        gradient_error = None
        if row.passes != "forward":
            gradient = torch.autograd.grad(loss, inputs.leaf)[0]
            gradient_error = _gradient_error(gradient, right_gradient)
        return _relative(abs(loss.item() - right_loss), abs(right_loss)), gradient_error

    errors, failures = {}, {}
    for name, function in contenders.items():
        try:
            errors[name] = errors_of(function)
        except Exception as error:
            if name == OURS:
                raise
            failures[name] = _first_line(error)
    if not _accurate(row, errors[OURS]):
        raise UnmeasurableError(f"wrong result for {row}: errors of loss, gradient {errors[OURS]}")
    return errors, failures


def _first_line(error: Exception) -> str:
    return _COLOUR.sub("", str(error)).strip().partition("\n")[0]


def _relative(error: float, right: float) -> float:
    return error / (right or 1.0)  # a single class has loss and gradient 0


def _gradient_error(gradient: Tensor, right: Tensor) -> float:
    kind = torch.finfo(gradient.dtype)
    # A mean over many elements leaves float16 gradients below its smallest number.
    unit = kind.smallest_normal * kind.eps
    error = (gradient - right).abs_().max().item() - unit
    return max(_relative(error, right.abs().max().item()), 0.0)


def _accurate(row: Row, errors: tuple[float, float | None]) -> bool:
    # Written so that a NaN is not accurate.
    return all(e is None or e <= TOLERANCE[row.dtype] for e in errors)


def _time(
    row: Row,
    contenders: dict[str, Function],
    feed: Feed,
    repeats: int,
    seconds: float,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds a step of every round, and how many steps each contender makes in a round."""
    step = row.step()

    def sample(function: Function, steps: int) -> float:
        # Not timed: the caches, and the free memory, are as another contender has left them.
        (inputs,) = feed.take(1)
        step(function, inputs)()
        ready = [step(function, inputs) for inputs in feed.take(steps)]

        def work() -> None:
            for one in ready:
                one()

        return _elapsed(row.device, work) / steps

    steps = {}
    for name, function in contenders.items():
        # At least a millisecond, so that neither clock nor launch gaps are what is measured.
        steps[name] = min(math.ceil(1 / sample(function, 3)), 1000)
        sample(function, steps[name])
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds * len(contenders)
    while len(times[OURS]) < repeats or time.perf_counter() < end:
        for name, function in contenders.items():
            times[name].append(sample(function, steps[name]))
    return times, steps


def _elapsed(device: str, work: Callable[[], None]) -> float:
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    event: Callable[..., Any] = torch.cuda.Event
    first, last = event(enable_timing=True), event(enable_timing=True)
    first.record()
    work()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


def copy_bandwidth(device: str) -> float:
    """GB/s of a copy between two large mapped buffers, bytes read and written both counted."""
    source = torch.ones(512 << 20, dtype=torch.uint8, device=device)
    target = source.clone()

    def copy() -> None:
        target.copy_(source)

    times = [_elapsed(device, copy) for _ in range(20)]
    return 2 * source.nbytes / median(times) / 1e6
