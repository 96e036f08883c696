"""One rank of benchmarks/compressed_training.py: train under each variant, time steps, score held-out samples."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from benchmarks._streams import ClickModel
from codegen.compressed import compressed_model, runs_exchange
from codegen.runtime.gather import gather_rows
from codegen.torchrec import sharded_model
from examples import _movielens as movielens
from ir.plan import Plan
from planner.zoo import build
from planner.zoo.tables import zoo_tables

DIM = 16
ROW_CAP = 10_000  # of a Criteo table: a MovieLens-sized model, at the published cardinalities below it
EPS = 1e-3  # of Adagrad; larger than rounding (examples/train_movielens.py)
WARM_UP = 3


class MovieLens:
    """The ratings of MovieLens-100K: one pass and a half over 90 %, scored on each user's latest 10 %."""

    def __init__(self, seed: int) -> None:
        self.data, self.seed = movielens.load(), seed

    def model(self, device: str = "cpu") -> Any:
        """The DLRM of examples/train_movielens.py."""
        torch.manual_seed(self.seed)
        return movielens.build(self.data.rows, self.data.dense.shape[1], device)

    def batches(self, size: int, steps: int) -> Iterator[np.ndarray]:
        """Samples of each global batch, epoch by epoch."""
        random = np.random.default_rng(self.seed)
        while steps > 0:
            order = random.permutation(self.data.train)
            for start in range(0, len(order) - size + 1, size):
                if steps > 0:
                    yield order[start : start + size]
                steps -= 1

    def held_out(self) -> np.ndarray:
        """Samples that are scored."""
        return np.arange(self.data.train, len(self.data))

    def batch(self, picked: np.ndarray) -> tuple[Any, Any, Any]:
        """Dense features, ids, labels."""
        return self.data.batch(picked)


class Criteo:
    """A stream of Criteo's shape: 26 features of Kaggle's cardinalities (capped), 13 dense, Zipf ids."""

    def __init__(self, seed: int) -> None:
        records, _ = zoo_tables(
            "criteo_kaggle.json", dim=DIM, row_cap=ROW_CAP, global_batch=4096, optimizer="adagrad"
        )
        self.seed = seed
        rows = tuple(table.rows for table in records)
        self.stream = ClickModel(rows=rows, pooling=(1,) * len(rows))
        self.samples: Any = None
        self.test = 20_000

    def model(self, device: str = "cpu") -> Any:
        """A DLRM of two small perceptrons."""
        torch.manual_seed(self.seed)
        return build(
            "dlrm",
            tables=self.stream.tables(DIM),
            dense_features=self.stream.dense,
            bottom=(64, DIM),
            top=(64, 32, 1),
            device=device,
        ).module

    def batches(self, size: int, steps: int) -> Iterator[np.ndarray]:
        """No sample is seen twice."""
        if self.samples is None:  # the same for every variant
            self.samples = self.stream.samples(size * steps + self.test, self.seed)
        for step in range(steps):
            yield np.arange(self.test + step * size, self.test + (step + 1) * size)

    def held_out(self) -> np.ndarray:
        """Samples that are scored."""
        return np.arange(self.test)

    def batch(self, picked: np.ndarray) -> tuple[Any, Any, Any]:
        """Dense features, ids, labels."""
        found: tuple[Any, Any, Any] = self.samples.batch(picked)
        return found


DATA = {"movielens": MovieLens, "criteo": Criteo}


def loss_of(model: Any, batch: tuple[Any, Any, Any]) -> Any:
    """Mean logistic loss."""
    dense, ids, labels = batch
    return F.binary_cross_entropy_with_logits(model(dense, ids), labels)


def prepared(plan: Plan, module: Any, lr: float) -> Any:
    """The module under a plan, by the engine the plan asks for."""
    if runs_exchange(plan):
        return compressed_model(plan, module, optimizer="adagrad", lr=lr, dense_optimizer="adagrad", eps=EPS)
    return sharded_model(plan, module, optimizer="adagrad", lr=lr, dense_optimizer="adagrad", eps=EPS)


def trained(plan: Plan, data: Any, settings: dict[str, Any]) -> dict[str, float]:
    """Train one seed under one plan; median step seconds and the AUC."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = prepared(plan, data.model(), settings["lr"])
    seconds = []
    for picked in data.batches(settings["batch"], settings["steps"]):
        batch = data.batch(np.split(picked, world)[rank])
        dist.barrier()
        started = time.perf_counter()
        model.zero_grad()
        loss_of(model, batch).backward()
        model.step()
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    if not settings["score"]:
        return {"step": statistics.median(seconds[WARM_UP:])}
    held_out = data.held_out()
    held_out = held_out[: len(held_out) // world * world]
    with torch.no_grad():
        dense, ids, labels = data.batch(np.split(held_out, world)[rank])
        scores, truth = gather_rows(model(dense, ids)), gather_rows(labels)
    area = movielens.auc(scores.double().numpy(), truth.numpy())
    return {"step": statistics.median(seconds[WARM_UP:]), "auc": area}


def main() -> None:
    """Read the settings (JSON file), train every variant for every seed, and print one JSON line from rank 0."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    plans = {name: Plan.from_dict(plan) for name, plan in settings["plans"].items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
    for seed in settings["seeds"]:
        data = DATA[settings["data"]](seed)
        for name, plan in plans.items():
            found[name].append(trained(plan, data, settings))
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
