"""README.md: its examples run, every feature it claims has a test, and its files are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"

if not README.exists():
    pytest.skip("these tests were copied without README.md", allow_module_level=True)

TEXT = README.read_text(encoding="utf-8")

# The first column of the table of features, and what would fail without the feature.
FEATURES = {
    "softmax: labels, probabilities, `weight`, `label_smoothing`": [
        "test_softmax_ce.py::test_dtypes",
        "test_softmax_ce.py::test_options",
    ],
    "softmax: (N, C, d1, ...) and any strides, without a copy": [
        "test_softmax_ce.py::test_shapes",
        "test_softmax_ce.py::test_strides",
        "test_softmax_ce.py::test_memory_of_strided_logits",
    ],
    "softmax: int32, int16 and int8 labels": [
        "test_softmax_ce.py::test_dtypes",
        "test_softmax_ce.py::test_extras_accept_what_torch_rejects",
    ],
    "softmax: `softcap`, `logit_scale`, `z_loss`": ["test_softmax_ce.py::test_extras"],
    "softmax: `stats` from the same pass": [
        "test_softmax_ce.py::test_stats",
        "test_softmax_ce.py::test_gradients_of_stats",
    ],
    "softmax: gradient of an ignored row that holds NaN": [
        "test_softmax_ce.py::test_ignored_rows",
        "test_softmax_ce.py::test_ignored_rows_poison_no_others",
    ],
    "softmax: `IndexError` for a bad label on CUDA, and the process goes on": [
        "test_bad_input.py::test_labels_out_of_range"
    ],
    "binary: logits, `weight`, `pos_weight`": [
        "test_bce.py::test_dtypes",
        "test_bce.py::test_weight_shapes",
    ],
    "binary: probabilities": ["test_bce.py::test_dtypes", "test_opinfo.py::test_functions"],
    "focal loss": ["test_bce.py::test_focal_is_torchvisions"],
    "focal gradient at `gamma=0.5`, logit 20, label 1": [
        "test_bce.py::test_focal_gradient_is_finite"
    ],
    "binary: bool and integer targets": [
        "test_bce.py::test_dtypes",
        "test_bce.py::test_extras_accept_what_torch_rejects",
    ],
    "half types computed in float32": [
        "test_bce.py::test_dtypes",
        "test_bce.py::test_bfloat16_where_torch_loses_the_gradient",
        "test_softmax_ce.py::test_dtypes",
        "test_softmax_ce.py::test_half_types_are_computed_in_float32",
    ],
    "binary: loss 0 at an infinite logit on the right side": [
        "test_bce.py::test_infinite_logits_on_the_right_side_cost_nothing"
    ],
    "same bits on any number of CPU threads": [
        "test_bce.py::test_same_bits_on_any_number_of_threads",
        "test_softmax_ce.py::test_same_bits_on_any_number_of_threads",
    ],
    "softmax: memory of forward and backward, in sizes of the logits": [
        "test_softmax_ce.py::test_memory"
    ],
    "binary: memory of forward and backward, in sizes of the logits": ["test_bce.py::test_memory"],
    "`inplace_backward`, which needs none": [
        "test_bce.py::test_inplace_backward",
        "test_bce.py::test_memory",
        "test_softmax_ce.py::test_inplace_backward",
        "test_softmax_ce.py::test_memory",
    ],
    "binary: `ignore_index`": ["test_bce.py::test_ignored_elements"],
    "binary: `label_smoothing`": ["test_bce.py::test_extras"],
    "`sample_weight`": ["test_bce.py::test_extras", "test_softmax_ce.py::test_extras"],
    "`normalizer`": [
        "test_bce.py::test_normalizer_makes_gradient_accumulation_exact",
        "test_softmax_ce.py::test_normalizer_makes_gradient_accumulation_exact",
    ],
    "`on_empty`": [
        "test_bce.py::test_on_empty",
        "test_softmax_ce.py::test_empty",
        "test_softmax_ce.py::test_denominator_zero",
    ],
    "gradients to `weight` and `pos_weight`": [
        "test_bce.py::test_gradients_of_all_arguments",
        "test_softmax_ce.py::test_gradients_of_all_arguments",
    ],
    "second derivatives": [
        "test_transforms.py::test_every_argument_to_second_order",
        "test_transforms.py::test_every_argument_of_classes_to_second_order",
    ],
    "`torch.func` and forward-mode differentiation": [
        "test_transforms.py::TestFunc::test_vmap",
        "test_transforms.py::TestFunc::test_hessian",
        "test_transforms.py::TestFunc::test_jvp",
        "test_transforms.py::test_forward_mode",
        "test_transforms.py::TestFuncOfClasses::test_vmap",
        "test_transforms.py::TestFuncOfClasses::test_hessian",
        "test_transforms.py::TestFuncOfClasses::test_jvp",
    ],
    "`torch.compile(fullgraph=True)`": [
        "test_transforms.py::test_compile",
        "test_transforms.py::test_inductor",
        "test_transforms.py::test_compile_classes",
        "test_transforms.py::test_inductor_of_classes",
    ],
    "`torch.export`": [
        "test_transforms.py::test_export",
        "test_transforms.py::test_export_of_classes",
    ],
}


def rows(first: str) -> list[list[str]]:
    """The cells below the header of the table whose first header cell is `first`."""
    lines = TEXT.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_examples() -> None:
    """In order and in one namespace, since they go on from one another."""
    namespace: dict[str, Any] = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        above = "\n" * TEXT[: block.start(1)].count("\n")  # a traceback names README's own line
        exec(compile(above + block[1], str(README), "exec"), namespace)


def test_features_are_the_tested_ones() -> None:
    table = rows("feature")
    assert [cells[0] for cells in table] == list(FEATURES)
    assert {len(cells) for cells in table} == {6}


def is_of_classes(test: str) -> bool:
    return "test_softmax_ce.py" in test or "classes" in test.lower()


# The focal loss is a form of the binary one.
@pytest.mark.parametrize("feature", FEATURES)
def test_features_are_tested_in_the_losses_that_have_them(feature: str) -> None:
    found = {is_of_classes(test) for test in FEATURES[feature] if "test_bad_input" not in test}
    if feature.startswith("softmax:"):
        assert found <= {True}
    elif feature.startswith(("binary:", "focal")):
        assert found == {False}
    else:
        assert found == {False, True}


@pytest.mark.parametrize("test", sorted({test for tests in FEATURES.values() for test in tests}))
def test_named_tests_exist(test: str) -> None:
    file, *names = test.split("::")
    body = ast.parse((TESTS / file).read_text(encoding="utf-8")).body
    for name in names:
        found = [
            n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name
        ]
        assert found, f"{file} has no {name}"
        body = found[0].body


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_named_files_exist(document: str) -> None:
    text = (README.parent / document).read_text(encoding="utf-8")
    paths = re.findall(r"\b(?:csrc|fused_ce|tests|benchmarks|examples)/[\w./]*\w(?![\w<])", text)
    assert paths
    assert [path for path in paths if not (README.parent / path).exists()] == []


def test_backends() -> None:
    from fused_ce import backends

    assert tuple(cells[0].strip("`") for cells in rows("backend")) == backends.BACKENDS
