"""All requests at once: one plan for a stacked-interaction model that decides everything and verifies."""

from __future__ import annotations

from dataclasses import replace

import planner
from ir.compression import CompressionRequest
from ir.constraints import Constraints
from ir.dedup import DedupPlan
from ir.format_plan import FormatRequest
from ir.growth import GrowthRequest
from ir.sessions import SessionGroup, SessionStats
from ir.tier_plan import TierRequest
from ir.towers import TowerRequest
from planner.models import resolve
from planner.report import render_report


def test_formats_tiers_compression_towers_dedup_and_growth_in_one_plan() -> None:
    resolved = resolve("wukong-small")
    assert resolved.workload is not None
    features = [feature for table in resolved.model.tables for feature in table.features]
    sessions = SessionStats(16.5, (SessionGroup(tuple(features[:13]), 0.95),))
    asked = Constraints(
        formats=FormatRequest(max_loss=0.02),
        tiers=TierRequest(),
        compression=CompressionRequest(),
        towers=TowerRequest(),
        growth=GrowthRequest(steps=1000),
    )
    plan = planner.compile(
        "wukong-small", "h100-cxl-2x2", replace(resolved.workload, sessions=sessions), constraints=asked
    )
    assert {"formats", "tiers", "compression", "towers", "dedup", "growth"} <= set(plan.decisions.present())
    assert [finding for finding in planner.verify(plan) if not finding.ok] == []
    assert isinstance(plan.decisions.dedup, DedupPlan)
    assert plan.decisions.dedup.chosen
    # every section can be read, saved and drawn
    text = plan.explain()
    for words in ("deduplication", "compression", "towers", "growth"):
        assert words in text.lower()
    assert planner.Plan.from_dict(plan.to_dict()).digest == plan.digest
    assert "<details" in render_report(plan, sensitivity=False)
