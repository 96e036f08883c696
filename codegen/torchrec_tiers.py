"""Tables in memory tiers as TorchRec and FBGEMM run them: unified memory, a cache in HBM, or a key-value store.

========================================== ===================== =========================================
where the plan puts a table                kernel                as
========================================== ===================== =========================================
the device's memory                        ``fused``
one byte-addressable tier of the host      ``fused_uvm``         every access crosses the host link
a cache in front of such a tier            ``fused_uvm_caching`` ``load_factor`` = cached share of the rows
rows split between device and host         ``fused_uvm_caching`` LFU cache as large as the device's rows
anything with a block tier                 ``key_value``         RocksDB on the drive, cache in HBM
========================================== ===================== =========================================

TorchRec cannot pin a range of rows to a tier, so a split becomes a cache that holds as many rows, by frequency:
in the steady state these are the rows that the plan put there. All byte-addressable host memory is one to it:
which NUMA node (CXL, persistent memory) backs it is for numactl to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ir.errors import InputError
from ir.plan import Plan, TablePlan
from ir.workload import Optimizer

Kernel = Literal["fused", "fused_uvm", "fused_uvm_caching", "key_value"]

CACHE_WAYS = 32  # rows of a cache set on NVIDIA GPUs: ASSOC of fbgemm_gpu 1.8
# what SSDTableBatchedEmbeddingBags of fbgemm_gpu 1.8 asserts
KEY_VALUE_DTYPES = frozenset({"fp32", "fp16"})
KEY_VALUE_OPTIMIZERS: frozenset[Optimizer] = frozenset({"rowwise_adagrad", "adam"})


@dataclass(frozen=True, slots=True)
class TierKernel:
    """How TorchRec runs one table.

    Attributes:
        load_factor: rows of the cache per row of the table; None without a cache.
        policy: of the cache.
        prefetch: TorchRec's prefetching train pipeline is needed for the plan's step.
        dram_gb: whole gigabytes (2**30 bytes) of host memory that a key-value table uses as second cache.
        note: where this differs from the plan; empty if nowhere.
    """

    kernel: Kernel
    load_factor: float | None = None
    policy: Literal["lru", "lfu"] = "lfu"
    prefetch: bool = False
    dram_gb: int = 0
    note: str = ""


def tier_kernel(table: TablePlan, plan: Plan) -> TierKernel:
    """The kernel of one table; needs neither torch nor TorchRec."""
    tiers = table.tiers
    own = {tier.name for tier in plan.topology.device.tiers}
    if tiers is None or all(part.tier in own for part in tiers.ranges):
        return TierKernel("fused")
    blocks = {tier.name for tier in plan.topology.host_tiers if tier.iops is not None}
    held = sum(part.rows for part in tiers.ranges if part.tier in own)
    below = [part for part in tiers.ranges if part.tier not in own]
    cached = tiers.cache.rows if tiers.cache is not None else held
    policy = tiers.cache.policy if tiers.cache is not None else "lfu"
    prefetch = tiers.prefetch_depth > 0
    factor = cached / table.rows
    notes = []
    if held and tiers.cache is None:
        notes.append(f"its {held} hottest rows are a frequency-ordered cache in {tiers.ranges[0].tier}")
    if any(part.tier in blocks for part in below):
        middle = sum(part.rows for part in below if part.tier not in blocks)
        if middle:
            notes.append("its rows in host memory are a second cache in front of the drive")
        if not cached:
            cached, factor = CACHE_WAYS, CACHE_WAYS / table.rows
            notes.append("a key-value table needs a cache in device memory: the smallest one")
        gigabytes = math.ceil(middle * _row_bytes(table, plan) / 2**30)
        return TierKernel("key_value", factor, policy, prefetch, gigabytes, "; ".join(notes))
    if len({part.tier for part in below}) > 1:
        notes.append(f"unified memory does not tell {' from '.join(part.tier for part in below)}")
    if not cached:
        return TierKernel("fused_uvm", note="; ".join(notes))
    return TierKernel("fused_uvm_caching", factor, policy, prefetch, note="; ".join(notes))


def _row_bytes(table: TablePlan, plan: Plan) -> float:
    return (table.memory.get("weights", 0) + table.memory.get("optimizer", 0)) / table.rows


def check_tiers(plan: Plan, *, device: str, optimizer: Optimizer | None = None) -> None:
    """Raise InputError where TorchRec lacks what a table in a tier needs."""
    name = optimizer or plan.workload.optimizer
    for table in plan.table_plans:
        kernel = tier_kernel(table, plan).kernel
        if kernel == "fused":
            continue
        if device == "cpu":
            raise InputError(
                f"table {table.name!r} needs the {kernel} kernel, which TorchRec has on GPUs only; run it on the CPU "
                "with codegen.runtime.tiered, or compile without tiers"
            )
        if table.sharding_type == "data_parallel":
            raise InputError(
                f"table {table.name!r} is data_parallel, which TorchRec keeps in device memory; forbid data_parallel for it"
            )
        if kernel != "key_value":
            continue
        if table.dtype not in KEY_VALUE_DTYPES:
            raise InputError(
                f"table {table.name!r} is {table.dtype} in a key-value store, which holds fp32 and fp16 only; "
                "change its type or keep it off block tiers"
            )
        if name not in KEY_VALUE_OPTIMIZERS:
            raise InputError(
                f"table {table.name!r} is in a key-value store, which FBGEMM trains with "
                f"{' or '.join(sorted(KEY_VALUE_OPTIMIZERS))} but not {name}; change the optimizer or the tier"
            )
    widths = {
        (shard.rank, shard.cols): table.name
        for table in plan.table_plans
        if tier_kernel(table, plan).kernel == "key_value"
        for shard in table.shards
    }
    for rank in sorted({rank for rank, _ in widths}):
        if len(mine := [cols for other, cols in widths if other == rank]) > 1:
            names = ", ".join(repr(widths[rank, cols]) for cols in mine)
            raise InputError(
                f"rank {rank} holds key-value tables of {sorted(mine)} columns ({names}), and FBGEMM keeps those of one "
                "width only in a store; pin them to different ranks"
            )


def tier_notes(plan: Plan) -> tuple[str, ...]:
    """Where what TorchRec runs differs from the plan, one sentence a table."""
    return tuple(
        f"table {table.name!r}: {note}"
        for table in plan.table_plans
        if (note := tier_kernel(table, plan).note)
    )


def tier_parameters(table: TablePlan, plan: Plan, *, storage: str | None = None) -> dict[str, Any]:
    """Arguments of TorchRec's ``ParameterSharding`` and ``ParameterConstraints`` that state the tiers.

    Args:
        storage: folder of key-value stores on the drive; ``@local_rank`` in it is replaced by TorchRec.

    Returns:
        ``cache_params`` and ``key_value_params`` where the kernel has them, else nothing.

    Raises:
        InputError: a key-value table without a folder.
    """
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
    from torchrec.distributed.types import CacheParams, KeyValueParams

    chosen = tier_kernel(table, plan)
    made: dict[str, Any] = {}
    if chosen.load_factor is not None:
        made["cache_params"] = CacheParams(
            algorithm=CacheAlgorithm.LRU if chosen.policy == "lru" else CacheAlgorithm.LFU,
            load_factor=chosen.load_factor,
            prefetch_pipeline=chosen.prefetch,
        )
    if chosen.kernel == "key_value":
        if storage is None:
            raise InputError(
                f"table {table.name!r} is in a key-value store; name the folder of the drive that holds it"
            )
        made["key_value_params"] = KeyValueParams(
            ssd_storage_directory=storage,
            l2_cache_size=chosen.dram_gb or None,
            enable_async_update=bool(chosen.dram_gb) or None,
        )
    return made


def tier_constraints(plan: Plan, *, storage: str | None = None) -> dict[str, Any]:
    """TorchRec ``ParameterConstraints`` by table: the plan's sharding type and kernel, for TorchRec's own planner."""
    from torchrec.distributed.planner.types import ParameterConstraints

    return {
        table.name: ParameterConstraints(
            sharding_types=[table.sharding_type],
            compute_kernels=[
                "dense" if table.sharding_type == "data_parallel" else tier_kernel(table, plan).kernel
            ],
            **tier_parameters(table, plan, storage=storage),
        )
        for table in plan.table_plans
    }
