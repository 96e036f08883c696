"""The machine for the report: its levels with what their links carry, and how far each memory tier is used."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from ir.plan import Plan
from ir.units import format_bandwidth
from planner.link_loads import LinkLoad, link_loads


def machine_data(plan: Plan) -> dict[str, Any]:
    """Levels from the host outwards, each with its load where one is known."""
    loads = link_loads(plan)
    levels: list[dict[str, Any]] = []
    for number, level in enumerate(plan.topology.levels):
        levels.append(
            {
                "name": level.name,
                "fanout": level.fanout,
                "link": level.link.name,
                "peak": format_bandwidth(level.link.bandwidth),
                **(_load(loads[number], plan.timeline.step) if loads else {}),
            }
        )
    serving = plan.decisions.serving
    what, used = "step", plan.world_size
    if serving is not None:
        what, used = "prompt", serving.chosen.layout.ranks * serving.replicas
    return {"device": plan.topology.device.name, "levels": levels, "what": what, "used": used}


def _load(load: LinkLoad, step: float) -> dict[str, Any]:
    most = float(load.sent.max(initial=0.0))
    seconds = most / load.bandwidth
    rounded = (float(f"{size:.4g}") for size in load.sent.tolist())
    runs = [[len(list(equal)), size] for size, equal in groupby(rounded)]
    return {
        "reached": format_bandwidth(load.bandwidth),
        "rate": load.bandwidth,
        "most": most,
        "seconds": seconds,
        "share": seconds / step if step else 0.0,
        "sent": runs,  # [ranks, bytes of each] of neighbours that send the same
        "parts": load.parts,
    }


def tier_data(plan: Plan) -> list[list[Any]]:
    """``[tier, stored, limit, [[resource, seconds], ...], binding]`` of the busiest host or rank of each tier."""
    section = plan.decisions.tiers
    if section is None:
        return []
    return [
        [use.tier, use.bytes, use.limit, [[k, v] for k, v in use.seconds.items() if v > 0], list(use.binding)]
        for use in section.tiers
    ]
