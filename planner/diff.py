"""The difference of two plans in the manner of a reviewable change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Group, RenderableType
from rich.text import Text

from ir.plan import Plan, TablePlan, common_weights
from ir.reading import dump_record
from ir.units import format_bandwidth, format_bytes, format_count, format_seconds
from planner.llm_render import describe
from planner.render import grid, percent_change

MOST_INPUTS = 30  # differing inputs that are listed
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class TableChange:
    """One table whose decision differs; an empty side means that the plan lacks the table."""

    name: str
    before: str
    after: str
    moved_bytes: int  # weights that are on a rank after and were not there before


@dataclass(frozen=True, slots=True)
class Move:
    """What it takes to get from one plan to the other: weights and optimizer state that ranks receive."""

    bytes: int
    seconds: float  # of the rank that receives most, over the link between hosts

    def break_even(self, saved: float) -> float | None:
        """Steps after which the move has paid, given seconds saved a step; None if it never does."""
        return self.seconds / saved if saved > 0 else None


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """All that differs between two plans; pairs are before and after."""

    step: tuple[float, float]
    objective: tuple[float, float]
    gap: tuple[float, float]
    rate: tuple[float, float]  # samples (decoders: tokens) a second
    peak_memory: tuple[int, int]
    topology: tuple[str, str]
    inputs: dict[str, tuple[str, str]]  # what differs of machine, workload and constraints, by its path
    phases: dict[str, tuple[float, float]]  # seconds of the step's events
    memory: dict[str, tuple[int, int]]  # bytes by purpose, on the rank that has most of it
    sections: dict[str, str]  # decision sections: "added", "removed" or "changed"
    changes: tuple[TableChange, ...]
    unchanged: int
    move: Move
    same: bool  # the plans are equal, byte for byte
    parallelism: tuple[str, str] = ("", "")  # layouts of decoders

    @property
    def saved(self) -> float:
        """Seconds of a step that the second plan saves; below 0 where it is slower."""
        return self.step[0] - self.step[1]

    def to_dict(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        return {
            "same": self.same,
            "step_seconds": list(self.step),
            "objective_seconds": list(self.objective),
            "gap": list(self.gap),
            "samples_per_second": list(self.rate),
            "peak_memory_bytes": list(self.peak_memory),
            "topology": list(self.topology),
            "parallelism": list(self.parallelism),
            "inputs": {name: list(pair) for name, pair in self.inputs.items()},
            "phase_seconds": {name: list(pair) for name, pair in self.phases.items()},
            "memory_bytes": {name: list(pair) for name, pair in self.memory.items()},
            "sections": self.sections,
            "unchanged_tables": self.unchanged,
            "moved_bytes": self.move.bytes,
            "move_seconds": self.move.seconds,
            "break_even_steps": self.move.break_even(self.saved),
            "changed_tables": [
                {"table": c.name, "before": c.before, "after": c.after, "moved_bytes": c.moved_bytes}
                for c in self.changes
            ],
        }


def diff_plans(before: Plan, after: Plan) -> PlanDiff:
    """Compare inputs, decisions, costs and placement."""
    changes = []
    unchanged = 0
    names = list(dict.fromkeys([*before.tables, *after.tables]))
    was, now = before.tables, after.tables
    for name in names:
        old, new = was.get(name), now.get(name)
        if old is not None and new is not None and (old.option, old.shards) == (new.option, new.shards):
            unchanged += 1
            continue
        moved = moved_bytes(old, new, after.world_size) if new is not None else 0
        changes.append(TableChange(name, old.option if old else "", new.option if new else "", moved))
    return PlanDiff(
        step=(before.timeline.step, after.timeline.step),
        objective=(before.certificate.objective, after.certificate.objective),
        gap=(before.certificate.gap, after.certificate.gap),
        rate=(_rate(before), _rate(after)),
        peak_memory=(max(r.total for r in before.memory), max(r.total for r in after.memory)),
        topology=(before.topology.name, after.topology.name),
        inputs=_inputs(before, after),
        phases=_pairs(_phases(before), _phases(after), 0.0),
        memory=_pairs(_memory(before), _memory(after), 0),
        sections=_sections(before, after),
        changes=tuple(changes),
        unchanged=unchanged,
        move=_move(before, after),
        same=before.digest == after.digest,
        parallelism=(describe(before), describe(after)),
    )


def _rate(plan: Plan) -> float:
    count = plan.workload.llm.global_tokens if plan.workload.llm else plan.workload.global_batch
    return count / plan.timeline.step if plan.timeline.step else 0.0


def _phases(plan: Plan) -> dict[str, float]:
    return {event.name: event.duration for event in plan.timeline.events if event.duration > 0}


def _memory(plan: Plan) -> dict[str, int]:
    purposes = dict.fromkeys(purpose for rank in plan.memory for purpose in rank.used)
    return {purpose: max(rank.used.get(purpose, 0) for rank in plan.memory) for purpose in purposes}


def _pairs(
    old: Mapping[str, Number], new: Mapping[str, Number], none: Number
) -> dict[str, tuple[Number, Number]]:
    names = dict.fromkeys((*old, *new))
    pairs = {name: (old.get(name, none), new.get(name, none)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _move(before: Plan, after: Plan) -> Move:
    from planner.replanning import received

    shared = min(before.world_size, after.world_size)
    kept = [*range(shared), *(-1 for _ in range(after.world_size - shared))]
    total, most = received(before, after, kept)
    return Move(total, most / after.topology.inter_link.bandwidth)


def _sections(before: Plan, after: Plan) -> dict[str, str]:
    old, new = set(before.decisions.present()), set(after.decisions.present())
    found = dict.fromkeys(old - new, "removed") | dict.fromkeys(new - old, "added")
    for name in old & new:
        if getattr(before.decisions, name) != getattr(after.decisions, name):
            found[name] = "changed"
    return dict(sorted(found.items()))


def _inputs(before: Plan, after: Plan) -> dict[str, tuple[str, str]]:
    """Leaves of machine, workload and constraints that differ; of long ones the first :data:`MOST_INPUTS`."""
    found: dict[str, tuple[str, str]] = {}
    for name in ("topology", "workload", "constraints"):
        old, new = (dict(_leaves(dump_record(getattr(plan, name)), name)) for plan in (before, after))
        for path in dict.fromkeys((*old, *new)):
            if old.get(path) != new.get(path) and not path.startswith("workload.dedup"):
                found[path] = _shown(path, old.get(path)), _shown(path, new.get(path))
    return dict(list(found.items())[:MOST_INPUTS])


def _leaves(data: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _leaves(value, f"{path}.{name}")
    elif isinstance(data, list) and any(isinstance(value, dict) for value in data):
        for index, value in enumerate(data):
            named = value.get("name", index) if isinstance(value, dict) else index
            yield from _leaves(value, f"{path}.{named}")
    else:
        yield path, data


def _shown(path: str, value: Any) -> str:
    """A leaf with its unit."""
    leaf = path.rpartition(".")[2]
    if isinstance(value, int | float) and not isinstance(value, bool):
        if leaf in ("capacity", "memory_limit", "granule"):
            return format_bytes(value)
        if leaf.endswith("bandwidth"):
            return format_bandwidth(value)
        if leaf == "latency":
            return format_seconds(value)
        if ".flops." in path:
            return f"{format_count(value)}FLOP/s"
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def moved_bytes(old: TablePlan | None, new: TablePlan, world_size: int) -> int:
    """Bytes of weights that ranks of a world hold under ``new`` and did not hold under ``old`` (fp32)."""
    moved = 0
    for rank in new.ranks(world_size):
        for shard in new.on_rank(rank):
            held = sum(common_weights(shard, other) for other in old.on_rank(rank)) if old is not None else 0
            moved += shard.rows * shard.cols - held
    return moved * 4


def render_diff(diff: PlanDiff, limit: int = 20) -> RenderableType:
    """What went in, what it gains, where: then changes grouped by what became what, and what moves most."""
    if diff.same:
        return Text("the plans are identical")
    parts: list[RenderableType] = []
    if diff.inputs:
        changed = grid("input", "before", "after")
        for name, pair in diff.inputs.items():
            changed.add_row(name, *pair)
        parts += [changed, Text()]
    parts += [_costs(diff), Text()]
    if any(diff.parallelism):
        return Group(*parts[:-1])
    if diff.changes:
        parts += [_groups(diff), Text(), _movers(diff, limit), Text()]
    parts += [Text(f"{verb}: {name}") for name, verb in diff.sections.items()]
    return Group(*parts, Text(_verdict(diff), style="bold"))


def _costs(diff: PlanDiff) -> RenderableType:
    costs = grid("", ">before", ">after", ">change")

    def seconds(name: str, old: float, new: float) -> None:
        costs.add_row(name, format_seconds(old), format_seconds(new), percent_change(old, new))

    seconds("step", *diff.step)
    costs.add_row(
        "tokens/s" if any(diff.parallelism) else "samples/s",
        *(format_count(rate) for rate in diff.rate),
        percent_change(*diff.rate),
    )
    seconds("objective" if any(diff.parallelism) else "embedding time", *diff.objective)
    costs.add_row("proved gap", *(f"{100 * gap:.2f} %" for gap in diff.gap), "")
    for name, (old_time, new_time) in diff.phases.items():
        seconds(f"  {name}", old_time, new_time)
    costs.add_row(
        "peak memory", *(format_bytes(size) for size in diff.peak_memory), percent_change(*diff.peak_memory)
    )
    for name, pair in diff.memory.items():
        costs.add_row(f"  {name}", *(format_bytes(size) for size in pair), percent_change(*pair))
    if diff.topology[0] != diff.topology[1]:
        costs.add_row("topology", *diff.topology, "")
    if any(diff.parallelism):
        costs.add_row("parallelism", *diff.parallelism, "" if len(set(diff.parallelism)) == 2 else "the same")
    return costs


def _groups(diff: PlanDiff) -> RenderableType:
    """``~`` changed, ``+`` new, ``-`` gone; moves are of weights."""
    groups: dict[tuple[str, str], list[TableChange]] = {}
    for change in diff.changes:
        groups.setdefault((change.before, change.after), []).append(change)
    table = grid("", "before", "after", ">tables", ">moves")
    for (old, new), members in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0])):
        sign = "+" if not old else "-" if not new else "~"
        size = format_bytes(sum(m.moved_bytes for m in members))
        table.add_row(sign, old or "(absent)", new or "(absent)", str(len(members)), size)
    return table


def _movers(diff: PlanDiff, limit: int) -> RenderableType:
    table = grid("table", "before", "after", ">moves")
    for change in sorted(diff.changes, key=lambda c: (-c.moved_bytes, c.name))[:limit]:
        table.add_row(
            change.name, change.before or "-", change.after or "-", format_bytes(change.moved_bytes)
        )
    return table


def _verdict(diff: PlanDiff) -> str:
    """What changes, what moves, and when that has paid."""
    steps = diff.move.break_even(diff.saved)
    gain = (
        f"saves {format_seconds(diff.saved)} a step"
        if diff.saved > 0
        else (f"costs {format_seconds(-diff.saved)} a step" if diff.saved < 0 else "the step is the same")
    )
    paid = f"; the move has paid after {max(1, math.ceil(steps)):,} steps" if steps is not None else ""
    moves = (
        f"{format_bytes(sum(c.moved_bytes for c in diff.changes))} of weights move, with optimizer state "
        f"{format_bytes(diff.move.bytes)} in about {format_seconds(diff.move.seconds)}"
    )
    return f"{len(diff.changes)} tables change, {diff.unchanged} do not; {moves}; {gain}{paid}"
