"""Deduplication: which feature groups travel and are looked up once per distinct sample.

A group of features that change together within a session (:mod:`ir.sessions`) is deduplicated when

- its ids shrink by more than the inverse index adds (RecD's rule: more than 4 bytes a sample), and
- the exchange, lookup and compute it saves take longer than repeating rows afterwards.

Exchange and lookup are priced with the cost model of a table-wise placement, the sharding is chosen afterwards with
the reduced traffic. Operations that read features of the group alone (pooling of sequences, attention over them, towers)
run once a distinct row; rows are repeated where a value meets other inputs.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, replace
from typing import ClassVar

from cost_models.calibration import Calibration, default_calibration
from cost_models.compute import BACKWARD_FACTOR
from cost_models.dedup import dedupe_factor, expand_seconds
from cost_models.embedding import LENGTH_BYTES, unit_seconds
from cost_models.step import dense_seconds
from ir.dedup import DedupGroup, DedupPlan, DedupRequest
from ir.ops import EmbeddingTable
from ir.program import Program
from ir.sessions import INVERSE_BYTES, SessionGroup
from ir.sharding import ShardingOption, largest_units
from ir.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class Dedup:
    """Fill ``decisions.dedup`` and the workload's ``dedup`` factors; nothing without session statistics."""

    name: ClassVar[str] = "dedup"
    calibration: Calibration | None = None

    def run(self, program: Program) -> Program:
        """Decide each group of the workload's sessions by itself."""
        sessions = program.workload.sessions
        request = program.options.constraints.dedup or DedupRequest()
        if sessions is None or not request.enabled:
            return program
        calibration = self.calibration or default_calibration(program.topology)
        known = {feature for table in program.model.tables for feature in table.features}
        groups = []
        for group in sessions.groups:
            features = tuple(
                f
                for f in group.features
                if f in known and not any(fnmatch.fnmatchcase(f, glob) for glob in request.keep)
            )
            if features:
                groups.append(
                    _decide(
                        program, replace(group, features=features), sessions.samples_per_session, calibration
                    )
                )
        section = DedupPlan(sessions.samples_per_session, tuple(groups))
        factors = {feature: group.factor for group in section.chosen for feature in group.features}
        repeats = {op: group.factor for group in section.chosen for op in group.compute}
        return replace(
            program,
            workload=replace(program.workload, dedup=factors, dedup_ops=repeats),
            decisions=replace(program.decisions, dedup=section),
        )


def _decide(program: Program, group: SessionGroup, size: float, calibration: Calibration) -> DedupGroup:
    workload, topology, train = program.workload, program.topology, program.options.mode == "train"
    samples = workload.global_batch / topology.world_size
    factor = dedupe_factor(size, group.stay)
    wanted = set(group.features)
    tables = [t for t in program.model.tables if wanted & set(t.features)]
    ids = sum(workload.stats(f).pooling_factor * workload.id_bytes + LENGTH_BYTES for f in group.features)
    saved_bytes = samples * ids * (1 - 1 / factor)
    inverse = samples * INVERSE_BYTES
    before = _seconds(program, tables, {}, calibration)
    after = _seconds(program, tables, dict.fromkeys(group.features, factor), calibration)
    saved = before - after
    compute = _compute(program, wanted)
    spared = _spared(program, compute, factor, calibration)
    if spared <= 0:  # nothing but the reading of vectors, which TorchRec repeats as well
        compute = ()
    columns = _repeated(program, tables, wanted, compute)
    expand = expand_seconds(samples, columns, factor, topology, workload, calibration, train=train)
    if saved_bytes <= inverse:
        reason = f"ids shrink by {format_bytes(saved_bytes)}, less than the inverse index of {format_bytes(inverse)}"
    elif saved + spared <= expand:
        reason = (
            f"saves {format_seconds(saved + spared)} of exchange, lookup and compute, repeating rows costs "
            f"{format_seconds(expand)}"
        )
    else:
        reason = (
            f"{factor:.2f} samples a distinct row: {format_bytes(saved_bytes - inverse)} less to carry and "
            f"{format_seconds(saved + spared - expand)} less a step"
        )
    chosen = saved_bytes > inverse and saved + spared > expand
    return DedupGroup(
        group.features, factor, saved_bytes, inverse, saved, expand, chosen, reason, compute, max(0.0, spared)
    )


def _compute(program: Program, features: set[str]) -> tuple[str, ...]:
    """The operations that run once a distinct row: those that read features of the group alone.

    Only TorchRec's own exchange hands out distinct rows, so none where another runtime is asked for, nor where layers
    resize while training.
    """
    asked = program.options.constraints
    if any(other is not None for other in (asked.towers, asked.tiers, asked.compression, asked.growth)):
        return ()
    return tuple(name for name, read in program.model.alone.items() if features.issuperset(read))


def _repeated(
    program: Program, tables: list[EmbeddingTable], features: set[str], compute: tuple[str, ...]
) -> int:
    """Columns of the rows that are repeated: what leaves the operations on distinct rows, and the vectors of the rest."""
    inside = set(compute)
    read = {f for name in compute for f in program.model.alone[name]}
    leaving = {
        name for op in program.model.ops if op.name not in inside for name in op.inputs if name in inside
    }
    widths = [math.prod(op.out_shape[1:]) for op in program.model.ops if op.name in leaving]
    rest = [t.dim * len((features - read) & set(t.features)) for t in tables if t.pooling != "none"]
    return sum(widths) + sum(rest)


def _spared(program: Program, compute: tuple[str, ...], factor: float, calibration: Calibration) -> float:
    """Seconds a step of those operations on all samples, less those on distinct rows."""
    whole = replace(program.workload, dedup_ops={})
    fewer = replace(program.workload, dedup_ops=dict.fromkeys(compute, factor))
    before, after = (
        dense_seconds(program.model, program.topology, workload, calibration) for workload in (whole, fewer)
    )
    ways = 1 + (BACKWARD_FACTOR if program.options.mode == "train" else 0)
    return ways * sum(before[name] - after[name] for name in compute if name in before)


def _seconds(
    program: Program, tables: list[EmbeddingTable], dedup: dict[str, float], calibration: Calibration
) -> float:
    """Seconds a step of these tables, table-wise and spread evenly over the ranks."""
    workload = replace(program.workload, dedup=dedup)
    topology, total = program.topology, 0.0
    for table in tables:
        option = ShardingOption("table_wise", (table.dim,))
        ((unit, _),) = largest_units(option, table.rows, topology.world_size, topology.host_size)
        price = unit_seconds(table, option, unit, topology, workload, calibration, program.options.mode)
        total += sum(price.values())
    return total / topology.world_size
