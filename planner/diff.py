"""The difference of two plans in the manner of a reviewable change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ir.plan import Plan, TablePlan, common_weights
from ir.reading import dump_record
from ir.units import format_bandwidth, format_bytes, format_count, format_seconds
from planner.llm_render import describe

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
    objectives: tuple[str, str] = ("", "")  # what each plan minimises

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
        objectives=(before.certificate.objective_name, after.certificate.objective_name),
    )


def _rate(plan: Plan) -> float:
    """Samples, or tokens, a second; of a serving plan new tokens of prompts, all replicas at work."""
    serving = plan.decisions.serving
    if serving is not None:
        seconds = serving.chosen.ttft
        return serving.request.new * serving.replicas / seconds if seconds > 0 else 0.0
    count = plan.workload.llm.global_tokens if plan.workload.llm else plan.workload.global_batch
    return count / plan.timeline.step if plan.timeline.step else 0.0


def _phases(plan: Plan) -> dict[str, float]:
    """Seconds by phase, parts of one (``all_reduce_0``, ``all_reduce_1``) together: another bucket is no other phase."""
    serving = plan.decisions.serving
    made: dict[str, float] = {"between tokens": serving.chosen.ttit} if serving is not None else {}
    for event in plan.timeline.events:
        if event.duration > 0:
            name = re.sub(r"_(\d+|last)$", "", event.name)
            made[name] = made.get(name, 0.0) + event.duration
    return made


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
