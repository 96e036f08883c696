"""One rank of benchmarks/cluster_fidelity.py: the same steps under each plan, plans taking turns."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.nn import functional as F

from benchmarks._streams import ClickModel
from codegen.compressed import compressed_model, runs_exchange
from codegen.torchrec import sharded_model
from ir.plan import Plan
from planner.zoo import build

DIM = 64
STREAM = ClickModel(rows=(8_000,) * 5 + (5_000, 1_000, 200), pooling=(4, 2, 1, 1, 1, 1, 1, 1))
WARM_UP = 2


def model(device: str = "cpu") -> Any:
    """The DLRM whose plans are compared."""
    torch.manual_seed(0)
    tables = STREAM.tables(DIM)
    return build(
        "dlrm", tables=tables, dense_features=STREAM.dense, bottom=(128, DIM), top=(128, 64, 1), device=device
    ).module


def prepared(plan: Plan) -> Any:
    """The model under a plan, by the engine that the plan asks for."""
    if runs_exchange(plan):
        return compressed_model(plan, model(), optimizer="sgd", lr=0.05, dense_optimizer="sgd")
    return sharded_model(plan, model(), optimizer="sgd", lr=0.05, dense_optimizer="sgd")


def step(trained: Any, batch: tuple[Any, Any, Any]) -> float:
    """Seconds of one step between two barriers."""
    dense, ids, labels = batch
    dist.barrier()
    started = time.perf_counter()
    trained.zero_grad()
    F.binary_cross_entropy_with_logits(trained(dense, ids), labels).backward()  # type: ignore[no-untyped-call]
    trained.step()
    dist.barrier()
    return time.perf_counter() - started


def as_rank_0(count: int) -> int:
    """The number that rank 0 has."""
    agreed = torch.tensor(count)
    dist.broadcast(agreed, 0)
    return int(agreed)


def main() -> None:
    """Read the settings (JSON file), take turns, and print one JSON line from rank 0."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    size = settings["batch"]
    batches = [STREAM.samples(size, 100 + 7 * n + rank).batch(slice(None)) for n in range(4)]
    models = {name: prepared(Plan.from_dict(plan)) for name, plan in settings["plans"].items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    turn, turns = 0, settings["turns"]
    while turn < turns:
        started = time.perf_counter()
        for name, trained in models.items():
            # the first step after another plan's refills the caches
            times = [step(trained, batches[n % 4]) for n in range(settings["steps"] + 1)]
            seconds[name] += times[1:] if turn else times[WARM_UP:]
        turn += 1
        if turn == 1:
            turns = max(turns, as_rank_0(int(settings["span"] / (time.perf_counter() - started))))
    if rank == 0:
        # what disturbs a step on a shared machine only adds to it
        answer = {
            name: {"step": statistics.quantiles(times)[0], "steps": len(times)}
            for name, times in seconds.items()
        }
        print("RESULT " + json.dumps(answer), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
