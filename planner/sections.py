"""The decision sections of a plan as text: one renderer a section, loaded when a plan has it."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from rich.console import RenderableType
from rich.text import Text

from ir.plan import Plan

# section of ir.decisions.Decisions -> "module:function" from a plan to what explain prints
RENDERERS: dict[str, str] = {
    "collectives": "planner.collectives_render:render_collectives",
    "compression": "planner.compression_render:render_compression",
    "dedup": "planner.dedup_render:render_dedup",
    "dense": "planner.dense_render:render_dense",
    "formats": "planner.storage_render:render_formats",
    "parallelism": "planner.llm_render:render_parallelism",
    "growth": "planner.growth_render:render_growth",
    "serving": "planner.serving_render:render_serving",
    "tiers": "planner.storage_render:render_tiers",
    "towers": "planner.towers:render_towers",
}


def render_sections(plan: Plan) -> list[RenderableType]:
    """Every section the plan has, in order, each after an empty line."""
    return [part for name in plan.decisions.present() for part in (Text(), render_section(plan, name))]


def render_section(plan: Plan, name: str) -> RenderableType:
    """One section the plan has."""
    module, _, function = RENDERERS[name].partition(":")
    render: Callable[[Plan], RenderableType] = getattr(importlib.import_module(module), function)
    return render(plan)
