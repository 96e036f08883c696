"""Accuracy of benchmarks/towers.py: multi-tower models beside the flat one, in one process, seed by seed.

Sharded and unsharded training agree (tests/test_tower_exchange.py), so no cluster is needed; a codec between peers is
put behind every tower module, on the forward and the backward pass. On the cluster the samples of a rank's own
tower are not coded, so the loss shown here is the larger one. Towers and widths are those of the planner, decided on
the embeddings of a flat model of a seed that is not judged.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from benchmarks._report import Report
from benchmarks._towers_data import Batch, Ints
from codegen.runtime.codecs import absolute_bound, decode, encode
from examples import _movielens as movielens
from ir.topology import Level, Link
from ir.tower_sample import PooledSample
from ir.towers import TowerDecision, TowerRequest
from passes.tower_pools import pools
from planner.towers import sample_pooled
from planner.zoo.multi_tower import MultiTower, with_towers

EPS = 1e-3  # of Adagrad; larger than rounding (examples/train_movielens.py)
SAMPLING_SEED = 1000  # none of the seeds that are judged


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


def train(data: Any, module: nn.Module, batches: Sequence[Batch]) -> None:
    """Train in place, once over the batches."""
    optimizer = torch.optim.Adagrad(module.parameters(), lr=data.lr, eps=EPS)
    for dense, ids, labels in batches:
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(module(dense, ids), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def judged(module: nn.Module, held_out: Batch) -> float:
    """The AUC of held-out samples."""
    dense, ids, labels = held_out
    with torch.no_grad():
        scores = module(dense, ids)
    return movielens.auc(scores.double().numpy(), labels.numpy())


def towered(
    data: Any, seed: int, decision: TowerDecision, codec: tuple[str, float] | None = None
) -> nn.Module:
    """The flat model of a seed with tower modules."""
    module = with_towers(data.model(seed), decision)
    if codec:
        assert isinstance(module, MultiTower)
        module.towers = nn.ModuleList(_Coded(tower, codec) for tower in module.towers)
    return module


def sample(data: Any, path: Path) -> None:
    """Pooled embeddings of a flat model of another seed, for the planner to learn towers and widths from.

    It trains twice as long as the models that are judged: strengths of towers are learned from a trained model.
    """
    module = data.model(SAMPLING_SEED)
    batches: list[Batch] = []
    for stream in (SAMPLING_SEED, SAMPLING_SEED + 1):
        batches = list(data.batches(stream))
        train(data, module, batches)
    sample_pooled(module, (ids for _, ids, _ in batches)).save(path)


def movielens_decision(data: Any, path: Path, budget: float) -> TowerDecision:
    """Two towers, learned from a sample that is written to ``path``."""
    sample(data, path)
    base = planner.topology("local-1")
    topology = replace(base, levels=(base.levels[0], Level("cluster", 2, Link("ethernet", 1.25e8, 60e-6))))
    asked = TowerRequest(
        module="projection", accuracy_budget=budget, interactions=str(path), balance=1.0, always=True
    )
    plan = planner.compile(
        data.model(SAMPLING_SEED), topology, constraints=planner.Constraints(towers=asked), time_limit=1.0
    )
    section = plan.decisions.towers
    assert section is not None
    return section


def numbered(decision: TowerDecision, features: Sequence[str]) -> Ints:
    """The tower of each feature."""
    found = {feature: number for number, tower in enumerate(decision.towers) for feature in tower.features}
    return np.array([found[feature] for feature in features])


def shuffled(
    decision: TowerDecision, features: Sequence[str], seed: int, sample: PooledSample
) -> TowerDecision:
    """Random towers of the same sizes that send as much; inside them pools are learned as the planner learns them."""
    order = iter(np.random.default_rng(seed).permutation(np.array(features)).tolist())
    towers = []
    for tower in decision.towers:
        members = tuple(next(order) for _ in tower.features)
        start = pools(sample.strengths(members), tower.vectors_out)
        towers.append(replace(tower, features=members, pools=start))
    return replace(decision, towers=tuple(towers))


def rand_index(a: Ints, b: Ints) -> float:
    """Adjusted Rand index of two partitions; 1 where they are the same (Hubert and Arabie 1985)."""
    table = np.array([[np.sum((a == i) & (b == j)) for j in np.unique(b)] for i in np.unique(a)])

    def pairs(counts: Any) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, one, other = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = one * other / pairs(np.array([len(a)]))
    return (both - expected) / ((one + other) / 2 - expected)


def accuracy(
    report: Report,
    name: str,
    data: Any,
    decisions: Mapping[str, TowerDecision],
    codec: tuple[str, float],
    seeds: int,
    sample: PooledSample,
) -> None:
    """Rows and claims of one data set, whose towers were learned from ``sample``.

    The first of ``decisions`` (by cluster) is judged in all variants.
    """
    torch.set_num_threads(1)
    features = data.model(0).features
    first, *others = decisions.values()
    if data.groups is not None:
        found_groups = numbered(first, features)
        report.claim(f"{name}_planted_groups_rand_index", rand_index(found_groups, data.groups), 0.9, ">=")
    held_out, found = data.held_out(), dict[str, list[float]]()
    for seed in range(seeds):
        batches = list(data.batches(seed))
        models = {
            "flat": data.model(seed),
            "SPTT+TM": towered(data, seed, first),
            "SPTT+TM+codec": towered(data, seed, first, codec),
            "random towers": towered(data, seed, shuffled(first, features, seed, sample)),
        }
        for where, decision in zip(list(decisions)[1:], others, strict=True):
            models[f"SPTT+TM+codec, {where}"] = towered(data, seed, decision, codec)
        for which, module in models.items():
            train(data, module, batches)
            found.setdefault(which, []).append(judged(module, held_out))
        print(
            f"{name}, seed {seed}: "
            + ", ".join(f"{which} {values[-1]:.4f}" for which, values in found.items()),
            file=sys.stderr,
            flush=True,
        )
    _claims(report, name, first, {which: np.array(values) for which, values in found.items()}, data)


def _claims(report: Report, name: str, decision: TowerDecision, area: Mapping[str, Any], data: Any) -> None:
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
    sizes = " + ".join(str(len(tower.features)) for tower in decision.towers)
    report.note(
        f"{name}: towers of {sizes} features, {decision.towers[0].dim} columns to {decision.towers[0].columns_out}, "
        f"energy lost {decision.energy_lost or 0:.1%}, {len(area['flat'])} seeds; SPTT without modules is the flat model; "
        f"one standard error of the flat AUC over seeds: "
        + (f"{error:.4f}" if error is not None else "unknown")
    )
    allowed = max(0.002, error or 0.0)
    for which in area:
        if which.startswith("SPTT"):
            loss = float((area["flat"] - area[which]).mean())
            report.claim(f"{name}_auc_loss_{which.removeprefix('SPTT+')}", loss, allowed, "<=")
    gain = area["SPTT+TM"] - area["random towers"]
    report.note(
        f"{name}: learned over random towers {gain.mean():+.4f} AUC, seed by seed {np.round(gain, 4)}"
    )
    if data.groups is not None:  # elsewhere nobody knows that there is structure to find
        report.claim(f"{name}_learned_over_random_towers", float(gain.mean()), 0.0, ">=")


def _error(values: Any) -> float | None:
    """Standard error of the mean; None of one value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
