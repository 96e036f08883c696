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
from benchmarks._towers_link import Probe, slow_link
from planner.zoo import build

TABLES = 26  # features of Criteo
STREAM = ClickModel(rows=(10_000,) * TABLES, pooling=(1,) * TABLES)
LR = 0.05
WARM_UP = 2
FLAT = "flat TorchRec"  # the variant whose step says what the link takes
LINK = "LINK "  # before the number and the bytes/s of a request for other links


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


class Links:
    """Asks the launcher for other links; every rank calls it."""

    def __init__(self, answers: Path) -> None:
        self.answers, self.asked = answers, 0

    def set(self, speed: float) -> None:
        """Cards of ``speed`` bytes/s from now on."""
        self.asked += 1
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"{LINK}{self.asked} {speed:.0f}", flush=True)
        while not (self.answers / str(self.asked)).exists():
            time.sleep(0.01)
        dist.barrier()


def timed(trained: Any, batches: Any, warm: int, steps: int) -> list[dict[str, float]]:
    """Seconds, loss and bytes on the card of ``steps`` steps after ``warm`` others, whose loss alone is kept."""
    rows = []
    for n in range(warm + steps):
        before = card_bytes()
        seconds, loss = step(trained, batches[n % len(batches)])
        rows.append({"loss": loss} | ({"step": seconds, "sent": card_bytes() - before} if n >= warm else {}))
    return rows


def median(rows: list[dict[str, float]], name: str) -> float:
    """Of what was kept, on rank 0, for all ranks."""
    found = torch.tensor(statistics.median(row[name] for row in rows if name in row), dtype=torch.float64)
    dist.broadcast(found, 0)
    return float(found)


def search(trained: Any, batches: Any, links: Links, settings: dict[str, Any]) -> dict[str, Any]:
    """The speeds at which the link takes the shares asked for; every probe measures the step on fast links beside it."""
    seen: list[Probe] = []

    def share_at(speed: float) -> float:
        rows: dict[float, list[dict[str, float]]] = {settings["fast"]: [], speed: []}
        for _ in range(settings["turns"]):
            for link, found in rows.items():
                links.set(link)
                found += timed(trained, batches, WARM_UP, settings["steps"])
        return 1 - median(rows[settings["fast"]], "step") / median(rows[speed], "step")

    speeds = [slow_link(share, seen, share_at) for share in settings["shares"]]
    return {"speeds": speeds, "probes": [(probe.speed, probe.share) for probe in seen]}


def variants(
    models: dict[str, Any], twin: Any, batches: Any, links: Links, settings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What every model measured, taking turns; the step on fast links of the flat one's ``twin`` too."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    fast: list[dict[str, float]] = []
    for turn in range(settings["turns"]):
        for name, trained in models.items():
            # the first steps allocate; later the first step after another model's refills the caches
            found[name] += timed(trained, batches, 1 if turn else WARM_UP, settings["steps"])
        links.set(settings["fast"])
        fast += timed(twin, batches, 1, settings["steps"])
        links.set(settings["slow"])
    answer = {}
    for name, trained in models.items():
        sent = torch.tensor(
            statistics.median(row["sent"] for row in found[name] if "sent" in row), dtype=torch.float64
        )
        dist.all_reduce(sent, op=dist.ReduceOp.MAX)  # of the busiest host
        losses = torch.tensor([row["loss"] for row in found[name]], dtype=torch.float64)
        dist.all_reduce(losses)
        answer[name] = {
            "step": median(found[name], "step"),
            "sent": float(sent),
            "loss": (losses / dist.get_world_size()).tolist(),
            "ratio": ratio(trained),
        }
    answer[FLAT]["fast"] = median(fast, "step")
    return answer


def main() -> None:
    """Read the settings (JSON file), search speeds or time all plans, and print one JSON line from rank 0."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), settings["batch"]
    batches = [STREAM.samples(size, 100 + 7 * n + rank).batch(slice(None)) for n in range(4)]
    links = Links(Path(settings["answers"]))

    def applied(plan: dict[str, Any]) -> Any:
        made = planner.Plan.from_dict(plan)
        return made.apply(model(), dist.group.WORLD, optimizer="sgd", lr=LR, dense_optimizer="sgd")

    models = {name: applied(plan) for name, plan in settings["plans"].items()}
    if "shares" in settings:
        answer = search(models[FLAT], batches, links, settings)
    else:
        answer = variants(models, applied(settings["plans"][FLAT]), batches, links, settings)
    if rank == 0:
        print("RESULT " + json.dumps(answer), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
