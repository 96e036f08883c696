"""One rank of benchmarks/dedup.py: the same training steps on plain and on deduplicated batches."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from codegen.dedup import deduplicator
from codegen.runtime.dedup.sessions import session_batches
from codegen.torchrec import sharded_model
from ir.plan import Plan
from planner.zoo import build

ROWS, DIM = 20_000, 32
USER, ITEM = 20, 6  # features; user features hold lists, item features one id
HOTNESS = 8  # ids of a user feature, mean
STAY = {"user": 0.97, "item": 0.05}


def features() -> list[str]:
    """User features, then item features."""
    return [f"user_{n}" for n in range(USER)] + [f"item_{n}" for n in range(ITEM)]


def model(device: str = "cpu") -> Any:
    """A DLRM over all features."""
    torch.manual_seed(0)
    tables = [{"name": f"t_{f}", "rows": ROWS, "dim": DIM, "features": [f]} for f in features()]
    return build("dlrm", tables=tables, dense_features=8, bottom=(64, DIM), top=(64, 1), device=device).module


class Stream:
    """A log of sessions, mean 16.5 samples; user features change together and rarely, item features often."""

    def __init__(self, samples: int, per_session: float, seed: int) -> None:
        random = np.random.default_rng(seed)
        sizes = random.geometric(1 / per_session, size=int(samples / per_session * 1.3) + 8)
        self.sessions = np.repeat(np.arange(len(sizes)), sizes)[:samples]
        first = np.diff(self.sessions, prepend=-1) != 0
        self.versions = {}
        user = np.cumsum(first | (random.random(samples) > STAY["user"])) - 1
        for name in features():
            if name.startswith("user"):
                self.versions[name] = user
            else:
                self.versions[name] = np.cumsum(first | (random.random(samples) > STAY["item"])) - 1
        self.lengths = {
            name: random.poisson(HOTNESS, int(v[-1]) + 1)
            if name.startswith("user")
            else np.ones(int(v[-1]) + 1, int)
            for name, v in self.versions.items()
        }
        self.ids = {name: random.integers(0, ROWS, int(n.sum())) for name, n in self.lengths.items()}
        self.starts = {name: np.cumsum(n) - n for name, n in self.lengths.items()}
        self.dense = random.standard_normal((samples, 8)).astype(np.float32)
        self.labels = random.integers(0, 2, samples).astype(np.float32)

    def batch(self, picked: np.ndarray) -> tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]:
        """Dense features, ids and labels of some samples."""
        values, lengths = [], []
        for name, versions in self.versions.items():
            row = versions[picked]
            count = self.lengths[name][row]
            within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            values.append(self.ids[name][np.repeat(self.starts[name][row], count) + within])
            lengths.append(count)
        jagged = KeyedJaggedTensor(
            keys=list(self.versions),
            values=torch.from_numpy(np.concatenate(values)),
            lengths=torch.from_numpy(np.concatenate(lengths)).int(),
        )
        return torch.from_numpy(self.dense[picked]), jagged, torch.from_numpy(self.labels[picked])


def main() -> None:
    """Read the settings (JSON file), train, and print one JSON line from rank 0."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    plan = Plan.from_dict(settings["plan"])
    stream = Stream(settings["batch"] * (settings["steps"] + 2), settings["per_session"], seed=7 + rank)
    picked = list(session_batches(stream.sessions, settings["batch"], seed=0))
    batches = [stream.batch(p) for p in picked[: settings["steps"] + 2]]
    made = [ids for _, ids, _ in batches]
    if settings["dedup"]:
        deduplicate = deduplicator(plan)
        made = [deduplicate(ids) for ids in made]
    trained = sharded_model(plan, model(), optimizer="sgd", lr=0.05, dense_optimizer="sgd")
    seconds, losses = [], []
    sent = 0
    for step, ((dense, _, labels), ids) in enumerate(zip(batches, made, strict=True)):
        dist.barrier()
        if step == 2:
            sent = _sent()  # the first two steps allocate
        started = time.perf_counter()
        trained.zero_grad()
        loss = F.binary_cross_entropy_with_logits(trained(dense, ids), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        trained.step()
        dist.barrier()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
    sent = _sent() - sent
    total = torch.tensor([sum(ids.values().numel() for ids in made), np.mean(losses)], dtype=torch.float64)
    dist.all_reduce(total)
    if rank == 0:
        answer = {
            "step": statistics.median(seconds[2:]),
            "bytes": sent / settings["steps"],
            "lookups": float(total[0]) / len(batches),
            "loss": float(total[1]) / world,
        }
        print("RESULT " + json.dumps(answer), flush=True)
    dist.destroy_process_group()


def _sent() -> int:
    """Bytes this host's card has sent, seen from inside its namespace."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            return int(counters.split()[8])
    return 0


if __name__ == "__main__":
    main()
