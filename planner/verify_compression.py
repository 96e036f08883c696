"""Independent check of a plan's compression section: no code of the pass or of the cost models.

Holds when every decision is about an exchanged table of the plan (in tower form with modules: about what a tower's
module sends), errors stay within budgets, bounded codecs
have a bound that explains their error, fixed rates have the ratio of their layout, what is left uncompressed
says so, TorchRec is asked only for what it runs, and the modelled step has the exchanges of the section, in no less time
than their bytes take on the link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ir.compression import Compression, ExchangeCompression, TableCompression, torchrec_refuses
from ir.plan import Plan
from ir.towers import TowerDecision

_BOUNDED = ("eb_lz", "eb_entropy", "eb_lz_entropy")
_TABLE_WISE = ("table_wise", "column_wise", "table_column_wise", "data_parallel")
_SLACK = 1e-6
_PEERS = {"forward": "peer", "backward": "peer_gradient"}  # phases of a step in tower form

# bytes of a float32 element over bytes of an element, from the layouts: 8 bytes more a row of int8, 4 of fp8,
# one scale byte for 32 elements of 4 bits
_RATIO: dict[str, dict[str, Callable[[int], float]]] = {
    "exchange": {
        "fp16": lambda d: 2.0,
        "bf16": lambda d: 2.0,
        "fp8": lambda d: 4 * d / (d + 4),
        "int8": lambda d: 4 * d / (d + 8),
        "mx4": lambda d: 128 / 17,
    },
    "torchrec": {
        "fp16": lambda d: 2.0,
        "bf16": lambda d: 2.0,
        "fp8": lambda d: 4.0,
        "int8": lambda d: 128 / 40,
        "mx4": lambda d: 128 / 17,
    },
}


def compression_faults(plan: Plan) -> Iterator[str]:
    """What is wrong with the section; nothing where the plan has none."""
    section = plan.decisions.compression
    if section is None:
        return
    seen: set[tuple[str, str]] = set()
    for row in section.tables:
        if (row.table, row.direction) in seen:
            yield f"compression of table {row.table!r} is decided twice for {row.direction}"
        seen.add((row.table, row.direction))
        yield from _table_faults(plan, section, row)
    yield from _engine_faults(plan, section)
    for exchange in section.exchanges:
        yield from _exchange_faults(plan, section, exchange)


def _exchanged(plan: Plan) -> dict[str, int]:
    """Columns of a vector of everything that is exchanged under codecs, by name."""
    section = _towers(plan)
    if section is not None and section.module != "none":
        return {f"tower {number}": tower.width_out for number, tower in enumerate(section.towers)}
    return {t.name: t.dim for t in plan.table_plans if t.sharding_type != "data_parallel"}


def _towers(plan: Plan) -> TowerDecision | None:
    section = plan.decisions.towers
    return section if section is not None and section.applied else None


def _table_faults(plan: Plan, section: Compression, row: TableCompression) -> Iterator[str]:
    columns = _exchanged(plan).get(row.table)
    what = f"compression of table {row.table!r}, {row.direction}"
    if columns is None:
        copied = row.table in plan.tables and plan.tables[row.table].sharding_type == "data_parallel"
        yield f"{what}: {'a copied table is not exchanged' if copied else 'the plan exchanges no such table'}"
        return
    if row.error > row.budget * (1 + _SLACK):
        yield f"{what}: an error of {row.error:.3g} is over its budget of {row.budget:.3g}"
    if row.codec == "none" and (row.error or row.bound or row.ratio != 1):
        yield f"{what}: no codec, but a bound, an error or a ratio"
    if (row.codec in _BOUNDED) != (row.bound > 0):
        yield f"{what}: codec {row.codec} with a bound of {row.bound:g}"
    if row.codec in _BOUNDED and row.error > row.bound**2 * (1 + _SLACK):
        # every element is within the bound, so the mean square is within its square
        yield f"{what}: an error of {row.error:.3g} is more than a bound of {row.bound:.3g} allows"
    expected = _RATIO[section.engine].get(row.codec)
    if expected is not None and not 0.85 <= row.ratio / expected(columns) <= 1.001:
        yield f"{what}: {row.codec} has a ratio of {expected(columns):.3f}, not {row.ratio:.3f}"
    if row.codec != "none" and not section.uses(row.direction):
        yield f"{what}: a codec, but the exchange is left as it is"


def _engine_faults(plan: Plan, section: Compression) -> Iterator[str]:
    used = {row.codec for row in section.tables if row.codec != "none"}
    if not used:
        return
    kinds = {table.sharding_type for table in plan.table_plans}
    if section.engine == "exchange":
        if _towers(plan) is not None:
            return  # whole vectors cross between peers, however a tower splits its tables
        bad = sorted(kinds - set(_TABLE_WISE))
        if bad:
            yield f"compression runs whole tables and column blocks only, the plan has {bad[0]} tables"
        return
    split = bool(kinds & {"row_wise", "table_row_wise", "grid_shard"})
    for direction in ("forward", "backward"):
        codecs = {row.codec for row in section.tables if row.direction == direction}
        if len(codecs) > 1:
            yield f"TorchRec has one codec a direction, {direction} has {', '.join(sorted(codecs))}"
        for codec in sorted(codecs):
            refused = torchrec_refuses(codec, plan.topology.device.kind, split)
            if refused:
                yield f"TorchRec does not run codec {codec}: {refused}"


def _exchange_faults(plan: Plan, section: Compression, exchange: ExchangeCompression) -> Iterator[str]:
    coded = [t for t in section.tables if t.direction == exchange.direction and t.codec != "none"]
    if not exchange.used:
        return
    if not coded:
        yield f"{exchange.phase} is said to be compressed but no table has a codec"
    if exchange.link + exchange.coding >= exchange.uncompressed:
        yield f"{exchange.phase} is compressed though it takes no less time than uncompressed"
    if exchange.link * (1 + _SLACK) < exchange.uncompressed / max((t.ratio for t in coded), default=1.0):
        yield f"{exchange.phase} shrinks by more than the largest ratio of its tables"
    towers = _towers(plan)
    phase = exchange.phase if towers is None else _PEERS[exchange.direction]
    event = next((e for e in plan.timeline.events if e.name == phase), None)
    if event is not None and event.duration < (exchange.link + exchange.coding) * (1 - _SLACK):
        yield f"{phase} lasts {event.duration:.3g} s in the step, less than its link and codecs take"
    if towers is not None:
        yield from _peer_faults(plan, towers, exchange, max((t.ratio for t in coded), default=1.0))


def _peer_faults(
    plan: Plan, towers: TowerDecision, exchange: ExchangeCompression, ratio: float
) -> Iterator[str]:
    """A rank sends its share of its tower's columns for every sample to all other towers, over its own link."""
    count = len(towers.towers)
    samples = plan.workload.global_batch / plan.world_size * (count - 1)
    size = 4 * samples * max(tower.width_out for tower in towers.towers)
    least = size / plan.topology.inter_link.bandwidth if plan.topology.hosts > 1 else 0.0
    for name, seconds, need in (
        ("uncompressed", exchange.uncompressed, least),
        ("compressed", exchange.link, least / ratio),
    ):
        if seconds < need * (1 - _SLACK):
            yield f"{exchange.direction} between peers takes {need:.3g} s at least {name}, not {seconds:.3g} s"
