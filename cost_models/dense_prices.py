"""Seconds of the collectives of a dense part that is split over ranks, by the library of the topology."""

from __future__ import annotations

from dataclasses import replace

from cost_models.calibration import Calibration
from cost_models.collective.planning import communication
from cost_models.dense import layout_of
from cost_models.dense_step import Price, ShardedDense, replica_topology, shard_topology
from cost_models.dense_tensor import TensorDense
from ir.dense_plan import DensePlan
from ir.schedules import Collective
from ir.topology import Topology
from ir.workload import Workload


def sharded_dense(
    plan: DensePlan | None, topology: Topology, calibration: Calibration, workload: Workload
) -> ShardedDense | TensorDense | None:
    """Prices of ``plan``'s collectives; None where the dense part is replicated."""
    if plan is None:
        return None
    if plan.tensor > 1:
        host = replace(topology, levels=topology.levels[:1])
        return TensorDense(
            plan,
            workload.global_batch / topology.world_size,
            _price(host, calibration, "all_gather"),
            _price(host, calibration, "reduce_scatter"),
            _price(replica_topology(topology), calibration, "all_reduce"),
            _price(topology, calibration, "all_reduce"),
            calibration.bucket_bytes,
        )
    if plan.shard == 1:
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
