"""The memory of large gradients, which the CPU keeps from one call to the next. The tests are about
the CPU alone: on a GPU torch's own allocator does so."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fused_ce.functional as fused
from fused_ce import _C

MIB = 1 << 20
SMALLEST = 2 * MIB  # gradient whose memory is kept
LARGE = 64 * MIB  # the system may take it back

# Torch 2.10's stable ABI has no tensor that owns memory of ours.
keeps = pytest.mark.skipif(
    torch.__version__ < "2.11", reason="needs torch 2.11 or later, as the README says"
)


def empty_gradient(logits: Tensor) -> Tensor:
    return torch.ops.fused_ce._empty_gradient(logits)


def of_bytes(size: int) -> Tensor:
    return torch.empty(size // 4)


def gradient_of(logits: Tensor, target: Tensor) -> Tensor:
    logits.grad = None
    fused.binary_cross_entropy_with_logits(logits, target, reduction="sum").backward()
    assert logits.grad is not None
    return logits.grad


@keeps
@pytest.mark.parametrize(
    ("freed", "wanted", "is_reused"),
    [
        (SMALLEST, SMALLEST, True),
        (LARGE, LARGE, True),
        # Sequences of other lengths, down to the half of it, the last pages in part.
        (2 * LARGE, 2 * LARGE - 4, True),
        (2 * LARGE, LARGE, True),
        # Smaller ones would hold more than twice what they need.
        (2 * LARGE, LARGE - 3 * MIB, False),
        (LARGE, LARGE + 4, False),
    ],
)
def test_freed_memory_is_used_again(freed: int, wanted: int, is_reused: bool) -> None:
    _C.release_gradients()
    first = empty_gradient(of_bytes(freed)).fill_(1.0)
    address = first.data_ptr()
    del first
    assert (empty_gradient(of_bytes(wanted)).data_ptr() == address) == is_reused


@keeps
def test_the_last_four_are_kept() -> None:
    _C.release_gradients()
    gradients = [empty_gradient(of_bytes(size * MIB)) for size in (10, 20, 40, 80, 160)]
    addresses = [gradient.data_ptr() for gradient in gradients]
    for i in range(5):
        gradients[i] = torch.empty(0)
    # The first has been given back. Of the others the smallest that is large enough serves.
    for size, at in ((10, 1), (60, 3), (100, 4), (40, 2)):
        gradients.append(empty_gradient(of_bytes(size * MIB)))
        assert gradients[-1].data_ptr() == addresses[at]


@keeps
@pytest.mark.parametrize("size", [SMALLEST, LARGE])
def test_a_step_uses_the_memory_of_the_last(size: int) -> None:
    x = torch.randn(size // 4, requires_grad=True)
    t = torch.rand(size // 4)
    address = gradient_of(x, t).data_ptr()
    expected = torch.sigmoid(x.detach().double()) - t
    for _ in range(2):
        gradient = gradient_of(x, t)
        assert gradient.data_ptr() == address
        torch.testing.assert_close(gradient, expected.float(), atol=1e-6, rtol=0)
        del gradient


def test_memory_in_use_is_left_alone() -> None:
    x = torch.randn(LARGE // 4, requires_grad=True)
    t = torch.rand(LARGE // 4)
    first = gradient_of(x, t)
    view = first[5:7]
    kept = view.clone()
    del first
    other = gradient_of(x, 1 - t)
    assert other.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    assert torch.equal(view, kept)


@pytest.mark.parametrize(
    "logits",
    [
        lambda: torch.empty(4, 9, 1 << 18),
        lambda: torch.empty(4, 9, 1 << 18)[:, :-1],
        lambda: torch.empty(1 << 12, 1 << 11).t(),
        lambda: torch.empty(1 << 12, 1).expand(-1, 1 << 11),
        lambda: torch.empty(2, 21, 512, 512).contiguous(memory_format=torch.channels_last),
        lambda: torch.empty(1 << 24, dtype=torch.bfloat16),
        lambda: torch.empty(1 << 24, dtype=torch.float16),
        lambda: torch.empty(1 << 22, dtype=torch.float64),
    ],
)
def test_like_torch_empty_like(logits: Callable[[], Tensor]) -> None:
    x = logits()
    gradient, expected = empty_gradient(x), torch.empty_like(x)
    for name in ("shape", "dtype", "device", "layout"):
        assert getattr(gradient, name) == getattr(expected, name), name
    assert gradient.stride() == expected.stride()
    assert gradient.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    gradient.fill_(1.0)  # all of it can be written


def test_threads_do_not_share_memory() -> None:
    wrong = []

    def work(value: float) -> None:
        for _ in range(50):
            gradient = empty_gradient(of_bytes(LARGE))[:: 1 << 18]
            gradient.fill_(value)
            if not bool((gradient == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_fork() -> None:
    empty_gradient(of_bytes(LARGE))[0] = 1.0
    child = os.fork()
    if child == 0:
        gradient = empty_gradient(of_bytes(LARGE))
        gradient[0] = 2.0
        del gradient
        os._exit(0)
    gradient = empty_gradient(of_bytes(LARGE))
    gradient[0] = 3.0
    assert os.waitpid(child, 0)[1] == 0
    assert float(gradient[0]) == 3.0


def test_opcheck() -> None:
    # Not the checks that compare two results: what is in the memory is not defined.
    torch.library.opcheck(
        torch.ops.fused_ce._empty_gradient.default,
        (torch.empty(4, 5),),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
