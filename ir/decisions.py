"""What passes decide besides sharding: one optional section a subject, each defined in its own file.

A section is a frozen record (pydantic config :data:`ir.reading.STRICT`) in ``ir/<subject>.py``. None means
that no pass looked at the subject; such sections are left out of the plan file.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from pydantic import ConfigDict

from ir.collective_plan import CollectivePlan
from ir.compression import Compression
from ir.dedup import DedupPlan
from ir.dense_plan import DensePlan
from ir.format_plan import FormatPlan
from ir.growth import Growth
from ir.parallelism import Parallelism
from ir.reading import STRICT
from ir.serving import Serving
from ir.tier_plan import TierPlan
from ir.towers import TowerDecision


@dataclass(frozen=True, slots=True)
class Decisions:
    """The sections of a program and of its plan."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    collectives: CollectivePlan | None = None
    compression: Compression | None = None
    dedup: DedupPlan | None = None
    dense: DensePlan | None = None
    formats: FormatPlan | None = None
    growth: Growth | None = None
    parallelism: Parallelism | None = None
    serving: Serving | None = None
    tiers: TierPlan | None = None
    towers: TowerDecision | None = None

    def present(self) -> tuple[str, ...]:
        """Names of the sections that were decided."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)
