"""Do DHEN and Wukong learn? Log-loss on MovieLens-100K beside logistic regression and matrix factorisation.

    python benchmarks/zoo_learning.py

Will a user rate a film 4 or 5? Trained on the earlier 90 % of each user's ratings and judged on the rest;
the last tenth of the training data in time chooses, for every model alike, learning rate, weight decay and
epoch, and takes no other part. Logistic regression sees all features that DHEN and Wukong see; matrix
factorisation sees users and films, as it is defined (a dot product and three biases). Means over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a file: make the project importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._report import Report
from examples import _movielens as movielens
from planner.zoo import build

DIM = 16
BATCH = 512
GRID = ((3e-3, 1e-5), (1e-3, 1e-5), (1e-3, 1e-4))  # Adam's learning rate, L2 on all weights
PATIENCE = 2  # epochs without a better validation loss before training ends
VALIDATION = 0.1


class LogisticRegression(nn.Module):
    """A weight for each id and each dense feature."""

    def __init__(self, rows: dict[str, int], dense_features: int) -> None:
        super().__init__()
        from planner.zoo.layers import torchrec_embeddings

        self.ebc = torchrec_embeddings(_records(rows, 4), "cpu")  # four columns are summed: TBE's least width
        self.dense = nn.Linear(dense_features, 1)

    def forward(self, dense: Tensor, sparse: Any) -> Tensor:
        """Logits (B,)."""
        logit: Tensor = self.ebc(sparse).values().sum(1) + self.dense(dense).squeeze(1)
        return logit


class MatrixFactorisation(nn.Module):
    """A mean, a bias and a vector for each user and film; Koren et al. 2009, equation 4."""

    def __init__(self, rows: dict[str, int], dense_features: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))
        self.bias = nn.ModuleDict({key: nn.Embedding(rows[key], 1) for key in ("user", "item")})
        self.vector = nn.ModuleDict({key: nn.Embedding(rows[key], DIM) for key in ("user", "item")})
        for table in (*self.bias.values(), *self.vector.values()):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, dense: Tensor, sparse: Any) -> Tensor:
        """Logits (B,)."""
        ids = {key: sparse[key].values() for key in ("user", "item")}
        user, item = (self.vector[key](ids[key]) for key in ids)
        biases = sum(self.bias[key](ids[key]).squeeze(1) for key in ids)
        logit: Tensor = self.mean + biases + (user * item).sum(1)
        return logit


def _entries(rows: dict[str, int], dim: int) -> list[dict[str, Any]]:
    return [
        {"name": f"t_{name}", "rows": count, "dim": dim, "features": [name]} for name, count in rows.items()
    ]


def _records(rows: dict[str, int], dim: int) -> Any:
    from ir.tables import capture_tables

    return capture_tables(_entries(rows, dim), "tables")[0].tables


def wukong(rows: dict[str, int], dense_features: int) -> nn.Module:
    """Two layers on the MovieLens features."""
    return build(
        "wukong-small",
        tables=_entries(rows, DIM),
        dense_features=dense_features,
        bottom=(32, DIM),
        top=(64, 1),
        row_cap=None,
        device="cpu",
    ).module


def dhen(rows: dict[str, int], dense_features: int) -> nn.Module:
    """Two layers of all five interaction modules on the MovieLens features."""
    return build(
        "dhen-small",
        tables=_entries(rows, DIM),
        dense_features=dense_features,
        bottom=(32, DIM),
        modules=("dlrm", "attention", "linear", "cross", "convolution"),
        hidden=(64,),
        top=(64, 1),
        row_cap=None,
        device="cpu",
    ).module


MODELS: dict[str, Callable[[dict[str, int], int], nn.Module]] = {
    "logistic regression": LogisticRegression,
    "matrix factorisation": MatrixFactorisation,
    "wukong": wukong,
    "dhen": dhen,
}


def scores(model: nn.Module, data: movielens.Data, samples: movielens.Ints) -> Tensor:
    """Logits of some samples."""
    model.eval()
    with torch.no_grad():
        parts = [model(*data.batch(part)[:2]) for part in np.array_split(samples, -(-len(samples) // 4096))]
    model.train()
    return torch.cat(parts)


def log_loss(logits: Tensor, labels: movielens.Floats) -> float:
    """Mean cross-entropy in nats."""
    return float(F.binary_cross_entropy_with_logits(logits.double(), torch.from_numpy(labels).double()))


def train(
    name: str, data: movielens.Data, seed: int, epochs: int, grid: tuple[tuple[float, float], ...]
) -> dict[str, float]:
    """The test log-loss and AUC at the setting of ``grid`` and the epoch that the validation data prefer."""
    cut = round(data.train * (1 - VALIDATION))
    checked, held_out = np.arange(cut, data.train), np.arange(data.train, len(data))
    best = {"validation": float("inf")}
    for rate, decay in grid:
        torch.manual_seed(seed)
        random = np.random.default_rng(seed)
        model = MODELS[name](data.rows, data.dense.shape[1])
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay)
        lowest, since = float("inf"), 0
        for epoch in range(1, epochs + 1):
            order = random.permutation(cut)
            for start in range(0, cut - BATCH + 1, BATCH):
                dense, ids, labels = data.batch(order[start : start + BATCH])
                loss = F.binary_cross_entropy_with_logits(model(dense, ids), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            found = log_loss(scores(model, data, checked), data.labels[checked])
            lowest, since = (found, 0) if found < lowest else (lowest, since + 1)
            if since >= PATIENCE:
                break
            if found < best["validation"]:
                logits = scores(model, data, held_out)
                best = {
                    "validation": found,
                    "log_loss": log_loss(logits, data.labels[held_out]),
                    "auc": movielens.auc(logits.numpy(), data.labels[held_out]),
                    "rate": rate,
                    "decay": decay,
                    "epoch": epoch,
                    "parameters": sum(p.numel() for p in model.parameters()),
                }
    return best


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one seed, one setting, three epochs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="at most")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the layers are too small to gain from more
    seeds, epochs = (1, 3) if options.quick else (options.seeds, options.epochs)
    grid = GRID[:1] if options.quick else GRID
    data = movielens.load()
    report = Report("zoo_learning")
    losses = {}
    for name in MODELS:
        runs = [train(name, data, seed, epochs, grid) for seed in range(seeds)]
        losses[name] = [run["log_loss"] for run in runs]
        report.row(
            model=name,
            log_loss=statistics.mean(losses[name]),
            worst=max(losses[name]),
            auc=statistics.mean(run["auc"] for run in runs),
            parameters=int(runs[0]["parameters"]),
            rate=runs[0]["rate"],
            decay=runs[0]["decay"],
            epoch=int(runs[0]["epoch"]),
        )
    share = float(data.labels[: data.train].mean())
    constant = np.full(len(data) - data.train, np.log(share / (1 - share)), np.float32)
    report.note(
        f"always the mean of the training data: {log_loss(torch.from_numpy(constant), data.labels[data.train :]):.4f}"
    )
    report.note(
        f"{seeds} seeds, at most {epochs} epochs, batch {BATCH}; log-loss in nats on {len(constant):,} held-out ratings"
    )
    for name in ("wukong", "dhen"):
        for rival in ("logistic regression", "matrix factorisation"):
            # the worst seed against the rival's best
            report.claim(
                f"{name}_over_{rival.replace(' ', '_')}",
                max(losses[name]) / min(losses[rival]),
                1.0,
                "<=",
            )
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
