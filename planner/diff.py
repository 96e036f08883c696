"""The difference of two plans in the manner of a reviewable change."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from ir.plan import Plan, TablePlan, common_weights
from ir.units import format_bytes, format_seconds
from planner.llm_render import describe
from planner.render import grid


@dataclass(frozen=True, slots=True)
class TableChange:
    """One table whose decision differs; an empty side means that the plan lacks the table."""

    name: str
    before: str
    after: str
    moved_bytes: int  # weights that are on a rank after and were not there before


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """All that differs between two plans."""

    step: tuple[float, float]
    objective: tuple[float, float]
    peak_memory: tuple[int, int]
    topology: tuple[str, str]
    changes: tuple[TableChange, ...]
    unchanged: int
    same: bool  # the plans are equal, byte for byte
    parallelism: tuple[str, str] = ("", "")  # layouts of decoders

    def to_dict(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        return {
            "same": self.same,
            "step_seconds": list(self.step),
            "objective_seconds": list(self.objective),
            "peak_memory_bytes": list(self.peak_memory),
            "topology": list(self.topology),
            "parallelism": list(self.parallelism),
            "unchanged_tables": self.unchanged,
            "changed_tables": [
                {"table": c.name, "before": c.before, "after": c.after, "moved_bytes": c.moved_bytes}
                for c in self.changes
            ],
        }


def diff_plans(before: Plan, after: Plan) -> PlanDiff:
    """Compare decisions, costs and placement."""
    changes = []
    unchanged = 0
    names = list(dict.fromkeys([*before.tables, *after.tables]))
    for name in names:
        old, new = before.tables.get(name), after.tables.get(name)
        if old is not None and new is not None and (old.option, old.shards) == (new.option, new.shards):
            unchanged += 1
            continue
        moved = moved_bytes(old, new, after.world_size) if new is not None else 0
        changes.append(TableChange(name, old.option if old else "", new.option if new else "", moved))
    return PlanDiff(
        step=(before.timeline.step, after.timeline.step),
        objective=(before.certificate.objective, after.certificate.objective),
        peak_memory=(max(r.total for r in before.memory), max(r.total for r in after.memory)),
        topology=(before.topology.name, after.topology.name),
        changes=tuple(changes),
        unchanged=unchanged,
        same=before.digest == after.digest,
        parallelism=(describe(before), describe(after)),
    )


def moved_bytes(old: TablePlan | None, new: TablePlan, world_size: int) -> int:
    """Bytes of weights that ranks of a world hold under ``new`` and did not hold under ``old`` (fp32)."""
    moved = 0
    for rank in new.ranks(world_size):
        for shard in new.on_rank(rank):
            held = sum(common_weights(shard, other) for other in old.on_rank(rank)) if old is not None else 0
            moved += shard.rows * shard.cols - held
    return moved * 4


def render_diff(diff: PlanDiff, limit: int = 20) -> RenderableType:
    """Costs first, then changes grouped by what became what, then the tables that move most."""
    if diff.same:
        return Text("the plans are identical")
    costs = grid("", ">before", ">after", ">change")
    for name, (old, new) in (
        ("step", diff.step),
        ("objective" if any(diff.parallelism) else "embedding time", diff.objective),
    ):
        moved = f"{100 * (new - old) / old:+.1f} %" if old else "-"
        costs.add_row(name, format_seconds(old), format_seconds(new), moved)
    old_peak, new_peak = diff.peak_memory
    costs.add_row(
        "peak memory",
        format_bytes(old_peak),
        format_bytes(new_peak),
        f"{100 * (new_peak - old_peak) / old_peak:+.1f} %",
    )
    if diff.topology[0] != diff.topology[1]:
        costs.add_row("topology", *diff.topology, "")
    if any(diff.parallelism):
        costs.add_row("parallelism", *diff.parallelism, "" if len(set(diff.parallelism)) == 2 else "the same")
        return Group(costs)
    groups: dict[tuple[str, str], list[TableChange]] = {}
    for change in diff.changes:
        groups.setdefault((change.before, change.after), []).append(change)
    by_group = grid("", "before", "after", ">tables", ">moves")
    for (old_option, new_option), members in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0])):
        sign = "+" if not old_option else "-" if not new_option else "~"
        by_group.add_row(
            sign,
            old_option or "(absent)",
            new_option or "(absent)",
            str(len(members)),
            format_bytes(sum(m.moved_bytes for m in members)),
        )
    movers = sorted(diff.changes, key=lambda c: (-c.moved_bytes, c.name))
    largest = grid("table", "before", "after", ">moves")
    for change in movers[:limit]:
        largest.add_row(
            change.name, change.before or "-", change.after or "-", format_bytes(change.moved_bytes)
        )
    line = (
        f"{len(diff.changes)} tables change, {diff.unchanged} do not; "
        f"{format_bytes(sum(c.moved_bytes for c in diff.changes))} of weights move"
    )
    return Group(costs, Text(), by_group, Text(), largest, Text(), Text(line, style="bold"))
