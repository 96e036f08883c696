"""Click streams for benchmarks on the emulated cluster: Zipf-distributed ids, labels that depend on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Samples:
    """Batches to train on: dense features, ids by feature as (samples, ids), labels."""

    dense: Floats
    ids: dict[str, Ints]
    labels: Floats

    def batch(self, picked: Ints | slice) -> tuple[Any, Any, Any]:
        """Dense features, a KeyedJaggedTensor and labels of some samples."""
        import torch
        from torchrec import KeyedJaggedTensor

        columns = {name: values[picked] for name, values in self.ids.items()}
        jagged = KeyedJaggedTensor(
            keys=list(columns),
            values=torch.from_numpy(np.concatenate([c.reshape(-1) for c in columns.values()])),
            lengths=torch.from_numpy(
                np.concatenate([np.full(len(c), c.shape[1], np.int32) for c in columns.values()])
            ),
        )
        return torch.from_numpy(self.dense[picked]), jagged, torch.from_numpy(self.labels[picked])


@dataclass(frozen=True)
class ClickModel:
    """A stream with a truth: each id and each dense feature shifts the log-odds of a click.

    Attributes:
        rows: ids of each feature.
        pooling: ids a sample has of each feature.
        dense: dense features, normal.
        exponent: of the Zipf law of ids; 1.1 is near what Criteo's larger features show.
        seed: of the truth.
    """

    rows: Sequence[int]
    pooling: Sequence[int]
    dense: int = 13
    exponent: float = 1.1
    seed: int = 0

    @property
    def features(self) -> list[str]:
        """Names of the features."""
        return [f"f{n}" for n in range(len(self.rows))]

    def samples(self, count: int, seed: int) -> Samples:
        """``count`` samples."""
        truth, random = np.random.default_rng([self.seed, 0]), np.random.default_rng([self.seed, 1, seed])
        dense = random.standard_normal((count, self.dense)).astype(np.float32)
        odds = dense @ truth.normal(0, 0.3 / np.sqrt(self.dense), self.dense)
        ids = {}
        for name, rows, pooling in zip(self.features, self.rows, self.pooling, strict=True):
            mass = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -self.exponent)
            drawn = np.searchsorted(mass / mass[-1], random.random((count, pooling)))
            ids[name] = np.minimum(drawn, rows - 1).astype(np.int64)
            effect = truth.normal(0, 1.2 / np.sqrt(len(self.rows)), rows)
            odds = odds + effect[ids[name]].mean(axis=1)
        labels = (random.random(count) < 1 / (1 + np.exp(-odds))).astype(np.float32)
        return Samples(dense, ids, labels)

    def tables(self, dim: int) -> list[dict[str, Any]]:
        """Table list of the zoo's models."""
        return [
            {"name": f"t_{name}", "rows": rows, "dim": dim, "features": [name]}
            for name, rows in zip(self.features, self.rows, strict=True)
        ]
