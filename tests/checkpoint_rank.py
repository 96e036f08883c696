"""What one rank of the checkpoint tests does: train some steps from a checkpoint or from the start, save."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from codegen.checkpoint import load_checkpoint, save_checkpoint
from codegen.runtime.batches import Batch
from codegen.runtime.gather import whole_weights
from codegen.runtime.launch import Rank
from codegen.torchrec import sharded_model
from ir.plan import Plan
from planner.zoo import build

ROWS, DIM, TABLES, GLOBAL_BATCH = 101, 16, 6, 48


class Summed(nn.Module):
    """A model whose layers do not depend on the number of tables: the features' vectors are added up."""

    def __init__(self, flat: Any) -> None:
        super().__init__()
        self.ebc, self.bottom, self.features = flat.ebc, flat.bottom, flat.features
        self.top = nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Linear(8, 1))
        self.random_batch = flat.random_batch

    def forward(self, dense: torch.Tensor, ids: Any) -> torch.Tensor:
        """Logits (B,)."""
        pooled = self.ebc(ids)
        vectors = [pooled[feature] for feature in self.features]
        return self.top(self.bottom(dense) + torch.stack(vectors).sum(0)).squeeze(-1)  # type: ignore[no-any-return]


def model(grown: Sequence[int] = (), seed: int = 0, tables: int = TABLES, summed: bool = False) -> Any:
    """The same small model on every rank; ``grown``: rows that its first tables have gained."""
    torch.manual_seed(seed)
    more = [*grown, *([0] * tables)]
    made = [
        {"name": f"t{n}", "rows": ROWS + n + more[n], "dim": DIM, "features": [f"f{n}"]}
        for n in range(tables)
    ]
    flat = build("dlrm", tables=made, dense_features=3, bottom=(8, DIM), top=(8, 1), device="cpu").module
    return Summed(flat) if summed else flat


def train(place: Rank, plan: dict[str, Any], folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Load if asked, train up to a step, save if asked; die at a step if asked; return a digest of everything."""
    decided = Plan.from_dict(plan)
    torch.set_num_threads(1)
    # smooth: SiLU and a large eps keep rounding from deciding steps, see examples/train_movielens.py
    sharded = sharded_model(
        decided,
        smooth(model(**settings.get("model", {}))),
        lr=0.05,
        dense_optimizer=settings["dense"],
        eps=1e-3,
    )
    before = Plan.from_dict(settings["before"]) if settings.get("before") else None
    start = load_checkpoint(decided, sharded, folder, before=before) if settings["load"] else 0
    if settings.get("copy_to"):
        save_checkpoint(decided, sharded, settings["copy_to"], start)
    for step in range(start, settings["until"]):
        if place.rank == 1 and step == settings.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        fed = model(**settings.get("model", {}))
        whole = Batch(*_split(fed.random_batch(GLOBAL_BATCH, decided.workload, 1000 + step)))
        part = whole.part(place.rank, place.world_size)
        sharded.zero_grad()
        F.binary_cross_entropy_with_logits(sharded(*part.inputs), part.labels).backward()
        sharded.step()
        if settings["save_every"] and (step + 1) % settings["save_every"] == 0:
            save_checkpoint(decided, sharded, folder, step + 1)
    weights = whole_weights(sharded.module)
    if place.rank == 0:
        torch.save(weights, Path(folder) / settings["weights"])
    return {"start": start}


def smooth(module: Any) -> Any:
    """ReLU replaced by SiLU."""
    for layers in (module.bottom, module.top):
        for index, layer in enumerate(layers):
            if isinstance(layer, torch.nn.ReLU):
                layers[index] = torch.nn.SiLU()
    return module


def _split(values: tuple[Any, ...]) -> tuple[tuple[Any, ...], torch.Tensor]:
    return values[:-1], values[-1]
