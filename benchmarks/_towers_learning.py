"""Accuracy of benchmarks/towers.py: multi-tower models beside the flat one, in one process, seed by seed.

Sharded and unsharded training agree (tests/test_tower_exchange.py), so no cluster is needed; a codec between peers is
put behind every tower module, on the forward and the backward pass. On the cluster the samples of a rank's own
tower are not coded, so the loss shown here is the larger one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._report import Report
from benchmarks._streams import Samples
from codegen.runtime.codecs import absolute_bound, decode, encode
from examples import _movielens as movielens
from ir.towers import ModuleKind, Tower, TowerDecision
from passes.tower_modules import fixed_widths
from passes.tower_partition import partition, stated
from planner.towers import sample_pooled
from planner.zoo import build
from planner.zoo.multi_tower import MultiTower, with_towers
from planner.zoo.tables import zoo_tables

EPS = 1e-3  # of Adagrad; larger than rounding (examples/train_movielens.py)
SAMPLING_SEED = 1000  # none of the seeds that are judged
BALANCE = 0.25  # the planner's default
Ints = np.ndarray[Any, np.dtype[np.int64]]
Groups = tuple[tuple[str, ...], ...]


class MovieLens:
    """Ratings of 4 or 5 in MovieLens-100K; three passes, scored on each user's latest tenth."""

    towers, compression, kind, lr = 2, 2.0, "projection", 0.05
    batch_size, steps = 1024, 264

    def __init__(self) -> None:
        self.data = movielens.load()
        self.groups: Ints | None = None

    def model(self, seed: int) -> Any:
        """The DLRM of examples/train_movielens.py."""
        torch.manual_seed(seed)
        return movielens.build(self.data.rows, self.data.dense.shape[1])

    def batches(self, seed: int) -> Iterator[tuple[Any, Any, Any]]:
        """Epoch by epoch."""
        random, left = np.random.default_rng(seed), self.steps
        while left > 0:
            order = random.permutation(self.data.train)
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size)[:left]:
                yield self.data.batch(order[start : start + self.batch_size])
                left -= 1

    def held_out(self) -> tuple[Any, Any, Any]:
        """Samples that are scored."""
        return self.data.batch(np.arange(self.data.train, len(self.data)))


@dataclass
class Planted:
    """A stream of Criteo's shape whose features have planted groups.

    26 features of Kaggle's cardinalities (capped), 13 dense. Ids belong to classes. In a sample all features of a
    group tend to be of one class, another for each group; the log-odds of a click rise with the share of a group's
    pairs that agree, and every class has a small effect of its own. Nothing connects groups.
    """

    towers: int = 4
    compression: float = 3.0
    kind: str = "projection"
    lr: float = 0.05
    batch_size: int = 2048
    steps: int = 150
    test: int = 20_000
    classes: int = 3  # as many as Kaggle's smallest table has rows
    agree: float = 0.8  # chance that a feature follows its group
    strength: float = 6.0  # log-odds between no and full agreement of a group
    alone: float = 0.3  # deviation of a class's own effect on the log-odds
    dim: int = 16
    dense: int = 13
    rows: tuple[int, ...] = field(init=False)
    groups: Ints = field(init=False)

    def __post_init__(self) -> None:
        records, _ = zoo_tables(
            "criteo_kaggle.json", dim=self.dim, row_cap=1_000, global_batch=4096, optimizer="adagrad"
        )
        self.rows = tuple(table.rows for table in records)
        self.groups = np.random.default_rng(0).permutation(np.arange(len(self.rows)) % self.towers)

    def samples(self, count: int, seed: int) -> Samples:
        """``count`` samples; ids follow a Zipf law within their class."""
        random = np.random.default_rng([7, seed])
        dense = random.standard_normal((count, self.dense)).astype(np.float32)
        odds = dense @ np.linspace(-0.1, 0.1, self.dense)
        common = random.integers(0, self.classes, (count, self.towers))
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
        for group in range(self.towers):
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

    def batches(self, seed: int) -> Iterator[tuple[Any, Any, Any]]:
        """No sample is seen twice."""
        for step in range(self.steps):
            yield self.samples(self.batch_size, 10_000 * (seed + 1) + step).batch(slice(None))

    def held_out(self) -> tuple[Any, Any, Any]:
        """Samples that are scored."""
        return self.samples(self.test, 1).batch(slice(None))


class _Coding(torch.autograd.Function):
    """A codec's errors on vectors, and on their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codec: str, relative: float) -> Tensor:
        ctx.codec, ctx.relative = codec, relative
        return _round_trip(x, codec, relative)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _round_trip(gradients[0], ctx.codec, ctx.relative), None, None


def _round_trip(x: Tensor, codec: str, relative: float) -> Tensor:
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    return decode(encode(rows, codec, absolute_bound(rows, relative)), *rows.shape).view(x.shape)


class _Coded(nn.Module):
    """A tower module with a codec behind it."""

    def __init__(self, module: nn.Module, codec: tuple[str, float]) -> None:
        super().__init__()
        self.module, self.codec = module, codec

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) to (B, m, D)."""
        coded: Tensor = _Coding.apply(self.module(x), *self.codec)  # type: ignore[no-untyped-call]
        return coded


def trained(data: Any, module: nn.Module, seed: int) -> float:
    """Train in place; the AUC of held-out samples."""
    optimizer = torch.optim.Adagrad(module.parameters(), lr=data.lr, eps=EPS)
    for dense, ids, labels in data.batches(seed):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(module(dense, ids), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    dense, ids, labels = data.held_out()
    with torch.no_grad():
        scores = module(dense, ids)
    return movielens.auc(scores.double().numpy(), labels.numpy())


def towered(data: Any, seed: int, groups: Groups, codec: tuple[str, float] | None = None) -> nn.Module:
    """The flat model of a seed with tower modules over groups of its features."""
    flat = data.model(seed)
    dim = flat.tables[0].dim
    outs = fixed_widths([len(group) for group in groups], data.compression)
    towers = tuple(
        Tower(group, group, number, 1, dim, dim * len(group), out, dim * out)
        for number, (group, out) in enumerate(zip(groups, outs, strict=True))
    )
    kind: ModuleKind = data.kind
    module = with_towers(flat, TowerDecision(True, "benchmark", "coherent", kind, towers))
    if codec:
        assert isinstance(module, MultiTower)
        module.towers = nn.ModuleList(_Coded(tower, codec) for tower in module.towers)
    return module


def learned_towers(data: Any) -> tuple[Groups, Ints]:
    """Towers from the embeddings of a flat model of another seed; by feature and as numbers."""
    module = data.model(SAMPLING_SEED)
    trained(data, module, SAMPLING_SEED)
    sample = sample_pooled(module, (ids for _, ids, _ in data.batches(SAMPLING_SEED)))
    gain = sample.strengths(module.features)
    problem, start = stated(gain, np.ones((len(gain), 1)), data.towers, BALANCE)
    found = partition(problem, start).tower
    return _groups(module.features, found), found


def _groups(features: Sequence[str], tower: Ints) -> Groups:
    return tuple(
        tuple(f for f, t in zip(features, tower, strict=True) if t == n) for n in sorted(set(tower.tolist()))
    )


def rand_index(a: Ints, b: Ints) -> float:
    """Adjusted Rand index of two partitions; 1 where they are the same (Hubert and Arabie 1985)."""
    table = np.array([[np.sum((a == i) & (b == j)) for j in np.unique(b)] for i in np.unique(a)])

    def pairs(counts: Any) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, one, other = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = one * other / pairs(np.array([len(a)]))
    return (both - expected) / ((one + other) / 2 - expected)


def accuracy(report: Report, name: str, data: Any, codec: tuple[str, float], seeds: int) -> None:
    """Rows and claims of one data set."""
    torch.set_num_threads(1)
    groups, tower = learned_towers(data)
    if data.groups is not None:
        report.claim(f"{name}_planted_groups_rand_index", rand_index(tower, data.groups), 0.9, ">=")
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        features = data.model(seed).features
        other = _groups(features, np.random.default_rng(seed).permutation(tower))
        models = {
            "flat": data.model(seed),
            "SPTT+TM": towered(data, seed, groups),
            "SPTT+TM+codec": towered(data, seed, groups, codec),
            "random towers": towered(data, seed, other),
        }
        for which, module in models.items():
            found.setdefault(which, []).append(trained(data, module, seed))
    area = {which: np.array(values) for which, values in found.items()}
    for which, values in area.items():
        apart = values - area["flat"]
        report.row(
            data=name,
            variant=which,
            auc=float(values.mean()),
            auc_difference=float(apart.mean()),
            standard_error=_error(apart),
        )
    error = _error(area["flat"])
    sizes = " + ".join(str(len(group)) for group in groups)
    report.note(
        f"{name}: towers of {sizes} features, {data.compression:g} vectors to one, {seeds} seeds; SPTT without "
        f"modules is the flat model; one standard error of the flat AUC over seeds: "
        + (f"{error:.4f}" if error is not None else "unknown")
    )
    allowed = max(0.002, error or 0.0)
    for which, label in (("SPTT+TM", "modules"), ("SPTT+TM+codec", "codec")):
        report.claim(f"{name}_auc_loss_{label}", float((area["flat"] - area[which]).mean()), allowed, "<=")
    gain = area["SPTT+TM"] - area["random towers"]
    report.note(
        f"{name}: learned over random towers {gain.mean():+.4f} AUC, seed by seed {np.round(gain, 4)}"
    )
    if data.groups is not None:  # elsewhere nobody knows that there is structure to find
        report.claim(f"{name}_learned_over_random_towers", float(gain.mean()), 0.0, ">=")


def _error(values: Any) -> float | None:
    """Standard error of the mean; None of one value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
