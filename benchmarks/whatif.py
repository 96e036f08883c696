"""What-ifs that start from a plan beside planning anew: CPU seconds, and objectives.

    python benchmarks/whatif.py [--quick] [--json] [--case NAME]

The 856 tables are Meta's row counts with the documented SYNTHETIC dims and pooling, on 16 hosts of 8 H100; the others are
MLPerf's DLRM-DCNv2 on 2 x 8 with number formats (20 bits a weight on average), memory tiers (8 GB a rank) and towers. Each
row is one changed setting: the what-if, then ``planner.compile`` of the same inputs. One process with one thread.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import planner
from benchmarks._report import Report
from benchmarks._tables import builtin
from ir.format_plan import FormatRequest
from ir.ops import EmbeddingTable
from ir.program import Model
from ir.tier_plan import TierRequest
from ir.towers import TowerRequest
from ir.workload import FeatureStats, Workload
from planner.what_if import Inputs, change, parse_settings

META = "meta_dlrm_datasets_856"
MLPERF = "dlrm-dcnv2"
WORSE = (
    0.01  # of the objective, that a what-if may lose to planning anew, and the share of its work it may take
)
SETTINGS = {
    "856 tables": ("hosts=8", "hosts=4", "link.inter=300Gbps", "hbm=60GB", "hosts=32"),
    "formats": ("link.inter=300Gbps", "hosts=4"),
    "tiers": ("link.inter=300Gbps", "hosts=4"),
    "towers": ("link.inter=300Gbps", "batch=16384"),
}


def plan_of(case: str) -> tuple[planner.Plan, Any]:
    """The plan in force, and what it was compiled from."""
    if case == "856 tables":
        tables = builtin(META)[META]
        records = tuple(EmbeddingTable(t.name, t.rows, t.dim, (f"f_{t.name}",)) for t in tables)
        fed = Workload(features={f"f_{t.name}": FeatureStats(pooling_factor=t.pooling) for t in tables})
        model = Model(META, records, ())
        return planner.compile(model, "h100-16x8", fed), model
    asked = {
        "formats": planner.Constraints(formats=FormatRequest(average_bits=20.0)),
        "tiers": planner.Constraints(tiers=TierRequest(), memory_limit=8_000_000_000),
        "towers": planner.Constraints(towers=TowerRequest(always=True)),
    }
    return planner.compile(MLPERF, "h100-2x8", constraints=asked[case]), MLPERF


def timed(make: Callable[[], planner.Plan]) -> tuple[planner.Plan, float]:
    """A plan, and the CPU seconds that it took."""
    start = time.process_time()
    made = make()
    return made, time.process_time() - start


def row(report: Report, case: str, plan: planner.Plan, model: Any, setting: str) -> tuple[float, float]:
    """One setting: work and objective of the what-if as ratios of those of planning anew."""
    fed = replace(plan.workload, dedup={}, dedup_ops={})
    changed = change(Inputs(plan.topology, fed, plan.constraints), parse_settings([setting]))
    warm, seconds = timed(lambda: planner.whatif(plan, parse_settings([setting]), model=model))
    anew, whole = timed(
        lambda: planner.compile(model, changed.topology, changed.workload, constraints=changed.constraints)
    )
    objective = warm.certificate.objective / anew.certificate.objective
    report.row(
        case=case,
        setting=setting,
        what_if_cpu_s=round(seconds, 1),
        anew_cpu_s=round(whole, 1),
        objective_percent=round(100 * (objective - 1), 2),
        start=warm.provenance.get("anew", "the plan"),
        sound=all(finding.ok for finding in planner.verify(warm)),
    )
    return seconds / whole, objective


def main() -> int:
    """Run the benchmark; exit code 0 when every claim holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one setting of the 856 tables")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", choices=sorted(SETTINGS), help="one of the cases")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    report = Report("whatif")
    cases = [args.case] if args.case else ["856 tables"] if args.quick else list(SETTINGS)
    for case in cases:
        plan, model = plan_of(case)
        settings = SETTINGS[case][:1] if args.quick else SETTINGS[case]
        found = [row(report, case, plan, model, setting) for setting in settings]
        name = case.replace(" ", "_")
        report.claim(f"{name}_largest_objective_ratio", max(o for _, o in found), 1 + WORSE, "<=")
        report.claim(f"{name}_least_share_of_work", min(s for s, _ in found), 1.0, "<=")
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
