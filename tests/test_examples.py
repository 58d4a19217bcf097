from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

for library in ("matplotlib", "rich", "sklearn", "torchmetrics", "typer"):
    pytest.importorskip(library)

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(folder: Path, name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env=os.environ | {"COLUMNS": "100", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


def test_train_binary(tmp_path: Path) -> None:
    out = run(tmp_path, "train_binary.py", "--epochs", "5", "--plot", "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    # the example itself asserts that the curves agree
    assert "largest difference of the loss curves" in out
    ours, theirs = (number(rf"\b{name} .*?([\d.]+)%", out) for name in ("fused_ce", "torch"))
    assert ours == theirs
    assert ours > 90


def test_train_multiclass(tmp_path: Path) -> None:
    out = run(tmp_path, "train_multiclass.py", "--epochs", "10", "--plot", "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    # the example itself asserts that the curves agree
    assert "largest difference of the loss curves" in out
    # of the last training batches, from the loss's own pass and from torch's second one
    ours, theirs = (number(rf"\b{name} .*?([\d.]+)%", out) for name in ("fused_ce", "torch"))
    assert ours == theirs
    assert ours > 80


def test_train_lm(tmp_path: Path) -> None:
    out = run(tmp_path, "train_lm.py", "--steps", "3", "--plot", "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    # the example itself asserts that the curves agree
    assert out.count("largest difference") == 4
    if sys.platform == "linux":
        # 2048 x 256 float32 logits are 2.1 MB, of which torch keeps two more than we do
        pattern = r"float32 .*?\b{} +│.* ([\d.]+) MB"
        theirs, ours = (number(pattern.format(name), out) for name in ("torch", "in place"))
        assert theirs - ours > 2.1


def test_sentiment(tmp_path: Path) -> None:
    out = run(tmp_path, "sentiment.py", "what a lovely film")
    # 320 coin flips pass 60 % with a probability of 2e-4
    assert number(r"held-out accuracy: ([\d.]+)%", out) > 60
    assert number(r"positive \(probability ([\d.]+)\)", out) > 0.5


def test_sentiment_negative(tmp_path: Path) -> None:
    out = run(tmp_path, "sentiment.py", "a terrible, boring film", "--epochs", "5")
    assert number(r"negative \(probability ([\d.]+)\)", out) > 0.5


def test_sentiment_data() -> None:
    lines = (EXAMPLES / "sentiment.tsv").read_text(encoding="utf-8").splitlines()
    labels, texts = zip(*(line.split("\t") for line in lines), strict=True)
    assert labels == ("positive", "negative") * (len(lines) // 2)  # the example relies on the pairs
    assert len({text.lower() for text in texts}) == len(texts)


@pytest.mark.parametrize("name", ["train_binary.py", "train_multiclass.py", "train_lm.py"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--plot", "no/folder/a.png", "cannot write no/folder/a.png"),
        ("--plot", "a.xyz", "cannot write a.xyz as png"),
        ("--plot", ".", "is a directory"),
        ("--device", "nope", "nope is not available"),
        ("--device", "meta", "meta is not available"),
        ("--device", "cuda", "cuda is not available"),
    ],
)
def test_refused_before_training(
    name: str,
    option: str,
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [name, option, value])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "status", "message"),
    [("--help", 0, "Which loss for which labels"), ("a", 2, "unexpected extra argument")],
)
def test_which_loss_reads_its_arguments(
    argument: str,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["which_loss.py", argument])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXAMPLES / "which_loss.py"), run_name="__main__")
    assert left.value.code == status
    assert message in "".join(capsys.readouterr())


def test_which_loss(tmp_path: Path) -> None:
    out = run(tmp_path, "which_loss.py")
    for line in ("CrossEntropyLoss", "BCE on sigmoid(logits)", "are refused: Target size"):
        assert line in out
    assert "torch.nn" not in out  # every loss is this package's
    whole, weighted, plain = (
        number(rf"{start}.*: +([\d.]+)", out) for start in ("loss over", "batch means", "plain")
    )
    assert weighted == pytest.approx(whole, abs=1e-4)
    assert plain != pytest.approx(whole, abs=0.1)
