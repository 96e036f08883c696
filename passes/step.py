"""The step: every op of a training or serving step on its stream, and the makespan."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

from cost_models.calibration import Calibration, constant_text, default_calibration
from cost_models.collective.planning import communication, dense_reduction
from cost_models.collectives import network
from cost_models.dense_prices import sharded_dense
from cost_models.embedding import phase_overheads
from cost_models.exchanged import exchanged_bytes, packed_ids
from cost_models.placed import rank_seconds, rank_tiers
from cost_models.shared import (
    framework_seconds,
    phase_seconds,
    posted_share,
    second_exchanges,
    staging_seconds,
)
from cost_models.step import DenseReduction, step_timeline
from ir.plan import Assumption
from ir.program import Program
from ir.units import format_bandwidth, format_seconds
from passes.compression import compressed_phases


@dataclass(frozen=True, slots=True)
class StepTimeline:
    """Fill ``timeline`` from the placed shards; the slowest rank decides each embedding phase."""

    name: ClassVar[str] = "step"
    calibration: Calibration | None = None

    def run(self, program: Program) -> Program:
        """Decide nothing; model the step."""
        assert program.tables is not None, "sharding runs before the step"
        topology, workload, mode = program.topology, program.workload, program.options.mode
        calibration = self.calibration or default_calibration(topology)
        slowest = {
            phase: phase_seconds(phase, seconds, topology.host_size, calibration)
            for phase, seconds in rank_seconds(program.tables, topology, workload, calibration, mode).items()
        }
        if _own_exchange(program):
            slowest["input_dist"] *= packed_ids(program.tables, topology, workload)
            slowest["input_dist"] *= posted_share(topology, calibration)
        overheads = phase_overheads(topology, workload, calibration, mode)
        kinds = {table.sharding_type for table in program.tables}
        again = second_exchanges(kinds, topology, network(topology, calibration).latency)
        phases = {p: seconds + overheads[p] + again.get(p, 0.0) for p, seconds in slowest.items()}
        phases = compressed_phases(phases, program.decisions.compression)
        timeline = step_timeline(
            program.model,
            phases,
            topology,
            workload,
            calibration,
            mode,
            program.decisions.formats,
            fetch_seconds(program, calibration),
            sharded_dense(program.decisions.dense, topology, calibration, workload)
            or _reduction(program, calibration),
            _host_seconds(program, calibration),
        )
        return replace(program, timeline=timeline, assumptions=assumptions(program, calibration))


def _own_exchange(program: Program) -> bool:
    """Whether vectors travel by the compressed exchange instead of TorchRec."""
    section = program.decisions.compression
    return section is not None and section.engine == "exchange" and any(e.used for e in section.exchanges)


def _host_seconds(program: Program, calibration: Calibration) -> float:
    """Seconds of the framework, and on a CPU of its copies of what is exchanged."""
    tables, topology = program.tables or (), program.topology
    types = len({table.sharding_type for table in tables} - {"data_parallel"})
    seconds = framework_seconds(len(tables), types, calibration, _own_exchange(program))
    if topology.device.kind != "cpu" or topology.world_size == 1:
        return seconds
    moved = exchanged_bytes(tables, topology, program.workload)
    vectors = sum(size for (phase, _), size in moved.items() if phase == "output_dist")
    ways = 2 if program.options.mode == "train" else 1
    return seconds + staging_seconds(ways * vectors, topology.device.tiers[0].read_bandwidth, calibration)


def _reduction(program: Program, calibration: Calibration) -> DenseReduction | None:
    """The all-reduces that were decided; None before that."""
    decided, asked = program.decisions.collectives, program.options.constraints.collectives
    if decided is None:
        return None
    net = communication(program.topology, calibration)
    if asked is None:
        return dense_reduction(net, decided.bucket_bytes, False)
    return dense_reduction(
        net, decided.bucket_bytes, asked.dense_engine == "scheduled", asked.dense_algorithm
    )


def fetch_seconds(program: Program, calibration: Calibration) -> float:
    """Seconds a step that the busiest memory tier (or host link) of any rank needs for its rows."""
    request = program.options.constraints.tiers
    if request is None or program.tables is None:
        return 0.0
    used = rank_tiers(
        program.tables, program.topology, program.workload, calibration, program.options.mode, request
    )
    return max(
        (float(v.max()) for uses in used.values() for kind, v in uses.items() if kind != "bytes"), default=0.0
    )


def assumptions(program: Program, calibration: Calibration) -> tuple[Assumption, ...]:
    """What the modelled seconds rest on: the calibration, the links and the workload's origin."""
    topology, workload = program.topology, program.workload
    listed = [
        Assumption(name.name, constant_text(getattr(calibration, name.name)), calibration.source)
        for name in fields(calibration)
        if name.name != "source" and getattr(calibration, name.name) != name.default
    ]
    for level in topology.levels:
        link = level.link
        listed.append(
            Assumption(
                f"link.{level.name}",
                f"{format_bandwidth(link.bandwidth)} a device and direction, {format_seconds(link.latency)}",
                link.source,
            )
        )
    tier = topology.device.tiers[0]
    listed.append(Assumption(tier.name, format_bandwidth(tier.read_bandwidth), tier.source))
    listed.append(Assumption("workload", f"global batch {workload.global_batch}", workload.origin))
    return tuple(listed)
