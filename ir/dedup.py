"""The deduplication section of a plan: which features are sent and looked up once per distinct sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from ir.reading import STRICT


@dataclass(frozen=True, slots=True)
class DedupRequest:
    """What is asked of the dedup pass; without session statistics in the workload it does nothing."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    enabled: bool = True
    keep: tuple[str, ...] = ()  # globs of features that are never deduplicated


@dataclass(frozen=True, slots=True)
class DedupGroup:
    """One inverse-keyed jagged tensor: features that share an inverse index, and whether it pays."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    features: tuple[str, ...]
    factor: Annotated[float, Field(ge=1)]  # samples a distinct row stands for
    index_bytes_saved: float  # ids and lengths a step and rank no longer carries
    inverse_bytes: float  # of the inverse index, a step and rank
    seconds_saved: float  # of exchange and lookup, modelled table-wise, a step
    expand_seconds: float  # to repeat the rows and add up their gradients, a step
    chosen: bool
    reason: str
    # Operations of the model that read this group alone and run once a distinct row, and what that saves a step.
    compute: tuple[str, ...] = ()
    compute_seconds: Annotated[float, Field(ge=0)] = 0.0


@dataclass(frozen=True, slots=True)
class DedupPlan:
    """Every group of the workload, chosen or not."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    samples_per_session: Annotated[float, Field(ge=1)]
    groups: tuple[DedupGroup, ...] = field(default_factory=tuple)

    @property
    def chosen(self) -> tuple[DedupGroup, ...]:
        """The groups that are deduplicated."""
        return tuple(group for group in self.groups if group.chosen)
