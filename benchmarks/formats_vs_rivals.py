"""Formats chosen together with sharding, against uniform formats, greedy and ModelOpt's integer program.

    python benchmarks/formats_vs_rivals.py [--quick] [--json]

DLRM-DCNv2's tables (MLPerf) on one H100 host. Loss coefficients are SYNTHETIC: log-normal (sigma 2), one a table,
times the relative squared error of the format; every rival sees the same ones. Formats: fp32, bf16, mx9, mx6, mx4,
priced as if kernels existed.

* At equal bytes: least predicted loss within the bytes that the rival stores.
* At equal loss: least modelled step whose predicted loss is the rival's or less. The rival's formats are pinned and
  sharded by this project's solver, so that only the choice of formats differs. Rivals know bits of weights only.
* At equal step: least predicted loss whose modelled step is the rival's or less.

All seconds are modelled; ratios below 1 are in favour of the joint choice.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import planner
from benchmarks._format_rivals import Group, greedy, integer_program
from benchmarks._report import Report
from benchmarks._tables import Table, builtin
from cost_models.formats import bits_per_element
from ir.constraints import Constraints
from ir.format_plan import FormatId, FormatPlan, FormatRequest, LossChange, Sensitivity
from ir.ops import EmbeddingTable
from ir.plan import Plan
from ir.program import Model
from ir.workload import FeatureStats, Workload
from passes.format_menu import relative_error
from planner.verification import verify

MENU: tuple[FormatId, ...] = ("fp32", "bf16", "mx9", "mx6", "mx4")
SIGMA = 2.0  # spread of the SYNTHETIC loss coefficients
AVERAGES = (16.0, 9.0, 6.0)  # bits per element at which rivals choose
TIE = 1e-6  # relative


class Case:
    """Tables with their sensitivities on one machine."""

    def __init__(self, tables: list[Table], topology: str, time_limit: float) -> None:
        rng = random.Random(0)
        self.topology, self.time_limit = topology, time_limit
        self.model = Model(
            "m", tuple(EmbeddingTable(t.name, t.rows, t.dim, (f"f_{t.name}",)) for t in tables), ()
        )
        self.workload = Workload(
            features={f"f_{t.name}": FeatureStats(pooling_factor=t.pooling) for t in tables}
        )
        weight = {t.name: rng.lognormvariate(0.0, SIGMA) for t in tables}
        self.loss = {name: {f: LossChange(w * relative_error(f)) for f in MENU} for name, w in weight.items()}

    def groups(self) -> list[Group]:
        """The tables as rivals see them."""
        return [
            Group(
                (t.name,),
                {f: bits_per_element(f, t.dim) * t.params for f in MENU},
                {f: change.mean for f, change in self.loss[t.name].items()},
            )
            for t in self.model.tables
        ]

    def plan(self, **asked: object) -> Plan:
        """A compiled and verified plan; embedding traffic stays fp32."""
        rules = {"traffic.*": ("fp32",), **asked.pop("rules", {})}  # type: ignore[dict-item]
        request = FormatRequest(
            formats={"table": MENU},
            rules=rules,
            kernels="emulate",
            sensitivity=Sensitivity(self.loss, "synthetic", "loss"),
            **asked,  # type: ignore[arg-type]
        )
        plan = planner.compile(
            self.model,
            self.topology,
            self.workload,
            constraints=Constraints(formats=request),
            time_limit=self.time_limit,
        )
        assert not [finding for finding in verify(plan, self.model.tables) if finding.faults]
        return plan


def section(plan: Plan) -> FormatPlan:
    """The formats of a plan."""
    assert plan.decisions.formats is not None
    return plan.decisions.formats


def rivals(case: Case) -> dict[str, dict[str, str]]:
    """Every rival's choice, formats by table."""
    groups, elements = case.groups(), sum(t.params for t in case.model.tables)
    made = {f"uniform {f}": {t.name: f for t in case.model.tables} for f in MENU[1:]}
    for bits in AVERAGES:
        made[f"greedy, {bits:g} bits"] = greedy(groups, bits * elements)
        made[f"integer program, {bits:g} bits"] = integer_program(groups, bits * elements)
    return made


def main() -> int:
    """Compare with every rival."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="three rivals, less search")
    args = parser.parse_args()
    report = Report("formats_vs_rivals")
    tables = next(iter(builtin("mlperf_dlrm_dcnv2").values()))
    case = Case(tables, "h100-1x8", 0.5 if args.quick else 10.0)
    chosen = rivals(case)
    if args.quick:
        chosen = {name: chosen[name] for name in ("uniform mx6", "greedy, 9 bits", "integer program, 9 bits")}
    worst_bytes = worst_step = worst_loss = 0.0
    for name, formats in chosen.items():
        theirs = case.plan(rules={table: (f,) for table, f in formats.items()})
        loss, bits = section(theirs).loss, section(theirs).average_bits
        same_bytes = case.plan(objective="loss", average_bits=bits)
        same_loss = case.plan(max_loss=loss * (1 + TIE))
        same_step = case.plan(objective="loss", max_step=theirs.certificate.objective * (1 + TIE))
        by_bytes = section(same_bytes).loss / loss
        by_step = same_loss.certificate.objective / theirs.certificate.objective
        by_loss = section(same_step).loss / loss
        worst_bytes, worst_step = max(worst_bytes, by_bytes), max(worst_step, by_step)
        worst_loss = max(worst_loss, by_loss)
        report.row(
            rival=name,
            bits=round(bits, 3),
            rival_loss=loss,
            loss_at_equal_bytes=section(same_bytes).loss,
            loss_ratio=round(by_bytes, 4),
            rival_ms=round(1e3 * theirs.certificate.objective, 4),
            ms_at_equal_loss=round(1e3 * same_loss.certificate.objective, 4),
            bound_ms=round(1e3 * same_loss.certificate.lower_bound, 4),
            step_ratio=round(by_step, 4),
            loss_at_equal_step=section(same_step).loss,
            loss_ratio_at_equal_step=float(f"{by_loss:.3g}"),
        )
    report.claim("worst_loss_ratio_at_equal_bytes", worst_bytes, 1 + 2 * TIE, "<=")
    report.claim("worst_step_ratio_at_equal_loss", worst_step, 1.0 + TIE, "<=")
    report.claim("worst_loss_ratio_at_equal_step", worst_loss, 1.0 + TIE, "<=")
    return report.finish(args.json)


if __name__ == "__main__":
    raise SystemExit(main())
