"""What one rank of the deduplication tests does: train on deduplicated batches, compare with plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
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
        outputs = [alone(part[0], part[1]) for part in parts]
        worst = max(worst, float((outputs[place.rank] - found).detach().abs().max()))
        optimizer.zero_grad()
        losses = [F.binary_cross_entropy_with_logits(o, p[2]) for o, p in zip(outputs, parts, strict=True)]
        torch.stack(losses).mean().backward()
        optimizer.step()
    weights, state = whole_weights(sharded.module), alone.state_dict()
    return {
        "factor": max(ratio),
        "outputs": worst,
        "weights": max(float((weights[name] - value).abs().max()) for name, value in state.items()),
        "moved": max(float((initial[name] - value).abs().max()) for name, value in state.items()),
    }
