"""Why not: what another option for one table would cost, or why it cannot be had.

The other option is forced and everything else decided again, starting from the plan; the cost lies between the
bound that is proved for the forced problem and the plan that was found. Another place is asked about in
:mod:`planner.why_not_place`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ir.plan
from ir.constraints import SHARDING_TYPES, Constraints, ShardingType, TableConstraint
from ir.errors import InfeasibleError, InputError, did_you_mean
from ir.plan import TablePlan
from ir.sharding import COLUMN_SPLIT
from planner.diff import diff_plans
from planner.explain import find_table
from planner.what_if import model_of
from planner.why_not_answer import SAME, Verdict, WhyNot
from planner.why_not_place import pinned, why_not_there

if TYPE_CHECKING:
    from cost_models.calibration import Calibration
    from ir.program import Model


def why_not(
    plan: ir.plan.Plan,
    name: str,
    asked: str,
    *,
    model: Any = None,
    calibration: Calibration | None = None,
    time_limit: float | None = None,
) -> WhyNot:
    """What it would cost to have ``asked`` for a table.

    Args:
        plan: the plan.
        name: of the table.
        asked: a sharding type, an option ("column_wise x4"), "rank=5" or "host=1".
        model: what the plan was compiled from; default what it says.
        calibration: constants; default those of the device kind.
        time_limit: deterministic solver work for the forced problem, about seconds; default the plan's.

    Raises:
        InputError: an unknown table, option or place, or no model to plan with.
    """
    table = find_table(plan, name)
    captured = model_of(plan, model)
    if "=" in asked:
        return why_not_there(plan, table, captured, asked, calibration)
    kind, _, columns = asked.partition(" ")
    if kind not in SHARDING_TYPES:
        raise InputError(
            f"there is no sharding type {kind!r}{did_you_mean(kind, SHARDING_TYPES)}; choose one of "
            f"{', '.join(SHARDING_TYPES)}, rank=N or host=N"
        )
    if asked in (table.sharding_type, table.option):
        return WhyNot(name, asked, table.option, "chosen", table.reason)
    try:
        labels = _offered(plan, captured, table, kind)
    except InfeasibleError as error:
        return WhyNot(name, asked, table.option, "not offered", _why_not_offered(plan, table, kind, error))
    if columns and asked not in labels:
        raise InputError(f"table {name!r} has no option {asked!r}; of {kind} it has {', '.join(labels)}")
    if columns:
        labels = [asked]
    limits = plan.constraints
    if columns and (limits.formats is not None or limits.tiers is not None):
        raise InputError(
            f"with formats or tiers a sharding type is forced as a whole; ask --why-not {kind} without {columns}"
        )
    try:
        forced = _forced(plan, captured, table, labels, calibration, time_limit)
    except InfeasibleError as error:
        return WhyNot(name, asked, table.option, "does not fit", str(error))
    return _costs(plan, forced, table, asked)


def _costs(plan: ir.plan.Plan, forced: ir.plan.Plan, table: TablePlan, asked: str) -> WhyNot:
    objective = plan.certificate.objective
    at_most = forced.certificate.objective - objective
    at_least = max(0.0, forced.certificate.lower_bound - objective)
    other = forced.tables[table.name]
    moved = diff_plans(plan, forced)
    verdict: Verdict = "costs"
    if at_most < -SAME * objective:
        verdict, reason = (
            "better",
            "the search did not find it in its limit: a plan with it is better than this one",
        )
    elif at_most <= SAME * objective:
        verdict, reason = "costs nothing", "the table is not on the slowest rank, or others make room"
    elif at_least > 0:
        reason = "every plan with it is slower"
    else:
        reason = "no plan with it that is as fast was found; that none exists is not proved"
    if not _allowed(plan.constraints, table, other):
        reason += f"; tables[{table.name}].sharding_types of the constraints forbids it"
    return WhyNot(
        table=table.name,
        asked=asked,
        chosen=table.option,
        verdict=verdict,
        reason=reason,
        at_most=at_most,
        at_least=at_least,
        step=forced.timeline.step,
        step_change=forced.timeline.step - plan.timeline.step,
        bound_method=forced.certificate.bound_method,
        changes=sum(change.name != table.name for change in moved.changes),
        moved_bytes=sum(change.moved_bytes for change in moved.changes),
        terms=dict(other.terms),
        memory=dict(other.memory),
    )


def _allowed(constraints: Constraints, table: TablePlan, other: TablePlan) -> bool:
    types = constraints.for_table(table.name).sharding_types
    return types is None or other.sharding_type in types


def _with_type(constraints: Constraints, name: str, kind: ShardingType) -> Constraints:
    """The constraints with one table's types replaced."""
    literal = "".join(f"[{c}]" if c in "*?[" else c for c in name)
    rule = replace(constraints.tables.get(literal, TableConstraint()), sharding_types=(kind,))
    others = {pattern: kept for pattern, kept in constraints.tables.items() if pattern != literal}
    return replace(constraints, tables={**others, literal: rule})


def _offered(plan: ir.plan.Plan, model: Model, table: TablePlan, kind: ShardingType) -> list[str]:
    """Labels of the options of a type; raises InfeasibleError that says why there is none."""
    from passes.sharding_options import table_options

    narrowed = _with_type(plan.constraints, table.name, kind)
    record = next(t for t in model.tables if t.name == table.name)
    options = table_options(record, plan.topology, plan.workload, narrowed)
    return [option.label for option in options if option.sharding_type == kind]


def _why_not_offered(plan: ir.plan.Plan, table: TablePlan, kind: str, error: InfeasibleError) -> str:
    rule = plan.constraints.for_table(table.name)
    if rule.ranks is not None and kind != "table_wise":
        return f"tables[{table.name}].ranks pins it, and only table-wise tables lie on named ranks"
    _, opened, rest = str(error).partition("(")
    said = rest.removesuffix(")") if opened else str(error)
    if kind in COLUMN_SPLIT and said.startswith("ranks need"):
        width = rule.min_column_width or plan.constraints.min_column_width
        return f"{table.dim} columns do not split into shards of {width} (min_column_width) on these ranks"
    return said.removeprefix(f"{kind}: ")


def _forced(
    plan: ir.plan.Plan,
    model: Model,
    table: TablePlan,
    labels: list[str],
    calibration: Calibration | None,
    time_limit: float | None,
) -> ir.plan.Plan:
    """The plan with one of the options, everything else decided again and ranks named so that little moves."""
    from passes.forced_sharding import ForcedSharding
    from passes.pipeline import pipeline
    from passes.relabel import Relabel
    from planner.api import compile

    limits = plan.constraints
    kind: Any = labels[0].partition(" ")[0]
    passes = []
    for step in pipeline(calibration):
        if step.name == "sharding":
            if limits.formats is None and limits.tiers is None:
                step = ForcedSharding(table.name, tuple(labels), plan.table_plans, calibration)
            same = Relabel(plan.table_plans, tuple(range(plan.world_size)), pinned(plan))
            passes += [step, same]
        else:
            passes.append(step)
    return compile(
        model,
        plan.topology,
        replace(plan.workload, dedup={}, dedup_ops={}),
        mode=plan.mode,
        constraints=_with_type(limits, table.name, kind),
        passes=passes,
        time_limit=time_limit or float(plan.provenance.get("time_limit", "30")),
        seed=int(plan.provenance.get("seed", "0")),
        objective=plan.provenance.get("objective", "phases"),  # type: ignore[arg-type]
        name=plan.model.name,
    )
