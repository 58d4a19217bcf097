"""Peak memory of a step beyond its inputs. On the CPU it is read in a child process."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from fused_ce import _C
from fused_ce.bench.rows import Feed, Row, parse_size


def peak_bytes(row: Row, rivals: list[str]) -> dict[str, int]:
    if torch.device(row.device).type == "cuda":
        return _peaks(row, rivals, _allocated)
    if sys.platform != "linux" or math.prod(parse_size(row.size)) < 1 << 18:
        return {}  # pages are too coarse for small tensors
    request = {
        "row": dataclasses.asdict(row),
        "rivals": rivals,
        "threads": torch.get_num_threads(),
    }
    child = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(request)],
        # Every tensor in pages of its own, given back when freed: none hides in the heap.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        check=False,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        reason = child.stderr.strip().rpartition("\n")[2] or f"exit status {child.returncode}"
        warnings.warn(f"peak memory of {row} is unknown: {reason}", stacklevel=2)
        return {}
    found: dict[str, int] = json.loads(child.stdout.splitlines()[-1])
    return found


def _peaks(
    row: Row, rivals: list[str], extra: Callable[[Callable[[], object]], int]
) -> dict[str, int]:
    feed = Feed(row)
    step = row.step()
    peaks = {}
    for name, function in row.contenders(rivals).items():
        step(function, *feed.take(1))()  # compiles, loads code, starts threads
        peaks[name] = extra(step(function, *feed.take(1)))
    return peaks


def _allocated(work: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def _resident(work: Callable[[], object]) -> int:
    _C.release_gradients()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the maximum starts again from here
    work()
    return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _child(request: str) -> None:
    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    print(json.dumps(_peaks(Row(**asked["row"]), asked["rivals"], _resident)))


if __name__ == "__main__":
    _child(sys.argv[1])
