"""Independent check of a plan's collectives: bytes, buckets and hierarchy re-derived from the plan alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from ir.collective_plan import CollectiveChoice, CollectivePlan
from ir.dtypes import nbytes
from ir.plan import Plan

_SLACK = 1e-9


def check_collectives(plan: Plan) -> Iterator[str]:
    """Buckets are those of the timeline, no collective beats its links, and the tables by size are in order."""
    section = plan.decisions.collectives
    if section is None:
        return
    yield from _buckets(plan, section)
    for choice in section.choices:
        yield from _choice(plan, choice)
    for table in section.crossovers:
        starts = [band.start for band in table.bands]
        if starts[0] != 0 or any(left >= right for left, right in pairwise(starts)):
            yield f"the sizes of {table.collective} do not rise from 0: {starts}"
        if any(left.algorithm == right.algorithm for left, right in pairwise(table.bands)):
            yield f"two neighbouring sizes of {table.collective} have the same algorithm"


def _buckets(plan: Plan, section: CollectivePlan) -> Iterator[str]:
    events = [event for event in plan.timeline.events if event.name.startswith("all_reduce")]
    if plan.decisions.towers is None and len(events) != section.buckets:
        yield f"the step has {len(events)} all-reduces of dense gradients, the decision {section.buckets} buckets"
    total = sum(event.duration for event in events)
    if plan.decisions.towers is None and not math.isclose(total, section.dense_seconds, rel_tol=1e-9):
        yield f"the all-reduces of the step last {total} s, the decision says {section.dense_seconds} s"
    gradients = plan.model.dense_params * nbytes(plan.workload.compute_dtype)
    if section.buckets > gradients / section.bucket_bytes + 1:
        yield f"{section.buckets} buckets of {section.bucket_bytes} bytes for {gradients:.0f} bytes of gradients"
    if section.exposed_seconds > section.dense_seconds * (1 + _SLACK) + 1e-12:
        yield f"{section.exposed_seconds} s are exposed of {section.dense_seconds} s"
    asked = plan.constraints.collectives
    if asked is not None and asked.bucket_bytes not in (None, section.bucket_bytes):
        yield f"buckets of {asked.bucket_bytes} bytes were asked for, {section.bucket_bytes} decided"


def _choice(plan: Plan, choice: CollectiveChoice) -> Iterator[str]:
    what = f"{choice.name} by {choice.algorithm}"
    if math.prod(choice.levels) != plan.world_size:
        yield f"{what} goes over {choice.levels}, the plan has {plan.world_size} ranks"
    if not math.isclose(sum(choice.terms.values()), choice.seconds, rel_tol=1e-6):
        yield f"{what} takes {choice.seconds} s, its terms add up to {sum(choice.terms.values())} s"
    # nothing can be faster than all of a rank's links together at their peak
    peak = sum(level.link.bandwidth for level in plan.topology.levels if level.fanout > 1)
    # (each of these moves all but a rank's own part through the ports of the rank that has most)
    least = choice.size * (1 - 1 / plan.world_size) / peak
    if choice.seconds < least * (1 - _SLACK):
        yield f"{what} takes {choice.seconds} s, its bytes need {least} s at the peak of all links"
    if choice.algorithm in ("overlapped", "in_switch", "channel_ring") and choice.engine == "scheduled":
        yield f"{what} is a library's, the plan says that this project sends it"
    sized = plan.model.dense_params * nbytes(plan.workload.compute_dtype)
    if choice.name == "dense_all_reduce" and choice.size > sized * (1 + _SLACK):
        yield f"{what} reduces {choice.size} bytes, the dense part has {sized} bytes of gradients"
