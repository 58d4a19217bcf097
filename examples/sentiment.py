"""Is a short English sentence positive or negative? A bag of words, a small network, one logit.

python examples/sentiment.py "what a lovely film"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import GroupKFold
from torch import Tensor, nn

import fused_ce

DATA = Path(__file__).with_name("sentiment.tsv")
FOLDS = 5


def load() -> tuple[list[str], list[int]]:
    rows = [line.split("\t") for line in DATA.read_text(encoding="utf-8").splitlines()]
    return [text for _, text in rows], [int(label == "positive") for label, _ in rows]


class Classifier:
    """Words and pairs of words ("not good") present in a text, to the logit of "positive"."""

    def __init__(self, texts: list[str], labels: list[int], epochs: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.vectorizer = CountVectorizer(binary=True, ngram_range=(1, 2))
        self.vectorizer.fit(texts)
        x = self.features(texts)
        y = torch.tensor(labels)
        self.model = nn.Sequential(
            nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 1)
        )
        loss_fn = fused_ce.BCEWithLogitsLoss()
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(32):
                loss = loss_fn(self.model(x[rows]).squeeze(1), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.model.eval()

    def features(self, texts: list[str]) -> Tensor:
        return torch.from_numpy(self.vectorizer.transform(texts).toarray()).float()

    @torch.no_grad()
    def probability(self, texts: list[str]) -> Tensor:
        """Of "positive". The loss takes logits: the sigmoid belongs here, not in the model."""
        return torch.sigmoid(self.model(self.features(texts)).squeeze(1))


def held_out_accuracy(texts: list[str], labels: list[int], epochs: int, seed: int) -> float:
    """Every sentence is predicted once, by a model that was trained without it.

    The lines come in pairs, a positive and a negative sentence about the same thing. A pair stays
    in one fold: with only one half of it in training, the words the halves share would count for
    that half's label, and held-out sentences would be pushed to the wrong side.
    """
    right = 0
    pairs = [line // 2 for line in range(len(texts))]
    for train, test in GroupKFold(FOLDS).split(texts, groups=pairs):
        model = Classifier([texts[i] for i in train], [labels[i] for i in train], epochs, seed)
        predicted = model.probability([texts[i] for i in test]) > 0.5
        right += int((predicted == torch.tensor([bool(labels[i]) for i in test])).sum().item())
    return right / len(texts)


def main(
    sentence: str,
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    seed: int = 0,
) -> None:
    """Say whether SENTENCE is positive or negative, after training on sentiment.tsv."""
    texts, labels = load()
    accuracy = held_out_accuracy(texts, labels, epochs, seed)
    print(
        f"held-out accuracy: {accuracy:.1%} (chance: 50%; {FOLDS} folds of {len(texts)} sentences)"
    )
    model = Classifier(texts, labels, epochs, seed)
    if not model.features([sentence]).any():
        raise SystemExit("none of these words occurs in the training sentences")
    positive = model.probability([sentence]).item()
    label, probability = ("positive", positive) if positive > 0.5 else ("negative", 1 - positive)
    print(f"{label} (probability {probability:.2f})")


if __name__ == "__main__":
    typer.run(main)
