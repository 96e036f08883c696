"""The published objective of NVIDIA's HugeCTR planner for MLPerf DLRM-DCNv2.

A bucket is a GPU, or a node when the plan is hierarchical. A table split ``s`` ways (a power of two)
makes ``s`` shards in distinct buckets; a shard costs its bucket ``hotness / s`` for memory and
``bandwidth_ratio / work_ratio`` for communication, and holds ``rows / s`` rows. Tables below the
data-parallel threshold are replicated at no cost. The objective is the largest bucket cost.

Source: sharding/planner.py and config_*.sh of NVIDIA's dlrm_dcnv2 submissions to MLPerf Training v3.0
to v5.0 (mlcommons/training_results_*).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ir.assignment import Option, Piece, Problem

ROW_BYTES = 128 * 8  # 128 fp32 weights and 128 fp32 Adagrad states (mlperf dlrm_dcnv2, sharding/planner.py)
GB = 1e9


@dataclass(frozen=True, slots=True)
class HugeCTRObjective:
    """The objective of one system.

    Attributes:
        rows, hotness: by table.
        buckets: GPUs, or nodes.
        shard_cost: ``mem_comm_bw_ratio / mem_comm_work_ratio``.
        capacity: bytes a bucket.
        replicated: indices of the tables kept on every bucket.
    """

    rows: tuple[int, ...]
    hotness: tuple[float, ...]
    buckets: int
    shard_cost: float
    capacity: float
    replicated: frozenset[int]

    def splits(self) -> tuple[int, ...]:
        """The powers of two up to the number of buckets."""
        return tuple(2**k for k in range(self.buckets.bit_length()) if 2**k <= self.buckets)

    def problem(self) -> Problem:
        """The assignment problem: loads in the planner's cost units, one rank a bucket."""
        options: list[tuple[Option, ...]] = []
        for t, (rows, hotness) in enumerate(zip(self.rows, self.hotness, strict=True)):
            if t in self.replicated:
                whole = Piece("all", (0.0,), rows * ROW_BYTES)
                options.append((Option("replicated", (whole,)),))
                continue
            options.append(
                tuple(
                    Option(
                        f"split {s}",
                        (Piece("rank", (hotness / s + self.shard_cost,), rows * ROW_BYTES / s, s),),
                        distinct=True,
                    )
                    for s in self.splits()
                )
            )
        return Problem(
            names=tuple(f"C{t}" for t in range(len(self.rows))),
            options=tuple(options),
            hosts=self.buckets,
            host_size=1,
            capacity=self.capacity,
            phases=("cost",),
        )

    def cost(self, matrix: Sequence[Sequence[int]]) -> tuple[float, float]:
        """Largest bucket cost and largest bucket bytes of a plan: the tables of each bucket.

        Raises:
            ValueError: a plan with the wrong number of buckets, a table missing or twice in a bucket, or
                a split that is not a power of two.
        """
        if len(matrix) != self.buckets:
            raise ValueError(f"the plan has {len(matrix)} buckets, the system {self.buckets}")
        shards = Counter(table for bucket in matrix for table in bucket)
        sharded = set(range(len(self.rows))) - self.replicated
        if set(shards) != sharded:
            raise ValueError(f"the plan shards tables {sorted(shards)}, expected {sorted(sharded)}")
        if any(count not in self.splits() for count in shards.values()):
            raise ValueError("a table is split into a number of shards that is not a power of two")
        if any(len(set(bucket)) != len(bucket) for bucket in matrix):
            raise ValueError("a bucket holds two shards of one table")
        everywhere = sum(self.rows[t] for t in self.replicated) * ROW_BYTES
        costs = [sum(self.hotness[t] / shards[t] + self.shard_cost for t in bucket) for bucket in matrix]
        memory = [everywhere + sum(self.rows[t] / shards[t] * ROW_BYTES for t in bucket) for bucket in matrix]
        return max(costs), max(memory)


def replicated_tables(rows: Sequence[int], threshold_gb: float) -> frozenset[int]:
    """Tables whose weights and state are smaller than the data-parallel threshold."""
    return frozenset(t for t, count in enumerate(rows) if count * ROW_BYTES / GB < threshold_gb)
