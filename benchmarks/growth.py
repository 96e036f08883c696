"""Alternate growth and pruning on MovieLens-100K: quality at equal FLOP, and step times against the plan's.

    python benchmarks/growth.py

A DLRM with a wide top MLP, trained for the same number of batches in four ways: dense; alternating growth
and pruning under a plan; pruned once after the same warm-up and left so, with as many units as make the
training FLOP equal to the alternating one's; and dense with fewer batches, FLOP equal again. The first
claim is quality against dense, the second against one-shot pruning; means over seeds with the same batches.
Then each phase's step is timed on one thread, as a fraction of the full-size step, and compared with what
the plan predicts from constants that ``planner calibrate``'s measurement finds in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a file: make the project importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn import functional as F

import planner
from benchmarks._report import Report
from codegen.runtime.growth.phases import PhasedTraining
from codegen.runtime.growth.resize import Resizer
from cost_models.growth import prunable_layers, shrunk
from examples import _movielens as movielens
from ir.capture import capture
from ir.growth import Growth, GrowthRequest, kept_units
from ir.workload import Workload
from planner.zoo import build

BATCH, RATE, DIM = 512, 1e-3, 16
TABLE_DECAY, DENSE_DECAY = 1e-3, 1e-5  # L2 penalties
MEAN_OF = 100  # steps that the running mean of the weights looks back
LATE = 3  # how much later weights count more where there are fewer: eta of Shamir and Zhang (ICML 2013), section 4
TOP = (512, 512, 256, 1)
TIMED_TOP = (2048, 2048, 1024, 1)  # wide enough that GEMMs, not calls, take the time
TIMED_BATCH = 1024
SPARSITY, FINAL = 0.5, 0.4
TIMED_SPARSITY = 0.75  # far apart, for times


def model_of(data: movielens.Data, top: tuple[int, ...]) -> Any:
    """The DLRM over the MovieLens features, seeded by torch's global state."""
    tables = [
        {"name": f"t_{name}", "rows": count, "dim": DIM, "features": [name]}
        for name, count in data.rows.items()
    ]
    dense = data.dense.shape[1]
    return build("dlrm", tables=tables, dense_features=dense, bottom=(64, DIM), top=top, device="cpu").module


def plan_of(
    data: movielens.Data,
    top: tuple[int, ...],
    steps: int,
    batch: int,
    topology: Any = "local-1",
    sparsity: float = SPARSITY,
    **more: Any,
) -> Any:
    """The plan with its growth section."""
    asked = GrowthRequest(steps=steps, sparsity=sparsity, regrow=0.5, cycles=2, warmup=0.1, final=FINAL)
    return planner.compile(
        model_of(data, top),
        topology,
        Workload(batch, optimizer="adam"),
        constraints=planner.Constraints(growth=asked),
        time_limit=2.0,
        **more,
    )


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: tuple[Any, Any, Any]) -> None:
    """Forward, backward, update."""
    dense, ids, labels = batch
    loss = F.binary_cross_entropy_with_logits(model(dense, ids), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class RunningMean:
    """Of the weights of a model since :meth:`restart`, over the last :data:`MEAN_OF` steps or so."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.restart()

    def restart(self) -> None:
        """Forget: the weights have other shapes now."""
        self.steps, self.mean = 0, [p.detach().clone() for p in self.model.parameters()]

    def step(self) -> None:
        """Take in the weights as they are."""
        self.steps += 1
        with torch.no_grad():
            share = max(1 / MEAN_OF, (LATE + 1) / (self.steps + LATE))
            torch._foreach_lerp_(self.mean, list(self.model.parameters()), share)

    def apply(self) -> None:
        """Give the model the mean."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), self.mean)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """Adam with the penalties."""
    tables = [p for name, p in model.named_parameters() if name.startswith("ebc.")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("ebc.")]
    groups = [(tables, TABLE_DECAY), (rest, DENSE_DECAY)]
    return torch.optim.Adam([{"params": p, "weight_decay": decay} for p, decay in groups], lr=RATE)


def train(
    data: movielens.Data, way: str, growth: Growth, shot: tuple[int, ...], seed: int
) -> dict[str, float]:
    """Log-loss and AUC on the held-out ratings after training in one way."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    model = model_of(data, TOP)
    optimizer, mean = optimizer_of(model), RunningMean(model)
    phases = PhasedTraining(growth, model, optimizer) if way == "alternating" else None
    resizer = Resizer(model, growth.layers, optimizer) if way == "one-shot" else None
    steps = round(growth.steps * (1 - growth.flop_saving)) if way == "dense, fewer steps" else growth.steps
    order: list[int] = []
    for step in range(steps):
        if phases is not None and phases.begin_step(step):
            mean.restart()
        if resizer is not None and step == growth.phases[0].steps:
            resizer.resize(shot)
            mean.restart()
        if len(order) < BATCH:
            order = random.permutation(data.train).tolist()
        train_step(model, optimizer, data.batch(np.asarray(order[:BATCH])))
        del order[:BATCH]
        mean.step()
    mean.apply()
    held_out = np.arange(data.train, len(data))
    with torch.no_grad():
        logits = torch.cat([model(*data.batch(part)[:2]) for part in np.array_split(held_out, 4)])
    labels = torch.from_numpy(data.labels[held_out])
    return {
        "log_loss": float(F.binary_cross_entropy_with_logits(logits.double(), labels.double())),
        "auc": movielens.auc(logits.numpy(), data.labels[held_out]),
    }


def equal_flop(data: movielens.Data, growth: Growth) -> tuple[tuple[int, ...], float]:
    """Units of the one-shot model whose training FLOP come nearest to the alternating one's, and their ratio."""
    model = capture(model_of(data, TOP))
    warm, whole = growth.phases[0].steps, model.dense_flops
    wanted = (1 - growth.flop_saving) * growth.steps * whole

    def total(kept: tuple[int, ...]) -> float:
        return warm * whole + (growth.steps - warm) * shrunk(model, growth.layers, kept).dense_flops

    options = {
        tuple(kept_units(layer.units, sparsity / 500, 4) for layer in growth.layers)
        for sparsity in range(1, 500)
    }
    best = min(options, key=lambda kept: abs(total(kept) - wanted))
    return best, total(best) / wanted


def timings(data: movielens.Data, repeats: int) -> list[dict[str, Any]]:
    """Measured and predicted step of each distinct phase, relative to the full-size step."""
    from planner.calibrate import calibration_of, measure_here, topology_of

    record = measure_here(1, repeats=3)
    machine = topology_of(record, "here-1")
    calibration = calibration_of(record, machine)
    plan = plan_of(data, TIMED_TOP, 1000, TIMED_BATCH, machine, TIMED_SPARSITY, calibration=calibration)
    growth = plan.decisions.growth
    torch.manual_seed(0)
    model = model_of(data, TIMED_TOP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    resizer = Resizer(model, growth.layers, optimizer)
    batch = data.batch(np.arange(TIMED_BATCH))
    kinds = list({phase.kept: phase for phase in growth.phases}.values())
    seconds: dict[tuple[int, ...], list[float]] = {phase.kept: [] for phase in kinds}
    for _ in range(repeats):  # in turn, so that a busy spell of the machine meets every phase
        for phase in kinds:
            resizer.resize(phase.kept)
            train_step(model, optimizer, batch)
            for _ in range(3):
                start = time.process_time()  # one thread: CPU time does not see who else is busy
                train_step(model, optimizer, batch)
                seconds[phase.kept].append(time.process_time() - start)
    whole = growth.phases[-1]
    base = min(seconds[whole.kept])
    return [
        {
            "way": f"step, {phase.kind}",
            "flop": phase.flops / whole.flops,
            "measured_ms": 1e3 * min(seconds[phase.kept]),
            "predicted_ms": 1e3 * phase.step_seconds,
            "measured": min(seconds[phase.kept]) / base,
            "predicted": phase.step_seconds / whole.step_seconds,
        }
        for phase in kinds
    ]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, epochs = (1, 1) if options.quick else (options.seeds, options.epochs)
    data = movielens.load()
    report = Report("growth")
    growth = plan_of(data, TOP, epochs * (data.train // BATCH), BATCH).decisions.growth
    assert growth is not None
    assert growth.layers == prunable_layers(capture(model_of(data, TOP)))
    shot, ratio = equal_flop(data, growth)
    found: dict[str, list[dict[str, float]]] = {}
    for way in ("dense", "alternating", "one-shot", "dense, fewer steps"):
        found[way] = [train(data, way, growth, shot, seed) for seed in range(seeds)]
        losses = [run["log_loss"] for run in found[way]]
        share = {"dense": 1.0, "one-shot": ratio * (1 - growth.flop_saving)}.get(way, 1 - growth.flop_saving)
        report.row(
            way=way,
            flop=share,
            log_loss=statistics.mean(losses),
            spread=statistics.stdev(losses) if seeds > 1 else 0.0,
            auc=statistics.mean(run["auc"] for run in found[way]),
        )

    def mean(way: str, what: str) -> float:
        return statistics.mean(run[what] for run in found[way])

    report.claim(
        "log_loss_over_dense", mean("alternating", "log_loss") / mean("dense", "log_loss"), 1.005, "<="
    )
    report.claim(
        "log_loss_over_one_shot", mean("alternating", "log_loss") / mean("one-shot", "log_loss"), 1.0, "<="
    )
    report.claim("flop_saved", growth.flop_saving, 0.25, ">=")
    report.claim("one_shot_flop_ratio", abs(ratio - 1), 0.01, "<=")
    timed = timings(data, 3 if options.quick else 10)
    for row in timed:
        report.row(**row)
    worst = max(abs(row["predicted"] / row["measured"] - 1) for row in timed)
    report.claim("relative_step_time_error", worst, 0.25, "<=")
    report.note(
        f"{seeds} seeds, {growth.steps} steps of {BATCH}; phases "
        + ", ".join(f"{p.kind} {p.steps}" for p in growth.phases)
        + f"; hidden layers {[layer.units for layer in growth.layers]}, one-shot keeps {list(shot)}"
    )
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
