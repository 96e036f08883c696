"""Codecs of a plan in tower form: decided anew for the exchange between peers, which alone they serve there.

Ranks at one position of every tower exchange whole pooled vectors, so that exchange is the one of a machine with one
rank a tower, whole tables on it, and the samples of a position: the batch over the ranks of a tower. Row splits inside
a tower do not matter to it, and vectors inside a tower travel as they are. What tower modules send was never
sampled and stays uncompressed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from cost_models.calibration import Calibration
from ir.plan import Assumption, Shard
from ir.program import Program
from passes.compression import CompressionBounds
from passes.dense_sparse import across


@dataclass(frozen=True, slots=True)
class TowerCompression:
    """Replace ``decisions.compression`` where towers are applied and the project's own exchange was asked for."""

    name: ClassVar[str] = "tower_compression"
    calibration: Calibration | None = None

    def run(self, program: Program) -> Program:
        """Decide; the step, priced without codecs between peers, stays an upper bound."""
        request, towers = program.options.constraints.compression, program.decisions.towers
        if request is None or request.engine != "exchange" or towers is None or not towers.applied:
            return program
        assert program.tables is not None
        tables = tuple(
            replace(
                plan,
                sharding_type="table_wise",
                shards=(Shard(towers.tower_of(plan.name), 0, 0, plan.rows, plan.dim),),
            )
            for plan in program.tables
        )
        if towers.module != "none":
            request = replace(request, samples=())
        constraints = replace(program.options.constraints, compression=request)
        peers = replace(
            program,
            topology=across(program.topology, len(towers.towers)),
            workload=replace(
                program.workload,
                global_batch=program.workload.global_batch // towers.towers[0].ranks,
            ),
            options=replace(program.options, constraints=constraints),
            tables=tables,
        )
        section = CompressionBounds(self.calibration).run(peers).decisions.compression
        noted = program
        if section is not None and any(exchange.used for exchange in section.exchanges):
            note = Assumption(
                "codecs between peers", "not in the step", "the step of towers is priced with float32 vectors"
            )
            noted = replace(program, assumptions=(*program.assumptions, note))
        return replace(noted, decisions=replace(noted.decisions, compression=section))
