"""The plan: the final form of the IR, a small versioned JSON file.

A plan holds decisions, what each of them is modelled to cost, and how it was made; it never holds
wall-clock times, host names or paths, so the same inputs give the same bytes. Seconds are modelled
seconds, bytes are bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from ir.constraints import Constraints, ShardingType
from ir.decisions import Decisions
from ir.errors import InputError
from ir.format_plan import FormatId
from ir.reading import STRICT, as_mapping, clipped, digest, dump_record, parse_record, read_json
from ir.tier_plan import TableTiers
from ir.topology import Topology
from ir.workload import Workload

FORMAT_VERSION = "1.0"  # MAJOR.MINOR: an unknown major is refused, a newer minor is read

Count = Annotated[int, Field(ge=0)]

EVERY_RANK = -1
"""Rank of the one shard of a data-parallel table: each rank holds a copy."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A block of a table on one rank: ``rows`` x ``cols`` from ``(row, col)``.

    A ``data_parallel`` table has one whole-table shard with rank :data:`EVERY_RANK`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rank: Annotated[int, Field(ge=EVERY_RANK)]
    row: Count
    col: Count
    rows: Count
    cols: Count


def common_weights(one: Shard, other: Shard) -> int:
    """Weights that two blocks of a table share."""
    height = min(one.row + one.rows, other.row + other.rows) - max(one.row, other.row)
    width = min(one.col + one.cols, other.col + other.cols) - max(one.col, other.col)
    return max(0, height) * max(0, width)


@dataclass(frozen=True, slots=True)
class Alternative:
    """An option that was not chosen, and what choosing it would do to the objective."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    option: str  # "column_wise x4"
    objective: float | None  # seconds of the whole objective with this option instead; None: does not fit
    delta: float | None  # objective minus the plan's
    terms: dict[str, float] = field(default_factory=dict)  # seconds of the table itself, summed over ranks
    note: str = ""


@dataclass(frozen=True, slots=True)
class TablePlan:
    """The decision for one table."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    rows: Annotated[int, Field(ge=1)]
    dim: Annotated[int, Field(ge=1)]
    dtype: str
    features: tuple[str, ...]
    pooling: str
    module: str  # path of the owning module
    parameter: str
    sharding_type: ShardingType
    compute_kernel: Literal["dense", "fused"]
    shards: tuple[Shard, ...]
    terms: dict[str, float]  # modelled seconds by phase, summed over ranks
    memory: dict[str, int]  # bytes by purpose, summed over ranks
    reason: str = ""
    runner_up: Alternative | None = None
    format: FormatId | None = None  # of the weights; None: as declared (``dtype``)
    state_format: FormatId | None = None  # of the optimizer state; None: fp32
    tiers: TableTiers | None = None  # None: all rows in the device's first tier

    def on_rank(self, rank: int) -> tuple[Shard, ...]:
        """The shards that one rank holds, a copy included."""
        return tuple(shard for shard in self.shards if shard.rank in (rank, EVERY_RANK))

    def ranks(self, world_size: int) -> tuple[int, ...]:
        """The ranks that hold a part of the table, in order."""
        if self.sharding_type == "data_parallel":
            return tuple(range(world_size))
        return tuple(sorted({shard.rank for shard in self.shards}))

    @property
    def option(self) -> str:
        """The decision in one phrase: ``"column_wise x4"``."""
        columns = len({(shard.col, shard.cols) for shard in self.shards})
        return self.sharding_type if columns == 1 else f"{self.sharding_type} x{columns}"


@dataclass(frozen=True, slots=True)
class Certificate:
    """How far from optimal the sharding decision can be.

    ``objective`` and ``lower_bound`` are values of the same objective over the same option space; the
    bound is proved for that cost model, not for the hardware.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    objective_name: str
    objective: float  # seconds
    lower_bound: float  # seconds
    status: Literal["optimal", "feasible"]
    bound_method: str

    @property
    def gap(self) -> float:
        """(objective - lower bound) / objective, a fraction of 1."""
        if self.objective <= 0:
            return 0.0
        return max(0.0, (self.objective - self.lower_bound) / self.objective)


@dataclass(frozen=True, slots=True)
class Event:
    """One op of the modelled step on one stream."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    stream: str  # "compute", "network", "input"
    start: float  # seconds from the start of the step
    duration: float  # seconds
    critical: bool  # on the critical path
    terms: dict[str, float] = field(default_factory=dict)  # what the duration is made of


@dataclass(frozen=True, slots=True)
class Timeline:
    """The modelled step: its makespan and the events of the slowest rank in each phase."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    step: float  # seconds, makespan
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Device memory of one rank, bytes by purpose ("weights", "optimizer", "io", "dense", ...)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rank: Count
    limit: Count  # bytes the plan may use: capacity less the reserve
    used: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in use."""
        return sum(self.used.values())


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What was planned."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    digest: str  # of the captured tables and ops
    embedding_params: Count
    dense_params: Count
    dense_flops: Annotated[float, Field(ge=0)]  # forward, per sample


@dataclass(frozen=True, slots=True)
class Assumption:
    """A number the plan rests on, and where it comes from."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    value: str
    source: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The result of :func:`planner.compile`.

    Fields that later versions add, here or in the records below, have a default that means what plans without them
    meant. It never changes within a major version, as the digest leaves defaults out.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model: ModelSummary
    topology: Topology
    workload: Workload
    constraints: Constraints
    mode: Literal["train", "inference"]
    table_plans: tuple[TablePlan, ...]  # in the model's order
    memory: tuple[RankMemory, ...]  # by rank
    timeline: Timeline
    certificate: Certificate
    decisions: Decisions = field(default_factory=Decisions)
    assumptions: tuple[Assumption, ...] = ()
    warnings: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)  # versions, seed, input digests
    format_version: str = FORMAT_VERSION

    @property
    def tables(self) -> dict[str, TablePlan]:
        """The table decisions by name."""
        return {table.name: table for table in self.table_plans}

    @property
    def world_size(self) -> int:
        """Ranks the plan is for."""
        return self.topology.world_size

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with :attr:`digest`."""
        data = dump_record(self)
        data["decisions"] = {name: data["decisions"][name] for name in self.decisions.present()}
        _without_none(data["constraints"], "formats", "tiers")
        for table in data["table_plans"]:
            _without_none(table, "format", "state_format", "tiers")
        return {**data, "digest": self.digest}

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of the format version and of every field that does not have its default."""
        return digest(dump_record(self, defaults=False) | {"format_version": self.format_version})

    def to_json(self) -> str:
        """The text of the plan file: stable key order, one line a table or rank."""
        return _layout(self.to_dict()) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan whole or not at all; raises InputError when the folder cannot be written."""
        write_atomically(path, self.to_json())

    @classmethod
    def from_dict(cls, data: object, what: str = "plan") -> Plan:
        """Read plain data; raises InputError on a wrong schema, version or digest."""
        fields = dict(as_mapping(data, what))
        version = str(fields.get("format_version", "missing"))
        if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
            raise InputError(
                f"{what} has format_version {version}, this planner reads {FORMAT_VERSION}; compile it again"
            )
        claimed = fields.pop("digest", None)
        plan = parse_record(cls, fields, what)
        fault = _unreadable(plan)
        if fault:
            raise InputError(f"{what} is inconsistent: {fault}; compile it again")
        # planners before took the digest over the file as it is written
        if claimed is not None and claimed not in (plan.digest, digest(fields)):
            raise InputError(f"{what} does not match its digest: it was edited or damaged; compile it again")
        return plan

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file; raises InputError."""
        return cls.from_dict(read_json(path, "plan"), f"plan {path}")


def _unreadable(plan: Plan) -> str:
    """What would keep a reader from looking things up; whether the plan is sound is the verifier's question."""
    world = plan.world_size
    if [record.rank for record in plan.memory] != list(range(world)):
        return f"memory is not listed for ranks 0..{world - 1} in order"
    if any(record.limit < 1 for record in plan.memory):
        return "a rank may use no memory at all"
    if plan.timeline.step < 0 or any(event.duration < 0 for event in plan.timeline.events):
        return "the modelled step has a negative time"
    for table in plan.table_plans:
        if not table.shards:
            return f"table {clipped(table.name)!r} has no shards"
        if max(shard.rank for shard in table.shards) >= world:
            return f"table {clipped(table.name)!r} has a shard beyond rank {world - 1}"
    made = plan.decisions.parallelism
    if made is not None:
        shape = [made.layout.virtual_stages] * made.layout.pipeline
        if [len(own) for own in made.stages] != shape:
            return "its pipeline stages are not those of the layout"
    return ""


def _without_none(record: dict[str, Any], *names: str) -> None:
    """Leave out what was neither asked nor decided, so that a plan file stays as short as it can."""
    for name in names:
        if record[name] is None:
            del record[name]


def _layout(value: Any, depth: int = 0) -> str:
    """Indented JSON in which records of scalars stay on one line."""
    pad = "  " * (depth + 1)
    if (
        isinstance(value, dict)
        and value
        and depth < 4
        and any(isinstance(v, (dict, list)) for v in value.values())
    ):
        body = ",\n".join(f"{pad}{json.dumps(k)}: {_layout(v, depth + 1)}" for k, v in value.items())
        return "{\n" + body + "\n" + "  " * depth + "}"
    if isinstance(value, list) and value and depth < 4 and any(isinstance(v, (dict, list)) for v in value):
        return "[\n" + ",\n".join(pad + _layout(v, depth + 1) for v in value) + "\n" + "  " * depth + "]"
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def write_atomically(path: str | Path, text: str) -> None:
    """Write ``text`` under a temporary name, then rename; raises InputError."""
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent or ".", prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; choose a folder that exists and is writable"
        ) from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from None
