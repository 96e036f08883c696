"""One rank of benchmarks/towers.py: the same steps of the flat model and of its tower forms, taking turns."""

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

import planner
from benchmarks._streams import ClickModel
from benchmarks._towers_data import DIM
from planner.zoo import build

TABLES = 26  # features of Criteo
STREAM = ClickModel(rows=(10_000,) * TABLES, pooling=(1,) * TABLES)
LR = 0.05
WARM_UP = 2


def model(device: str = "cpu") -> Any:
    """The flat DLRM; small perceptrons, so that its own gradients are few beside its vectors."""
    torch.manual_seed(0)
    tables = STREAM.tables(DIM)
    return build(
        "dlrm", tables=tables, dense_features=STREAM.dense, bottom=(64, DIM), top=(128, 64, 1), device=device
    ).module


def ratio(trained: Any) -> float:
    """Bytes of vectors and gradients that this rank sent other ranks under codecs, as float32 and as they travelled."""
    traffic = getattr(getattr(trained, "lookup", None), "traffic", ())
    sent = sum(way.sent for way in traffic)
    return sum(way.raw for way in traffic) / sent if sent else 1.0


def step(trained: Any, batch: tuple[Any, Any, Any]) -> tuple[float, float]:
    """Seconds of one step between two barriers, and its loss on this rank."""
    dense, ids, labels = batch
    dist.barrier()
    started = time.perf_counter()
    trained.zero_grad()
    loss = F.binary_cross_entropy_with_logits(trained(dense, ids), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    trained.step()
    dist.barrier()
    return time.perf_counter() - started, float(loss.detach())


def card_bytes() -> int:
    """Bytes this host's card has sent, seen from inside its namespace."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            return int(counters.split()[8])
    return 0


def main() -> None:
    """Read the settings (JSON file), take turns, and print one JSON line from rank 0."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), settings["batch"]
    batches = [STREAM.samples(size, 100 + 7 * n + rank).batch(slice(None)) for n in range(4)]
    models = {
        name: planner.Plan.from_dict(plan).apply(
            model(), dist.group.WORLD, optimizer="sgd", lr=LR, dense_optimizer="sgd"
        )
        for name, plan in settings["plans"].items()
    }
    found: dict[str, dict[str, list[float]]] = {n: {"step": [], "sent": [], "loss": []} for n in models}
    for turn in range(settings["turns"]):
        for name, trained in models.items():
            # the first steps allocate; later the first step after another model's refills the caches
            for n in range(settings["steps"] + (1 if turn else WARM_UP)):
                before = card_bytes()
                seconds, loss = step(trained, batches[n % len(batches)])
                found[name]["loss"].append(loss)
                if n >= (1 if turn else WARM_UP):
                    found[name]["step"].append(seconds)
                    found[name]["sent"].append(card_bytes() - before)
    answer = {}
    for name, trained in models.items():
        sent = torch.tensor(statistics.median(found[name]["sent"]), dtype=torch.float64)
        dist.all_reduce(sent, op=dist.ReduceOp.MAX)  # of the busiest host
        losses = torch.tensor(found[name]["loss"], dtype=torch.float64)
        dist.all_reduce(losses)
        answer[name] = {
            "step": statistics.median(found[name]["step"]),
            "sent": float(sent),
            "loss": (losses / dist.get_world_size()).tolist(),
            "ratio": ratio(trained),
        }
    if rank == 0:
        print("RESULT " + json.dumps(answer), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
