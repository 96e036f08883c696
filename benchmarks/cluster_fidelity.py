"""Predicted against measured step time of twelve plans, on the emulated cluster at three link speeds.

    python benchmarks/cluster_fidelity.py [--quick] [--json] [--inter 150Mbps,400Mbps,1Gbps]

At each speed the cluster (2 hosts x 2 ranks) is calibrated once with `planner calibrate`; then a DLRM is compiled
under constraints that force twelve kinds of plan, and all of them train in turns on the same batches. The lower
quartile of a plan's steps counts, as in the calibration: what disturbs a shared machine only adds to a step.
Nothing is fitted on the steps that are judged. The plan the compiler prefers is the one with the least predicted
step time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import planner
from benchmarks._cluster_run import calibrate, run_worker
from benchmarks._fidelity_worker import STREAM, model
from benchmarks._report import Report
from benchmarks.cluster import Cluster, ClusterUnavailable
from cost_models.calibration import Calibration
from ir.compression import CompressionRequest
from ir.constraints import Constraints, ShardingType, TableConstraint
from ir.topology import Topology
from ir.workload import Workload

HOSTS, RANKS = 2, 2
BATCH = 512  # samples a rank
SPEEDS = ("150Mbps", "400Mbps", "1Gbps")
SPAN = 60.0  # seconds that the steps of one speed fill at least, else a passing disturbance hits all steps of a plan
WORKER = Path(__file__).with_name("_fidelity_worker.py")
BIG, SMALL = "t_f[0-4]", "t_f[5-7]"
EXCHANGED: tuple[ShardingType, ...] = ("table_wise", "column_wise", "table_column_wise", "data_parallel")


def measured_workload() -> Workload:
    """What the plans are compiled for: statistics of batches that nobody trains on."""
    batches = [STREAM.samples(BATCH, seed).batch(slice(None))[1] for seed in range(8)]
    rows = dict(zip(STREAM.features, STREAM.rows, strict=True))
    measured = Workload.from_batches(batches, rows, world_size=HOSTS * RANKS)
    return replace(measured, optimizer="sgd")


def sampled_traffic() -> tuple[Any, Any]:
    """Samples of the model's vectors and gradients, and the codecs' speeds on them, all ranks at once."""
    import torch
    from torch.nn import functional as F

    from codegen.runtime.codecs.sampling import measure_speeds, sample_traffic

    torch.set_num_threads(1)
    module = model()
    batches = [STREAM.samples(BATCH, seed).batch(slice(None)) for seed in range(3)]

    def loss_of(trained: Any, batch: Any) -> Any:
        dense, ids, labels = batch
        return F.binary_cross_entropy_with_logits(trained(dense, ids), labels)

    samples = sample_traffic(module, batches, loss_of)
    with torch.no_grad():
        pooled = module.ebc(batches[0][1]).to_dict()
    return samples, measure_speeds([vectors.contiguous() for vectors in pooled.values()], ranks=HOSTS * RANKS)


def constraints(traffic: tuple[Any, Any]) -> dict[str, Constraints]:
    """What forces each of the twelve plans."""
    samples, speeds = traffic

    def forced(
        compression: CompressionRequest | None = None, **tables: Sequence[ShardingType]
    ) -> Constraints:
        globs = {"big": BIG, "small": SMALL, "every": "*"}
        rules = {
            globs[which]: TableConstraint(sharding_types=tuple(kinds)) for which, kinds in tables.items()
        }
        return Constraints(tables=rules, compression=compression, allow_state_split=True)

    coded = CompressionRequest(samples=samples, speeds=speeds, error_budget=3e-3, gradient_budget=3e-3)
    fixed = replace(coded, engine="torchrec")
    made = {
        kind: forced(every=[kind])
        for kind in (
            "table_wise",
            "column_wise",
            "row_wise",
            "table_row_wise",
            "table_column_wise",
            "grid_shard",
            "data_parallel",
        )
    }
    made["free"] = forced()
    made["row_wise + data_parallel"] = forced(big=["row_wise"], small=["data_parallel"])
    made["table_wise on host 0"] = Constraints(
        tables={"*": TableConstraint(sharding_types=("table_wise",), ranks=(0, 1))}
    )
    made["error-bounded codecs"] = forced(coded, every=EXCHANGED)
    made["TorchRec fp16"] = forced(replace(fixed, codecs=("none", "fp16")), every=["table_wise"])
    return made


def compiled(
    topology: Topology, calibration: Calibration, work: Workload, traffic: tuple[Any, Any]
) -> dict[str, planner.Plan]:
    """The twelve plans for one cluster."""
    module = model("meta")
    return {
        name: planner.compile(module, topology, work, constraints=wanted, calibration=calibration)
        for name, wanted in constraints(traffic).items()
    }


def measure(
    cluster: Cluster, plans: Mapping[str, planner.Plan], turns: int, steps: int, span: float
) -> dict[str, float]:
    """Step time of each plan: the lower quartile of its steps, on the slowest rank."""
    settings = {
        "plans": {name: plan.to_dict() for name, plan in plans.items()},
        "batch": BATCH,
        "turns": turns,
        "steps": steps,
        "span": span,
    }
    return {name: found["step"] for name, found in run_worker(cluster, WORKER, settings).items()}


def ranks_of(values: Sequence[float]) -> np.ndarray:
    """Ranks with ties averaged."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranked: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return ranked


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's."""
    return float(np.corrcoef(ranks_of(a), ranks_of(b))[0, 1])


def at_speed(
    report: Report, inter: str, work: Workload, traffic: tuple[Any, Any], quick: bool
) -> list[float]:
    """Rows and claims of one speed; the relative errors."""
    with tempfile.TemporaryDirectory() as folder, Cluster(HOSTS, RANKS, inter) as cluster:
        topology, calibration = calibrate(cluster, Path(folder) / f"cluster-{inter}.yaml")
        plans = compiled(topology, calibration, work, traffic)
        measured = measure(cluster, plans, *((1, 4, 0.0) if quick else (4, 4, SPAN)))
    predicted = {name: plan.timeline.step for name, plan in plans.items()}
    errors = []
    for name in plans:
        errors.append(abs(predicted[name] / measured[name] - 1))
        report.row(
            inter=inter,
            plan=name,
            predicted_ms=1e3 * predicted[name],
            measured_ms=1e3 * measured[name],
            error=predicted[name] / measured[name] - 1,
        )
    preferred = min(predicted, key=lambda name: predicted[name])
    fastest = min(measured, key=lambda name: measured[name])
    report.note(f"{inter}: preferred {preferred}, fastest {fastest}")
    report.claim(
        f"rank_correlation_{inter}",
        rank_correlation(list(predicted.values()), list(measured.values())),
        0.9,
        ">=",
    )
    report.claim(f"preferred_over_fastest_{inter}", measured[preferred] / measured[fastest], 1.03, "<=")
    return errors


def main() -> int:
    """Run the benchmark; exit code 0 when every claim holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one speed, fewer steps")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inter", default=",".join(SPEEDS), help="speeds of each host's card")
    args = parser.parse_args()
    report = Report("cluster_fidelity")
    work, traffic = measured_workload(), sampled_traffic()
    errors: list[float] = []
    try:
        for inter in args.inter.split(",")[: 1 if args.quick else None]:
            errors += at_speed(report, inter, work, traffic, args.quick)
    except ClusterUnavailable as error:
        report.note(f"no emulated cluster: {error}")
    report.claim("mean_error", statistics.mean(errors) if errors else None, 0.15, "<=")
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
