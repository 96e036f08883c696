"""Seconds of the collectives of a dense part that is split over ranks, by the library of the topology."""

from __future__ import annotations

from cost_models.calibration import Calibration
from cost_models.collective.planning import communication
from cost_models.dense import layout_of
from cost_models.dense_step import Price, ShardedDense, replica_topology, shard_topology
from ir.dense_plan import DensePlan
from ir.schedules import Collective
from ir.topology import Topology


def sharded_dense(
    plan: DensePlan | None, topology: Topology, calibration: Calibration
) -> ShardedDense | None:
    """Prices of ``plan``'s collectives; None where the dense part is replicated."""
    if plan is None or plan.shard == 1:
        return None
    layout = layout_of(plan)
    inner = shard_topology(topology, layout)
    return ShardedDense(
        layout,
        plan.units,
        _price(inner, calibration, "all_gather"),
        _price(inner, calibration, "reduce_scatter"),
        _price(replica_topology(topology), calibration, "all_reduce"),
    )


def _price(topology: Topology, calibration: Calibration, collective: Collective) -> Price:
    net = communication(topology, calibration)

    def price(size: float) -> dict[str, float]:
        return net.ranked(collective, size)[0].terms.to_dict() if net.ranks > 1 else {"transfer": 0.0}

    return price
