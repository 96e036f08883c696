"""Memory tiers: fewer nodes, drives that cannot keep up, and RecShard's program.

    python benchmarks/memory_tiers.py [--quick] [--json]

1. Nodes: NVIDIA's synthetic jumbo (3.0 TiB of fp32 weights) and colossal (21.8 TiB), batch 65,536, Adagrad, Zipf
   1.05 as published. Hosts needed to keep a target throughput with HBM alone and with the tiers of mixed
   servers, in the planner's own model of the step. The target is the published step time of jumbo on 128 A100
   (124.3 ms); colossal, which has none, is given the same samples per second.
2. Drives: the same number of hosts with Optane SSDs alone below HBM, and with as many NAND drives. Where the
   512-byte-block tier keeps the target the NAND-only machine must be refuted, by its IOPS or its endurance.
3. RecShard (ASPLOS 22): its mixed-integer program (two tiers, one split point a table, its own cost), solved
   by OR-Tools, against this project's solver on the same objective. SYNTHETIC pooling, Zipf 1.05.

All seconds are modelled.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from ortools.linear_solver import pywraplp

import planner
from benchmarks._report import Report
from benchmarks._tables import builtin
from ir.assignment import Option, Piece
from ir.constraints import Constraints
from ir.errors import InfeasibleError
from ir.plan import Plan
from ir.program import Model
from ir.tier_plan import TierRequest
from ir.topology import Topology
from ir.workload import Workload, icdf_from_zipf
from passes.assignment.budget import Budget
from passes.assignment.column_generation import Frame, Menu, relax
from passes.assignment.joint import solve_joint
from passes.joint_search import polish
from planner.verification import verify

ALPHA = 1.05  # NVIDIA-Merlin/distributed-embeddings, synthetic models: power law of the ids
BATCH = 65536  # the same
JUMBO_SECONDS = 0.1243  # published step of jumbo on 128 A100 (DGX-A100), the same README
FEWER = 4.0  # MTrainS (arXiv 2305.01515, abstract): 4 to 8 times fewer nodes where capacity binds

STEPS = 100  # points of RecShard's discretised ICDF
SCIP_SECONDS = 60.0  # wall limit of RecShard's program


def synthetic_model(name: str) -> tuple[Model, Workload]:
    """One of NVIDIA's synthetic models: every table with the features that read it."""
    from planner.models import resolve

    resolved = resolve(f"{_file()}#{name}")
    assert resolved.workload is not None
    rows = {feature: table.rows for table in resolved.model.tables for feature in table.features}
    known: dict[int, tuple[float, ...]] = {}
    features = {}
    for feature, stats in resolved.workload.features.items():
        size = rows[feature]
        known.setdefault(size, icdf_from_zipf(size, ALPHA))
        features[feature] = replace(stats, icdf=known[size])
    return resolved.model, replace(
        resolved.workload, features=features, global_batch=BATCH, optimizer="adagrad"
    )


def _file() -> str:
    from benchmarks._tables import FOLDER

    return str(FOLDER / "nvidia_synthetic_models.json")


def fewest_hosts(
    model: Model,
    workload: Workload,
    topology: Topology,
    tiers: tuple[str, ...] | None,
    target: float,
    most: int,
) -> Plan:
    """The plan on the fewest hosts that keep ``target`` samples per second."""
    request = TierRequest(tiers=tiers, objective="nodes", throughput=target, max_hosts=most)
    return planner.compile(model, topology, workload, constraints=Constraints(tiers=request))


def nodes(report: Report, quick: bool) -> None:
    """Section 1."""
    target = BATCH / JUMBO_SECONDS
    for name, most in (("jumbo", 64),) if quick else (("jumbo", 64), ("colossal", 256)):
        model, workload = synthetic_model(name)
        base: float | None = None
        for family, tiers in (("a100", ()), ("a100-optane", None), ("a100-scm", None)):
            start, cpu = time.monotonic(), time.process_time()
            plan = fewest_hosts(model, workload, planner.topology(f"{family}-2x8"), tiers, target, most)
            section = plan.decisions.tiers
            assert section is not None
            hosts = section.hosts
            base = float(hosts) if base is None else base
            report.row(
                section="nodes",
                case=f"{name}, {'HBM only' if tiers == () else family}",
                hosts=hosts,
                proved_at_least=section.lower_bound,
                step_ms=round(1e3 * section.step, 3),
                allowed_ms=round(1e3 * (section.step_limit or 0), 3),
                binds="; ".join(
                    f"{use.tier}: {', '.join(use.binding)}" for use in section.tiers if use.binding
                ),
                sound=all(finding.ok for finding in verify(plan, model.tables)),
                cpu_s=round(time.process_time() - cpu, 1),
                wall_s=round(time.monotonic() - start, 1),
            )
            if tiers is None:
                # jumbo's lookups alone need several hosts at that rate, so it is not bound by capacity alone
                least = FEWER if name == "colossal" else 1.0
                report.claim(f"{name}.{family}.times_fewer_hosts", base / hosts, least, ">=")


def only(topology: Topology, tier: str, hosts: int) -> Topology:
    """The machine with one host tier left, on ``hosts`` hosts."""
    return replace(topology.with_hosts(hosts), host_tiers=(topology.tier(tier),))


def drives(report: Report) -> None:
    """Section 2: drives alone below HBM."""
    from planner.presets import tiers as t

    model, workload = synthetic_model("jumbo")
    target = BATCH / JUMBO_SECONDS
    optane = replace(planner.topology("a100-optane-2x8"), host_tiers=(t.several(t.OPTANE_P5800X, 4),))
    plan = fewest_hosts(model, workload, optane, None, target, 32)
    section = plan.decisions.tiers
    assert section is not None
    report.row(section="drives", case="jumbo, 4 x P5800X a host", hosts=section.hosts, verdict="kept")
    nand = replace(optane, name="a100 with 4 NAND drives", host_tiers=(t.several(t.NAND_GEN4, 4),))
    request = TierRequest(objective="nodes", throughput=target, max_hosts=section.hosts)
    verdict, why = "kept", ""
    try:
        planner.compile(
            model, nand.with_hosts(section.hosts), workload, constraints=Constraints(tiers=request)
        )
    except InfeasibleError as error:
        verdict, why = "impossible", str(error)
    report.row(
        section="drives", case="jumbo, 4 x NAND a host", hosts=section.hosts, verdict=verdict, binds=why
    )
    refuted = verdict == "impossible" and ("iops" in why or "endurance" in why)
    report.claim("nand_refuted_for_iops_or_endurance", float(refuted), 1.0, "==")


@dataclass(frozen=True, slots=True)
class RecShardTable:
    """A table as RecShard sees it."""

    rows: int
    dim: int
    pooling: float
    coverage: float
    icdf: tuple[float, ...]


HBM_BANDWIDTH, UVM_BANDWIDTH = 1555e9, 21e9  # A100 40 GB HBM2 peak; host copy over PCIe 4 (Azure threshold)


def recshard_costs(table: RecShardTable) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, HBM bytes) of each split step i: the share i / STEPS of accesses is served by HBM."""
    pct = np.arange(STEPS + 1) / STEPS
    row = table.dim * 4.0
    moved = BATCH * table.coverage * table.pooling * row
    seconds = moved * (pct / HBM_BANDWIDTH + (1 - pct) / UVM_BANDWIDTH)
    return seconds, np.asarray(table.icdf) * table.rows * row


def recshard_milp(tables: list[RecShardTable], gpus: int, hbm: float, uvm: float) -> tuple[float, float]:
    """RecShard's program: (objective of the best point found, proved bound), seconds."""
    solver = pywraplp.Solver.CreateSolver("SCIP")
    solver.SetTimeLimit(int(1000 * SCIP_SECONDS))
    priced = [recshard_costs(table) for table in tables]
    scale = sum(float(seconds.min()) for seconds, _ in priced) / gpus
    longest = solver.NumVar(0, solver.infinity(), "")
    # p_mj x_ij, linearised: one variable a table, step and GPU
    y = [[[solver.BoolVar("") for _ in range(gpus)] for _ in range(STEPS + 1)] for _ in tables]
    for row in y:
        solver.Add(sum(v for step in row for v in step) == 1)
    for m in range(gpus):
        terms = [(j, i) for j in range(len(tables)) for i in range(STEPS + 1)]
        solver.Add(sum(y[j][i][m] * float(priced[j][0][i] / scale) for j, i in terms) <= longest)
        solver.Add(sum(y[j][i][m] * float(priced[j][1][i] / hbm) for j, i in terms) <= 1)
        whole = [table.rows * table.dim * 4.0 for table in tables]
        solver.Add(sum(y[j][i][m] * float((whole[j] - priced[j][1][i]) / uvm) for j, i in terms) <= 1)
    solver.Minimize(longest)
    status = solver.Solve()
    if status not in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE):
        return float("inf"), solver.Objective().BestBound() * scale
    return solver.Objective().Value() * scale, solver.Objective().BestBound() * scale


def ours_on_recshard(tables: list[RecShardTable], gpus: int, hbm: float, uvm: float) -> tuple[float, float]:
    """This project's solver on the same objective: (objective, proved bound), seconds."""
    menus = []
    for j, table in enumerate(tables):
        seconds, held = recshard_costs(table)
        whole = table.rows * table.dim * 4.0
        options = [
            Option(f"{i} %", (Piece("rank", (float(s),), float(b), 1, (whole - float(b),)),))
            for i, (s, b) in enumerate(zip(seconds, held, strict=True))
        ]
        menus.append(Menu((j,), options))
    names = tuple(f"t{j}" for j in range(len(tables)))
    frame = Frame(names, 1, gpus, hbm, ("lookup",), (uvm,), (False,))
    relaxed = relax(frame, menus)
    joint = solve_joint(frame, menus, relaxed, budget=Budget(60.0))
    joint = polish(frame, joint, budget=Budget(60.0), seed=0)
    return joint.step, min(relaxed.bound, joint.step)


def recshard(report: Report, quick: bool) -> None:
    """Section 3."""
    rng = random.Random(0)
    rows = [t.rows for t in builtin("meta_dlrm_datasets_856")["meta_dlrm_datasets_856"] if t.rows > 1_000_000]
    worst = 0.0
    for count, gpus in ((12, 2),) if quick else ((12, 2), (24, 4), (48, 4)):
        tables = []
        for size in rng.sample(rows, count):
            coverage = round(rng.uniform(0.3, 1.0), 2)
            pooling = round(rng.lognormvariate(1.5, 1.0) + 1, 2)
            tables.append(RecShardTable(size, 64, pooling, coverage, icdf_from_zipf(size, ALPHA)))
        total = sum(t.rows * t.dim * 4.0 for t in tables)
        hbm, uvm = 0.25 * total / gpus, 2.0 * total / gpus
        rival, rival_bound = recshard_milp(tables, gpus, hbm, uvm)
        mine, bound = ours_on_recshard(tables, gpus, hbm, uvm)
        worst = max(worst, mine / rival)
        report.row(
            section="recshard",
            case=f"{count} tables on {gpus} GPUs",
            recshard_ms=round(1e3 * rival, 5),
            recshard_bound_ms=round(1e3 * rival_bound, 5),
            ours_ms=round(1e3 * mine, 5),
            ours_bound_ms=round(1e3 * bound, 5),
            gap=round(1 - bound / mine, 5),
        )
        report.claim(f"recshard.{count}x{gpus}.bound_below_rival", bound / rival, 1.0, "<=")
    report.claim("recshard.worst_ours_over_milp", worst, 1.0 + 1e-6, "<=")


def main() -> int:
    """Run the sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="jumbo only, one RecShard case")
    parser.add_argument("--section", choices=["nodes", "drives", "recshard"], help="one section only")
    args = parser.parse_args()
    report = Report("memory_tiers")
    if args.section in (None, "nodes"):
        nodes(report, args.quick)
    if args.section in (None, "drives"):
        drives(report)
    if args.section in (None, "recshard"):
        recshard(report, args.quick)
    return report.finish(args.json)


if __name__ == "__main__":
    raise SystemExit(main())
