"""Towers: groups of features whose tables share a host, and what is decided about them.

Disaggregated multi-tower training (Luo et al. 2024, arXiv 2403.00877) gives each host (or group of hosts)
the tables of one tower. The global exchange of pooled embeddings becomes an exchange inside the tower and
one between ranks of equal position ("peers") in different towers; a tower module between the two may
compress what crosses hosts.

Legality. The two-step exchange only moves data, so outputs and gradients are those of the flat lookup, if

- every table is pooled and looked up by one op only (its feature vectors have one producer);
- the ids are inputs of the model (a lookup whose ids are computed from another lookup would have to wait
  for its exchange);
- all tables of the lookup are in one tower each, and no tower is empty.

A module may be moved before the exchange between peers if it reads features of one tower only and treats
samples independently (no batch statistics): every sample is then seen by exactly one rank of the tower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from ir.compression import Direction
from ir.ops import EmbeddingTable, Op
from ir.reading import STRICT

ModuleKind = Literal["none", "projection", "cross", "wukong", "dhen"]
"""Tower modules: none (the exchange alone), or the architecture whose interaction they shrink."""

Narrowing = Literal["vectors", "columns"]
"""How a tower module compresses: fewer vectors, or as many vectors of fewer columns."""

TowerObjective = Literal["coherent", "diverse"]
"""Put features that are alike together, or apart."""

Strength = Literal["centred", "cosine"]
"""Interaction strength: mean cosine of vectors less their feature's mean vector, or of vectors as they are."""

PEER_PHASE: dict[Direction, str] = {"forward": "peer", "backward": "peer_gradient"}
"""Phase of a step in tower form that exchanges vectors, or their gradients, between peers."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class TowerRequest:
    """What the user asks of the tower pass.

    Attributes:
        towers: how many; None for one a host, or one for a group of hosts where tables are few.
        objective: what the partition maximises, see :data:`TowerObjective`.
        module: tower module; "none" keeps the model's mathematics.
        compression: columns in per column out, the same for every tower; None lets the budget decide.
        narrow: see :data:`Narrowing`; only projections narrow columns.
        accuracy_budget: share of the energy (sum of squares) of the pooled embeddings that the modules
            may be unable to carry; needs ``interactions``. A proxy for the loss in AUC.
        interactions: file of pooled embeddings of real batches (:class:`ir.tower_sample.PooledSample`);
            without it towers are balanced only.
        strength: how interaction is measured, see :data:`Strength`.
        balance: how far a tower may exceed the mean in memory, lookup time and number of tables.
        always: apply towers even where the model says that the flat plan is faster.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    towers: Annotated[int, Field(ge=1)] | None = None
    objective: TowerObjective = "coherent"
    module: ModuleKind = "none"
    compression: Annotated[float, Field(ge=1)] | None = None
    narrow: Narrowing = "vectors"
    accuracy_budget: Annotated[float, Field(ge=0, lt=1)] | None = None
    interactions: str = ""
    strength: Strength = "centred"
    balance: Annotated[float, Field(ge=0, le=10)] = 0.25
    always: bool = False


@dataclass(frozen=True, slots=True)
class Tower:
    """One tower: ranks ``first_rank`` to ``first_rank + ranks - 1`` hold its tables and its module.

    Attributes:
        tables: in the model's order.
        features: in the order their vectors are laid side by side.
        dim: columns of every vector; 0 where they differ (then there is no module).
        width: columns of all vectors together.
        vectors_out: vectors that cross to the peers; the number of features without module.
        width_out: columns that cross to the peers.
        params: of the module.
        flops: of the module, forward, per sample.
        energy_lost: share of the tower's energy that no linear map of this width can carry, measured on
            samples that were not used to fit it; None without a sample.
        memory: bytes of its tables' weights and optimizer state.
        lookup_seconds: modelled seconds of lookups and updates in a step, summed over its ranks.
        dim_out: columns of a vector that crosses to the peers; 0: ``dim``.
        pools: for each feature, the vector out that starts as a sum with it in it; empty: runs of neighbours.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    tables: tuple[str, ...]
    features: tuple[str, ...]
    first_rank: Count
    ranks: Annotated[int, Field(ge=1)]
    dim: Count
    width: Annotated[int, Field(ge=1)]
    vectors_out: Annotated[int, Field(ge=1)]
    width_out: Annotated[int, Field(ge=1)]
    params: Count = 0
    flops: Amount = 0.0
    energy_lost: Share | None = None
    memory: Count = 0
    lookup_seconds: Amount = 0.0
    dim_out: Count = 0
    pools: tuple[Count, ...] = ()

    @property
    def columns_out(self) -> int:
        """Columns of a vector that crosses to the peers."""
        return self.dim_out or self.dim

    @property
    def compression(self) -> float:
        """Columns in per column out."""
        return self.width / self.width_out


@dataclass(frozen=True, slots=True)
class Affinity:
    """The value of a partition: mean interaction strength gained within towers, and how good it can be.

    ``value`` is the sum over pairs of features in one tower of their interaction strength ("coherent") or
    of one minus it ("diverse"); no partition into towers of the allowed sizes has more than ``bound``.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    value: Amount
    bound: Amount
    rival: Amount | None  # multidimensional scaling with constrained k-means, the published method
    method: str  # what proved the bound

    @property
    def gap(self) -> float:
        """(bound - value) / bound, a fraction of 1."""
        return 0.0 if self.bound <= 0 else max(0.0, (self.bound - self.value) / self.bound)


@dataclass(frozen=True, slots=True)
class TowerDecision:
    """The section of a plan.

    Attributes:
        applied: whether the plan uses the towers; if not, its tables are sharded flat.
        reason: why, in a sentence.
        objective, module: as asked for.
        towers: the partition, also where it is not applied.
        affinity: None without a sample.
        steps: modelled seconds of a step: "flat", "exchange" (towers without modules) and, where a module
            is asked for, "modules".
        cross_host_bytes: embedding bytes (forward and backward) that the busiest rank sends to other
            hosts in a step, by the same names.
        energy_lost: share of all features' energy that the modules cannot carry; None without a sample.
        sample: digest of the pooled embeddings that the decision rests on.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    applied: bool
    reason: str
    objective: TowerObjective
    module: ModuleKind
    towers: Annotated[tuple[Tower, ...], Field(min_length=1)]
    affinity: Affinity | None = None
    steps: dict[str, Amount] = field(default_factory=dict)
    cross_host_bytes: dict[str, Amount] = field(default_factory=dict)
    energy_lost: Share | None = None
    sample: str = ""

    def tower_of(self, table: str) -> int:
        """Number of the tower that holds a table; raises KeyError."""
        for number, tower in enumerate(self.towers):
            if table in tower.tables:
                return number
        raise KeyError(table)


def sent_name(number: int) -> str:
    """What the output of a tower's module is called where tables are named, in codecs and graphs."""
    return f"tower {number}"


def illegal(tables: Sequence[EmbeddingTable], ops: Sequence[Op]) -> str:
    """Why the lookups of a model cannot be rewritten to tower form; empty if they can.

    The rule is stated in the module's text; ``ops`` may be empty for a model of tables alone.
    """
    return next(_faults(tables, ops), "")


def _faults(tables: Sequence[EmbeddingTable], ops: Sequence[Op]) -> Iterator[str]:
    if not tables:
        yield "the model has no tables"
    for table in tables:
        if table.pooling == "none":
            yield f"table {table.name!r} gives sequences of rows, and towers exchange pooled vectors only"
    readers = Counter(name for op in ops for name in op.tables)
    for name, count in readers.items():
        if count > 1:
            yield f"table {name!r} is looked up by {count} ops, so its vectors have no single producer"
    kinds = {op.name: op.kind for op in ops}
    reached: dict[str, bool] = {}  # whether an op depends on a lookup
    for op in ops:
        late = any(reached[source] for source in op.inputs)
        if op.kind == "lookup" and late:
            yield f"the ids of {op.name!r} are computed from another lookup"
        reached[op.name] = late or kinds[op.name] == "lookup"


def faults(decision: TowerDecision, world_size: int, tables: Sequence[str]) -> Iterator[str]:
    """What must hold of the section in any program: a partition over ranks that are all used once."""
    held = Counter(table for tower in decision.towers for table in tower.tables)
    for name in tables:
        if held[name] != 1:
            yield f"table {name!r} is in {held[name]} towers"
    for name in held.keys() - set(tables):
        yield f"tower table {name!r} is no table of the model"
    ranks = [
        rank for tower in decision.towers for rank in range(tower.first_rank, tower.first_rank + tower.ranks)
    ]
    if ranks != list(range(world_size)):
        yield f"the towers do not cover ranks 0..{world_size - 1} once, in order"
    if len({tower.ranks for tower in decision.towers}) > 1:
        yield "towers have different numbers of ranks"
    for number, tower in enumerate(decision.towers):
        if not tower.features or tower.vectors_out > len(tower.features) or tower.width_out > tower.width:
            yield f"tower {number} sends more than it holds, or holds nothing"
        if tower.pools and (
            len(tower.pools) != len(tower.features) or set(tower.pools) != set(range(tower.vectors_out))
        ):
            yield f"tower {number} does not start each of its {tower.vectors_out} vectors as a sum of features"
