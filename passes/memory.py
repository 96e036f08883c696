"""Memory accounting: bytes by purpose on every rank, from the shards that were placed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from cost_models.dense import planned_dense_memory
from cost_models.gemm_formats import format_memory
from cost_models.placed import rank_memory
from ir.plan import RankMemory
from ir.program import Program
from passes.sharding_prices import memory_limit


@dataclass(frozen=True, slots=True)
class MemoryAccounting:
    """Fill ``memory``: what each rank holds, beside the limit it must stay under."""

    name: ClassVar[str] = "memory"

    def run(self, program: Program) -> Program:
        """Decide nothing; add up the placed shards and the dense part."""
        assert program.tables is not None, "sharding runs before memory accounting"
        topology, workload, mode = program.topology, program.workload, program.options.mode
        dense = planned_dense_memory(program)
        if program.decisions.formats is not None and mode == "inference":
            change = format_memory(program.model, program.decisions.formats, workload, topology)
            dense = {
                purpose: dense.get(purpose, 0) + change.get(purpose, 0) for purpose in {**dense, **change}
            }
        limit = memory_limit(program)
        ranks = []
        for rank, embedding in enumerate(rank_memory(program.tables, topology, workload, mode)):
            used = dict(embedding)
            for purpose, size in dense.items():
                used[purpose] = used.get(purpose, 0) + size
            ranks.append(RankMemory(rank, limit, dict(sorted(used.items()))))
        return replace(program, memory=tuple(ranks))
