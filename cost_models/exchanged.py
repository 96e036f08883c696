"""Bytes that the exchanges of a step move, on the rank that moves most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from cost_models.embedding import LENGTH_BYTES, Traffic, traffic
from cost_models.placed import option_of, placed_units, table_of
from ir.dtypes import nbytes
from ir.ids import id_width
from ir.plan import TablePlan
from ir.schedules import Collective
from ir.sharding import Unit
from ir.topology import Topology
from ir.workload import Workload

Exchange = tuple[str, Collective]
"""Phase of the step and collective, as ("output_dist", "all_to_all")."""


def exchanged_bytes(
    plans: Sequence[TablePlan], topology: Topology, workload: Workload
) -> dict[Exchange, float]:
    """Bytes of the largest rank in each exchange of ids and of vectors, its own part included.

    Vectors of tables that lie whole (or by columns) on ranks travel in an all-to-all, those of tables that
    are split by rows in a reduce-scatter: over the host and then an all-to-all, or over all ranks. Tables that every
    rank copies exchange nothing here.
    """
    moved: dict[Exchange, np.ndarray] = {}

    def add(exchange: Exchange, ranks: Sequence[int], size: float) -> None:
        load = moved.setdefault(exchange, np.zeros(topology.world_size))
        np.add.at(load, list(ranks), size)

    for plan, unit, ranks, load in _loads(plans, topology, workload):
        add(("input_dist", "all_to_all"), ranks, _ids(load, workload))
        vectors = load.outputs * unit.blocks[0].cols * nbytes(workload.exchange_dtype)
        scope = option_of(plan).scope
        if scope == "all":
            add(("output_dist", "reduce_scatter"), ranks, vectors)
        else:
            share = topology.host_size if scope == "host" else 1
            add(("output_dist", "all_to_all"), ranks, vectors / share)
    return {exchange: float(load.max()) for exchange, load in moved.items()}


def _loads(
    plans: Sequence[TablePlan], topology: Topology, workload: Workload
) -> Iterator[tuple[TablePlan, Unit, Sequence[int], Traffic]]:
    """Each unit of a table that is exchanged, with the ranks it lies on and what a step reads of it."""
    for plan in plans:
        if plan.sharding_type == "data_parallel":
            continue
        table, option = table_of(plan), option_of(plan)
        for unit, ranks in placed_units(plan, topology):
            yield plan, unit, ranks, traffic(table, option, unit, topology, workload)


def _ids(load: Traffic, workload: Workload) -> float:
    return load.ids * workload.id_bytes + load.lengths * LENGTH_BYTES + load.weight_bytes


def packed_ids(plans: Sequence[TablePlan], topology: Topology, workload: Workload) -> float:
    """Bytes of ids as the compressed exchange packs them over those of TorchRec, on the ranks that receive most.

    Each id takes the least bytes that hold the rows of its table (:mod:`codegen.runtime.ids_wire`). 1 where
    no ids are exchanged.
    """
    plain, packed = np.zeros(topology.world_size), np.zeros(topology.world_size)
    for plan, _, ranks, load in _loads(plans, topology, workload):
        # lengths as if they differed, about their mean; those that are all equal do not travel
        length = id_width(math.ceil(load.ids / load.lengths) + 1) if load.lengths else 1
        size = load.ids * id_width(plan.rows) + load.lengths * length + load.weight_bytes
        np.add.at(plain, list(ranks), _ids(load, workload))
        np.add.at(packed, list(ranks), size)
    return float(packed.max() / plain.max()) if plain.any() else 1.0
