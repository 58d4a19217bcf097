"""What is refused, with torch's exception and message wherever torch refuses it too."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from cases import (
    FLOATS,
    FOCAL,
    FORMS,
    LOGITS,
    PROBABILITY,
    REDUCTIONS,
    SOFTMAX,
    Form,
    dtype_id,
    exact_cross_entropy,
    form_id,
    make_input,
    run,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import fused_ce

bce_with_logits = LOGITS.ours
bce = PROBABILITY.ours
focal = FOCAL.ours
cross_entropy = SOFTMAX.ours

each_form = pytest.mark.parametrize("form", FORMS, ids=form_id)
each_loss = pytest.mark.parametrize("form", [*FORMS, SOFTMAX], ids=form_id)
CLASSES = SOFTMAX._replace(name="labels")  # the same loss, of labels in place of probabilities
each_mode = pytest.mark.parametrize("form", [*FORMS, SOFTMAX, CLASSES], ids=form_id)

X = torch.rand(4, 5)
T = torch.tensor([0, 1, 2, 3])  # labels of X
IMAGES, MASKS = torch.rand(2, 3, 4, 5), torch.ones(2, 4, 5, dtype=torch.int64)
LEAF = torch.tensor(0.5, requires_grad=True)
COMPLEX = torch.complex64
with warnings.catch_warnings():  # torch calls the one deprecated and the other a beta
    warnings.simplefilter("ignore")
    QUANTIZED = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
    COMPRESSED = X.to_sparse_csr()


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is the question
        function(*args, **kwargs)
    return caught.value


def moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


# (form, input, target, options): torch's type and message, word for word
SAME_MESSAGE = {
    "target of another shape": (LOGITS, torch.rand(3, 1), torch.rand(3), {}),
    "target of another shape, probabilities": (PROBABILITY, torch.rand(3, 1), torch.rand(3), {}),
    "0-D and one element": (LOGITS, torch.rand(()), torch.rand(1), {}),
    "weight a list": (LOGITS, X, X, {"weight": [1.0]}),
    "weight a number": (LOGITS, X, X, {"weight": 2.0}),
    "pos_weight a number": (LOGITS, X, X, {"pos_weight": 2.0}),
    "weight enlarges": (LOGITS, X, X, {"weight": torch.rand(7, 4, 5)}),
    "weight enlarges rows": (LOGITS, X[:1], X[:1], {"weight": X}),
    "weight has a dimension more": (LOGITS, X, X, {"weight": torch.rand(1, 4, 5)}),
    "weight enlarges, probabilities": (PROBABILITY, X, X, {"weight": torch.rand(7, 4, 5)}),
    "pos_weight enlarges": (LOGITS, X, X, {"pos_weight": torch.rand(7, 4, 5)}),
    "weight of another size": (LOGITS, X, X, {"weight": torch.rand(3)}),
    "pos_weight of another size": (LOGITS, X, X, {"pos_weight": torch.rand(3)}),
    "weight of another size and rank": (LOGITS, X, X, {"weight": torch.rand(7, 4, 3)}),
    # (C,) on NCHW broadcasts along the width; (C, 1, 1) is right
    "pos_weight of channels": (
        LOGITS,
        torch.rand(2, 3, 4, 4),
        torch.rand(2, 3, 4, 4),
        {"pos_weight": torch.rand(3)},
    ),
    "unknown reduction": (LOGITS, X, X, {"reduction": "foo"}),
    "unknown reduction, probabilities": (PROBABILITY, X, X, {"reduction": "foo"}),
    "reduction a list": (LOGITS, X, X, {"reduction": []}),
    "reduction a list, probabilities": (PROBABILITY, X, X, {"reduction": []}),
    "reduction None": (LOGITS, X, X, {"reduction": None}),
    "probabilities of a half target": (PROBABILITY, X, X.half(), {}),
    "probabilities of a double target": (PROBABILITY, X, X.double(), {}),
    "double probabilities": (PROBABILITY, X.double(), X, {}),
    "integer probabilities": (PROBABILITY, X.long(), X, {}),
    "complex probabilities": (PROBABILITY, X.to(COMPLEX), X, {}),
    "complex target of probabilities": (PROBABILITY, X, X.to(COMPLEX), {}),
    "uint16 target of probabilities": (PROBABILITY, X, X.to(torch.uint16), {}),
    # softmax: which rows the labels are of
    "labels of fewer rows": (SOFTMAX, X, T[:3], {}),
    "labels of more rows": (SOFTMAX, X[:3], T, {}),
    "a label of no dimension": (SOFTMAX, X, T[0], {}),
    "a label of no dimension for one row": (SOFTMAX, X[:1], T[0], {}),
    "labels in a column": (SOFTMAX, X, T[:, None], {}),
    "labels in a shorter column": (SOFTMAX, X, T[:3, None], {}),
    "several labels for one row": (SOFTMAX, X[0], T, {}),
    "no label for one row": (SOFTMAX, X[0], T[:0], {}),
    "labels in a matrix for one row": (SOFTMAX, X[0], T.view(2, 2), {}),
    "labels without positions": (SOFTMAX, IMAGES[0], MASKS[0, 0, :3], {}),
    "labels of other positions": (SOFTMAX, IMAGES[..., 0], MASKS[..., :2, 0], {}),
    "labels of more dimensions": (SOFTMAX, IMAGES[..., 0], MASKS[..., :1], {}),
    "labels of another batch": (SOFTMAX, IMAGES[..., 0], MASKS[[0, 0, 0], ..., 0], {}),
    "masks of another size": (SOFTMAX, IMAGES, MASKS[:, :3], {}),
    "masks of another batch": (SOFTMAX, IMAGES, MASKS[:1], {}),
    "masks without a width": (SOFTMAX, IMAGES, MASKS[..., 0], {}),
    "masks with a channel": (SOFTMAX, IMAGES, MASKS[:, None], {}),
    "masks of no dimension": (SOFTMAX, IMAGES, MASKS[0, 0, 0], {}),
    "volumes of another size": (SOFTMAX, IMAGES[..., None], MASKS[..., :4, None], {}),
    "volumes without a depth": (SOFTMAX, IMAGES[..., None], MASKS, {}),
    "smoothed labels of fewer rows": (SOFTMAX, X, T[:3], {"label_smoothing": 0.1}),
    "a logit without dimensions": (SOFTMAX, X[0, 0], T[0], {}),
    "a logit and probability without dimensions": (SOFTMAX, X[0, 0], X[0, 0], {}),
    "a logit without dimensions and labels": (SOFTMAX, X[0, 0], T, {}),
    # what the target is
    "labels of the logits' shape": (SOFTMAX, X, X.long(), {}),
    "labels of the logits' shape, 1 by 1": (SOFTMAX, X[:1, :1], T[:1, None], {}),
    "labels of the logits' shape, 1-D": (SOFTMAX, X[:, 0], T, {}),
    "bools of the logits' shape": (SOFTMAX, X, X > 0, {}),
    "complex probabilities of classes": (SOFTMAX, X, X.to(COMPLEX), {}),
    "float labels": (SOFTMAX, X, T.float(), {}),
    "half labels": (SOFTMAX, X, T.bfloat16(), {}),
    "bool labels": (SOFTMAX, X, T > 0, {}),
    "complex labels": (SOFTMAX, X, T.to(COMPLEX), {}),
    "unsigned labels": (SOFTMAX, X, T.to(torch.uint16), {}),
    "float labels of fewer rows": (SOFTMAX, X, T[:3].float(), {}),
    "float masks": (SOFTMAX, IMAGES, MASKS.float(), {}),
    "float labels of positions": (SOFTMAX, IMAGES[..., 0], MASKS[..., 0].float(), {}),
    "probabilities of other classes": (SOFTMAX, X, X[:, :4], {}),
    "ignored probabilities": (SOFTMAX, X, X, {"ignore_index": 0}),
    # weights of the classes
    "too few weights": (SOFTMAX, X, T, {"weight": torch.rand(3)}),
    "weights in a column": (SOFTMAX, X, T, {"weight": torch.rand(5, 1)}),
    "weight of no dimension": (SOFTMAX, X, T, {"weight": torch.rand(())}),
    "too few weights of channels": (SOFTMAX, IMAGES, MASKS, {"weight": torch.rand(2)}),
    "too many weights of positions": (
        SOFTMAX,
        IMAGES[..., 0],
        MASKS[..., 0],
        {"weight": torch.rand(4)},
    ),
    "too few weights, smoothed": (
        SOFTMAX,
        X,
        T,
        {"weight": torch.rand(3), "label_smoothing": 0.1},
    ),
    "too few weights of probabilities": (SOFTMAX, X, X, {"weight": torch.rand(3)}),
    "weights of probabilities in a column": (SOFTMAX, X, X, {"weight": torch.rand(5, 1)}),
    "half weights": (SOFTMAX, X, T, {"weight": torch.rand(5).half()}),
    "double weights": (SOFTMAX, X, T, {"weight": torch.rand(5).double()}),
    "double weights, smoothed": (
        SOFTMAX,
        X,
        T,
        {"weight": torch.rand(5).double(), "label_smoothing": 0.1},
    ),
    "whole weights": (SOFTMAX, X, T, {"weight": torch.ones(5).long()}),
    "float weights of half logits": (SOFTMAX, X.half(), T, {"weight": torch.rand(5)}),
    "complex weights": (SOFTMAX, X, T, {"weight": torch.rand(5).to(COMPLEX)}),
    "weights a list": (SOFTMAX, X, T, {"weight": [1.0]}),
    "weights a number": (SOFTMAX, X, T, {"weight": 2.0}),
    # options
    "smoothing above 1": (SOFTMAX, X, T, {"label_smoothing": 1.5}),
    "smoothing of probabilities above 1": (SOFTMAX, X, X, {"label_smoothing": 1.5}),
    "smoothing above 1 and fewer rows": (SOFTMAX, X, T[:3], {"label_smoothing": 1.5}),
    "smoothing above 1 and whole probabilities": (SOFTMAX, X, X.long(), {"label_smoothing": 1.5}),
    "smoothing above 1 and reduction": (
        SOFTMAX,
        X,
        T,
        {"label_smoothing": 1.5, "reduction": "foo"},
    ),
    "smoothing text": (SOFTMAX, X, T, {"label_smoothing": "a"}),
    "smoothing of one dimension": (SOFTMAX, X, T, {"label_smoothing": torch.tensor([0.1])}),
    "smoothings": (SOFTMAX, X, T, {"label_smoothing": torch.tensor([0.1, 0.2])}),
    "smoothing None": (SOFTMAX, X, T, {"label_smoothing": None}),
    "smoothing that requires grad": (SOFTMAX, X, T, {"label_smoothing": LEAF}),
    "smoothing complex": (SOFTMAX, X, T, {"label_smoothing": 1j}),
    "unknown reduction of labels": (SOFTMAX, X, T, {"reduction": "foo"}),
    "reduction of labels a list": (SOFTMAX, X, T, {"reduction": []}),
    "index a float": (SOFTMAX, X, T, {"ignore_index": 1.0}),
    "index text": (SOFTMAX, X, T, {"ignore_index": "1"}),
    "index a bool": (SOFTMAX, X, T, {"ignore_index": True}),
    "index None": (SOFTMAX, X, T, {"ignore_index": None}),
    "index past 64 bits": (SOFTMAX, X, T, {"ignore_index": 2**63}),
    "index below 64 bits": (SOFTMAX, X, T, {"ignore_index": -(2**63) - 1}),
    "index a float tensor": (SOFTMAX, X, T, {"ignore_index": torch.tensor(1.0)}),
    "logits a list": (SOFTMAX, [0.5], T, {}),
    "no labels": (SOFTMAX, X, None, {}),
    "labels a list": (SOFTMAX, X, [0, 1, 2, 3], {}),
}

# torch's exception; the message names an internal function of torch's, or another device
SAME_TYPE = {
    "integer logits": (LOGITS, X.long(), X, {}),
    "bool logits": (LOGITS, X > 0, X, {}),
    "float8 logits": (LOGITS, X.to(torch.float8_e4m3fn), X, {}),
    "complex logits": (LOGITS, X.to(COMPLEX), X, {}),
    "complex logits and target": (LOGITS, X.to(COMPLEX), X.to(COMPLEX), {}),
    "complex probabilities and target": (PROBABILITY, X.to(COMPLEX), X.to(COMPLEX), {}),
    "quantised logits": (LOGITS, QUANTIZED, X, {}),
    "quantised target": (LOGITS, X, QUANTIZED, {}),
    "sparse logits": (LOGITS, X.to_sparse(), X, {}),
    "sparse both": (LOGITS, X.to_sparse(), X.to_sparse(), {}),
    "compressed rows": (LOGITS, COMPRESSED, X, {}),
    "sparse probabilities": (PROBABILITY, X.to_sparse(), X, {}),
    "mkldnn logits": (LOGITS, X.to_mkldnn(), X, {}),
    "weight of another size, probabilities": (PROBABILITY, X, X, {"weight": torch.rand(3)}),
    "target on another device": (LOGITS, X, X.to("meta"), {}),
    "input on another device": (LOGITS, X.to("meta"), X, {}),
    "weight on another device": (LOGITS, X, X, {"weight": X.to("meta")}),
    "0-D weight on another device": (LOGITS, X, X, {"weight": torch.rand((), device="meta")}),
    "probabilities on another device": (PROBABILITY, X.to("meta"), X, {}),
    "input a list": (LOGITS, [0.5], X, {}),
    "target missing": (LOGITS, X, None, {}),
    "arrays": (LOGITS, X.numpy(), X.numpy(), {}),
    "a logits array": (LOGITS, X.numpy(), X, {}),
    "arrays of probabilities": (PROBABILITY, X.numpy(), X.numpy(), {}),
    "a target array of probabilities": (PROBABILITY, X, X.numpy(), {}),
    "arrays of classes": (SOFTMAX, X.numpy(), T.numpy(), {}),
    "whole logits of classes": (SOFTMAX, X.long(), T, {}),
    "whole logits and probabilities of classes": (SOFTMAX, X.long(), X, {}),
    "bool logits of classes": (SOFTMAX, X > 0, T, {}),
    "complex logits of classes": (SOFTMAX, X.to(COMPLEX), T, {}),
    "float8 logits of classes": (SOFTMAX, X.to(torch.float8_e4m3fn), T, {}),
    "whole logits and fewer rows": (SOFTMAX, X.long(), T[:3], {}),
    "float8 probabilities of classes": (SOFTMAX, X, X.to(torch.float8_e4m3fn), {}),
    "quantised logits of classes": (SOFTMAX, QUANTIZED, T, {}),
    "quantised probabilities of classes": (SOFTMAX, X, QUANTIZED, {}),
    "sparse logits of classes": (SOFTMAX, X.to_sparse(), T, {}),
    "compressed rows of classes": (SOFTMAX, COMPRESSED, T, {}),
    "sparse labels": (SOFTMAX, X, T.to_sparse(), {}),
    "sparse weights": (SOFTMAX, X, T, {"weight": torch.rand(5).to_sparse()}),
    "labels on another device": (SOFTMAX, X, T.to("meta"), {}),
    "logits on another device": (SOFTMAX, X.to("meta"), T, {}),
    "probabilities of classes on another device": (SOFTMAX, X, X.to("meta"), {}),
    "weights on another device": (SOFTMAX, X, T, {"weight": torch.rand(5, device="meta")}),
}


# Torch 2.11 and earlier look at the dtype of labels before their shape, and word it otherwise.
SAYS_LONG_OR_BYTE = torch.__version__ >= "2.12"
if SAYS_LONG_OR_BYTE:
    SAME_MESSAGE["probabilities of other classes, 1-D"] = (SOFTMAX, X[0], X[0, :4], {})


def worded(error: BaseException) -> str:
    if SAYS_LONG_OR_BYTE:
        return str(error)
    new = r"expected target dtype to be Long or Byte, but got \1"
    return re.sub(r"expected scalar type Long but found (\w+)", new, str(error))


@pytest.mark.parametrize("name", SAME_MESSAGE)
def test_message(name: str, device: str) -> None:
    form, x, t, options = SAME_MESSAGE[name]
    theirs = error_of(form.theirs, x, t, **options)
    options = {k: moved(v, device) for k, v in options.items()}
    ours = error_of(form.ours, moved(x, device), moved(t, device), **options)
    assert type(ours) is type(theirs)
    assert str(ours) == worded(theirs)


# These are refused before a device is looked at.
@pytest.mark.parametrize("name", SAME_TYPE)
def test_exception(name: str) -> None:
    form, x, t, options = SAME_TYPE[name]
    theirs = error_of(form.theirs, x, t, **options)
    ours = error_of(form.ours, x, t, **options)
    assert type(ours) is type(theirs)
    assert str(ours)


# What torch has no word for, or accepts: (form, input, target, options, exception, message)
OWN = {
    "smoothing below": (
        LOGITS,
        {"label_smoothing": -0.1},
        RuntimeError,
        r"between 0.0 and 1.0.*-0.1",
    ),
    "smoothing above": (PROBABILITY, {"label_smoothing": 1.5}, RuntimeError, r"1.0. Got: 1.5"),
    "smoothing NaN": (FOCAL, {"label_smoothing": math.nan}, RuntimeError, "Got: nan"),
    "gamma below 0": (FOCAL, {"gamma": -1}, ValueError, "Invalid gamma value: -1"),
    "gamma NaN": (FOCAL, {"gamma": math.nan}, ValueError, "Invalid gamma value: nan"),
    "alpha above 1": (FOCAL, {"alpha": 1.5}, ValueError, "Invalid alpha value: 1.5"),
    "alpha below 0": (FOCAL, {"alpha": -0.5}, ValueError, "or -1 for ignore"),
    "focal reduction": (FOCAL, {"reduction": "foo"}, ValueError, "Supported reduction modes"),
    "focal reduction a list": (FOCAL, {"reduction": []}, ValueError, "Supported reduction modes"),
    "on_empty": (LOGITS, {"on_empty": "none"}, ValueError, "on_empty must be 'nan' or 'zero'"),
    "normalizer of text": (LOGITS, {"normalizer": "3"}, TypeError, "normalizer must be a number"),
    "normalizer a list": (LOGITS, {"normalizer": [3]}, TypeError, "number"),
    "normalizer complex": (LOGITS, {"normalizer": 1j}, TypeError, "complex"),
    "two normalizers": (LOGITS, {"normalizer": torch.ones(2)}, ValueError, "one real number"),
    "complex normalizer": (LOGITS, {"normalizer": torch.tensor(1j)}, ValueError, "real number"),
    "ignore_index a float": (LOGITS, {"ignore_index": 1.0}, TypeError, "must be int, not float"),
    "ignore_index text": (FOCAL, {"ignore_index": "1"}, TypeError, "must be int, not str"),
    "ignore_index a bool": (PROBABILITY, {"ignore_index": True}, TypeError, "int, not bool"),
    "ignore_index a bool tensor": (
        LOGITS,
        {"ignore_index": torch.tensor(True)},
        TypeError,
        "must be int, not Tensor",
    ),
    "ignore_index two numbers": (
        LOGITS,
        {"ignore_index": torch.ones(2).int()},
        TypeError,
        "must be int, not Tensor",
    ),
    "ignore_index past 64 bits": (LOGITS, {"ignore_index": 2**63}, ValueError, "^Overflow when"),
    # Whose gradient would be lost.
    "label_smoothing that requires grad": (
        LOGITS,
        {"label_smoothing": LEAF},
        TypeError,
        "label_smoothing must be a number",
    ),
    "alpha that requires grad": (FOCAL, {"alpha": LEAF}, TypeError, "alpha must be a number"),
    "gamma that requires grad": (FOCAL, {"gamma": LEAF}, TypeError, "gamma must be a number"),
    "softcap that requires grad": (SOFTMAX, {"softcap": LEAF}, TypeError, "softcap must be a"),
    "logit_scale that requires grad": (SOFTMAX, {"logit_scale": LEAF}, TypeError, "logit_scale"),
    "z_loss that requires grad": (SOFTMAX, {"z_loss": LEAF}, TypeError, "z_loss must be a number"),
    "sample_weight a number": (LOGITS, {"sample_weight": 2.0}, TypeError, "must be Tensor"),
    "sample_weight of columns": (LOGITS, {"sample_weight": torch.rand(5)}, ValueError, "leading"),
    "sample_weight of more dimensions": (
        LOGITS,
        {"sample_weight": torch.rand(4, 5, 1)},
        ValueError,
        "leading",
    ),
    "sample_weight elsewhere": (
        LOGITS,
        {"sample_weight": torch.rand(4, device="meta")},
        RuntimeError,
        "same device",
    ),
    "complex sample_weight": (
        LOGITS,
        {"sample_weight": torch.rand(4).to(COMPLEX)},
        NotImplementedError,
        "complex64",
    ),
    "complex weight": (LOGITS, {"weight": X.to(COMPLEX)}, NotImplementedError, "complex64"),
    "quantised weight": (LOGITS, {"weight": QUANTIZED}, NotImplementedError, "quint8"),
    "normalizer elsewhere": (
        LOGITS,
        {"normalizer": torch.rand((), device="meta")},
        RuntimeError,
        "same device",
    ),
    "on_empty of classes": (SOFTMAX, {"on_empty": "none"}, ValueError, "on_empty must be"),
    "normalizer of classes": (SOFTMAX, {"normalizer": "3"}, TypeError, "must be a number"),
    "sample_weight of classes": (SOFTMAX, {"sample_weight": torch.rand(5)}, ValueError, "leading"),
    "sample_weight of rows and classes": (SOFTMAX, {"sample_weight": X}, ValueError, "leading"),
    "sample_weight of rows elsewhere": (
        SOFTMAX,
        {"sample_weight": torch.rand(4, device="meta")},
        RuntimeError,
        "same device",
    ),
    "softcap 0": (SOFTMAX, {"softcap": 0.0}, ValueError, "softcap must be a positive, .* not 0.0"),
    "softcap below 0": (
        SOFTMAX,
        {"softcap": -1},
        ValueError,
        "softcap must be a positive.* not -1",
    ),
    "softcap NaN": (SOFTMAX, {"softcap": math.nan}, ValueError, "softcap must be"),
    "softcap infinite": (SOFTMAX, {"softcap": math.inf}, ValueError, "softcap must be"),
    "softcap beyond float32": (SOFTMAX, {"softcap": 3.5e38}, ValueError, "number of float32"),
    "softcap below float32": (SOFTMAX, {"softcap": 1e-46}, ValueError, "number of float32"),
    "softcap whose inverse is infinite": (SOFTMAX, {"softcap": 1e-39}, ValueError, "normal number"),
    "softcap text": (SOFTMAX, {"softcap": "1"}, TypeError, "str"),
    "logit_scale text": (SOFTMAX, {"logit_scale": "1"}, (TypeError, RuntimeError), "logit_scale"),
    "z_loss None": (SOFTMAX, {"z_loss": None}, (TypeError, RuntimeError), "z_loss"),
    "unknown statistic": (
        SOFTMAX,
        {"stats": ("lse", "accuracy")},
        ValueError,
        "unknown statistic 'accuracy': choose among 'lse', 'entropy', 'prediction', 'correct'",
    ),
    "a statistic without its tuple": (SOFTMAX, {"stats": "lse"}, ValueError, "unknown statistic"),
    "complex weights of probabilities": (
        SOFTMAX,
        {"weight": torch.rand(5).to(COMPLEX)},
        NotImplementedError,
        "complex64",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_own_errors(name: str, device: str) -> None:
    form, options, exception, message = OWN[name]
    options = {
        k: v if isinstance(v, Tensor) and (v.is_meta or v.is_quantized) else moved(v, device)
        for k, v in options.items()
    }
    with pytest.raises(exception, match=message):
        form.ours(X.to(device), X.to(device), **options)


# Torch computes a complex loss of a complex target.
def test_complex_and_sparse_targets() -> None:
    for target in (X.to(COMPLEX), X.to_sparse(), X.to(torch.float8_e4m3fn), X.to(torch.uint16)):
        for form in FORMS:
            with pytest.raises((NotImplementedError, RuntimeError)):
                form.ours(X, target)


def test_sparse_weight_is_taken_as_a_dense_one() -> None:
    weight = torch.eye(4, 5)
    assert torch.equal(bce_with_logits(X, X, weight.to_sparse()), bce_with_logits(X, X, weight))
    theirs = F.binary_cross_entropy_with_logits(X, X, weight.to_sparse())
    torch.testing.assert_close(bce_with_logits(X, X, weight.to_sparse()), theirs)


def test_sparse_extras_are_taken_as_dense_ones() -> None:
    weight = torch.tensor([0.0, 2, 0, 3])
    for name, dense in (("sample_weight", weight), ("normalizer", weight[1:2])):
        for form, target in ((LOGITS, X), (SOFTMAX, T)):
            found, right = (
                form.ours(X, target, **{name: tensor}) for tensor in (dense.to_sparse(), dense)
            )
            assert torch.equal(found, right)


@pytest.mark.parametrize(
    "index",
    [np.int64(1), np.uint8(1), torch.tensor(1), torch.tensor([1], dtype=torch.int16)],
    ids=repr,
)
def test_integers_of_other_types(index: Any) -> None:
    for form, target in (
        (LOGITS, T[:, None].expand(4, 5)),
        (FOCAL, T[:, None].expand(4, 5)),
        (SOFTMAX, T),
    ):
        found = form.ours(X, target, ignore_index=index)
        assert torch.equal(found, form.ours(X, target, ignore_index=1))
        assert not torch.equal(found, form.ours(X, target))
    torch.testing.assert_close(found, F.cross_entropy(X, T, ignore_index=index))


# The largest and the smallest that there are; 1e30 makes no difference to X.
@pytest.mark.parametrize("softcap", [torch.finfo().max, 1e30, torch.finfo().tiny])
def test_extreme_softcaps(softcap: float, device: str) -> None:
    for dtype in FLOATS:
        x = (X - 0.5).to(dtype)
        found = run(cross_entropy, x, T, device=device, softcap=softcap)
        right = run(exact_cross_entropy, x.double(), T, softcap=softcap)
        torch.testing.assert_close(found.loss, right.loss.to(dtype))
        torch.testing.assert_close(found.gradient, right.gradient.to(dtype))


def loss_or_message(function: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor | str:
    try:
        return function(x, t)
    except RuntimeError as error:
        return str(error)


# Torch's table, of what is refused and of the loss's dtype, which half types do not decide.
@pytest.mark.parametrize("target_dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_mixed_dtypes_under_autocast(
    dtype: torch.dtype, target_dtype: torch.dtype, device: str
) -> None:
    for form in (LOGITS, PROBABILITY) if device == "cpu" else (LOGITS,):
        x, t = X.to(dtype), X.to(target_dtype)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = loss_or_message(form.theirs, x, t)
        with torch.autocast(device, torch.bfloat16):
            ours = loss_or_message(form.ours, x.to(device), t.to(device))
        if isinstance(theirs, str):
            assert ours == theirs
        else:
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours.cpu(), theirs)
        # An integer target leaves it to the logits.
        with torch.autocast(device, torch.bfloat16):
            ours = form.ours(x.to(device), T[:, None].expand(4, 5).gt(1).to(device))
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (fused_ce.BCEWithLogitsLoss, {"reduction": "foo"}),
        (fused_ce.BCELoss, {"reduction": "foo"}),
        (fused_ce.SigmoidFocalLoss, {"reduction": "foo"}),
        (fused_ce.BCEWithLogitsLoss, {"on_empty": "foo"}),
        (fused_ce.SigmoidFocalLoss, {"gamma": -1}),
        (fused_ce.CrossEntropyLoss, {"reduction": "foo"}),
        (fused_ce.CrossEntropyLoss, {"on_empty": "foo"}),
        (fused_ce.CrossEntropyLoss, {"stats": ("foo",)}),
    ],
)
def test_modules_refuse_at_the_call(module: type[nn.Module], options: dict[str, Any]) -> None:
    loss = module(**options)  # as torch's: not here
    with pytest.raises(ValueError, match=r"foo|gamma"):
        loss(X, X)


def test_focal_shapes() -> None:
    with pytest.raises(ValueError, match=re.escape("must be the same as input size")):
        focal(torch.rand(3, 1), torch.rand(3))


@each_form
def test_integer_target_has_no_gradient(form: Form, device: str) -> None:
    """And takes none from the others."""
    t = (torch.arange(20) % 2).view(4, 5).to(device)
    found = []
    for target in (t, t.bool(), t.float()):
        leaf = X.to(device, copy=True).requires_grad_()
        sample_weight = torch.linspace(1, 2, 4).to(device).requires_grad_()
        form.ours(leaf, target, reduction="sum", sample_weight=sample_weight).backward()
        assert target.grad is None
        found.append((leaf.grad, sample_weight.grad))
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


def test_smoothing_above_1_is_refused_at_the_call() -> None:
    module = fused_ce.CrossEntropyLoss(label_smoothing=1.5)  # as torch's: not here
    with pytest.raises(RuntimeError, match=r"between 0.0 and 1.0. Got: 1.5"):
        module(X, T)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
@each_loss
def test_cpu_and_cuda(form: Form) -> None:
    for x, t in ((X.cuda(), X), (X, X.cuda())):
        with pytest.raises(RuntimeError, match="same device"):
            form.ours(x, t)
    with pytest.raises(RuntimeError, match="same device"):
        bce_with_logits(X.cuda(), X.cuda(), X)
    # As in torch, a 0-D tensor of the CPU stands for a number.
    weight = torch.tensor(2.0)
    theirs = F.binary_cross_entropy_with_logits(X, X, weight)
    torch.testing.assert_close(bce_with_logits(X.cuda(), X.cuda(), weight).cpu(), theirs)


# ---- probabilities out of range ------------------------------------------------------------------

OUTSIDE = [-1e-6, 1.0001, math.nan, math.inf, -math.inf]


def nan_and_check(x: Tensor, t: Tensor, reduction: str) -> None:
    """The CPU raises in the call; on CUDA the loss is NaN, and `check` finds the error."""
    assert bce(x, t, reduction=reduction).isnan().any()
    fused_ce.check()


@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize("wrong", ["input", "target"])
def test_probabilities_out_of_range(wrong: str, value: float, device: str) -> None:
    good, bad = torch.full((1030,), 0.5), torch.full((1030,), 0.5)
    bad[1027] = value  # in the tail past a block
    x, t = (bad, good) if wrong == "input" else (good, bad)
    message = error_of(F.binary_cross_entropy, x, t).args[0]
    assert message == f"all elements of {wrong} should be between 0 and 1"
    message = f"^{message}" if device == "cpu" else message
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        if bad.to(dtype).max() == 1:
            continue  # bfloat16 rounds 1.0001 into the range
        for reduction in REDUCTIONS:
            with pytest.raises(RuntimeError, match=message):
                nan_and_check(x.to(device, dtype), t.to(device, dtype), reduction)
    fused_ce.check()  # reported once
    assert bce(good.to(device), good.to(device)).isfinite()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CPU raises at once")
def test_next_call_reports_probabilities_out_of_range() -> None:
    bad, good = (X + 1).cuda(), X.cuda()
    assert bce(bad, good, reduction="none").isnan().any()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
        bce(good, good)
    assert bce(good, good).isfinite()  # and the process goes on


# Smoothing may bring a target back into the range. On the CPU; torch's own loss stops CUDA.
@pytest.mark.parametrize("value", [-0.04, 1.05, math.nan])
def test_smoothed_targets_out_of_range(value: float) -> None:
    x, t = torch.full((3,), 0.5), torch.tensor([0.5, value, 1.0])

    def smoothed(x: Tensor) -> Tensor:
        return bce(x, t, label_smoothing=0.2)

    for function in (smoothed, torch.func.grad(smoothed), torch.func.hessian(smoothed)):
        with pytest.raises(RuntimeError, match="all elements of target should be between 0 and 1"):
            function(x)
    with fused_ce.backend("reference"), pytest.raises(RuntimeError, match="elements of target"):
        smoothed(x)


def test_ignored_probabilities_may_be_out_of_range(device: str) -> None:
    x, t = torch.tensor([math.nan, 2.0, 0.5]).to(device), torch.tensor([-1.0, -1.0, 1.0]).to(device)
    assert bce(x, t, ignore_index=-1).item() == pytest.approx(math.log(2))
    fused_ce.check()


def test_check_finds_nothing(device: str) -> None:
    bce(X.to(device), X.to(device))
    fused_ce.check()


# ---- labels out of range -------------------------------------------------------------------------

OUT_OF_RANGE = {
    "above": ((4, 5), torch.int64, 5),
    "far above": ((4, 5), torch.int64, 2**40),
    "below": ((4, 5), torch.int64, -1),
    "next to ignore_index": ((4, 5), torch.int64, -101),
    "int32": ((4, 5), torch.int32, 7),
    "int16": ((4, 5), torch.int16, -7),
    "int8": ((4, 5), torch.int8, 5),
    "uint8": ((4, 5), torch.uint8, 255),  # -1 as a byte
    "two classes": ((70, 2), torch.int64, 2),
    "many classes": ((3, 50257), torch.int64, 50257),
    "one row": ((5,), torch.int64, 9),
    "positions": ((2, 3, 7), torch.int64, 3),
    "images": ((2, 3, 4, 5), torch.uint8, 3),
    "no classes": ((4, 0), torch.int64, 0),
}


def use_and_check(x: Tensor, t: Tensor, **options: Any) -> None:
    """The CPU raises in the call; on CUDA loss and gradient are NaN, and `check` raises."""
    loss = cross_entropy(x, t, **options)
    loss = loss[0] if "stats" in options else loss
    assert loss.isnan().any()
    if x.requires_grad and x.numel() > 0:
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert gradient.isnan().any()
    fused_ce.check()


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_labels_out_of_range(name: str, device: str) -> None:
    shape, dtype, label = OUT_OF_RANGE[name]
    classes = shape[min(1, len(shape) - 1)]
    x = torch.rand(shape)
    t = torch.full(shape[:1] + shape[2:] if len(shape) > 1 else (), 0 if classes else -100)
    t = t.to(dtype)
    t.view(-1)[-1] = label  # in the last row
    message = f"Target {label} is out of bounds."
    if dtype == torch.int64:
        theirs = error_of(F.cross_entropy, x, t)
        assert (type(theirs), str(theirs)) == (IndexError, message)
    weight = torch.rand(classes).to(device)
    for options in ({}, {"weight": weight}, {"label_smoothing": 0.1}, {"stats": ("lse",)}):
        for reduction in REDUCTIONS:
            for leaf in (x.to(device), x.to(device, copy=True).requires_grad_()):
                ours = error_of(use_and_check, leaf, t.to(device), reduction=reduction, **options)
                assert type(ours) is IndexError
                assert str(ours).startswith(message.removesuffix("."))
                assert device != "cpu" or str(ours) == message
    fused_ce.check()  # reported once
    cross_entropy(x.to(device), t.to(device) * 0, ignore_index=0)


# The wrong label is the last: of one block of rows, of rows that share a vector, of the work of
# several threads, and of rows that are taken one by one.
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 600), (70000, 2), (300, 1000)], ids=str)
def test_labels_out_of_range_leave_the_logits_alone(shape: tuple[int, ...], device: str) -> None:
    if device != "cpu":
        pytest.skip("CUDA knows of a wrong label only when it has come to its row")
    x = torch.rand(shape)
    t = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    t.view(-1)[-1] = shape[1]
    for options in ({}, {"reduction": "sum"}, {"normalizer": 3.0}, {"label_smoothing": 0.1}):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        with pytest.raises(IndexError, match="out of bounds"):
            cross_entropy(logits, t, inplace_backward=True, **options)
        assert torch.equal(logits, x)
        cross_entropy(logits, t * 0, inplace_backward=True, **options).backward()
        assert leaf.grad.isfinite().all()


# The wrong labels are in rows 2 and 4. 98568 rows, whose classes lie apart, are enough for threads
# that take two at once, on up to 192 multiprocessors.
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 222, 222)], ids=str)
def test_labels_out_of_range_spare_the_other_rows(shape: tuple[int, ...], device: str) -> None:
    if device == "cpu":
        pytest.skip("the CPU raises at once")
    x, t = torch.rand(shape), torch.randint(5, shape[:1] + shape[2:])
    t.view(-1)[2], t.view(-1)[4] = 7, -1
    leaf = x.to(device).requires_grad_()
    bad = (t == 7) | (t == -1)
    report = r"Target (7|-1) is out of bounds \(row (2|4)"
    loss = cross_entropy(leaf.detach(), t.to(device), reduction="none")
    assert torch.equal(loss.isnan().cpu(), bad)
    with pytest.raises(IndexError, match=report):
        fused_ce.check()
    cross_entropy(leaf, t.to(device), reduction="sum").backward()
    assert torch.equal(leaf.grad.isnan().all(1).cpu(), bad)
    assert torch.equal(leaf.grad.isnan().any(1).cpu(), bad)
    with pytest.raises(IndexError, match=report):
        fused_ce.check()


def test_next_call_reports_labels_out_of_range(device: str) -> None:
    if device == "cpu":
        pytest.skip("the CPU raises at once")
    x, good, bad = X.to(device), T.to(device), T.to(device) + 3
    for following in (
        lambda: cross_entropy(x, good),
        lambda: bce_with_logits(x, x),
        lambda: fused_ce.check(),
    ):
        assert cross_entropy(x, bad, reduction="none").isnan().any()
        torch.cuda.synchronize()
        with pytest.raises(IndexError, match="is out of bounds"):
            following()
        assert cross_entropy(x, good).isfinite()  # and the process goes on


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.func.vmap])
def test_labels_out_of_range_under_transforms(transform: Callable[..., Any]) -> None:
    """On the CPU; elsewhere there the loss is NaN."""
    x, t = (X, T + 3) if transform is torch.func.vmap else (X[0], T[3] + 3)
    arguments = {"argnums": 0} if transform is not torch.func.vmap else {}
    with pytest.raises(IndexError, match=r"Target [5-6] is out of bounds"):
        transform(cross_entropy, **arguments)(x, t)


def test_sparse_probabilities_are_taken_as_dense_ones() -> None:
    sparse = torch.eye(4, 5).to_sparse()
    torch.testing.assert_close(cross_entropy(X, sparse), F.cross_entropy(X, sparse))


def test_no_prediction_among_no_classes() -> None:
    with pytest.raises(IndexError, match="no prediction among no classes"):
        cross_entropy(torch.rand(4, 0), torch.full((4,), -100), stats=("prediction",))


# ---- tensors that are no plain tensors -----------------------------------------------------------


@each_form
def test_meta_tensors(form: Form) -> None:
    x = torch.empty(4, 5, device="meta", requires_grad=True)
    t = torch.empty(4, 5, device="meta", dtype=torch.bool)
    for reduction in REDUCTIONS:
        loss = form.ours(x, t, reduction=reduction, sample_weight=torch.empty(4, device="meta"))
        assert loss.is_meta
        assert loss.shape == ((4, 5) if reduction == "none" else ())
        (gradient,) = torch.autograd.grad(loss, x, torch.empty_like(loss))
        assert gradient.is_meta
        assert gradient.shape == x.shape


@each_form
def test_fake_tensors(form: Form) -> None:
    from torch._subclasses import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        # 2^40 elements: nothing is computed
        x = torch.empty(2**20, 2**20, dtype=torch.bfloat16, requires_grad=True)
        t = torch.empty(2**20, 2**20, dtype=torch.bfloat16)
        for reduction in REDUCTIONS:
            loss = form.ours(x, t, reduction=reduction)
            assert isinstance(loss, FakeTensor)
            assert loss.dtype == torch.bfloat16
            assert loss.shape == (x.shape if reduction == "none" else ())
            (gradient,) = torch.autograd.grad(loss, x, torch.empty_like(loss))
            assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("target_dtype", [torch.int16, torch.bfloat16])
def test_fake_and_meta_classes(target_dtype: torch.dtype) -> None:
    from torch._subclasses import FakeTensorMode

    def check(device: str, rows: int, classes: int) -> None:
        x = torch.empty(rows, classes, dtype=torch.bfloat16, device=device, requires_grad=True)
        shape = (rows, classes) if target_dtype.is_floating_point else (rows,)
        t = torch.empty(shape, dtype=target_dtype, device=device)
        for reduction in REDUCTIONS:
            loss, stats = cross_entropy(
                x,
                t,
                torch.empty(classes, dtype=torch.bfloat16, device=device),
                reduction=reduction,
                sample_weight=torch.empty(rows, device=device),
                stats=("lse", "entropy", "prediction", "correct"),
            )
            assert (loss.dtype, loss.shape) == (
                torch.bfloat16,
                (rows,) if reduction == "none" else (),
            )
            found = vars(stats).values()
            assert [s.dtype for s in found] == [torch.float32] * 2 + [torch.int64, torch.bool]
            assert {s.shape for s in found} == {(rows,)}
            total = loss.sum() + stats.lse.sum()
            (gradient,) = torch.autograd.grad(total, x)
            assert (gradient.shape, gradient.dtype, gradient.device) == (x.shape, x.dtype, x.device)

    check("meta", 4, 5)
    with FakeTensorMode():
        check("cpu", 2**20, 2**20)  # 2^40 logits: nothing is computed


def test_subclasses_of_classes_keep_their_type(device: str) -> None:
    x, t = X.to(device), T.to(device)
    arguments = {
        "input": x,
        "target": t,
        "weight": torch.rand(5).to(device),
        "sample_weight": torch.rand(4).to(device),
        "normalizer": torch.rand(()).to(device),
    }
    for name in arguments:
        Tagged.calls.clear()
        tagged = arguments | {name: arguments[name].as_subclass(Tagged)}
        loss = cross_entropy(**tagged)
        assert cross_entropy in Tagged.calls
        assert type(loss) is Tagged
        torch.testing.assert_close(loss.as_subclass(torch.Tensor), cross_entropy(**arguments))
        _, stats = cross_entropy(**tagged, stats=("lse", "correct"))
        lse = stats.lse.as_subclass(torch.Tensor)
        torch.testing.assert_close(lse, torch.logsumexp(x, 1))
        assert stats.correct.dtype == torch.bool


class Tagged(torch.Tensor):
    calls: list[Any] = []  # noqa: RUF012 - emptied by the test

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs)


@each_form
def test_subclasses_keep_their_type(form: Form, device: str) -> None:
    x, t = make_input(form, (4, 5)).to(device), torch.rand(4, 5).to(device)
    for inputs in ((x.as_subclass(Tagged), t), (x, t.as_subclass(Tagged))):
        Tagged.calls.clear()
        loss = form.ours(*inputs)
        assert form.ours in Tagged.calls
        assert type(loss) is type(form.theirs(*(i.cpu() for i in inputs))) is Tagged
        torch.testing.assert_close(loss.as_subclass(torch.Tensor), form.ours(x, t))
    # Every tensor argument is looked at.
    for option in ("sample_weight", "normalizer", *form.weights):
        Tagged.calls.clear()
        form.ours(x, t, **{option: torch.ones(()).to(device).as_subclass(Tagged)})
        assert form.ours in Tagged.calls


class Refusing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


@each_loss
def test_subclasses_may_refuse(form: Form) -> None:
    with pytest.raises(TypeError, match="no implementation found"):
        form.ours(X.as_subclass(Refusing), X)


def test_parameters_are_plain_tensors(device: str) -> None:
    x = nn.Parameter(X.to(device, copy=True))
    assert type(bce_with_logits(x, X.to(device))) is torch.Tensor


# ---- logits that change before backward ----------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_mode
def test_changed_before_backward(form: Form, reduction: str, device: str) -> None:
    """Also where torch's loss would not notice."""
    leaf = make_input(form, (4, 5)).to(device).requires_grad_()
    for changed in ("input", "target", "sample_weight", "normalizer", *form.weights):
        tensors = {
            "input": leaf * 1,
            "target": (T if form is CLASSES else torch.rand(4, 5)).to(device, copy=True),
            "sample_weight": torch.rand(4).to(device),
            "normalizer": torch.ones(()).to(device),
            **{name: torch.rand(5).to(device) for name in form.weights},
        }
        loss = form.ours(**renamed(form, tensors), reduction=reduction)
        tensors[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(torch.ones(loss.shape).to(device))


def renamed(form: Form, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision calls input and target so."""
    names = {"input": "inputs", "target": "targets"} if form is FOCAL else {}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


# ---- inplace_backward ----------------------------------------------------------------------------


def overwriting(form: Form, logits: Tensor, **options: Any) -> Tensor:
    shape = logits.shape[: logits.dim() - 1] if form is CLASSES else logits.shape
    t = torch.full(shape, 1 if form is CLASSES else 0.5, device=logits.device)
    return form.ours(logits, t, **{"reduction": "mean", "inplace_backward": True} | options)


class Viewing(torch.autograd.Function):
    """A view from a custom function, as a module's full backward hook makes one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def backward(loss: Tensor, **options: Any) -> None:
    loss.backward(torch.ones(loss.shape).to(loss.device), **options)


@pytest.mark.parametrize("form", [LOGITS, FOCAL, SOFTMAX, CLASSES], ids=form_id)
class TestInplaceBackward:
    def leaf(self, device: str) -> Tensor:
        return torch.randn(4, 5).to(device).requires_grad_()

    def test_leaf(self, form: Form, device: str) -> None:
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used"):
            overwriting(form, self.leaf(device))

    def test_expanded(self, form: Form, device: str) -> None:
        logits = (self.leaf(device)[:1] * 1).expand(4, 5)
        with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
            overwriting(form, logits)

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x.view(20).unfold(0, 3, 1),
            lambda x: x.as_strided((2, 3), (2, 1)),
            lambda x: x.as_strided((3, 2), (1, 2)),
            lambda x: x.as_strided((2, 2, 2), (1, 4, 4)),
        ],
    )
    def test_overlapping(self, form: Form, view: Callable[[Tensor], Tensor], device: str) -> None:
        with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
            overwriting(form, view(self.leaf(device) * 1))

    # No overlap, though not every byte between the first and the last is theirs.
    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x[:, ::2],
            lambda x: x[::2],
            lambda x: x.t()[1:],
            lambda x: x[:, 1:3],
            lambda x: x.as_strided((2, 3), (3, 1)),
            lambda x: x.as_strided((1, 4), (0, 2)),
        ],
    )
    def test_gaps(self, form: Form, view: Callable[[Tensor], Tensor], device: str) -> None:
        x, found = self.leaf(device).detach(), []
        for inplace_backward in (True, False):
            leaf = x.clone().requires_grad_()
            overwriting(form, view(leaf * 1), inplace_backward=inplace_backward).backward()
            found.append(leaf.grad)
        assert torch.equal(*found)

    # Torch refuses to have these written to.
    @pytest.mark.parametrize(
        ("view", "message"),
        [
            (lambda leaf: leaf.view_as(leaf), "a view of a leaf Variable"),
            (lambda leaf: (leaf * 1).chunk(2)[0], "is a view and is being modified inplace"),
            (lambda leaf: Viewing.apply(leaf * 1), "is a view and is being modified inplace"),
        ],
        ids=["of a leaf", "chunk", "custom function"],
    )
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_refused_before_anything_is_written(
        self,
        form: Form,
        reduction: str,
        view: Callable[[Tensor], Tensor],
        message: str,
        device: str,
    ) -> None:
        logits = view(self.leaf(device))
        before = logits.detach().clone()
        with pytest.raises(RuntimeError, match=message):
            overwriting(form, logits, reduction=reduction)
        assert torch.equal(logits.detach(), before)

    def test_lazy_negative(self, form: Form, device: str) -> None:
        leaf = self.leaf(device)
        logits = (torch.complex(leaf, leaf) * 1).conj().imag
        with pytest.raises(RuntimeError, match=r"resolve_neg\(\)"):
            overwriting(form, logits)
        overwriting(form, logits.resolve_neg()).backward()
        assert leaf.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_memory_after_backward(
        self, form: Form, reduction: str, dtype: torch.dtype, device: str
    ) -> None:
        """The loss, kept for a log, does not keep that of the logits."""
        logits = self.leaf(device).to(dtype) * 1
        memory = StorageWeakRef(logits.untyped_storage())
        loss = overwriting(form, logits, reduction=reduction)
        del logits
        assert not memory.expired()
        backward(loss, retain_graph=True)
        assert memory.expired()

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_later_use(self, form: Form, reduction: str, device: str) -> None:
        logits = self.leaf(device) * 1
        loss = overwriting(form, logits, reduction=reduction)
        later = (logits * 2).sum()
        with pytest.raises(RuntimeError, match="were used again"):
            later.backward()
        backward(loss)

    def test_use_in_the_same_sum(self, form: Form, device: str) -> None:
        logits = self.leaf(device) * 1
        with pytest.raises(RuntimeError, match="were used again"):
            (overwriting(form, logits) + logits.sum()).backward()

    def test_use_through_the_base_of_a_view(self, form: Form, device: str) -> None:
        base = self.leaf(device) * 1
        overwriting(form, base.view(20))
        with pytest.raises(RuntimeError, match="were used again"):
            base.sum().backward()

    def test_earlier_use_that_saved_them(self, form: Form, device: str) -> None:
        logits = self.leaf(device) * 1
        square = (logits**2).sum()
        overwriting(form, logits)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.backward()

    def test_producer_that_saved_them(self, form: Form, device: str) -> None:
        logits = torch.exp(self.leaf(device))  # whose backward multiplies by its result
        loss = overwriting(form, logits)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward(loss)

    def test_two_losses(self, form: Form, device: str) -> None:
        logits = self.leaf(device) * 1
        first = overwriting(form, logits)
        second = overwriting(form, logits)
        with pytest.raises(RuntimeError, match=r"modified by an inplace|were used again"):
            backward(first + second)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_changed_before_backward(self, form: Form, reduction: str, device: str) -> None:
        logits = self.leaf(device) * 1
        loss = overwriting(form, logits, reduction=reduction)
        with torch.no_grad():
            logits.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward(loss)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_second_backward(self, form: Form, reduction: str, device: str) -> None:
        loss = overwriting(form, self.leaf(device) * 1, reduction=reduction)
        backward(loss, retain_graph=True)
        with pytest.raises(RuntimeError, match="a second time"):
            backward(loss)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_second_derivative(self, form: Form, reduction: str, device: str) -> None:
        leaf = self.leaf(device)
        loss = overwriting(form, leaf * 1, reduction=reduction)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, leaf, torch.ones(loss.shape).to(device), create_graph=True)

    def test_gradient_of_a_weight(self, form: Form, device: str) -> None:
        """Refused where the forward pass has overwritten the logits."""
        weight = torch.ones(4).to(device).requires_grad_()
        loss = overwriting(form, self.leaf(device) * 1, sample_weight=weight)
        with pytest.raises(RuntimeError, match="target or weight that requires grad"):
            backward(loss)

        waiting: list[tuple[torch.dtype, dict[str, Any]]] = [
            (torch.float32, {"reduction": "none"}),
            (torch.float16, {"reduction": "sum"}),
        ]
        if form in (SOFTMAX, CLASSES):
            waiting += [
                (torch.float32, {"stats": (s,), "normalizer": 1}) for s in ("lse", "entropy")
            ]
        for dtype, options in waiting:
            weight.grad = None
            x = self.leaf(device).to(dtype)
            loss = overwriting(form, x * 1, sample_weight=weight, **options)
            backward(loss[0] if "stats" in options else loss)
            right = overwriting(form, x.detach(), reduction="none")
            right = right.float().view(4, -1).sum(1)
            torch.testing.assert_close(weight.grad, right, rtol=2e-3, atol=1e-5)

    def test_gradient_of_the_target(self, form: Form, device: str) -> None:
        if form is CLASSES:
            pytest.skip("a label has none")
        target = torch.rand(4, 5).to(device).requires_grad_()
        loss = form.ours(self.leaf(device) * 1, target, reduction="mean", inplace_backward=True)
        with pytest.raises(RuntimeError, match="target or weight that requires grad"):
            backward(loss)

    def test_without_effect(self, form: Form, device: str) -> None:
        """Where the loss is composed from torch's operations. The logits may be a leaf, then."""
        leaf, normalizer = self.leaf(device), torch.tensor(3.0).to(device).requires_grad_()
        x = leaf.detach().clone()
        overwriting(form, leaf, normalizer=normalizer).backward()
        found = torch.func.grad(lambda x: overwriting(form, x, normalizer=3.0))(leaf)
        torch.testing.assert_close(found, leaf.grad)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf, torch.ones_like(leaf))
            tangent = forward_ad.unpack_dual(overwriting(form, dual, normalizer=3.0)).tangent
        torch.testing.assert_close(tangent, leaf.grad.sum())
        assert torch.equal(leaf, x)

    def test_one_of_several_views(self, form: Form, device: str) -> None:
        # as torch's own in-place operations
        first, _ = (self.leaf(device) * 1).unbind(0)[:2]
        theirs = error_of(first.mul_, 2)
        ours = error_of(overwriting, form, first)
        assert type(ours) is type(theirs) is RuntimeError
        assert "is a view and" in str(ours)
        assert "modified inplace" in str(ours)


# ---- backends ------------------------------------------------------------------------------------


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'cudnn'.*native, triton, reference"):
        fused_ce.set_backend("cudnn")
    with pytest.raises(ValueError, match="unknown backend"), fused_ce.backend("cudnn"):
        pass


@pytest.mark.skipif(
    torch.backends.cuda.is_built() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton may be there",
)
def test_absent_backend() -> None:
    before = fused_ce.backends.table()
    with pytest.raises(RuntimeError, match="backend 'triton' is not available on CPU here"):
        fused_ce.set_backend("triton")
    assert fused_ce.backends.table() == before


def test_every_device_is_served() -> None:
    for op in fused_ce.backends.OPS:
        for device in fused_ce.backends.DEVICES:
            name = f"fused_ce::{op}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, device), (name, device)


def test_backend_is_restored_after_an_error() -> None:
    before = fused_ce.backends.table()
    during = []
    with pytest.raises(ValueError, match="Target size"), fused_ce.backend("reference"):
        during.extend(fused_ce.backends.table()) or bce_with_logits(X, X[0])
    assert {name for _, _, name in during} == {"reference"}
    assert fused_ce.backends.table() == before


@pytest.mark.parametrize(("name", "error"), [("cudnn", "unknown backend 'cudnn'"), ("", "")])
def test_environment_variable(name: str, error: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import fused_ce"],
        env=os.environ | {"FUSED_CE_BACKEND": name},
        capture_output=True,
        text=True,
    )
    assert error in done.stderr
    assert bool(error) == bool(done.returncode)


def test_backends_agree(device: str) -> None:
    x, t = make_input(LOGITS, (33,)), torch.rand(33)
    with fused_ce.backend("reference"):
        right = run(bce_with_logits, x, t, device=device)
    torch.testing.assert_close(run(bce_with_logits, x, t, device=device).loss, right.loss)
