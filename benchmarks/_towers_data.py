"""What benchmarks/towers.py trains on: MovieLens-100K, and a stream with planted groups of features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks._streams import Samples
from examples import _movielens as movielens
from planner.zoo import build
from planner.zoo.tables import zoo_tables

DIM = 32  # columns of a vector, also of the model whose steps are timed
Ints = np.ndarray[Any, np.dtype[np.int64]]
Batch = tuple[Any, Any, Any]


class MovieLens:
    """Ratings of 4 or 5 in MovieLens-100K; three passes, scored on each user's latest tenth."""

    lr, batch_size, steps = 0.05, 1024, 264

    def __init__(self) -> None:
        self.data = movielens.load()
        self.groups: Ints | None = None

    def model(self, seed: int) -> Any:
        """The DLRM of examples/train_movielens.py."""
        torch.manual_seed(seed)
        return movielens.build(self.data.rows, self.data.dense.shape[1])

    def batches(self, seed: int) -> Iterator[Batch]:
        """Epoch by epoch."""
        random, left = np.random.default_rng(seed), self.steps
        while left > 0:
            order = random.permutation(self.data.train)
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size)[:left]:
                yield self.data.batch(order[start : start + self.batch_size])
                left -= 1

    def held_out(self) -> Batch:
        """Samples that are scored."""
        return self.data.batch(np.arange(self.data.train, len(self.data)))


@dataclass
class Planted:
    """A stream of Criteo's shape whose features have planted groups.

    26 features of Kaggle's cardinalities (capped), 13 dense. Ids belong to classes. In a sample all features of a
    group tend to be of one class, another for each group; the log-odds of a click rise with the share of a group's
    pairs that agree, and every class has a small effect of its own. Nothing connects groups.
    """

    count: int = 4  # of groups
    lr: float = 0.05
    batch_size: int = 2048
    steps: int = 150
    test: int = 20_000
    classes: int = 3  # as many as Kaggle's smallest table has rows
    agree: float = 0.8  # chance that a feature follows its group
    strength: float = 6.0  # log-odds between no and full agreement of a group
    alone: float = 0.3  # deviation of a class's own effect on the log-odds
    dim: int = DIM
    dense: int = 13
    rows: tuple[int, ...] = field(init=False)
    groups: Ints = field(init=False)

    def __post_init__(self) -> None:
        records, _ = zoo_tables(
            "criteo_kaggle.json", dim=self.dim, row_cap=1_000, global_batch=4096, optimizer="adagrad"
        )
        self.rows = tuple(table.rows for table in records)
        self.groups = np.random.default_rng(0).permutation(np.arange(len(self.rows)) % self.count)

    def samples(self, count: int, seed: int) -> Samples:
        """``count`` samples; ids follow a Zipf law within their class."""
        random = np.random.default_rng([7, seed])
        dense = random.standard_normal((count, self.dense)).astype(np.float32)
        odds = dense @ np.linspace(-0.1, 0.1, self.dense)
        common = random.integers(0, self.classes, (count, self.count))
        chosen = np.empty((count, len(self.rows)), np.int64)
        effects = np.random.default_rng(1).normal(0, self.alone, (len(self.rows), self.classes))
        effects -= effects.mean(
            axis=1, keepdims=True
        )  # else features of different groups would point one way
        ids = {}
        for n, rows in enumerate(self.rows):
            follows = random.random(count) < self.agree
            other = random.integers(0, self.classes, count)
            chosen[:, n] = np.where(follows, common[:, self.groups[n]], other)
            odds += effects[n, chosen[:, n]]
            mass = np.cumsum(1.0 / np.arange(1, rows // self.classes + 1))
            place = np.searchsorted(mass / mass[-1], random.random(count))
            ids[f"f{n}"] = (np.minimum(place, len(mass) - 1) * self.classes + chosen[:, n])[:, None]
        for group in range(self.count):
            mine = chosen[:, self.groups == group]
            same = np.mean(mine[:, :, None] == mine[:, None, :], axis=(1, 2))
            odds += self.strength * (same - same.mean())
        labels = (random.random(count) < 1 / (1 + np.exp(-odds))).astype(np.float32)
        return Samples(dense, ids, labels)

    def model(self, seed: int) -> Any:
        """A DLRM of two small perceptrons."""
        torch.manual_seed(seed)
        tables = [
            {"name": f"t_f{n}", "rows": rows, "dim": self.dim, "features": [f"f{n}"]}
            for n, rows in enumerate(self.rows)
        ]
        return build(
            "dlrm",
            tables=tables,
            dense_features=self.dense,
            bottom=(64, self.dim),
            top=(64, 32, 1),
            device="cpu",
        ).module

    def batches(self, seed: int) -> Iterator[Batch]:
        """No sample is seen twice."""
        for step in range(self.steps):
            yield self.samples(self.batch_size, 10_000 * (seed + 1) + step).batch(slice(None))

    def held_out(self) -> Batch:
        """Samples that are scored."""
        return self.samples(self.test, 1).batch(slice(None))
