"""Session structure of an input stream: how often consecutive samples of a session repeat their ids.

Logs of recommenders hold several impressions of one visit; most user features do not change between them
(RecD, MLSys 23). ``stay`` is the probability that a feature's ids equal those of the previous sample of the
same session. Features that change together form a group, which shares one inverse index when deduplicated.
:mod:`ir.session_stats` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from ir.reading import STRICT

INVERSE_BYTES = 4  # one int32 a sample: which distinct row the sample is


@dataclass(frozen=True, slots=True)
class SessionGroup:
    """Features that change together."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    features: Annotated[tuple[str, ...], Field(min_length=1)]
    stay: Annotated[float, Field(ge=0, le=1)]  # P(no feature of the group changes to the next sample)


@dataclass(frozen=True, slots=True)
class SessionStats:
    """Sessions of a stream whose batches hold whole sessions side by side."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    samples_per_session: Annotated[float, Field(ge=1, le=1e9)]  # mean, within one rank's batch
    groups: tuple[SessionGroup, ...]
    origin: str = "given"
