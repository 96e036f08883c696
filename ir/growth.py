"""Alternate growth and pruning: what is asked, and the phases that are decided.

Training starts at full size, alternates between pruned and regrown hidden layers, and ends at full size.
A phase fixes how many hidden units each layer keeps, how tables are sharded, what travels and what linear layers compute in.
The schedule is this project's own; the idea is of "Alternate Model Growth and Pruning for Efficient
Training of Recommendation Systems" (arXiv 2105.01064), whose abstract states no schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from ir.format_plan import FormatId
from ir.reading import STRICT
from ir.workload import ExchangeType

PhaseKind = Literal["full", "pruned", "grown"]
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, slots=True)
class GrowthRequest:
    """What is asked of the growth pass.

    The training of ``steps`` is: ``warmup`` of it at full size; then ``cycles`` times a pruned stretch,
    which takes two thirds of its cycle, and a grown one; the last grown stretch is the final phase at full
    size, of at least ``final`` of the training.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    steps: Annotated[int, Field(ge=10, le=10**12)]  # of the whole training
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5  # hidden units removed from each layer when pruned
    regrow: Annotated[float, Field(ge=0, le=1)] = 0.5  # of the removed units, back in a grown phase
    cycles: Annotated[int, Field(ge=1, le=100)] = 2
    warmup: Share = 0.1
    final: Annotated[float, Field(gt=0, lt=1)] = 0.2
    multiple: Annotated[int, Field(ge=1)] = 8  # units kept are a multiple of it: vector and tile widths
    exclude: tuple[str, ...] = ()  # globs of modules that keep their width
    exchange_dtypes: tuple[ExchangeType, ...] = ()  # also allowed on the wire before the final phase
    gemm_formats: tuple[
        FormatId, ...
    ] = ()  # also allowed for operands of linear layers before the final phase


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """A hidden layer whose units can be removed: rows of ``producer``, columns of each consumer."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    producer: str  # module path of the linear layer that makes the units
    consumers: tuple[str, ...]  # module paths of the linear layers that read them
    units: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class MovedTable:
    """A table that a phase shards otherwise than the plan does.

    ``columns`` are its column blocks ``(first column, columns, rank)``; where rows are split, the rank is
    the first of those that share the block, and -1 stands for a copy on every rank.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    sharding_type: str
    columns: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class GrowthPhase:
    """A stretch of the training."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: PhaseKind
    steps: Annotated[int, Field(ge=1)]
    kept: tuple[Annotated[int, Field(ge=1)], ...]  # hidden units, by layer of the section
    flops: Annotated[float, Field(ge=0)]  # forward, dense, per sample
    step_seconds: Annotated[float, Field(ge=0)]
    memory: Annotated[int, Field(ge=0)]  # bytes on the fullest rank
    exchange_dtype: ExchangeType
    gemm_format: FormatId | None = None  # of all linear layers' operands and gradients; None: the plan's own
    sharding: Annotated[int, Field(ge=0)] = 0  # of the section's shardings; 0 is the plan's own
    move_bytes: Annotated[int, Field(ge=0)] = 0  # table rows and state into the rank that receives most
    move_seconds: Annotated[float, Field(ge=0)] = 0.0  # before the phase: tables, and the dense resizing


@dataclass(frozen=True, slots=True)
class Growth:
    """The growth section of a plan."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    layers: tuple[PrunedLayer, ...]
    phases: Annotated[tuple[GrowthPhase, ...], Field(min_length=1)]
    shardings: tuple[tuple[MovedTable, ...], ...] = ()  # number i + 1: the tables that differ from the plan
    dense_seconds: Annotated[float, Field(ge=0)] = 0.0  # the same steps at full size under the plan
    fixed_seconds: Annotated[float, Field(ge=0)] = (
        0.0  # these phases under the plan's sharding and type alone
    )

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return sum(phase.steps for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Of the whole training, moves included."""
        return sum(phase.steps * phase.step_seconds + phase.move_seconds for phase in self.phases)

    @property
    def flop_saving(self) -> float:
        """Fraction of the dense training FLOP that the schedule avoids."""
        whole = max(phase.flops for phase in self.phases) * self.steps
        return 1 - sum(phase.steps * phase.flops for phase in self.phases) / whole if whole else 0.0

    @property
    def time_saving(self) -> float:
        """Fraction of the modelled training time that the schedule avoids."""
        return 1 - self.seconds / self.dense_seconds if self.dense_seconds else 0.0


def schedule(request: GrowthRequest) -> tuple[tuple[PhaseKind, int, float], ...]:
    """Kind, steps and sparsity of each phase, in order; the steps add up to the request's.

    Phases that would last no step are left out, the final one never is.
    """
    warm = round(request.steps * request.warmup)
    final = max(1, round(request.steps * request.final))
    middle = max(0, request.steps - warm - final)
    edges = [round(middle * part / (3 * request.cycles)) for part in range(3 * request.cycles + 1)]
    phases: list[tuple[PhaseKind, int, float]] = [("full", min(warm, request.steps - final), 0.0)]
    for cycle in range(request.cycles):
        start, turn, end = edges[3 * cycle], edges[3 * cycle + 2], edges[3 * cycle + 3]
        if cycle == request.cycles - 1:  # what comes next is full size: the last growth is all of it
            turn = end
        phases.append(("pruned", turn - start, request.sparsity))
        phases.append(("grown", end - turn, request.sparsity * (1 - request.regrow)))
    phases.append(("full", final, 0.0))
    return tuple(phase for phase in phases if phase[1] > 0)


def kept_units(units: int, sparsity: float, multiple: int) -> int:
    """Units a layer of ``units`` keeps: the nearest multiple, at least one of it, at most all."""
    if sparsity <= 0:
        return units
    return min(units, max(multiple, round(units * (1 - sparsity) / multiple) * multiple))
