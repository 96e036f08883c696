"""Deduplication: which feature groups travel and are looked up once per distinct sample.

A group of features that change together within a session (:mod:`ir.sessions`) is deduplicated when

- its ids shrink by more than the inverse index adds (RecD's rule: more than 4 bytes a sample), and
- the exchange and lookup it saves take longer than repeating the pooled rows afterwards.

Both sides are priced with the cost model of a table-wise placement, the sharding is chosen afterwards with
the reduced traffic. Pooled rows are repeated where they arrive, after the output exchange, so that it, too,
carries each distinct row once.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from typing import ClassVar

from cost_models.calibration import Calibration, default_calibration
from cost_models.dedup import dedupe_factor, expand_seconds
from cost_models.embedding import LENGTH_BYTES, unit_seconds
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
        return replace(
            program,
            workload=replace(program.workload, dedup=factors),
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
    columns = sum(t.dim * len(wanted & set(t.features)) for t in tables if t.pooling != "none")
    expand = expand_seconds(samples, columns, factor, topology, workload, calibration, train=train)
    saved = before - after
    if saved_bytes <= inverse:
        reason = f"ids shrink by {format_bytes(saved_bytes)}, less than the inverse index of {format_bytes(inverse)}"
    elif saved <= expand:
        reason = f"saves {format_seconds(saved)} of exchange and lookup, repeating rows costs {format_seconds(expand)}"
    else:
        reason = (
            f"{factor:.2f} samples a distinct row: {format_bytes(saved_bytes - inverse)} less to carry and "
            f"{format_seconds(saved - expand)} less a step"
        )
    chosen = saved_bytes > inverse and saved > expand
    return DedupGroup(group.features, factor, saved_bytes, inverse, saved, expand, chosen, reason)


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
