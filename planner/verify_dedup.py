"""Independent check of a plan's deduplication section."""

from __future__ import annotations

import math
from collections.abc import Iterator

from codegen.execution import form_of
from ir.dedup import DedupPlan
from ir.plan import Plan


def check_dedup(plan: Plan) -> Iterator[str]:
    """Factors follow from the workload's sessions, and the traffic that was priced is that of the choice."""
    section, workload = plan.decisions.dedup, plan.workload
    if section is None:
        if workload.dedup or workload.dedup_ops:
            yield "the workload is deduplicated but no decision says why"
        return
    sessions = workload.sessions
    if sessions is None:
        yield "features are deduplicated but the workload has no sessions"
        return
    stay = {feature: group.stay for group in sessions.groups for feature in group.features}
    size = sessions.samples_per_session
    chosen: dict[str, float] = {}
    for group in section.chosen:
        for feature in group.features:
            if feature in chosen:
                yield f"feature {feature!r} is in two groups"
            chosen[feature] = group.factor
            # of S samples the first is distinct, and each of the S - 1 others if it changed
            distinct = 1 + (size - 1) * (1 - stay.get(feature, 0.0))
            if not math.isclose(group.factor, size / distinct, rel_tol=1e-6):
                yield (
                    f"feature {feature!r} has a dedup factor of {group.factor:g}, its sessions give "
                    f"{size / distinct:g}"
                )
        if group.index_bytes_saved <= group.inverse_bytes:
            yield f"the group of {group.features[0]!r} saves less than its inverse index adds"
    if chosen != workload.dedup:
        yield "the priced traffic is not that of the chosen groups"
    yield from _compute_faults(plan, section)
    copied = [table.name for table in plan.table_plans if table.sharding_type == "data_parallel"]
    if chosen and copied:
        yield f"table {copied[0]!r} is data_parallel, which takes no deduplicated input"


def _compute_faults(plan: Plan, section: DedupPlan) -> Iterator[str]:
    """Operations on distinct rows: of one group each, priced as such, and run by a runtime that has them."""
    priced = plan.workload.dedup_ops
    named = [(op, group.factor) for group in section.chosen for op in group.compute]
    if sorted(op for op, _ in named) != sorted(priced):
        yield "the operations priced on distinct rows are not those of the chosen groups, once each"
    wrong = [op for op, factor in named if priced.get(op) != factor]
    if wrong:
        yield f"operation {wrong[0]!r} is not priced on the distinct rows of its group"
    if named and form_of(plan, plan.topology.device.kind) != "torchrec":
        yield f"operation {named[0][0]!r} is to run on distinct rows, which only TorchRec's exchange hands out"
