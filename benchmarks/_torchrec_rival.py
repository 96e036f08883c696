"""TorchRec's planner as a rival: as it comes, and tuned by an expert.

The expert tries ``min_partition`` 16, 32, 64 and unset, allows all seven sharding types, and takes the
best plan of every proposer (grid search, greedy by depth and breadth, uniform by depth and breadth,
dynamic programming). One planner run serves both objectives: its performance model rates each plan by
``Perf.total``, as TorchRec does, and remembers the best plan under each objective.
"""

from __future__ import annotations

import contextlib
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torchrec
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.proposers import (
    DynamicProgrammingProposer,
    GreedyProposer,
    GridSearchProposer,
    UniformProposer,
)
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation
from torchrec.distributed.planner.types import PerfModel, PlannerError
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from benchmarks._tables import Table

GLOBAL_BATCH = 65536
HOST_SIZE = 8
MIN_PARTITIONS: tuple[int | None, ...] = (16, 32, 64, None)
ALL_TYPES = [kind.value for kind in ShardingType]
# Topology bandwidths are bytes per millisecond. H100 SXM: 80 GB, 3,350 GB/s HBM3, 450 GB/s NVLink per
# direction, 50 GB/s InfiniBand a GPU (NVIDIA H100 datasheet; one 400 Gb/s NIC a GPU).
H100 = {"hbm_cap": 80 * 10**9, "hbm_mem_bw": 3350e6, "intra_host_bw": 450e6, "inter_host_bw": 50e6}


@dataclass(frozen=True, slots=True)
class Case:
    """A module on a machine, in TorchRec's terms."""

    module: Any
    sharders: list[Any]
    topology: Any
    batch_size: int
    constraints: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RivalPlan:
    """The best plan of one planner under each objective (None: it found none), and its cost.

    ``ratings`` are the planner's own, ms, where it was asked for both objectives; ``whole`` is False
    where the planner was stopped after ``cpu_seconds`` without a plan.
    """

    total: list[Any] | None
    with_input: list[Any] | None
    cpu_seconds: float
    note: str = ""
    ratings: tuple[float, float] | None = None
    whole: bool = True


def build_module(tables: list[Table]) -> Any:
    """An EmbeddingBagCollection on the meta device with fused row-wise Adagrad."""
    configs = [
        EmbeddingBagConfig(
            name=t.name, num_embeddings=t.rows, embedding_dim=t.dim, feature_names=[f"f_{t.name}"]
        )
        for t in tables
    ]
    module = EmbeddingBagCollection(device=torch.device("meta"), tables=configs)
    apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, module.parameters(), {"lr": 0.01})
    return module


def build_case(module: Any, tables: list[Table], ranks: int, constants: str) -> Case:
    """The case of one row of the benchmark; ``constants`` is "default" or "h100"."""
    hardware = H100 if constants == "h100" else {}
    host = min(HOST_SIZE, ranks)
    topology = Topology(world_size=ranks, compute_device="cuda", local_world_size=host, **hardware)
    constraints = {t.name: ParameterConstraints(pooling_factors=[t.pooling]) for t in tables}
    return Case(
        module, [EmbeddingBagCollectionSharder()], topology, max(1, GLOBAL_BATCH // ranks), constraints
    )


class _Recorder(PerfModel):  # type: ignore[misc]
    """TorchRec's own rating, remembering the best plan under both objectives."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.best: dict[str, tuple[float, Any]] = {}

    def rate(self, plan: list[Any]) -> float:
        total, extra = [0.0] * self.world_size, [0.0] * self.world_size
        for option in plan:
            for shard in option.shards:
                total[shard.rank] += shard.perf.total
                extra[shard.rank] += shard.perf.total + shard.perf.input_dist_comms
        for name, value in (("total", max(total)), ("with_input", max(extra))):
            if name not in self.best or value < self.best[name][0]:
                ranks = [(o, [(s.size, s.offset, s.rank) for s in o.shards]) for o in plan]
                self.best[name] = (value, ranks)
        return max(total)


def _frozen(recorded: Any) -> list[Any]:
    """Fresh ``ShardingOption`` s of a recorded plan (the planner reuses and resets its own)."""
    from torchrec.distributed.planner.types import Shard, ShardingOption

    return [
        ShardingOption(
            name=o.name,
            tensor=o.tensor,
            module=o.module,
            input_lengths=o.input_lengths,
            batch_size=o.batch_size,
            compute_kernel=o.compute_kernel,
            sharding_type=o.sharding_type,
            partition_by=o.partition_by,
            shards=[Shard(size=size, offset=offset, rank=rank) for size, offset, rank in shards],
            is_pooled=o.is_pooled,
        )
        for o, shards in recorded
    ]


class _OutOfTime(Exception):
    """The planner has used the CPU seconds it was given."""


@contextlib.contextmanager
def _cpu_limit(seconds: float | None) -> Iterator[None]:
    """Raise ``_OutOfTime`` once this process has used so many CPU seconds more; None is no limit."""
    if seconds is None:
        yield
        return

    def stop(*_: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def _plan(
    case: Case, constraints: dict[str, Any], proposers: list[Any] | None, limit: float | None = None
) -> RivalPlan:
    recorder = _Recorder(case.topology.world_size) if proposers else None
    with warnings.catch_warnings(), _cpu_limit(limit):
        warnings.simplefilter("ignore")
        started = time.process_time()
        planner = EmbeddingShardingPlanner(
            topology=case.topology,
            batch_size=case.batch_size,
            constraints=constraints,
            storage_reservation=HeuristicalStorageReservation(percentage=0.15),
            proposer=proposers,
            performance_model=recorder,
            stats=NoopEmbeddingStats(),
            debug=False,
        )
        try:
            planner.plan(case.module, case.sharders)
        except PlannerError as error:
            return RivalPlan(None, None, time.process_time() - started, str(error.error_type))
        except _OutOfTime:
            return RivalPlan(None, None, time.process_time() - started, "stopped", whole=False)
        seconds = time.process_time() - started
    if recorder is None:
        return RivalPlan(planner._best_plan, planner._best_plan, seconds)
    (total, plan), (with_input, other) = recorder.best["total"], recorder.best["with_input"]
    return RivalPlan(_frozen(plan), _frozen(other), seconds, ratings=(total, with_input))


def default_plan(case: Case, limit: float | None = None) -> RivalPlan:
    """The planner as it comes: default proposers, min_partition and sharding types.

    ``limit`` is in CPU seconds; a planner that has not ended by then gives a plan that is not ``whole``.
    """
    return _plan(case, case.constraints, None, limit)


def tuned_constraints(case: Case, min_partition: int | None) -> dict[str, Any]:
    """The case's constraints with all sharding types allowed and columns split as an expert would."""
    return {
        name: ParameterConstraints(
            pooling_factors=limit.pooling_factors, min_partition=min_partition, sharding_types=ALL_TYPES
        )
        for name, limit in case.constraints.items()
    }


def tuned_plans(case: Case, min_partitions: tuple[int | None, ...] = MIN_PARTITIONS) -> list[RivalPlan]:
    """One plan a ``min_partition``, each the best over all proposers, by the untouched planner.

    Hours on large table sets; ``_torchrec_twin.Twin.tuned`` finds the same plans.
    """
    plans = []
    for width in min_partitions:
        proposers = [
            GridSearchProposer(),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
            UniformProposer(use_depth=False),
            DynamicProgrammingProposer(),
        ]
        plans.append(_plan(case, tuned_constraints(case, width), proposers))
    return plans


def plan_text(plan: list[Any] | None) -> list[str] | None:
    """A plan in a form that can be compared: every shard of every table with its rank."""
    if plan is None:
        return None
    return [
        f"{o.path}.{o.name} {o.sharding_type} {o.compute_kernel} "
        + " ".join(f"{tuple(s.size)}@{tuple(s.offset)}:{s.rank}" for s in o.shards)
        for o in plan
    ]
