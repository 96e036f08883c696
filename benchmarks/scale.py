"""How large: 856 tables on 128 ranks, and 10,000 tables on 4,096 ranks, each with a proved gap.

    python benchmarks/scale.py [--quick] [--json] [--tables FILE.json --ranks N]

Each row is one whole ``planner.compile`` (options priced, assignment solved and bounded, every table
explained, memory and step modelled, the IR verified after each pass), or, for "TorchRec prices", the
same solver on a problem that TorchRec's own estimators price. The 856 tables are Meta's row counts with
the documented SYNTHETIC dims and pooling; the 10,000 tables are SYNTHETIC. H100 hosts of 8.

Each is measured under both objectives: "bottleneck" (the slowest rank's total, as TorchRec rates plans), and the
default "phases" (a sum of five maxima over ranks), whose claims have ``phases`` in their names. Seconds are of one
process with one thread.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import planner
from benchmarks._report import Report
from benchmarks._tables import Table, builtin, load, synthetic
from ir.ops import EmbeddingTable
from ir.program import Model, Objective
from ir.workload import FeatureStats, Workload
from passes.assignment import Problem, solve
from planner.verification import verify

HOST_SIZE = 8
META = "meta_dlrm_datasets_856"
OBJECTIVES: tuple[Objective, ...] = ("bottleneck", "phases")


def price_torchrec(tables: list[Table], ranks: int) -> Problem:
    """TorchRec's estimators, default constants: one phase, milliseconds."""
    from benchmarks._torchrec_rival import build_case, build_module
    from cost_models.adapters.torchrec import TorchRecObjective

    case = build_case(build_module(tables), tables, ranks, "default")
    return TorchRecObjective(
        case.module, case.sharders, case.topology, case.batch_size, case.constraints
    ).problem()


def peak_bytes() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # ru_maxrss is KiB on Linux


def compile_row(
    report: Report, name: str, tables: list[Table], ranks: int, objective: Objective
) -> dict[str, float]:
    """Compile, verify, and report; the figures that claims are made of."""
    records = tuple(EmbeddingTable(t.name, t.rows, t.dim, (f"f_{t.name}",)) for t in tables)
    workload = Workload(features={f"f_{t.name}": FeatureStats(pooling_factor=t.pooling) for t in tables})
    machine = f"h100-{max(1, ranks // HOST_SIZE)}x{min(HOST_SIZE, ranks)}"
    wall, cpu = time.monotonic(), time.process_time()
    plan = planner.compile(Model(name, records, ()), machine, workload, objective=objective)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    peak = peak_bytes()
    sound = all(finding.ok for finding in verify(plan, records))
    certificate = plan.certificate
    report.row(
        problem=name,
        tables=len(tables),
        ranks=ranks,
        objective=objective,
        ms=round(1e3 * certificate.objective, 4),
        bound_ms=round(1e3 * certificate.lower_bound, 4),
        gap=round(certificate.gap, 5),
        sound=sound,
        cpu_s=round(cpu, 2),
        wall_s=round(wall, 2),
        peak_GB=round(peak / 1e9, 3),
    )
    return {"gap": certificate.gap if sound else 1.0, "seconds": cpu, "peak": peak}


def solver_row(report: Report, name: str, tables: list[Table], ranks: int) -> dict[str, float]:
    """Price with TorchRec's estimators, solve, and report."""
    wall, cpu = time.monotonic(), time.process_time()
    solution = solve(price_torchrec(tables, ranks), time_limit=10.0, stop_gap=0.003)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    report.row(
        problem=name,
        tables=len(tables),
        ranks=ranks,
        objective="Perf.total",
        ms=round(solution.objective, 4),
        bound_ms=round(solution.lower_bound, 4),
        gap=round(solution.gap, 5),
        sound=True,
        cpu_s=round(cpu, 2),
        wall_s=round(wall, 2),
        peak_GB=round(peak_bytes() / 1e9, 3),
    )
    return {"gap": solution.gap, "seconds": cpu}


def main() -> int:
    """Run the benchmark; exit code 0 when every claim holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="856 tables and a tenth of the large case")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tables", type=Path, help="a table set in the format of planner/data/tables")
    parser.add_argument("--ranks", type=int, default=128, help="with --tables")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    report = Report("scale")
    if args.tables:
        for name, tables in load(args.tables).items():
            for objective in OBJECTIVES:
                compile_row(report, name, tables, args.ranks, objective)
        return report.finish(args.json)
    # the large case first: the peak memory must not count torch, which pricing by TorchRec loads
    count, ranks = (1000, 512) if args.quick else (10_000, 4096)
    large = compile_row(report, "synthetic", synthetic(count), ranks, "bottleneck")
    size = f"{count}_tables_{ranks}_ranks"
    report.claim(f"{size}_gap", large["gap"], 0.05, "<=")
    report.claim(f"{size}_cpu_seconds", large["seconds"], 120.0, "<=")
    report.claim(f"{size}_peak_bytes", large["peak"], 4e9, "<=")
    meta = builtin(META)[META]
    ours = compile_row(report, META, meta, 128, "bottleneck")
    report.claim("856_tables_128_ranks_gap", ours["gap"], 0.01, "<=")
    report.claim("856_tables_128_ranks_cpu_seconds", ours["seconds"], 15.0, "<=")
    summed = compile_row(report, META, meta, 128, "phases")
    report.claim("856_tables_128_ranks_phases_gap", summed["gap"], 0.01, "<=")
    report.claim("856_tables_128_ranks_phases_cpu_seconds", summed["seconds"], 15.0, "<=")
    if not args.quick:
        summed = compile_row(report, "synthetic", synthetic(count), ranks, "phases")
        report.claim(f"{size}_phases_gap", summed["gap"], 0.05, "<=")
        report.claim(f"{size}_phases_cpu_seconds", summed["seconds"], 120.0, "<=")
        report.claim(f"{size}_phases_peak_bytes", summed["peak"], 4e9, "<=")
    try:
        rated = solver_row(report, f"{META}, TorchRec prices", meta, 128)
    except ImportError as error:
        report.note(f"TorchRec is absent: {error}")
        rated = {}
    report.claim("856_tables_128_ranks_torchrec_prices_gap", rated.get("gap"), 0.01, "<=")
    report.claim("856_tables_128_ranks_torchrec_prices_cpu_seconds", rated.get("seconds"), 15.0, "<=")
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
