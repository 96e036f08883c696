"""TorchRec's own objective, priced by TorchRec's own estimators.

Every option of a table makes shards of one size (TorchRec splits columns evenly, and its prices do not
depend on how many rows a row shard has), so one representative shard an option is priced instead of
every shard on every rank. Tables of one shape share their prices. :func:`score` prices a finished plan
from scratch, shard by shard, and is what a comparison should use.

Source: ``torchrec.distributed.planner`` 1.8 (enumerators.py, estimator/estimator.py,
shard_estimators.py, partitioners.py, stats.py). Times are in the estimators' milliseconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ir.assignment import Option, Piece, Problem
from ir.errors import InfeasibleError, InputError

Objective = Literal["total", "total+input"]

ALIGNMENT = 4  # column widths are multiples of 4 (torchrec.distributed.sharding_plan._find_base_dim)
HBM_KERNELS = ("fused",)
SPILL_KERNELS = ("fused_uvm_caching", "fused_uvm")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to build the ``ShardingOption`` behind an :class:`ir.assignment.Option`."""

    sharding_type: str
    kernel: str
    width: int  # columns of each column block


@dataclass(frozen=True, slots=True)
class Score:
    """A plan under TorchRec's estimators.

    Attributes:
        total: max over ranks of the sum of ``Perf.total``, ms: what its planner minimises.
        with_input: the same with ``input_dist_comms`` added to each shard, ms.
        critical_comms, critical_compute: the critical path that its statistics print, ms.
        hbm, ddr: largest use of any rank, bytes.
        legal: every rank within its storage after the reservation.
    """

    total: float
    with_input: float
    critical_comms: float
    critical_compute: float
    hbm: int
    ddr: int
    legal: bool

    @property
    def critical_path(self) -> float:
        """Communication plus computation, ms."""
        return self.critical_comms + self.critical_compute


def widths(dim: int, min_partition: int) -> tuple[int, ...]:
    """Widths of column blocks that some ``min_partition`` of at least the given one leads to.

    TorchRec takes the smallest divisor of ``dim`` that is a multiple of 4 and not below
    ``min_partition``, else the whole table; the whole table is not listed.
    """
    return tuple(w for w in range(max(1, min_partition), dim) if dim % w == 0 and w % ALIGNMENT == 0)


def _recipes(dim: int, min_partition: int, kernels: Sequence[str]) -> list[Recipe]:
    """Every option of a table that can be best.

    Left out: splits into one column block (they are table-wise and table-row-wise), and
    table-column-wise, which costs what column-wise costs in these estimators and may go to fewer places.
    """
    made = [Recipe("data_parallel", "dense", dim)]
    narrow = widths(dim, min_partition)
    for kernel in kernels:
        made.append(Recipe("table_wise", kernel, dim))
        made += [Recipe("column_wise", kernel, width) for width in narrow]
        made.append(Recipe("row_wise", kernel, dim))
        made.append(Recipe("table_row_wise", kernel, dim))
        made += [Recipe("grid_shard", kernel, width) for width in narrow]
    return made


class TorchRecObjective:
    """Options and prices of the tables of one module under one topology.

    Args:
        module: holds the ``EmbeddingBagCollection`` s; the meta device will do.
        sharders: as for TorchRec's planner.
        topology: a ``torchrec.distributed.planner.Topology`` whose ranks are all alike.
        batch_size: samples a rank.
        constraints: ``ParameterConstraints`` by table; pooling factors are read from them.
        min_partition: narrowest column block, as an expert would set it.
        objective: "total" is ``Perf.total``; "total+input" adds ``input_dist_comms``.
        reservation: a ``StorageReservation``; None is TorchRec's default (heuristic, 15 %).
        spill: offer the kernels that keep tables in host memory as well.
    """

    def __init__(
        self,
        module: Any,
        sharders: Sequence[Any],
        topology: Any,
        batch_size: int,
        constraints: dict[str, Any] | None = None,
        *,
        min_partition: int = 16,
        objective: Objective = "total",
        reservation: Any = None,
        spill: bool = False,
    ) -> None:
        from torchrec.distributed.planner.shard_estimators import (
            EmbeddingPerfEstimator,
            EmbeddingStorageEstimator,
        )
        from torchrec.distributed.planner.utils import build_sharder_data_map, sharder_name

        self.topology = topology
        self.hosts = topology.world_size // topology.local_world_size
        self.host_size = topology.local_world_size
        self.batch_size = batch_size
        self.constraints = constraints or {}
        self.objective = objective
        self.spill = spill
        self.kernels = HBM_KERNELS + (SPILL_KERNELS if spill else ())
        self.min_partition = min_partition
        self._perf = EmbeddingPerfEstimator(topology=topology, constraints=self.constraints)
        self._storage = EmbeddingStorageEstimator(topology=topology, constraints=self.constraints)
        sharder_map = {sharder_name(sharder.module_type): sharder for sharder in sharders}
        self._sharder_data = build_sharder_data_map(sharder_map)
        self.reserved = reserve(module, sharders, topology, batch_size, self.constraints, reservation)
        self.tables = list(_tables(module, sharder_map))
        self.recipes: list[list[Recipe]] = []

    def problem(self) -> Problem:
        """The assignment problem; loads in ms (one phase), memory in bytes of HBM.

        With ``spill``, host memory of a rank (bytes) is its one further limit.

        Raises:
            InfeasibleError: the reservation leaves a rank no memory.
        """
        capacity = min(device.storage.hbm for device in self.reserved.devices)
        if capacity <= 0:
            raise InfeasibleError(
                "the storage reservation leaves no memory for tables; lower it or take larger devices",
                conflict=("storage_reservation",),
            )
        self.recipes = [
            _recipes(int(tensor.shape[1]), self.min_partition, self.kernels)
            for _, tensor, _, _, _ in self.tables
        ]
        shapes: dict[tuple[Any, ...], tuple[list[Recipe], list[Any]]] = {}
        keys = []
        for (name, tensor, path, owner, pooled), recipes in zip(self.tables, self.recipes, strict=True):
            key = self._shape_key(name, tensor, owner, pooled)
            keys.append(key)
            if key not in shapes:
                shapes[key] = (
                    recipes,
                    [
                        self._sharding_option(name, tensor, path, owner, pooled, recipe, [None])
                        for recipe in recipes
                    ],
                )
        self._price_times(shapes)
        self._storage.estimate([o for _, sample in shapes.values() for o in sample], self._sharder_data)
        options = {
            key: tuple(self._option(r, s) for r, s in zip(recipes, sample, strict=True))
            for key, (recipes, sample) in shapes.items()
        }
        return Problem(
            names=tuple(table[0] for table in self.tables),
            options=tuple(options[key] for key in keys),
            hosts=self.hosts,
            host_size=self.host_size,
            capacity=float(capacity),
            phases=(self.objective,),
            limits=(float(min(d.storage.ddr for d in self.reserved.devices)),) if self.spill else (),
        )

    def sharding_options(self, choice: Sequence[int], placement: Sequence[Sequence[int]]) -> list[Any]:
        """Real ``ShardingOption`` s with every shard sized, offset and ranked (not priced).

        ``placement`` has, for each table, the rank or host of each piece; see
        :class:`passes.assignment.Solution`.
        """
        made = []
        for (name, tensor, path, owner, pooled), recipes, chosen, places in zip(
            self.tables, self.recipes, choice, placement, strict=True
        ):
            recipe = recipes[chosen]
            ranks = self._ranks(recipe, places)
            made.append(self._sharding_option(name, tensor, path, owner, pooled, recipe, ranks))
        return made

    def score(self, sharding_options: Sequence[Any]) -> Score:
        """Price ranked ``ShardingOption`` s from scratch; see :func:`score`."""
        return score(sharding_options, self._perf, self._storage, self._sharder_data, self.reserved)

    def _price_times(self, shapes: dict[tuple[Any, ...], tuple[list[Recipe], list[Any]]]) -> None:
        """Set ``perf`` of every sample; tables that differ in rows only share it where rows do not matter.

        The default estimators read the rows of data-parallel tables alone. That is probed, not assumed:
        the first tables that differ in rows only are priced one by one, and if any of their times
        differs, every table is.
        """
        groups: dict[tuple[Any, ...], list[Any]] = {}
        whole = []
        for key, (recipes, sample) in shapes.items():
            for recipe, option in zip(recipes, sample, strict=True):
                if recipe.sharding_type == "data_parallel":
                    whole.append(option)
                else:
                    groups.setdefault((key[0][1], *key[1:], recipe), []).append(option)
        probes = next((list(g) for g in _alike(groups) if len(g) > 1), [])
        self._perf.estimate(whole + [g[0] for g in groups.values()] + probes, self._sharder_data)
        if any(option.shards[0].perf != probes[0].shards[0].perf for option in probes):
            self._perf.estimate([o for g in groups.values() for o in g], self._sharder_data)
            return
        for first, *rest in groups.values():
            for option in rest:
                option.shards[0].perf = first.shards[0].perf

    def _shape_key(self, name: str, tensor: Any, owner: Any, pooled: bool) -> tuple[Any, ...]:
        limit = self.constraints.get(name)
        details = (
            ()
            if limit is None
            else (
                tuple(limit.pooling_factors),
                repr(limit.batch_sizes),
                repr(limit.num_poolings),
                limit.is_weighted,
            )
        )
        return (tuple(tensor.shape), tensor.dtype, type(owner), pooled, details)

    def _option(self, recipe: Recipe, sample: Any) -> Option:
        shard = sample.shards[0]
        perf = shard.perf.total
        if self.objective == "total+input":
            perf += shard.perf.input_dist_comms
        blocks = int(sample.tensor.shape[1]) // recipe.width
        host = (float(shard.storage.ddr),) if self.spill else ()
        scope: Literal["rank", "host", "all"] = _SCOPES[recipe.sharding_type]
        label = recipe.sharding_type if blocks == 1 else f"{recipe.sharding_type} x{blocks}"
        if recipe.kernel not in ("dense", "fused"):
            label += f" {recipe.kernel}"
        return Option(
            label,
            (Piece(scope, (perf,), float(shard.storage.hbm), blocks, host),),
            together=recipe.sharding_type == "table_column_wise",
        )

    def _ranks(self, recipe: Recipe, places: Sequence[int]) -> list[int]:
        if recipe.sharding_type in ("data_parallel", "row_wise"):
            return list(range(self.topology.world_size))
        if recipe.sharding_type in ("table_row_wise", "grid_shard"):
            return [host * self.host_size + i for host in places for i in range(self.host_size)]
        return list(places)

    def _sharding_option(
        self,
        name: str,
        tensor: Any,
        path: str,
        owner: Any,
        pooled: bool,
        recipe: Recipe,
        ranks: Sequence[Any],
    ) -> Any:
        """One ``ShardingOption``; ``ranks`` [None] makes the representative shard only."""
        from torchrec.distributed.planner.enumerators import get_partition_by_type
        from torchrec.distributed.planner.types import Shard, ShardingOption

        limit = self.constraints.get(name)
        rows, dim = int(tensor.shape[0]), int(tensor.shape[1])
        parts = _row_parts(recipe.sharding_type, self.topology.world_size, self.host_size)
        block = -(-rows // parts)
        cells = [
            (min(part * block, rows), column, max(0, min(block, rows - part * block)))
            for column in range(0, dim, recipe.width)
            for part in range(parts)
        ]
        if recipe.sharding_type == "data_parallel":
            cells = cells * len(ranks)
        shards = [
            Shard(size=[height, recipe.width], offset=[row, column], rank=rank)
            for (row, column, height), rank in zip(cells, ranks, strict=False)
        ]
        return ShardingOption(
            name=name,
            tensor=tensor,
            module=(path, owner),
            input_lengths=list(limit.pooling_factors) if limit is not None else [1.0],
            batch_size=self.batch_size,
            compute_kernel=recipe.kernel,
            sharding_type=recipe.sharding_type,
            partition_by=get_partition_by_type(recipe.sharding_type),
            shards=shards,
            is_pooled=pooled,
        )


def _alike(groups: dict[tuple[Any, ...], list[Any]]) -> list[list[Any]]:
    """The first and the most different table of each group, by rows."""
    return [
        [min(g, key=lambda o: int(o.tensor.shape[0])), max(g, key=lambda o: int(o.tensor.shape[0]))]
        if len(g) > 1
        else g
        for g in groups.values()
    ]


_SCOPES: dict[str, Literal["rank", "host", "all"]] = {
    "data_parallel": "all",
    "row_wise": "all",
    "table_wise": "rank",
    "column_wise": "rank",
    "table_column_wise": "rank",
    "table_row_wise": "host",
    "grid_shard": "host",
}


def _row_parts(sharding_type: str, world_size: int, host_size: int) -> int:
    if sharding_type == "row_wise":
        return world_size
    return host_size if sharding_type in ("table_row_wise", "grid_shard") else 1


def _tables(module: Any, sharder_map: dict[str, Any]) -> Any:
    """``(name, tensor, path, owner, pooled)`` of every shardable table, in module order."""
    from torchrec.distributed.planner.types import ShardingOption
    from torchrec.distributed.planner.utils import sharder_name

    stack = [("", module)]
    while stack:
        path, owner = stack.pop(0)
        sharder = sharder_map.get(sharder_name(type(owner)))
        if sharder is None:
            stack += [(f"{path}.{n}" if path else n, child) for n, child in owner.named_children()]
            continue
        pooled = ShardingOption.module_pooled(owner, path)
        for name, tensor in sharder.shardable_parameters(owner).items():
            if tensor.dim() != 2 or 0 in tensor.shape:
                raise InputError(
                    f"table {name!r} has shape {tuple(tensor.shape)}; a table needs rows and columns"
                )
            yield name, tensor, path, owner, pooled


def reserve(
    module: Any,
    sharders: Sequence[Any],
    topology: Any,
    batch_size: int,
    constraints: dict[str, Any],
    reservation: Any = None,
) -> Any:
    """The topology with TorchRec's storage reservation taken off (default: heuristic, 15 %)."""
    from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = reservation if reservation is not None else HeuristicalStorageReservation(percentage=0.15)
        return policy.reserve(
            topology=topology,
            batch_size=batch_size,
            module=module,
            sharders=list(sharders),
            constraints=constraints,
        )


def score(
    sharding_options: Sequence[Any], perf: Any, storage: Any, sharder_data: Any, reserved: Any
) -> Score:
    """Price ranked ``ShardingOption`` s with TorchRec's estimators, shard by shard.

    Overwrites the prices that the options carry. ``reserved`` is the topology after reservation.
    """
    from torchrec.distributed.planner.stats import _calculate_critical_path

    perf.estimate(list(sharding_options), sharder_data)
    storage.estimate(list(sharding_options), sharder_data)
    world = reserved.world_size
    total, extra, hbm, ddr = [0.0] * world, [0.0] * world, [0] * world, [0] * world
    for option in sharding_options:
        for shard in option.shards:
            total[shard.rank] += shard.perf.total
            extra[shard.rank] += shard.perf.input_dist_comms
            hbm[shard.rank] += shard.storage.hbm
            ddr[shard.rank] += shard.storage.ddr
    path = _calculate_critical_path(list(sharding_options))
    legal = all(
        hbm[rank] <= device.storage.hbm and ddr[rank] <= device.storage.ddr
        for rank, device in enumerate(reserved.devices)
    )
    return Score(
        total=max(total),
        with_input=max(a + b for a, b in zip(total, extra, strict=True)),
        critical_comms=path.comms_estimate,
        critical_compute=path.comp_estimate,
        hbm=max(hbm),
        ddr=max(ddr),
        legal=legal,
    )
