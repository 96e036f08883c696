"""Independent check that what a plan decides about tables can be run as one: no pass, no runtime.

A decoder's plan, and a plan that decides one subject only, have nothing to join.
"""

from __future__ import annotations

from collections.abc import Iterator

from codegen.execution import form_of
from ir.compression import torchrec_refuses
from ir.plan import Plan

_SUMS_ROWS = ("row_wise", "table_row_wise", "grid_shard")


def check_composition(plan: Plan) -> Iterator[str]:
    """Towers, codecs, tiers and groups of tables exclude one another where no runtime does both."""
    decided = plan.decisions
    towers = decided.towers is not None and decided.towers.applied
    tiers = [table.name for table in plan.table_plans if table.tiers is not None]
    coded = decided.compression is not None and any(e.used for e in decided.compression.exchanges)
    groups = (
        decided.dense is not None and decided.dense.sparse is not None and decided.dense.sparse.groups > 1
    )
    if groups and (towers or tiers):
        yield "groups of replicated tables do not run in tower form or from memory tiers"
    if decided.compression is not None and coded:
        if decided.compression.engine == "torchrec" and towers:
            yield "TorchRec's codecs do not run between the peers of towers; ask for the engine 'exchange'"
        split = [t.name for t in plan.table_plans if t.sharding_type in _SUMS_ROWS]
        if decided.compression.engine == "exchange" and not towers and split:
            yield f"table {split[0]!r} is summed over its row blocks, each of which codecs would change"
    wire, device = plan.workload.exchange_dtype, plan.topology.device.kind
    if wire != "fp32" and not coded and form_of(plan, device) == "torchrec":
        sums = any(table.sharding_type in _SUMS_ROWS for table in plan.table_plans)
        refused = torchrec_refuses(wire, device, sums)
        if refused:
            yield f"vectors cannot travel as {wire}: {refused}"
    for table in plan.table_plans:
        if towers and table.pooling not in ("sum", "mean"):
            yield f"table {table.name!r} is not pooled, and towers exchange pooled vectors"
        if table.tiers is not None and table.sharding_type == "data_parallel":
            yield f"table {table.name!r} is copied to every rank, and its copies are in memory tiers"
