"""The program: what is compiled, and what has been decided so far.

A pass takes a :class:`Program` and returns a new one; nothing is mutated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ir.constraints import Constraints
from ir.decisions import Decisions
from ir.ops import EmbeddingTable, Op
from ir.plan import Assumption, Certificate, RankMemory, TablePlan, Timeline
from ir.reading import digest, dump_record
from ir.topology import Topology
from ir.workload import Workload

Mode = Literal["train", "inference"]
Objective = Literal["phases", "bottleneck"]
"""What sharding minimises, see :mod:`passes.sharding`."""


@dataclass(frozen=True, slots=True)
class Model:
    """A captured model: tables and op records in graph order.

    ``alone`` has the nodes whose rows each depend on one sample's ids of some features and on nothing else, by name, with
    those features (:mod:`ir.capture_rows`).
    """

    name: str
    tables: tuple[EmbeddingTable, ...]
    ops: tuple[Op, ...]
    alone: dict[str, tuple[str, ...]] = field(default_factory=dict, kw_only=True, compare=False)

    @property
    def embedding_params(self) -> int:
        """Parameters in embedding tables."""
        return sum(table.params for table in self.tables)

    @property
    def dense_params(self) -> int:
        """Parameters outside embedding tables."""
        return sum(op.params for op in self.ops)

    @property
    def dense_flops(self) -> float:
        """Forward FLOP per sample outside embedding lookups."""
        return sum(op.flops for op in self.ops)

    @property
    def digest(self) -> str:
        """Content digest over tables and ops."""
        return digest(
            {
                "tables": [dump_record(table) for table in self.tables],
                "ops": [dump_record(op) for op in self.ops],
            }
        )


@dataclass(frozen=True, slots=True)
class Options:
    """How to compile."""

    mode: Mode = "train"
    constraints: Constraints = field(default_factory=Constraints)
    time_limit: float = 30.0  # limit on deterministic solver work, about seconds
    seed: int = 0
    objective: Objective = "phases"


@dataclass(frozen=True, slots=True)
class Program:
    """Model, machine, input and decisions; fields that no pass has filled yet are None or empty."""

    model: Model
    topology: Topology
    workload: Workload
    options: Options
    tables: tuple[TablePlan, ...] | None = None
    certificate: Certificate | None = None
    memory: tuple[RankMemory, ...] | None = None
    timeline: Timeline | None = None
    decisions: Decisions = field(default_factory=Decisions)
    assumptions: tuple[Assumption, ...] = ()
    warnings: tuple[str, ...] = ()
