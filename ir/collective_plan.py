"""What is decided about the collectives of a step: algorithm, chunk, hierarchy, bucket; and what is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from ir.reading import STRICT
from ir.schedules import Collective

Engine = Literal["library", "scheduled"]
"""Who runs a collective: NCCL or gloo as they come, or this project's point-to-point schedules."""

Bytes = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class CollectiveRequest:
    """What the user asks of the collectives."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    dense_engine: Engine = "library"  # of the all-reduce of dense gradients
    dense_algorithm: str = ""  # one of the engine's, such as "halving_doubling"; empty: the fastest
    bucket_bytes: Annotated[int, Field(ge=2**16)] | None = None  # None: the planner's to decide


@dataclass(frozen=True, slots=True)
class CollectiveChoice:
    """One collective of the step.

    Attributes:
        name: the op of the step: input_dist, output_dist, gradient_dist or dense_all_reduce.
        collective: what is computed.
        size: bytes of the buffer of the rank that has most; of one bucket.
        count: times a step.
        algorithm: a name of :mod:`cost_models.collective.algorithms`.
        engine: who runs it.
        levels: fanouts of the levels it goes through one by one; a single number: flat.
        chunk: bytes of a chunk; 0 when nothing is cut.
        seconds: modelled, of one.
        terms: what they are made of.
        runner_up: the next best algorithm of either engine, and its seconds; empty when there is none.
        reason: in words.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    collective: Collective
    size: Bytes
    count: Annotated[int, Field(ge=1)]
    algorithm: str
    engine: Engine
    levels: tuple[Annotated[int, Field(ge=1)], ...]
    chunk: Bytes
    seconds: Seconds
    terms: dict[str, float] = field(default_factory=dict)
    runner_up: str = ""
    runner_up_seconds: Seconds = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Band:
    """From so many bytes on, this algorithm is the fastest."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    start: Bytes
    algorithm: str


@dataclass(frozen=True, slots=True)
class Crossovers:
    """The fastest algorithm of one collective by message size, an engine's own ones."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    collective: Collective
    engine: Engine
    bands: Annotated[tuple[Band, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class CollectivePlan:
    """The collectives of a step.

    Attributes:
        bucket_bytes: dense gradients gathered before an all-reduce starts (DDP's bucket_cap_mb).
        buckets: of a step.
        dense_seconds: of all of them.
        exposed_seconds: of those, what the backward pass does not hide.
        default_step_change: seconds that the step would last longer with DDP's bucket of 25 MiB.
        choices: one for each collective.
        crossovers: tables by message size.
        environment: variables that ask NCCL for what was decided; advice, NCCL's own choice is as a rule the same.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    bucket_bytes: Annotated[int, Field(ge=1)]
    buckets: Annotated[int, Field(ge=0)]
    dense_seconds: Seconds
    exposed_seconds: Seconds
    default_step_change: float
    choices: tuple[CollectiveChoice, ...]
    crossovers: tuple[Crossovers, ...]
    environment: dict[str, str] = field(default_factory=dict)
