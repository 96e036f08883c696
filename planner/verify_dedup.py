"""Independent check of a plan's deduplication section."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ir.plan import Plan


def check_dedup(plan: Plan) -> Iterator[str]:
    """Factors follow from the workload's sessions, and the traffic that was priced is that of the choice."""
    section, workload = plan.decisions.dedup, plan.workload
    if section is None:
        if workload.dedup:
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
    copied = [table.name for table in plan.table_plans if table.sharding_type == "data_parallel"]
    if chosen and copied:
        yield f"table {copied[0]!r} is data_parallel, which takes no deduplicated input"
