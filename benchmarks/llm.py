"""Training plans of Llama 3 against the published configurations and their measured throughput.

    python benchmarks/llm.py [--quick] [--json]

Fits the one constant of the decoder model that is no published measurement of a kernel or a link
(``gemm_efficiency``) on the row of ``planner/data/measured/llama3.json`` marked "fit" (8,192 GPUs), judges the
row marked "judge" (16,384 GPUs), and shows the one of sequence 131,072. Then plans the same three problems
freely: how the published layout ranks, what the planner's own pays less for, and the time planning takes.
``--quick`` plans only the first and leaves out the other FLOP conventions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import planner
from benchmarks._report import Report
from cost_models.calibration import Calibration
from cost_models.llm import LLM_GPU
from ir.decoder import LlmWorkload
from ir.llm import DecoderModel
from ir.parallelism import Layout, Parallelism, ParallelismConstraints

DATA = Path(planner.__file__).parent / "data" / "measured" / "llama3.json"

# Meta's text gives the schedule (interleaved 1F1B, one layer a virtual stage: 8 of 128 slots a rank), the sharding
# (optimizer state and gradients), no activation checkpointing and one sequence a micro-batch.
PUBLISHED = ParallelismConstraints(
    micro_batch=1,
    virtual_stages=8,
    schedules=("interleaved_1f1b",),
    recompute=("none", "elementwise"),
    zero=(2,),
)
# figures of other planners for the first row, as their authors' code gave them elsewhere; not run here
QUOTED = (
    "Calculon caa4b11, at the published TP8 PP16, full recomputation: 330 TFLOP/s; it refuses the published layout "
    "(it stores the seq^2 scores). Its own search over the true 126 layers: 152 TFLOP/s in 19 minutes. llm-analysis "
    "d841e40: 440 TFLOP/s at an efficiency given by hand, and 83.0 GiB a GPU. Figures quoted, not run here."
)


def rows() -> list[dict[str, Any]]:
    """The published configurations."""
    table: list[dict[str, Any]] = json.loads(DATA.read_text())["table4"]
    return table


def workload(row: dict[str, Any]) -> planner.Workload:
    """What a row trains."""
    tokens = row["sequence"] * row["sequences_per_replica"] * row["data"]
    return planner.Workload(llm=LlmWorkload(row["sequence"], tokens))


def compile_row(
    model: DecoderModel, row: dict[str, Any], calibration: Calibration, rules: ParallelismConstraints | None
) -> planner.Plan:
    """A plan for the row's cluster and batch."""
    return planner.compile(
        model,
        f"llama3-roce-{row['gpus'] // 8}x8",
        workload(row),
        constraints=planner.Constraints(parallelism=rules),
        calibration=calibration,
    )


def published_rules(row: dict[str, Any]) -> ParallelismConstraints:
    """The row's layout as constraints."""
    degrees = {name: row[name] for name in ("tensor", "context", "pipeline", "data")}
    return replace(PUBLISHED, **degrees)


def section(plan: planner.Plan) -> Parallelism:
    """The plan's parallelism."""
    assert plan.decisions.parallelism is not None
    return plan.decisions.parallelism


# FLOP of attention a layer, token, token of the sequence and element of a query, over forward and backward
CONVENTIONS = {"6N and causal attention": 6.0, "6N alone": 0.0, "6N and full attention": 12.0}


def measured_step(model: DecoderModel, row: dict[str, Any], attention: float) -> float:
    """Seconds of the row's step if its TFLOP/s count so much attention."""
    shape, tokens = model.shape, row["sequence"] * row["sequences_per_replica"] * row["data"]
    attended = attention * shape.layers * row["sequence"] * shape.query_width
    flops: float = (6.0 * shape.params + attended) * tokens
    return flops / (row["tflops"] * 1e12 * row["gpus"])


def step_error(model: DecoderModel, row: dict[str, Any], efficiency: float, attention: float = 6.0) -> float:
    """Measured over modelled step of the published layout, less 1: the relative error of its TFLOP/s."""
    plan = compile_row(model, row, replace(LLM_GPU, gemm_efficiency=efficiency), published_rules(row))
    return measured_step(model, row, attention) / plan.timeline.step - 1


def fit(model: DecoderModel, fitted: list[dict[str, Any]], attention: float = 6.0) -> float:
    """``gemm_efficiency`` for which the errors of the rows add up to 0; bisection."""

    def excess(efficiency: float) -> float:
        return sum(step_error(model, row, efficiency, attention) for row in fitted)

    low, high = 0.3, 0.95
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return (low + high) / 2


def rank_of(
    model: DecoderModel, row: dict[str, Any], calibration: Calibration
) -> tuple[int | None, Layout | None]:
    """Place of the published degrees among the best 50, and the planner's layout of those degrees."""
    plan = compile_row(model, row, calibration, ParallelismConstraints(alternatives=50))
    made = section(plan)
    ranked = [made.layout, *(other.layout for other in made.alternatives)]
    wanted = tuple(row[name] for name in ("tensor", "context", "pipeline", "data"))
    for place, layout in enumerate(ranked, 1):
        if (layout.tensor, layout.context, layout.pipeline, layout.data) == wanted:
            return place, layout
    return None, None


def reason(free: planner.Plan, published: planner.Plan) -> str:
    """What the planner's layout pays less for than the published one."""
    own, theirs = section(free).seconds, section(published).seconds
    saved = sorted(((theirs[name] - own[name], name) for name in own), reverse=True)
    return ", ".join(
        f"{name} {theirs[name]:.2f} -> {own[name]:.2f} s" for gain, name in saved[:3] if gain > 0
    )


def main() -> int:
    """Run; exit code 0 when every claim holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="plan only the first row")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report = Report("llm")

    from planner.models import resolve

    started = time.process_time()
    model = resolve("llama3-405b").model
    captured = time.process_time() - started
    assert isinstance(model, DecoderModel)
    table = rows()
    efficiency = fit(model, [row for row in table if row["use"] == "fit"])
    calibration = replace(LLM_GPU, gemm_efficiency=efficiency)
    errors: dict[str, list[float]] = {"fit": [], "judge": [], "shown": []}
    for row in table:
        plan = compile_row(model, row, calibration, published_rules(row))
        made = section(plan)
        errors[row["use"]].append(abs(made.tflops / row["tflops"] - 1))
        _row(report, row, "published", plan, f"{made.tflops / row['tflops'] - 1:+.1%}")
    slowest, better, places = 0.0, [], []
    for row in table[:1] if args.quick else table:
        started = time.process_time()
        free = compile_row(model, row, calibration, None)
        slowest = max(slowest, time.process_time() - started)
        published = compile_row(model, row, calibration, published_rules(row))
        _row(report, row, "planned", free, "")
        better.append(section(free).tflops / section(published).tflops)
        place, own = rank_of(model, row, calibration)
        places.append(place)
        where = f"place {place} ({own.details})" if own is not None else "not among the best 50 degrees"
        report.note(
            f"{row['gpus']} GPUs, sequence {row['sequence']}: the published {section(published).layout.label} is {where}; "
            f"the planned layout pays {reason(free, published)}"
        )
        faults = [fault for finding in planner.verify(free) for fault in finding.faults]
        report.claim(
            f"faults of the plan for {row['gpus']} GPUs, sequence {row['sequence']}", len(faults), 0, "=="
        )
    report.note(f"fitted: gemm_efficiency {efficiency:.4f}")
    for name, attention in () if args.quick else CONVENTIONS.items():
        other = fit(model, [row for row in table if row["use"] == "fit"], attention)
        found = [f"{step_error(model, row, other, attention):+.1%}" for row in table if row["use"] != "fit"]
        report.note(f"if the published TFLOP/s count {name}: fitted {other:.3f}, errors {', '.join(found)}")
    report.note(QUOTED)
    report.claim("fit: largest error of TFLOP/s", max(errors["fit"]), 0.001, "<=")
    report.claim("judge: largest error of TFLOP/s", max(errors["judge"]), 0.07, "<=")
    report.claim("sequence 131,072 (shown, not judged): error of TFLOP/s", max(errors["shown"]), 0.07, "<=")
    report.claim("planned over published layout, modelled TFLOP/s, least", min(better), 1.0, ">=")
    report.claim("capture of 405B, CPU seconds, torch's import included", captured, 5.0, "<=")
    report.claim("planning, CPU seconds, slowest", slowest, 10.0, "<=")
    report.claim(
        "stored constant: difference to the fit", abs(LLM_GPU.gemm_efficiency / efficiency - 1), 1e-3, "<="
    )
    return report.finish(args.json)


def _row(report: Report, row: dict[str, Any], which: str, plan: planner.Plan, error: str) -> None:
    made = section(plan)
    report.row(
        use=row["use"] if which == "published" else which,
        gpus=row["gpus"],
        sequence=row["sequence"],
        layout=made.layout.label,
        details=made.layout.details,
        measured=row["tflops"] if which == "published" else None,
        modelled=round(made.tflops, 1),
        error=error,
        step_s=round(plan.timeline.step, 3),
        bubble=f"{made.bubble:.1%}",
        memory_gb=round(max(entry.total for entry in plan.memory) / 1e9, 1),
    )


if __name__ == "__main__":
    raise SystemExit(main())
