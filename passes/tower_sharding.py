"""Tables onto the ranks of their tower: the sharding pass run on each tower's own hosts.

Inside a tower the sharding pass sees a machine of the tower's hosts and the whole batch, so that its output
exchange is the one inside the tower. A split over all ranks of one host is ``column_wise`` or ``row_wise``
there and ``table_column_wise`` or ``table_row_wise`` in the whole machine. Copies and splits over several
towers are not offered.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace

from cost_models.calibration import Calibration
from cost_models.dense import planned_dense_memory
from cost_models.towers import tower_topology
from ir.constraints import Constraints, ShardingType, TableConstraint
from ir.errors import InfeasibleError, InputError
from ir.format_plan import FormatRequest
from ir.ops import EmbeddingTable
from ir.plan import Certificate, TablePlan
from ir.program import Model, Program
from ir.tier_plan import TierPlan
from ir.towers import Tower
from passes.search_share import search_limit, stages
from passes.sharding import Sharding
from passes.sharding_prices import memory_limit
from passes.warm_sharding import WarmSharding

# type on one host of a tower -> type on the machine
_ON_ONE_HOST: dict[ShardingType, ShardingType] = {
    "table_wise": "table_wise",
    "column_wise": "table_column_wise",
    "row_wise": "table_row_wise",
}
_ON_HOSTS: tuple[ShardingType, ...] = (
    "table_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
)


def shard_towers(
    program: Program, towers: Sequence[Tower], calibration: Calibration, known: Sequence[TablePlan] = ()
) -> tuple[tuple[TablePlan, ...], Certificate, TierPlan | None]:
    """Decide every table within its tower; number formats stay those of the program's section.

    ``known``: where the tables of these towers lie, to start from.

    Returns:
        The table plans in the model's order, the certificate of the slowest tower (for these towers no
        plan has a smaller embedding time), and the use of memory tiers where these are asked for.

    Raises:
        InfeasibleError: a tower's tables do not fit its ranks; names the tower.
        InputError: a table is pinned to ranks, which towers decide.
    """
    found: dict[str, TablePlan] = {}
    certificates = []
    uses: list[TierPlan] = []
    for number, tower in enumerate(towers):
        try:
            plans, certificate, tiers = _shard(program, tower, len(towers), calibration, known)
        except InfeasibleError as error:
            raise InfeasibleError(
                f"tower {number} ({len(tower.tables)} tables on {tower.ranks} ranks): {error}",
                error.conflict,
                error.relaxation,
            ) from None
        certificates.append(certificate)
        uses += [tiers] if tiers is not None else []
        found.update({plan.name: plan for plan in plans})
    slowest = max(certificates, key=lambda c: c.objective)
    bound = max(c.lower_bound for c in certificates)
    together = replace(
        slowest,
        objective_name=f"slowest tower, towers given: {slowest.objective_name}",
        lower_bound=min(bound, slowest.objective),
        status="optimal" if bound >= slowest.objective * (1 - 1e-6) else "feasible",
    )
    return tuple(found[table.name] for table in program.model.tables), together, _busiest(uses)


def _busiest(uses: Sequence[TierPlan]) -> TierPlan | None:
    """The tiers of all towers: each as its busiest host uses it. Towers have hosts of their own."""
    if not uses:
        return None
    slowest = max(uses, key=lambda plan: plan.step)
    tiers = []
    for name in dict.fromkeys(use.tier for plan in uses for use in plan.tiers):
        mine = [use for plan in uses for use in plan.tiers if use.tier == name]
        kinds = sorted({kind for use in mine for kind in use.seconds})
        tiers.append(
            replace(
                max(mine, key=lambda use: use.bytes),
                seconds={kind: max(use.seconds.get(kind, 0.0) for use in mine) for kind in kinds},
                binding=tuple(dict.fromkeys(kind for use in mine for kind in use.binding)),
                price_per_gb=max(use.price_per_gb for use in mine),
            )
        )
    return replace(
        slowest,
        tiers=tuple(tiers),
        hosts=sum(plan.hosts for plan in uses),
        lower_bound=max(p.lower_bound for p in uses),
    )


def _pinned(program: Program, tables: Sequence[EmbeddingTable]) -> FormatRequest | None:
    """The formats that were decided for the whole model, as the only ones allowed."""
    asked, decided = program.options.constraints.formats, program.decisions.formats
    if asked is None or decided is None:
        return asked
    rules: dict[str, tuple[str, ...]] = dict.fromkeys(
        ("traffic.forward", "traffic.backward"), (program.workload.exchange_dtype,)
    )
    for name in (name for table in tables for name in (table.name, f"{table.name}.state")):
        format = decided.format_of(name)
        if format is not None:
            rules[glob.escape(name)] = (format,)
    return FormatRequest(rules=rules, kernels=asked.kernels, sensitivity=asked.sensitivity)


def _shard(
    program: Program, tower: Tower, towers: int, calibration: Calibration, known: Sequence[TablePlan]
) -> tuple[tuple[TablePlan, ...], Certificate, TierPlan | None]:
    topology = tower_topology(program.topology, tower.ranks)
    tables = tuple(table for table in program.model.tables if table.name in tower.tables)
    dense = sum(planned_dense_memory(program).values())
    constraints = program.options.constraints
    inner = replace(
        constraints,
        memory_limit=max(1, memory_limit(program) - dense),
        memory_reserve=0.0,
        tables=_rules(tables, constraints, topology.world_size, topology.hosts),
        formats=_pinned(program, tables),
        towers=None,
    )
    part = replace(
        program,
        model=Model(program.model.name, tables, ()),
        topology=topology,
        # sharding takes one stage's part of it
        options=replace(
            program.options, constraints=inner, time_limit=search_limit(program) / towers * stages(inner)
        ),
        tables=None,
        certificate=None,
        memory=None,
        timeline=None,
        decisions=replace(program.decisions, towers=None),
    )
    inside = tuple(
        _inside(plan, tower.first_rank, topology.hosts) for plan in known if plan.name in tower.tables
    )
    ranks = (topology.world_size, topology.host_size)
    step = (
        WarmSharding(inside, ranks, calibration, program.decisions.formats)
        if known
        else Sharding(calibration)
    )
    done = step.run(part)
    assert done.tables is not None
    assert done.certificate is not None
    moved = tuple(_moved(plan, tower.first_rank, topology.hosts) for plan in done.tables)
    return moved, done.certificate, done.decisions.tiers


def _rules(
    tables: Sequence[EmbeddingTable], constraints: Constraints, world: int, hosts: int
) -> dict[str, TableConstraint]:
    """The user's rules in the tower's terms, one a table."""
    rules = {}
    for table in tables:
        rule = constraints.for_table(table.name)
        if rule.ranks is not None:
            raise InputError(
                f"table {table.name!r} is pinned to ranks, but towers decide the ranks of their tables; remove one"
            )
        types: tuple[ShardingType, ...] = _ON_HOSTS if hosts > 1 else tuple(_ON_ONE_HOST)
        if rule.sharding_types is not None:
            asked = set(rule.sharding_types)
            types = tuple(t for t in types if t in asked or (hosts == 1 and _ON_ONE_HOST[t] in asked))
        if world == 1:
            types = tuple(t for t in types if t == "table_wise")
        if not types:
            raise InfeasibleError(
                f"table {table.name!r} may only be {', '.join(rule.sharding_types or ())}, which does not stay "
                "in a tower",
                conflict=(f"tables[{table.name}].sharding_types", "towers"),
                relaxation=f"allow table_wise for {table.name!r}",
            )
        rules[table.name] = replace(rule, sharding_types=types)
    return rules


def _inside(plan: TablePlan, first: int, hosts: int) -> TablePlan:
    """The inverse of :func:`_moved`."""
    kinds = {machine: one for one, machine in _ON_ONE_HOST.items()} if hosts == 1 else {}
    shards = tuple(replace(shard, rank=shard.rank - first) for shard in plan.shards)
    return replace(plan, sharding_type=kinds.get(plan.sharding_type, plan.sharding_type), shards=shards)


def _moved(plan: TablePlan, first: int, hosts: int) -> TablePlan:
    """A decision on the tower's own machine as one on the whole machine."""
    kind = _ON_ONE_HOST[plan.sharding_type] if hosts == 1 else plan.sharding_type
    shards = tuple(replace(shard, rank=shard.rank + first) for shard in plan.shards)
    if kind == "table_column_wise" and len({shard.col for shard in shards}) == 1:
        kind = "table_wise"
    return replace(plan, sharding_type=kind, shards=shards)
