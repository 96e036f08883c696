"""Why not: what another option for one table would cost, or another place, or why it cannot be had.

The other option is forced and everything else decided again, starting from the plan; the cost lies between the
bound that is proved for the forced problem and the plan that was found. A place is asked about with everything
else left where it is, because ranks are alike: with everything else free, names of ranks can be exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict
from rich.console import Group, RenderableType
from rich.text import Text

import ir.plan
from cost_models.placed import placed_units
from ir.constraints import SHARDING_TYPES, Constraints, ShardingType, TableConstraint
from ir.errors import InfeasibleError, InputError, did_you_mean
from ir.plan import TablePlan
from ir.reading import STRICT
from ir.sharding import COLUMN_SPLIT
from ir.units import format_bytes, format_seconds
from planner.diff import diff_plans, moved_bytes
from planner.explain import find_table
from planner.render import grid, percent_change, signed
from planner.what_if import model_of, program_of

if TYPE_CHECKING:
    from cost_models.calibration import Calibration
    from ir.program import Model, Program
    from ir.topology import Topology

Verdict = Literal["chosen", "not offered", "does not fit", "costs nothing", "costs", "better"]

MOST_UNITS = 16  # units of a table that are tried in another place
SAME = 1e-6  # relative difference below which two objectives are the same


@dataclass(frozen=True, slots=True)
class WhyNot:
    """The answer; seconds are of the objective or the modelled step, costs are against the plan."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    table: str
    asked: str  # "row_wise", "column_wise x4", "rank=5", "host=1"
    chosen: str
    verdict: Verdict
    reason: str
    at_most: float | None = None  # objective of the best plan found with it, less the plan's
    at_least: float | None = None  # proved for every plan with it, less the plan's; never below 0
    step: float | None = None  # modelled step with it, seconds
    step_change: float | None = None
    bound_method: str = ""
    changes: int = 0  # other tables that are decided differently then
    moved_bytes: int = 0  # weights (fp32) on ranks that do not hold them now, all tables
    terms: dict[str, float] | None = None  # of the table with it, summed over ranks
    memory: dict[str, int] | None = None


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
        return _why_not_there(plan, table, captured, asked, calibration)
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
            same = Relabel(plan.table_plans, tuple(range(plan.world_size)), _pinned(plan))
            passes += [step, same]
        else:
            passes.append(step)
    return compile(
        model,
        plan.topology,
        replace(plan.workload, dedup={}),
        mode=plan.mode,
        constraints=_with_type(limits, table.name, kind),
        passes=passes,
        time_limit=time_limit or float(plan.provenance.get("time_limit", "30")),
        seed=int(plan.provenance.get("seed", "0")),
        objective=plan.provenance.get("objective", "phases"),  # type: ignore[arg-type]
        name=plan.model.name,
    )


def _pinned(plan: ir.plan.Plan) -> frozenset[str]:
    """Tables whose ranks the user has named."""
    limits = plan.constraints
    return frozenset(t.name for t in plan.table_plans if limits.for_table(t.name).ranks is not None)


def _why_not_there(
    plan: ir.plan.Plan,
    table: TablePlan,
    model: Model,
    asked: str,
    calibration: Calibration | None,
) -> WhyNot:
    """A unit of the table moved to a rank or host, all else left where it is."""
    ranks = _ranks_of(plan, asked)
    if any(rank in ranks for rank in table.ranks(plan.world_size)):
        return WhyNot(table.name, asked, table.option, "chosen", f"{table.option}: a part of it lies there")
    program = program_of(plan, model)
    base = _repriced(program, table, calibration)[0]
    found: tuple[float, TablePlan] | None = None
    lacking: list[int] = []
    for moved in _moves(table, _candidates(plan, ranks), plan.topology):
        step, short = _repriced(program, moved, calibration)
        if short > 0:
            lacking.append(short)
        elif found is None or step < found[0]:
            found = step, moved
    named = "" if _pinned(plan) else "; ranks are alike: the same plan with its ranks renamed has it there"
    if found is None:
        reason = f"with all else left where it is, {format_bytes(min(lacking))} would lack there{named}"
        return WhyNot(table.name, asked, table.option, "does not fit", reason)
    verdict, reason = _verdict_of_move(found[0] - base, base)
    return WhyNot(
        table.name,
        asked,
        table.option,
        verdict,
        reason + named,
        step=found[0],
        step_change=found[0] - base,
        moved_bytes=moved_bytes(table, found[1], plan.world_size),
    )


def _verdict_of_move(change: float, base: float) -> tuple[Verdict, str]:
    if change < -SAME * base:
        return "better", "the search did not find it in its limit: the step is shorter with the table there"
    if change <= SAME * base:
        return "costs nothing", "with all else left where it is, the step is the same with the table there"
    return "costs", "with all else left where it is, others would wait for that rank"


def _ranks_of(plan: ir.plan.Plan, asked: str) -> tuple[int, ...]:
    place, _, number = asked.partition("=")
    topology = plan.topology
    count = {"rank": plan.world_size, "host": topology.hosts}.get(place)
    if count is None or not number.isdigit():
        raise InputError(f"--why-not {asked} names no place; write rank=5 or host=1")
    at = int(number)
    if at >= count:
        raise InputError(f"the plan has {place}s 0..{count - 1}, not {at}")
    size = topology.host_size
    return (at,) if place == "rank" else tuple(range(at * size, (at + 1) * size))


def _candidates(plan: ir.plan.Plan, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Of several ranks the one with the most free memory and the one with the least work on tables."""
    from cost_models.calibration import default_calibration
    from cost_models.placed import rank_seconds

    loads = rank_seconds(
        plan.table_plans, plan.topology, plan.workload, default_calibration(plan.topology), plan.mode
    )
    busy = sum(loads.values())
    emptiest = min(ranks, key=lambda rank: (plan.memory[rank].total, rank))
    idlest = min(ranks, key=lambda rank: (float(busy[rank]), rank))  # type: ignore[index]
    return tuple(dict.fromkeys((emptiest, idlest)))


def _moves(table: TablePlan, ranks: tuple[int, ...], topology: Topology) -> Iterator[TablePlan]:
    """The table with one of its units, or all where they stay in one host, moved to a rank."""
    size = topology.host_size
    placed = list(placed_units(table, topology))
    for rank in ranks:
        host = topology.host_of(rank)
        if table.sharding_type == "table_column_wise":
            shift = rank - table.shards[0].rank
            moved = [host * size + (shard.rank + shift) % size for shard in table.shards]
            yield _on(table, moved)
            continue
        for chosen in range(min(len(placed), MOST_UNITS)):
            where = [list(held) for _, held in placed]
            where[chosen] = (
                [rank] if placed[chosen][0].scope == "rank" else [host * size + i for i in range(size)]
            )
            yield _on(table, [held for unit in where for held in unit])


def _on(table: TablePlan, ranks: list[int]) -> TablePlan:
    shards = (replace(shard, rank=rank) for shard, rank in zip(table.shards, ranks, strict=True))
    return replace(table, shards=tuple(shards))


def _repriced(program: Program, table: TablePlan, calibration: Calibration | None) -> tuple[float, int]:
    """Modelled step with a table's shards as given, and the bytes that the fullest rank lacks (or has left: < 0)."""
    from passes.memory import MemoryAccounting
    from passes.step import StepTimeline

    assert program.tables is not None
    tables = tuple(table if kept.name == table.name else kept for kept in program.tables)
    made = StepTimeline(calibration).run(MemoryAccounting().run(replace(program, tables=tables)))
    assert made.memory is not None
    assert made.timeline is not None
    return made.timeline.step, max(rank.total - rank.limit for rank in made.memory)


def render_why_not(plan: ir.plan.Plan, found: WhyNot) -> RenderableType:
    """The verdict in one line, then the costs side by side."""
    head = Text(f"{found.table}: why not {found.asked}? chosen is {found.chosen}", style="bold")
    verdict = Text(f"{found.verdict}: {found.reason}")
    if found.step_change is None:
        return Group(head, verdict)
    costs = grid("", ">plan", f">with {found.asked}", ">change")
    if found.at_most is not None:
        objective = plan.certificate.objective
        costs.add_row(
            "objective",
            format_seconds(objective),
            format_seconds(objective + found.at_most),
            signed(found.at_most),
        )
    step = (found.step or 0.0) - found.step_change
    costs.add_row(
        "modelled step", format_seconds(step), format_seconds(found.step or 0.0), signed(found.step_change)
    )
    table = plan.tables[found.table]
    for term, seconds in (found.terms or {}).items():
        before = table.terms.get(term, 0.0)
        costs.add_row(
            f"{term}, all ranks", format_seconds(before), format_seconds(seconds), signed(seconds - before)
        )
    if found.memory is not None:
        before_bytes, after = sum(table.memory.values()), sum(found.memory.values())
        costs.add_row(
            "its memory", format_bytes(before_bytes), format_bytes(after), percent_change(before_bytes, after)
        )
    lines: list[RenderableType] = [head, verdict, Text(), costs, Text()]
    if found.at_most is not None and found.at_least is not None:
        proof = (
            f"proved to cost at least {signed(found.at_least)} ({found.bound_method})"
            if found.at_least > 0
            else f"not proved to cost anything ({found.bound_method})"
        )
        lines.append(
            Text(f"costs at most {signed(found.at_most)}: such a plan was found, all else free; {proof}")
        )
    more = f"{found.changes} other tables change, " if found.at_most is not None else ""
    lines.append(Text(f"{more}{format_bytes(found.moved_bytes)} of weights move"))
    return Group(*lines)
