"""Towers: which tables share a host, how much of them crosses hosts, and whether that pays.

Runs on a finished flat plan and replaces it where the modelled step of the tower form is shorter (or the
user says ``always``). Decides, in this order: the number of towers, the partition of tables
(:mod:`passes.tower_partition`), the widths of the tower modules (:mod:`passes.tower_modules`), the shards
inside each tower (:mod:`passes.tower_sharding`), the codecs between peers (:mod:`passes.tower_compression`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cost_models.calibration import Calibration, default_calibration
from cost_models.embedding import unit_seconds
from cost_models.memory import unit_memory
from cost_models.towers import module_work
from ir.errors import InputError
from ir.plan import TablePlan
from ir.program import Program
from ir.sharding import ShardingOption, largest_units
from ir.tower_sample import PooledSample
from ir.towers import Affinity, Narrowing, Tower, TowerDecision, TowerRequest, illegal
from ir.units import format_seconds
from passes.memory import MemoryAccounting
from passes.tower_candidate import Candidate, OverArch, candidate, flat_crossing
from passes.tower_modules import Profile, columns_within, fixed_widths, profile, widths_within
from passes.tower_partition import partition, partition_value, stated
from passes.tower_pools import pools
from passes.tower_rival import rival_partition

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class KnownTowers:
    """The towers of a plan on the same ranks, and where their tables lie."""

    decision: TowerDecision
    tables: tuple[TablePlan, ...]


@dataclass(frozen=True, slots=True)
class Towers:
    """The tower pass; it does nothing unless the constraints ask for towers.

    ``over_arch`` says what tower modules leave of the interaction above them; without it the flat model's
    interaction is priced in full, which understates what modules gain. With ``known`` towers those are kept.
    """

    name: ClassVar[str] = "towers"
    calibration: Calibration | None = None
    over_arch: OverArch | None = None
    known: KnownTowers | None = None

    def run(self, program: Program) -> Program:
        """Fill ``decisions.towers``; replace tables, certificate, memory and timeline where towers pay.

        Raises:
            InputError: the model's lookups cannot be rewritten, or the request does not fit the machine,
                the model or the sample.
            InfeasibleError: the tables of a tower do not fit its ranks.
        """
        request = program.options.constraints.towers
        if request is None:
            return program
        assert program.timeline is not None, "towers are compared with a finished flat plan"
        calibration = self.calibration or default_calibration(program.topology)
        reason = illegal(program.model.tables, program.model.ops)
        if reason:
            raise InputError(f"the lookups of {program.model.name} cannot be put into towers: {reason}")
        sample = PooledSample.load(request.interactions) if request.interactions else None
        known: tuple[TablePlan, ...] = ()
        if self.known is None:
            count = tower_count(program, request)
            towers, affinity = _partition(program, request, count, sample, calibration)
            towers, lost = _with_modules(program, request, towers, sample)
        else:
            towers, known = _as_before(program, self.known.decision, calibration), self.known.tables
            affinity, lost = self.known.decision.affinity, self.known.decision.energy_lost
        chosen = candidate(program, towers, request, calibration, self.over_arch, known)
        towers = _in_rank_order(towers, chosen.tables)
        if sample is not None and request.module != "none":
            towers = tuple(_pooled(tower, sample, request, program.options.seed) for tower in towers)
        decision = _decision(program, request, towers, affinity, lost, sample, chosen)
        done = replace(program, decisions=replace(program.decisions, towers=decision))
        if not decision.applied:
            return replace(done, warnings=(*done.warnings, f"towers: {decision.reason}"))
        done = replace(done, tables=chosen.tables, certificate=chosen.certificate, timeline=chosen.timeline)
        decided = replace(done.decisions, compression=chosen.compression)
        if chosen.tiers is not None:
            decided = replace(decided, tiers=chosen.tiers)
        return MemoryAccounting().run(replace(done, decisions=decided))


def tower_count(program: Program, request: TowerRequest) -> int:
    """The number of towers: as asked for, else one a host, or a group of hosts where tables are few.

    Raises:
        InputError: the number does not divide the hosts, or there are fewer tables.
    """
    hosts, tables = program.topology.hosts, len(program.model.tables)
    if request.towers is None:
        return max(t for t in range(1, hosts + 1) if hosts % t == 0 and t <= tables)
    if hosts % request.towers or request.towers > tables:
        raise InputError(
            f"{request.towers} towers do not fit {hosts} hosts and {tables} tables; choose a divisor of {hosts} "
            f"that is at most {tables}"
        )
    return request.towers


def _as_before(program: Program, decision: TowerDecision, calibration: Calibration) -> tuple[Tower, ...]:
    """The towers of a decision with what their tables take now."""
    names = [table.name for table in program.model.tables]
    rows = dict(zip(names, _resources(program, calibration), strict=True))
    return tuple(
        replace(
            tower,
            memory=int(sum(rows[name][0] for name in tower.tables)),
            lookup_seconds=float(sum(rows[name][1] for name in tower.tables)),
        )
        for tower in decision.towers
    )


def _resources(program: Program, calibration: Calibration) -> Floats:
    """Of each table: bytes of weights and state, seconds of lookups and updates, columns it puts out."""
    rows = []
    topology, workload, mode = program.topology, program.workload, program.options.mode
    for table in program.model.tables:
        option = ShardingOption("table_wise", (table.dim,))
        ((unit, _),) = largest_units(option, table.rows, topology.world_size, topology.host_size)
        seconds = unit_seconds(table, option, unit, topology, workload, calibration, mode)
        memory = unit_memory(table, option, unit, topology, workload, mode)
        rows.append(
            (
                float(memory["weights"] + memory.get("optimizer", 0)),
                seconds["lookup_forward"] + seconds["lookup_backward"],
                float(table.dim * len(table.features)),
            )
        )
    return np.array(rows)


def _gain(program: Program, request: TowerRequest, sample: PooledSample) -> Floats:
    """(tables, tables): what it is worth to have two tables in one tower, over pairs of their features."""
    tables = program.model.tables
    features = [feature for table in tables for feature in table.features]
    strengths = sample.strengths(features, request.strength)
    worth = strengths if request.objective == "coherent" else 1.0 - strengths
    owner = np.repeat(np.arange(len(tables)), [len(table.features) for table in tables])
    member = np.zeros((len(tables), len(features)))
    member[owner, np.arange(len(features))] = 1.0
    gain: Floats = member @ worth @ member.T
    np.fill_diagonal(gain, 0.0)
    return (gain + gain.T) / 2


def _partition(
    program: Program,
    request: TowerRequest,
    count: int,
    sample: PooledSample | None,
    calibration: Calibration,
) -> tuple[tuple[Tower, ...], Affinity | None]:
    resources = _resources(program, calibration)
    tables = program.model.tables
    gain = np.zeros((len(tables), len(tables))) if sample is None else _gain(program, request, sample)
    problem, start = stated(gain, resources, count, request.balance)
    affinity = None
    if sample is not None and count > 1:
        found = partition(problem, start, program.options.seed)
        distance = gain.max() - gain
        np.fill_diagonal(distance, 0.0)
        rival = rival_partition(distance, count, problem.sizes, program.options.seed)
        affinity = Affinity(found.value, found.bound, partition_value(gain, rival), found.method)
        start = found.tower
    ranks = program.topology.world_size // count
    towers = []
    for number in range(count):
        members = np.flatnonzero(start == number)
        mine = [tables[i] for i in members]
        dims = {table.dim for table in mine}
        features = tuple(feature for table in mine for feature in table.features)
        width = sum(table.dim * len(table.features) for table in mine)
        towers.append(
            Tower(
                tables=tuple(table.name for table in mine),
                features=features,
                first_rank=number * ranks,
                ranks=ranks,
                dim=dims.pop() if len(dims) == 1 else 0,
                width=width,
                vectors_out=len(features),
                width_out=width,
                memory=int(resources[members, 0].sum()),
                lookup_seconds=float(resources[members, 1].sum()),
            )
        )
    return tuple(towers), affinity


def _with_modules(
    program: Program, request: TowerRequest, towers: Sequence[Tower], sample: PooledSample | None
) -> tuple[tuple[Tower, ...], float | None]:
    """The towers with the widths of their modules, and the share of all energy that is lost."""
    if request.module == "none":
        return tuple(towers), None
    if any(tower.dim == 0 for tower in towers) or len({tower.dim for tower in towers}) > 1:
        raise InputError(
            f"tower modules need vectors of one width, but the tables of {program.model.name} have several; "
            "use module none"
        )
    if request.compression is None and (request.accuracy_budget is None or sample is None):
        raise InputError(
            "tower modules need a compression, or an accuracy_budget with interactions to measure it on"
        )
    narrow = _narrowing(request)
    profiles = [
        None if sample is None else profile(sample, tower.features, tower.dim, narrow) for tower in towers
    ]
    measured = [p for p in profiles if p is not None]
    kept = _kept(request, narrow, towers, measured)
    made = []
    for tower, count, energy in zip(towers, kept, profiles, strict=True):
        vectors, columns = (count, tower.dim) if narrow == "vectors" else (len(tower.features), count)
        work = module_work(request.module, len(tower.features), tower.dim, vectors, columns)
        made.append(
            replace(
                tower,
                vectors_out=vectors,
                dim_out=columns,
                width_out=vectors * columns,
                params=work.params,
                flops=work.flops,
                energy_lost=None if energy is None else float(energy.lost[count - 1]),
            )
        )
    total = sum(p.energy for p in measured)
    lost = sum(p.energy * float(p.lost[count - 1]) for p, count in zip(measured, kept, strict=False))
    return tuple(made), (lost / total if total else 0.0) if sample is not None else None


def _narrowing(request: TowerRequest) -> Narrowing:
    """What the modules narrow; raises InputError for columns of other modules than projections."""
    if request.narrow == "columns" and request.module != "projection":
        raise InputError(
            f"{request.module} tower modules keep the columns of a vector; ask them to narrow vectors"
        )
    return request.narrow


def _kept(
    request: TowerRequest, narrow: Narrowing, towers: Sequence[Tower], measured: Sequence[Profile]
) -> list[int]:
    """Vectors that leave each tower, or columns of its vectors, by the ratio or by the budget."""
    counts = [len(tower.features) for tower in towers]
    dims = [tower.dim for tower in towers]
    if request.compression is not None:
        return fixed_widths(counts if narrow == "vectors" else dims, request.compression)
    assert request.accuracy_budget is not None
    if narrow == "columns":
        return [columns_within(measured, request.accuracy_budget)] * len(towers)
    # dot products are taken of different vectors: one alone would carry no product of its tower's features
    return widths_within(
        measured, dims, request.accuracy_budget, least=2 if request.module == "projection" else 1
    )


def _in_rank_order(towers: Sequence[Tower], tables: Sequence[TablePlan]) -> tuple[Tower, ...]:
    """Features in the order in which the ranks' outputs are laid side by side, so that nothing has to be sorted."""
    place: dict[str, int] = {}
    for table in tables:
        first = min(shard.rank for shard in table.shards)
        place.update(dict.fromkeys(table.features, first))
    return tuple(
        replace(tower, features=tuple(sorted(tower.features, key=place.__getitem__))) for tower in towers
    )


def _pooled(tower: Tower, sample: PooledSample, request: TowerRequest, seed: int) -> Tower:
    """The tower with what the vectors that leave its module start as."""
    if tower.vectors_out == len(tower.features):
        return tower
    return replace(
        tower,
        pools=pools(sample.strengths(tower.features, request.strength), tower.vectors_out, seed),
    )


def _decision(
    program: Program,
    request: TowerRequest,
    towers: tuple[Tower, ...],
    affinity: Affinity | None,
    lost: float | None,
    sample: PooledSample | None,
    found: Candidate,
) -> TowerDecision:
    assert program.timeline is not None
    assert program.tables is not None
    flat, step = program.timeline.step, found.timeline.step
    shorter = step < flat
    change = f"{format_seconds(step)} a step against {format_seconds(flat)} flat"
    if program.topology.hosts == 1:
        why = f"one host has no slow link to spare ({change})"
    else:
        why = f"{'towers are faster' if shorter else 'towers do not pay here'}: {change}"
    return TowerDecision(
        applied=request.always or (shorter and program.topology.hosts > 1),
        reason=why + (", kept because always was asked for" if request.always and not shorter else ""),
        objective=request.objective,
        module=request.module,
        towers=towers,
        affinity=affinity,
        steps={"flat": flat, **found.steps},
        cross_host_bytes={"flat": flat_crossing(program), **found.crossing},
        energy_lost=lost,
        sample="" if sample is None else sample.digest,
    )
