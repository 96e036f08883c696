"""The tower form of a program as it would run: shards, codecs between peers, and the modelled step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cost_models.calibration import Calibration
from cost_models.collective.planning import communication, dense_reduction
from cost_models.dense_prices import sharded_dense
from cost_models.dense_step import ShardedDense
from cost_models.embedding import phase_overheads
from cost_models.step import DenseReduction
from cost_models.tower_step import tower_timeline
from cost_models.towers import flat_cross_bytes, tower_seconds
from ir.compression import Compression
from ir.plan import Certificate, TablePlan, Timeline
from ir.program import Model, Program
from ir.tier_plan import TierPlan
from ir.towers import ModuleKind, Tower, TowerRequest
from passes.step import fetch_seconds
from passes.tower_compression import peer_compression, peer_phases
from passes.tower_sharding import shard_towers

OverArch = Callable[[int, int], Model]
"""Dense ops of the model when its interaction sees so many feature vectors, of so many columns."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Towers on their ranks.

    Attributes:
        tables, certificate, tiers: of :func:`passes.tower_sharding.shard_towers`.
        compression: codecs between peers, None where none are asked for.
        timeline: the step, with modules where they are asked for.
        steps: seconds of the step by name: "exchange" (no modules), "modules".
        crossing: bytes that the busiest rank sends to other hosts, by the same names.
    """

    tables: tuple[TablePlan, ...]
    certificate: Certificate
    tiers: TierPlan | None
    compression: Compression | None
    timeline: Timeline
    steps: dict[str, float]
    crossing: dict[str, float]


def candidate(
    program: Program,
    towers: tuple[Tower, ...],
    request: TowerRequest,
    calibration: Calibration,
    over_arch: OverArch | None,
    known: Sequence[TablePlan] = (),
) -> Candidate:
    """Shard the tables and price the step, with and without modules; arguments and errors of :func:`shard_towers`."""
    tables, certificate, tiers = shard_towers(program, towers, calibration, known)
    plain = tuple(
        replace(t, vectors_out=len(t.features), dim_out=t.dim, width_out=t.width, params=0) for t in towers
    )
    forms: dict[str, tuple[ModuleKind, tuple[Tower, ...], Model]] = {
        "exchange": ("none", plain, program.model)
    }
    if request.module != "none":
        vectors = sum(tower.vectors_out for tower in towers)
        above = program.model if over_arch is None else over_arch(vectors, towers[0].columns_out)
        forms["modules"] = (request.module, towers, above)
    steps, crossing = {}, {}
    for name, (kind, shape, model) in forms.items():
        compression = peer_compression(program, tables, shape, kind, calibration)
        timeline, crossing[name] = tower_step(program, tables, shape, kind, model, compression, calibration)
        steps[name] = timeline.step
    return Candidate(tables, certificate, tiers, compression, timeline, steps, crossing)


def tower_step(
    program: Program,
    tables: tuple[TablePlan, ...],
    towers: tuple[Tower, ...],
    kind: ModuleKind,
    above: Model,
    compression: Compression | None,
    calibration: Calibration,
) -> tuple[Timeline, float]:
    """The modelled step, and the bytes that the busiest rank sends to other hosts in it."""
    topology, workload, mode = program.topology, program.workload, program.options.mode
    overheads = phase_overheads(topology, workload, calibration, mode)
    found = tower_seconds(tables, towers, kind, topology, workload, calibration, mode, overheads)
    timeline = tower_timeline(
        above,
        peer_phases(found.phases, compression),
        topology,
        workload,
        calibration,
        mode,
        _reduction(program, calibration),
        program.decisions.formats,
        fetch_seconds(replace(program, tables=tables), calibration),
    )
    return timeline, found.cross_host_bytes - found.peer_bytes * _saved(compression)


def _saved(compression: Compression | None) -> float:
    """Share of an exchange's bytes that codecs save, added over both directions."""
    exchanges = compression.exchanges if compression is not None else ()
    return sum(1 - e.link / e.uncompressed for e in exchanges if e.used and e.uncompressed > 0)


def flat_crossing(program: Program) -> float:
    """Embedding bytes that the busiest rank of the flat plan sends to other hosts in a step, codecs included."""
    assert program.tables is not None
    ways = 2 if program.options.mode == "train" else 1
    whole = flat_cross_bytes(program.tables, program.topology, program.workload, program.options.mode)
    return whole * (1 - _saved(program.decisions.compression) / ways)


def _reduction(program: Program, calibration: Calibration) -> DenseReduction | ShardedDense | None:
    """How dense gradients were decided to be summed for the flat plan; None before that."""
    split = sharded_dense(program.decisions.dense, program.topology, calibration, program.workload)
    if isinstance(split, ShardedDense):
        return split
    decided, asked = program.decisions.collectives, program.options.constraints.collectives
    if decided is None:
        return None
    scheduled = asked is not None and asked.dense_engine == "scheduled"
    algorithm = asked.dense_algorithm if asked is not None else ""
    net = communication(program.topology, calibration)
    return dense_reduction(net, decided.bucket_bytes, scheduled, algorithm)
