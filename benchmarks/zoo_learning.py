"""Do DHEN and Wukong learn? Log-loss on MovieLens-100K beside logistic regression and matrix factorisation.

    python benchmarks/zoo_learning.py

Will a user rate a film 4 or 5? Judged on the latest tenth of each user's ratings, which takes no other part. Of
what is left, the latest tenth of each user's ratings is the validation data: it chooses, for every model alike and
with a seed of its own, learning rate, L2 penalty of the tables and number of epochs. With these each model is then
trained on all training data, once a seed. All models are scored with the running mean of their weights (Polyak and
Juditsky 1992). Logistic regression sees all features that DHEN and Wukong see; matrix factorisation sees users and
films, as it is defined (a dot product and three biases).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
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
# Adam's learning rate, and L2 penalty of tables, which few ratings a row let overfit first
GRID = ((1e-2, 1e-4), (3e-3, 1e-4), (3e-3, 1e-3), (1e-3, 1e-3))
DENSE_DECAY = 1e-5  # L2 penalty of the rest
MEAN_OF = 500  # steps that the running mean of the weights looks back
PATIENCE = 1  # epochs without a better validation loss before a trial ends
VALIDATION = 0.1
TRIAL_SEED = 1000  # of the trials; seeds of the judged runs count from 0


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
    """Two layers on the MovieLens features, of all interaction modules but the convolution, slow on a CPU."""
    return build(
        "dhen-small",
        tables=_entries(rows, DIM),
        dense_features=dense_features,
        bottom=(32, DIM),
        modules=("dlrm", "attention", "linear", "cross"),
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


def validation_split(data: movielens.Data) -> tuple[movielens.Ints, movielens.Ints]:
    """Training ratings without, and only, the latest tenth of each user's: cut as the held-out ratings are."""
    user = data.ids["user"][0][: data.train]
    later = np.bincount(user, minlength=data.rows["user"])
    left, later = later.copy(), np.round(later * VALIDATION).astype(int)
    checked = np.zeros(data.train, bool)
    for n in range(data.train):  # in order of time
        checked[n] = left[user[n]] <= later[user[n]]
        left[user[n]] -= 1
    return np.flatnonzero(~checked), np.flatnonzero(checked)


class Training:
    """One model under Adam, with the running mean of its weights."""

    def __init__(self, name: str, data: movielens.Data, seed: int, rate: float, decay: float) -> None:
        torch.manual_seed(seed)
        self.data, self.random = data, np.random.default_rng(seed)
        self.model = MODELS[name](data.rows, data.dense.shape[1])
        tables = [m for m in self.model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        of_tables = [p for table in tables for p in table.parameters()]
        known = {id(p) for p in of_tables}
        rest = [p for p in self.model.parameters() if id(p) not in known]
        groups = [(of_tables, decay), (rest, DENSE_DECAY)]
        self.optimizer = torch.optim.Adam(
            [{"params": params, "weight_decay": penalty} for params, penalty in groups], lr=rate
        )
        self.mean = [p.detach().clone() for p in self.model.parameters()]
        self.steps = 0

    def epoch(self, samples: movielens.Ints) -> None:
        """Each sample once, but for those that fill no batch."""
        order = self.random.permutation(samples)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            dense, ids, labels = self.data.batch(order[start : start + BATCH])
            loss = F.binary_cross_entropy_with_logits(self.model(dense, ids), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.steps += 1
            with torch.no_grad():
                torch._foreach_lerp_(self.mean, list(self.model.parameters()), 1 / min(self.steps, MEAN_OF))

    def logits(self, samples: movielens.Ints) -> Tensor:
        """Of some samples, by the mean weights."""
        now = [p.detach().clone() for p in self.model.parameters()]
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), self.mean)
            found = scores(self.model, self.data, samples)
            torch._foreach_copy_(list(self.model.parameters()), now)
        return found


def choose(
    name: str, data: movielens.Data, epochs: int, grid: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """The setting and the number of epochs with the least validation loss."""
    fitted, checked = validation_split(data)
    best = {"validation": float("inf")}
    for rate, decay in grid:
        training = Training(name, data, TRIAL_SEED, rate, decay)
        lowest, since = float("inf"), 0
        for epoch in range(1, epochs + 1):
            training.epoch(fitted)
            found = log_loss(training.logits(checked), data.labels[checked])
            lowest, since = (found, 0) if found < lowest else (lowest, since + 1)
            if found < best["validation"]:
                best = {"validation": found, "rate": rate, "decay": decay, "epochs": epoch}
            if since >= PATIENCE:
                break
    return best


def judge(name: str, data: movielens.Data, seed: int, chosen: dict[str, float]) -> dict[str, float]:
    """Log-loss and AUC on the held-out ratings, trained on all others."""
    training = Training(name, data, seed, chosen["rate"], chosen["decay"])
    for _ in range(int(chosen["epochs"])):
        training.epoch(np.arange(data.train))
    held_out = np.arange(data.train, len(data))
    logits = training.logits(held_out)
    return {
        "log_loss": log_loss(logits, data.labels[held_out]),
        "auc": movielens.auc(logits.numpy(), data.labels[held_out]),
        "parameters": sum(p.numel() for p in training.model.parameters()),
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one seed, two settings, three epochs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20, help="at most")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the layers are too small to gain from more
    seeds, epochs = (1, 3) if options.quick else (options.seeds, options.epochs)
    grid = GRID[::3] if options.quick else GRID
    data = movielens.load()
    report = Report("zoo_learning")
    losses = {}
    for name in MODELS:
        chosen = choose(name, data, epochs, grid)
        runs = [judge(name, data, seed, chosen) for seed in range(seeds)]
        losses[name] = [run["log_loss"] for run in runs]
        report.row(
            model=name,
            log_loss=statistics.mean(losses[name]),
            best=min(losses[name]),
            worst=max(losses[name]),
            auc=statistics.mean(run["auc"] for run in runs),
            validation=chosen["validation"],
            parameters=int(runs[0]["parameters"]),
            rate=chosen["rate"],
            decay=chosen["decay"],
            epochs=int(chosen["epochs"]),
        )
    share = float(data.labels[: data.train].mean())
    constant = np.full(len(data) - data.train, np.log(share / (1 - share)), np.float32)
    report.note(
        f"always the mean of the training data: {log_loss(torch.from_numpy(constant), data.labels[data.train :]):.4f}"
    )
    report.note(
        f"{seeds} seeds, at most {epochs} epochs, {len(grid)} settings each, batch {BATCH}; log-loss in nats on "
        f"{len(constant):,} held-out ratings"
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
