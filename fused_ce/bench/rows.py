"""A row of the table: one case in one dtype and size, its inputs and the step that is timed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from fused_ce.bench.losses import LOSSES, RIVALS, Case, Function, Inputs, Loss

OURS = "fused_ce"
PASSES = ("forward", "backward", "both")
STANDARD_PASSES = ("forward", "both")
Step = Callable[[Function, Inputs], Callable[[], object]]


def parse_size(text: str) -> tuple[int, ...]:
    """`64Mi` is a vector, `8192x1000` a matrix."""
    units = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    shape = []
    for part in text.split("x"):
        match = re.fullmatch(r"([1-9]\d*)([kKMG]?i?)", part)
        if match is None or match[2] not in units:
            raise ValueError(f"not a size: {text!r} (such as 1000000, 64Mi or 8192x1000)")
        shape.append(int(match[1]) * units[match[2]])
    return tuple(shape)


@dataclass(frozen=True)
class Row:
    """Plain strings, so that it can be sent to another process."""

    loss: str
    case: str
    passes: str
    dtype: str
    size: str
    device: str

    @property
    def label(self) -> str:
        return f"{self.case} {self.passes} {self.dtype} {self.size}"

    def entry(self) -> tuple[Loss, Case]:
        loss = LOSSES[self.loss]
        return loss, loss.cases[self.case]

    def contenders(self, rivals: list[str]) -> dict[str, Function]:
        case = self.entry()[1]
        able = [name for name in rivals if self.missing(name) is None]
        return {OURS: case.fused, **{name: RIVALS[name].contender(case) for name in able}}

    def missing(self, rival: str) -> str | None:
        return RIVALS[rival].missing(self.case, len(parse_size(self.size)), self.device)

    def inputs(self) -> Inputs:
        torch.manual_seed(0)
        dtype: torch.dtype = getattr(torch, self.dtype)
        inputs = self.entry()[1].make(parse_size(self.size), dtype, torch.device(self.device))
        inputs.logits.requires_grad_(self.passes != "forward")
        return inputs

    def step(self) -> Step:
        """What readies a step; calling what it returns is timed."""
        if self.passes == "forward":
            return _forward
        inplace = self.entry()[1].inplace
        finish = _backward_through_layer if inplace else _backward_to_leaf
        return partial(_both if self.passes == "both" else _backward, finish)


def rows(
    loss: str,
    cases: Sequence[str],
    dtypes: Sequence[str],
    sizes: Sequence[str],
    passes: Sequence[str],
    device: str,
) -> Iterator[Row]:
    for case in cases:
        for dtype in dtypes:
            for size in sizes:
                for one in passes:
                    # Without a gradient nothing is written: `inplace` would repeat `plain`.
                    if one != "forward" or not LOSSES[loss].cases[case].inplace:
                        yield Row(loss, case, one, dtype, size, device)


# Each step frees what it allocated, as a training loop does, and pays for that in its own time.
def _forward(function: Function, inputs: Inputs) -> Callable[[], object]:
    return lambda: function(inputs.logits, inputs.target, **inputs.options)


def _both(
    finish: Callable[[Tensor, Inputs], None], function: Function, inputs: Inputs
) -> Callable[[], object]:
    return lambda: finish(function(inputs.logits, inputs.target, **inputs.options), inputs)


def _backward(
    finish: Callable[[Tensor, Inputs], None], function: Function, inputs: Inputs
) -> Callable[[], object]:
    loss = [function(inputs.logits, inputs.target, **inputs.options)]
    return lambda: finish(loss.pop(), inputs)


def _backward_to_leaf(loss: Tensor, inputs: Inputs) -> None:
    torch.autograd.backward(loss)
    inputs.logits.grad = None


def _backward_through_layer(loss: Tensor, inputs: Inputs) -> None:
    torch.autograd.grad(loss, inputs.leaf)


class Feed:
    """The inputs of step after step, handed out before the clock runs."""

    def __init__(self, row: Row) -> None:
        self.inputs = row.inputs()
        self._inplace = row.entry()[1].inplace
        self._buffers: list[Tensor] = []
        sets = 1
        if torch.device(row.device).type == "cuda":
            # Steps take turns at enough sets to overflow the L2 cache; where 64 do not, a launch
            # takes longer than the bytes do.
            cache = torch.cuda.get_device_properties(row.device).L2_cache_size
            sets = min(1 + 4 * cache // self.inputs.nbytes, 64)
        self._turns = cycle([self.inputs, *(row.inputs() for _ in range(sets - 1))])

    def take(self, steps: int) -> list[Inputs]:
        taken = [next(self._turns) for _ in range(steps)]
        if not self._inplace:
            return taken
        while len(self._buffers) < steps:
            self._buffers.append(torch.empty_like(self.inputs.logits, requires_grad=False))
        layer: Callable[..., Tensor] = _Layer.apply
        return [
            Inputs(layer(inputs.logits, buffer), inputs.target, inputs.options, inputs.logits)
            for inputs, buffer in zip(taken, self._buffers, strict=False)
        ]


class _Layer(torch.autograd.Function):
    """Stands for a model: its output is no leaf, and may be overwritten. Moves no gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, buffer: Tensor) -> Tensor:
        # The buffer is kept from step to step, so that refilling it maps and unmaps no memory.
        return buffer.copy_(values).data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
