"""What one rank of the deduplication tests does: train on deduplicated batches, compare with plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import planner
from codegen.dedup import deduplicator
from codegen.runtime.gather import whole_weights
from codegen.runtime.launch import Rank
from codegen.torchrec import sharded_model
from ir.constraints import Constraints, TableConstraint
from ir.session_stats import sessions_from_batches
from planner.zoo import build

FEATURES, ROWS, DIM, BATCH, STEPS = 4, 200, 16, 24, 3
SETTINGS = {"optimizer": "sgd", "lr": 0.5, "dense_optimizer": "sgd", "dense_lr": 0.5}


def model() -> Any:
    """The same small DLRM on every rank."""
    torch.manual_seed(0)
    tables = [{"name": f"t{n}", "rows": ROWS, "dim": DIM, "features": [f"f{n}"]} for n in range(FEATURES)]
    return build("dlrm", tables=tables, dense_features=3, bottom=(16, DIM), top=(16, 1), device="cpu").module


def batch(seed: int) -> tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor, np.ndarray]:
    """Sessions of 6 samples; features 0 and 1 change together and rarely, 2 rarely, 3 always; empty bags too."""
    random = np.random.default_rng(seed)
    sessions = np.arange(BATCH) // 6
    changed = random.random(BATCH) < 0.2
    changed[::6] = True
    version = {0: np.cumsum(changed), 1: np.cumsum(changed), 2: sessions, 3: np.arange(BATCH)}
    values, lengths = [], []
    for feature, number in version.items():
        rows = [random.integers(0, ROWS, random.integers(0, 4)) for _ in range(BATCH + 1)]
        picked = [rows[v] for v in number]
        values += picked
        lengths += [len(ids) for ids in picked]
        assert feature in version
    jagged = KeyedJaggedTensor(
        keys=[f"f{n}" for n in range(FEATURES)],
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.tensor(lengths, dtype=torch.int32),
    )
    dense = torch.from_numpy(random.standard_normal((BATCH, 3)).astype(np.float32))
    labels = torch.from_numpy(random.integers(0, 2, BATCH).astype(np.float32))
    return dense, jagged, labels, sessions


class Ranker(nn.Module):
    """Self-attention over a history, an MLP over it and a profile, then an item: three features of two groups."""

    def __init__(self) -> None:
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

        super().__init__()
        self.histories = EmbeddingCollection(
            tables=[
                EmbeddingConfig(name="h", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["history"])
            ]
        )
        self.bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=name[0], num_embeddings=ROWS, embedding_dim=DIM, feature_names=[name])
                for name in ("profile", "item")
            ]
        )
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.user = nn.Sequential(nn.Linear(2 * DIM, 32), nn.ReLU(), nn.Linear(32, DIM))
        self.top = nn.Linear(2 * DIM + 3, 1)
        self.rows_seen: list[int] = []
        self.attention.register_forward_hook(lambda _m, i, _o: self.rows_seen.append(len(i[0])))

    def forward(self, dense: torch.Tensor, ids: Any) -> torch.Tensor:
        sequence = self.histories(ids)["history"].to_padded_dense(4)
        attended = self.attention(sequence, sequence, sequence)[0].sum(1)
        pooled = self.bags(ids)
        user = self.user(torch.cat([attended, pooled["profile"]], 1))
        return self.top(torch.cat([user, pooled["item"], dense], 1)).squeeze(-1)

    def example_inputs(self, samples: int) -> tuple[torch.Tensor, KeyedJaggedTensor]:
        return torch.zeros(samples, 3), KeyedJaggedTensor(
            keys=["history", "profile", "item"],
            values=torch.zeros(3 * samples, dtype=torch.int64),
            lengths=torch.ones(3 * samples, dtype=torch.int32),
        )


def ranker() -> Ranker:
    """The same on every rank."""
    torch.manual_seed(1)
    return Ranker()


def compute(place: Rank, plan: dict[str, Any], first: bool) -> dict[str, float]:
    """Steps of a plan that computes on distinct rows, beside the unsharded model; ``first``: deduplicate in the loader."""
    decided = planner.Plan.from_dict(plan)
    sharded, alone = decided.apply(ranker(), torch.distributed.group.WORLD, **SETTINGS), ranker()
    optimizer = torch.optim.SGD(alone.parameters(), lr=SETTINGS["lr"])  # type: ignore[arg-type]
    worst, seen = 0.0, 0
    for step in range(STEPS):
        parts = [_renamed(batch(100 * step + rank)) for rank in range(place.world_size)]
        dense, jagged, labels, _ = parts[place.rank]
        found = sharded(dense, deduplicator(decided)(jagged) if first else jagged)
        sharded.zero_grad()
        F.binary_cross_entropy_with_logits(found, labels).backward()
        sharded.step()
        whole = _step_alone(alone, optimizer, parts)
        worst = max(worst, float((whole[place.rank] - found).detach().abs().max()))
        both = zip(jagged["history"].to_dense(), jagged["profile"].to_dense(), strict=True)
        seen = max(seen, len({(tuple(h.tolist()), tuple(p.tolist())) for h, p in both}))
    weights, state = whole_weights(sharded.module), alone.state_dict()
    inside = sharded.module.module.get_submodule("attention")
    return {
        "outputs": worst,
        "weights": max(float((weights[name] - value).abs().max()) for name, value in state.items()),
        "most_distinct": seen,
        "attended": max(_rows_seen(inside)),
    }


def _step_alone(alone: Any, optimizer: Any, parts: list[Any]) -> list[Any]:
    """One step of the unsharded model on the batches of all ranks; what it said of each."""
    outputs = [alone(part[0], part[1]) for part in parts]
    optimizer.zero_grad()
    losses = [F.binary_cross_entropy_with_logits(o, p[2]) for o, p in zip(outputs, parts, strict=True)]
    torch.stack(losses).mean().backward()
    optimizer.step()
    return outputs


def _rows_seen(module: Any) -> list[int]:
    """What the hook of :class:`Ranker` noted: hooks travel with the module, wherever it is."""
    (hook,) = module._forward_hooks.values()
    found: list[int] = hook.__closure__[0].cell_contents.rows_seen
    return found


def _renamed(made: Any) -> Any:
    dense, jagged, labels, sessions = made
    split = jagged.to_dict()
    names = {"history": "f0", "profile": "f1", "item": "f3"}
    return (
        dense,
        KeyedJaggedTensor(
            keys=list(names),
            values=torch.cat([split[old].values() for old in names.values()]),
            lengths=torch.cat([split[old].lengths() for old in names.values()]),
        ),
        labels,
        sessions,
    )


def train(place: Rank, types: list[Any]) -> dict[str, float]:
    """Three steps on this rank's sessions; every rank also trains the whole model alone."""
    mine = [batch(100 * step + place.rank) for step in range(STEPS)]
    stats = sessions_from_batches([(b[1], b[3]) for b in mine])
    workload = planner.Workload(global_batch=BATCH * place.world_size, optimizer="sgd", sessions=stats)
    constraints = Constraints(min_column_width=8, tables={"*": TableConstraint(sharding_types=tuple(types))})
    shared = [None]
    if place.rank == 0:  # ranks measure different sessions; one plan for all
        plan = planner.compile(model(), f"local-{place.world_size}", workload, constraints=constraints)
        shared = [plan.to_dict()]
    torch.distributed.broadcast_object_list(shared)
    plan = planner.Plan.from_dict(shared[0])
    section = plan.decisions.dedup
    assert section is not None
    # tiny batches: the launch of one kernel is worth more than they save, so the groups are taken by hand
    groups = tuple(replace(g, chosen=g.factor > 1.01) for g in section.groups)
    plan = replace(plan, decisions=replace(plan.decisions, dedup=replace(section, groups=groups)))
    deduplicate = deduplicator(plan)

    sharded, alone = sharded_model(plan, model(), **SETTINGS), model()
    initial = {name: value.detach().clone() for name, value in alone.state_dict().items()}
    optimizer = torch.optim.SGD(alone.parameters(), lr=SETTINGS["lr"])  # type: ignore[arg-type]
    worst, ratio = 0.0, []
    for step in range(STEPS):
        dense, jagged, labels, _ = mine[step]
        compact = deduplicate(jagged)
        ratio.append(jagged.values().numel() / compact.values().numel())
        found = sharded(dense, compact)
        sharded.zero_grad()
        F.binary_cross_entropy_with_logits(found, labels).backward()
        sharded.step()

        parts = [batch(100 * step + rank) for rank in range(place.world_size)]
        whole = _step_alone(alone, optimizer, parts)
        worst = max(worst, float((whole[place.rank] - found).detach().abs().max()))
    weights, state = whole_weights(sharded.module), alone.state_dict()
    return {
        "factor": max(ratio),
        "outputs": worst,
        "weights": max(float((weights[name] - value).abs().max()) for name, value in state.items()),
        "moved": max(float((initial[name] - value).abs().max()) for name, value in state.items()),
    }
