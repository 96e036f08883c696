"""How the dense part and the tables' replicas are laid over the ranks: what is asked, and what is decided.

Strategies of the dense part, T ranks in hosts of g:

====  ===========================================================================================
ddp   every rank holds all weights; gradients are summed over all ranks
fsdp  weights, gradients and optimizer state are split over all ranks; weights are gathered unit by unit
hsdp  the same split over the ranks of a host; the shards' gradients are summed across hosts
tp    pairs of wide layers are split over the ranks of a host, which gather each other's samples for them; hosts, and
      all other weights, are replicas as with ddp
====  ===========================================================================================

Sources: FSDP (arXiv 2304.11277), HSDP as in DHEN (arXiv 2203.11014), pairs of a column-split and a row-split layer as in
Megatron-LM (arXiv 1909.08053), their activations scattered as in arXiv 2205.05198 with samples for tokens, 2D sparse
parallelism (TorchRec's ``DMPCollection``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from ir.reading import STRICT

DenseStrategy = Literal["ddp", "fsdp", "hsdp", "tp"]
STRATEGIES: tuple[DenseStrategy, ...] = ("ddp", "tp", "hsdp", "fsdp")  # the simplest first: it wins ties

Count = Annotated[int, Field(ge=0)]
Ranks = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class DenseRequest:
    """What the user asks of the dense part.

    Attributes:
        strategies: to choose between, by modelled step time among those that fit; None: all that the rest of the
            request allows (tp runs beside TorchRec's tables, without towers, compression or tiers).
        reshard_after_forward: drop gathered weights after the forward pass and gather them again for the
            backward pass; None: whichever fits and is faster.
        unit_bytes: weights (in the compute type) that are gathered together at least, and that a pair of layers has at
            least to be split by tp; None: decided.
        sparse_groups: numbers M of model-parallel groups to try, each with a copy of all tables sharded over T/M
            ranks, beside the flat sharding (M = 1).
        sync_every: steps between two synchronisations of the groups' tables.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    strategies: Annotated[tuple[DenseStrategy, ...], Field(min_length=1)] | None = None
    reshard_after_forward: bool | None = None
    unit_bytes: Annotated[int, Field(ge=1)] | None = None
    sparse_groups: tuple[Annotated[int, Field(ge=2)], ...] = ()
    sync_every: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True, slots=True)
class TensorPair:
    """Two linear layers with element-wise functions between, split over the units between them.

    Attributes:
        first, second: paths of the modules; ``first`` keeps rows, ``second`` columns, of its weight.
        units: between them.
        params: that are split: both weights and the bias of ``first``.
        inputs, outputs: elements a sample that are gathered before ``first`` and scattered after ``second``.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    first: str
    second: str
    units: Ranks
    params: Count
    inputs: Count
    outputs: Count


@dataclass(frozen=True, slots=True)
class DenseCandidate:
    """One layout that was weighed.

    Attributes:
        strategy: its name.
        reshard_after_forward: as in :class:`DenseRequest`; False for ddp.
        unit_bytes: gathered together at least; 0 for ddp.
        memory: bytes of the dense part on each rank, activations included.
        step_seconds: of the modelled step; None: does not fit.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    strategy: DenseStrategy
    reshard_after_forward: bool
    unit_bytes: Count
    memory: Count
    step_seconds: Seconds | None


@dataclass(frozen=True, slots=True)
class GroupTable:
    """The sharding of a table inside each group: (first column, columns, first rank of the group) of each block."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    sharding_type: str
    columns: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class SparseCandidate:
    """A number of groups that was weighed; seconds and bytes are None where it does not fit."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    groups: Ranks
    step_seconds: Seconds | None  # synchronisation included, spread over the steps between two
    sync_seconds: Seconds | None  # of one synchronisation
    memory: Count | None  # bytes on the fullest rank


@dataclass(frozen=True, slots=True)
class SparseReplicas:
    """2D sparse parallelism: contiguous groups of T/M ranks, rank i of each holding the same shards.

    Attributes:
        groups: M; 1: the flat sharding is faster, and the plan's own tables hold.
        sync_every: steps between two synchronisations, which average weights and optimizer state over the groups.
        sync_bytes: of weights and state that each rank averages, on the rank with most.
        extra_bytes: table weights and state that replication adds to a rank on average, S (M - 1) / T.
        tables: of one group; empty with one group.
        candidates: all that were weighed, the flat one first.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    groups: Ranks
    sync_every: Ranks
    sync_bytes: Count
    extra_bytes: Count
    tables: tuple[GroupTable, ...]
    candidates: tuple[SparseCandidate, ...]


@dataclass(frozen=True, slots=True)
class DensePlan:
    """The decision.

    Attributes:
        strategy: its name.
        shard: ranks over which all weights are split; 1 for ddp and tp.
        replicas: of each shard.
        reshard_after_forward: weights are gathered twice a step.
        unit_bytes: gathered together at least; 0 for ddp.
        units: paths of the modules that are gathered together, in the order of the forward pass; parameters of no unit
            are gathered before it and kept. Empty for ddp and tp.
        tensor: ranks over which pairs of layers are split; 1 for all but tp.
        pairs: that are split.
        message_bytes: of the buffers of a step's collectives on one rank, an all-reduce counted twice: the
            accounting in which HSDP moves 1.125 times what data parallelism does in hosts of 8 (arXiv 2203.11014).
        wire_bytes: that ring collectives send from one rank in a step.
        candidates: all that were weighed.
        reason: in words.
        sparse: replicas of the tables, where asked for.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    strategy: DenseStrategy
    shard: Ranks
    replicas: Ranks
    reshard_after_forward: bool = False
    unit_bytes: Count = 0
    units: tuple[tuple[str, ...], ...] = ()
    tensor: Ranks = 1
    pairs: tuple[TensorPair, ...] = ()
    message_bytes: Count = 0
    wire_bytes: Count = 0
    candidates: tuple[DenseCandidate, ...] = ()
    reason: str = ""
    sparse: SparseReplicas | None = None
