"""Codecs of a plan in tower form: those of the exchange between peers, which alone they serve there.

Ranks at one position of every tower exchange what leaves the towers, so that exchange is the one of a machine with
one rank a tower, whole tables on it, and the samples of a position: the batch over the ranks of a tower. What a tower
module sends is one table of that machine, and one message a peer. Row splits inside a tower do not matter to it, and
vectors inside a tower travel as they are.

Vectors of tables are priced by the request's samples of them. What leaves a module changes as the module trains, and
depends on a module that does not exist yet, so it is priced as the vectors that codecs can do least with
(:func:`cost_models.codecs.unmeasured`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cost_models.calibration import Calibration
from cost_models.codecs import unmeasured
from ir.compression import Compression, CompressionRequest, EmbeddingSample
from ir.plan import Shard, TablePlan
from ir.program import Program
from ir.towers import PEER_PHASE, ModuleKind, Tower, sent_name
from passes.compression import CompressionBounds
from passes.compression_choices import budget_of
from passes.dense_sparse import across


def peer_compression(
    program: Program,
    tables: Sequence[TablePlan],
    towers: Sequence[Tower],
    kind: ModuleKind,
    calibration: Calibration,
) -> Compression | None:
    """Codecs and bounds between the peers of ``towers``; None where the constraints ask for no codecs.

    Args:
        program: flat; its constraints say what is asked.
        tables: on the ranks of their towers.
        towers: with the widths that cross to the peers.
        kind: of the modules.
        calibration: of the whole machine.
    """
    request = program.options.constraints.compression
    if request is None:
        return None
    by_library = request.engine == "torchrec"
    request = replace(request, engine="exchange", codecs=("none",) if by_library else request.codecs)
    if kind != "none":
        request, tables = _of_modules(program, request, towers)
    else:
        tower_of = {name: number for number, tower in enumerate(towers) for name in tower.tables}
        tables = [_whole(plan, tower_of[plan.name]) for plan in tables]
    constraints = replace(program.options.constraints, compression=request)
    peers = replace(
        program,
        topology=across(program.topology, len(towers)),
        workload=replace(
            program.workload, global_batch=max(1, program.workload.global_batch // towers[0].ranks)
        ),
        options=replace(program.options, constraints=constraints),
        tables=tuple(tables),
        decisions=replace(program.decisions, compression=None),
    )
    section = CompressionBounds(_posted(calibration)).run(peers).decisions.compression
    if by_library and section is not None:
        why = "TorchRec's codecs run in its own exchange, not between towers"
        return replace(section, tables=tuple(replace(row, verdict=why) for row in section.tables))
    return section


def peer_phases(phases: Mapping[str, float], section: Compression | None) -> dict[str, float]:
    """Seconds of the phases in tower form with the exchanges between peers under their codecs.

    As :func:`passes.compression.compressed_phases`: a phase's floor and its copies stay.
    """
    found = dict(phases)
    for exchange in section.exchanges if section is not None else ():
        if exchange.used:
            found[PEER_PHASE[exchange.direction]] += exchange.link + exchange.coding - exchange.uncompressed
    return found


def _posted(calibration: Calibration) -> Calibration:
    """Links as exchanges between towers reach them, whose receives are posted first."""
    if not calibration.posted_efficiency:
        return calibration
    return replace(calibration, network_efficiency=calibration.posted_efficiency, one_way_gain=0.0)


def _whole(plan: TablePlan, rank: int) -> TablePlan:
    return replace(
        plan, sharding_type="table_wise", shards=(Shard(rank, 0, 0, plan.rows, plan.dim),), tiers=None
    )


def _of_modules(
    program: Program, request: CompressionRequest, towers: Sequence[Tower]
) -> tuple[CompressionRequest, list[TablePlan]]:
    """What leaves each tower as one table, with a sample a direction and what formats have left of the budget."""
    samples: list[EmbeddingSample] = []
    spent: dict[str, float] = {}
    tables = []
    for number, tower in enumerate(towers):
        name = sent_name(number)
        samples += [unmeasured(name, direction, tower.width_out) for direction in PEER_PHASE]
        left = min(budget_of(program, request, table, "forward") for table in tower.tables)
        spent[name] = request.error_budget - left
        tables.append(
            TablePlan(
                name=name,
                rows=1,
                dim=tower.width_out,
                dtype="fp32",
                features=(name,),
                pooling="sum",
                module="",
                parameter="",
                sharding_type="table_wise",
                compute_kernel="fused",
                shards=(Shard(number, 0, 0, 1, tower.width_out),),
                terms={},
                memory={},
            )
        )
    return replace(request, samples=tuple(samples), format_error=spent), tables
