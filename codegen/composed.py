"""A plan that joins towers, deduplication, codecs, number formats and memory tiers, as one distributed module.

Each of these has a runtime of its own (:mod:`codegen.towers`, :mod:`codegen.dedup`, :mod:`codegen.compressed`,
:mod:`codegen.formats`, :mod:`codegen.runtime.tiered`); :func:`composed_model` runs a plan that decides several of them,
on gloo and CPUs. Without towers the plan is run as one tower of all ranks. The result equals the unsharded model with
the plan's formats (:func:`codegen.formats.apply`), up to the codecs' bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codegen.dense import groups_of
from codegen.torchrec_check import group_for
from ir.compression import CODECS, Compression, Direction, codec_of
from ir.errors import InputError
from ir.formats import parse_format
from ir.plan import Plan, TablePlan
from ir.sharding import ROW_SPLIT
from ir.towers import Tower, TowerDecision
from ir.workload import Optimizer

if TYPE_CHECKING:
    from torch import nn

    from codegen.runtime.composed.lookup import Copies
    from codegen.runtime.composed.rows import Shards, Storage, Update
    from codegen.runtime.compressed_all_to_all import Rule
    from codegen.runtime.towers.layout import TowerLayout
    from codegen.towers import TowerModel

LOOKUP = "tower_lookup"  # codegen.towers.LOOKUP, which imports torch
WIDE = "fp32"
SPARE = 2.0  # distinct rows of a batch over the mean that the workload states: pooling factors vary


def composes(plan: Plan, device: str = "cpu") -> bool:
    """Whether the plan needs :func:`composed_model`: no single runtime does all that it decides.

    Towers with anything beside them (a dense part that is split over ranks too), tables in tiers (on CPUs; TorchRec has
    them on GPUs), or the compressed exchange beside deduplication, formats or a split dense part.
    """
    decided = plan.decisions
    towers = decided.towers is not None and decided.towers.applied
    tiers = device == "cpu" and any(table.tiers is not None for table in plan.table_plans)
    others = [
        decided.dedup is not None and bool(decided.dedup.chosen),
        decided.formats is not None,
        _bounded(plan) or (plan.workload.exchange_dtype != WIDE and towers),
        decided.dense is not None and (decided.dense.shard > 1 or decided.dense.tensor > 1),
    ]
    return tiers or (towers and any(others)) or (_bounded(plan) and any((others[0], others[1], others[3])))


def _bounded(plan: Plan) -> bool:
    section = plan.decisions.compression
    return section is not None and section.engine == "exchange" and any(e.used for e in section.exchanges)


def refused(plan: Plan) -> str:
    """Why no runtime joins what the plan decides; empty if one does."""
    section, towers, dense = plan.decisions.compression, plan.decisions.towers, plan.decisions.dense
    if dense is not None and dense.tensor > 1:
        return "layers that are split over a host run beside TorchRec's tables only"
    if groups_of(plan) is not None:
        return "groups of replicated tables run in TorchRec only, without towers, tiers and codecs of this project"
    if section is not None and section.engine == "torchrec" and any(e.used for e in section.exchanges):
        return (
            "TorchRec's codecs run in TorchRec's own exchange; compile with the compression engine 'exchange'"
        )
    flat = towers is None or not towers.applied
    for table in plan.table_plans:
        if table.pooling not in ("sum", "mean"):
            return f"table {table.name!r} has pooling {table.pooling!r}; sums and means are exchanged"
        if flat and _bounded(plan) and table.sharding_type in ROW_SPLIT:
            return (
                f"table {table.name!r} is {table.sharding_type}, and codecs would add their error to each partial sum; "
                "pin it to table_wise or column_wise, or use towers"
            )
        if table.sharding_type == "data_parallel" and table.tiers is not None:
            return f"table {table.name!r} is on every rank and in memory tiers; forbid data_parallel for it"
    return ""


def flat_tower(plan: Plan) -> TowerDecision:
    """One tower of all ranks: the flat exchange in the terms of towers. Copied tables are left out."""
    held = [table for table in plan.table_plans if table.sharding_type != "data_parallel"]
    features = tuple(feature for table in held for feature in table.features)
    width = max(1, sum(table.dim * len(table.features) for table in held))
    tower = Tower(
        tables=tuple(table.name for table in held),
        features=features,
        first_rank=0,
        ranks=plan.world_size,
        dim=0,
        width=width,
        vectors_out=max(1, len(features)),
        width_out=width,
    )
    return TowerDecision(True, "the flat plan", "coherent", "none", (tower,))


@dataclass(frozen=True, slots=True)
class Transport:
    """How vectors travel between all ranks (flat) or between peers."""

    section: Compression | None  # None: every vector in ``dtype``
    dtype: str
    table_of: dict[str, str]  # feature -> table

    @property
    def plain(self) -> tuple[bool, bool]:
        """Nothing has a codec (forward, backward)."""
        if self.section is None:
            return self.dtype == WIDE, self.dtype == WIDE
        return not self.section.uses("forward"), not self.section.uses("backward")

    def __call__(self, name: str, direction: Direction, step: int | None) -> Rule:
        """The rule of a feature, or of a tower module's output; ``step`` None: not training, the final bounds."""
        from codegen.runtime.compressed_all_to_all import PLAIN, Rule

        if self.section is None:
            return PLAIN if self.dtype == WIDE else Rule(self.dtype)  # type: ignore[arg-type]
        decided = self.section.of(self.table_of.get(name, name), direction)
        if decided is None or not self.section.uses(direction):
            return PLAIN
        factor = 1.0 if step is None else self.section.decay.factor(step)
        bound = decided.bound * factor if codec_of(decided.codec).bounded else 0.0
        return Rule(decided.codec, bound)


def transport_of(plan: Plan) -> Transport:
    """The plan's transport; raises InputError for a traffic format that no codec carries."""
    section = plan.decisions.compression
    dtype = plan.workload.exchange_dtype
    if section is None and dtype != WIDE and dtype not in CODECS:
        raise InputError(f"vectors travel as {dtype}, for which there is no codec; allow fp16, bf16 or fp32")
    table_of = {feature: table.name for table in plan.table_plans for feature in table.features}
    return Transport(section, dtype, table_of)


def storage_of(
    plan: Plan, table: TablePlan, rows: int, batch_rows: int | None, optimizer: Optimizer
) -> Storage:
    """How a shard of ``rows`` rows of a table is kept, without a folder."""
    from codegen.runtime.composed.rows import Storage
    from codegen.runtime.tiered.planned import tiered_layout

    format = parse_format(table.format or table.dtype).id
    state = parse_format(table.state_format or WIDE).id
    if table.tiers is None:
        return Storage(format, state)
    if batch_rows is None:
        ids = sum(plan.workload.stats(feature).pooling_factor for feature in table.features)
        batch_rows = math.ceil(SPARE * plan.workload.global_batch * ids)
    layout = tiered_layout(table, plan, batch_rows=min(batch_rows, rows), rows=rows, optimizer=optimizer)
    return Storage(format, state, layout.ranges, layout.cache_rows, layout.policy)


def composed_model(
    plan: Plan,
    module: nn.Module,
    process_group: Any = None,
    *,
    optimizer: Optimizer | None = None,
    lr: float = 0.01,
    dense_optimizer: Optimizer | None = None,
    dense_lr: float | None = None,
    eps: float = 1e-8,
    device: str = "cpu",
    kernel: str = "fused",
    storage: str | Path | None = None,
    batch_rows: int | None = None,
) -> TowerModel:
    """``module`` on the ranks of ``process_group`` under all that the plan decides about tables; its weights are kept.

    Gradients are those of the mean over ranks of the ranks' losses, as with TorchRec and DDP.

    Args:
        plan: for this module and as many ranks.
        module: the model that was planned, or one with tower modules; consumed.
        process_group: default: the default group; gloo.
        optimizer, lr: of the tables; default the workload's.
        dense_optimizer, dense_lr: of the rest; default the like of the tables'.
        eps: of Adagrad and Adam.
        device: "cpu".
        kernel: "fused": FBGEMM for float32 tables in memory; "rows": this project's rows for all.
        storage: folder for the files of tables in memory tiers; each shard has a folder of its own below it.
        batch_rows: most distinct rows of a table in a global batch, which tiers' caches must hold; default twice what
            the workload's pooling factors give.

    Raises:
        InputError: decisions that no runtime joins (:func:`refused`), another model, ranks or optimizer.
    """
    import torch.distributed as dist

    from codegen.runtime.composed.lookup import ComposedLookup
    from codegen.runtime.composed.rows import Update
    from codegen.runtime.optimizers import ordinary_optimizers
    from codegen.runtime.towers.layout import tower_layout
    from codegen.runtime.towers.sptt import make_groups
    from codegen.towers import (
        TowerModel,
        check_tables,
        lookup_node,
        movable_modules,
        replace_lookup,
        sent_widths,
        trace_model,
    )

    why = refused(plan)
    if why:
        raise InputError(f"the plan of {plan.model.name!r} cannot be run as one: {why}")
    if device != "cpu":
        raise InputError(
            f"towers, codecs and tiers of one plan run together on CPUs, not on {device!r}; plan fewer of them for it"
        )
    if kernel not in ("fused", "rows"):
        raise InputError(f"kernel must be 'fused' or 'rows', not {kernel!r}")
    group = group_for(plan, process_group)
    name: Optimizer = optimizer or plan.workload.optimizer
    towers = plan.decisions.towers
    decision = towers if towers is not None and towers.applied else flat_tower(plan)
    _narrow_layers(plan, module)
    graph = trace_model(module)
    node = lookup_node(graph)
    collection: Any = graph.get_submodule(str(node.target))
    check_tables(plan, collection)
    movable = movable_modules(graph, node, decision)
    layout = tower_layout(plan, decision)
    weights = {key: bag.weight for key, bag in collection.embedding_bags.items()}
    dedup = _groups(plan, set(layout.dims))
    transport = transport_of(plan)
    lookup: Any = ComposedLookup(
        layout,
        _shards(
            plan,
            layout,
            dist.get_rank(group),
            dedup,
            weights,
            Update(name, lr, eps),
            (kernel, storage, batch_rows),
        ),
        _copies(plan, weights),
        make_groups(group, layout.members),
        dedup=dedup,
        mean=frozenset(f for t in plan.table_plans if t.pooling == "mean" for f in t.features),
        keys=[feature for config in collection.embedding_bag_configs() for feature in config.feature_names],
        modules={m.tower: m.module for m in movable},
        widths=sent_widths(layout, movable),
        rules=transport,
        plain=transport.plain,
        weighted=collection.is_weighted(),
    )
    graph.add_submodule(LOOKUP, lookup)
    replace_lookup(graph, node, movable)
    wrapped = _parallel(plan, graph, group)
    copies = list(lookup.copies.parameters())
    optimizers = ordinary_optimizers(copies, _dense(graph), (name, lr), (dense_optimizer, dense_lr), eps)
    moved = {m.tower: str(m.node.target) for m in movable}
    return TowerModel(wrapped, lookup, optimizers, moved, str(node.target))


def _narrow_layers(plan: Plan, module: nn.Module) -> None:
    """GEMMs in the formats of the plan, in place."""
    from codegen.formats import apply_formats

    decided = plan.decisions.formats
    chosen = (
        {}
        if decided is None
        else {
            tensor.name: tensor.format
            for tensor in decided.tensors
            if tensor.kind in ("weight", "activation")
        }
    )
    if any(format != WIDE for format in chosen.values()):
        apply_formats(module, chosen, training=plan.mode == "train", inplace=True)


def _groups(plan: Plan, exchanged: set[str]) -> list[tuple[str, ...]]:
    """The features that are deduplicated together, of those that are exchanged."""
    section = plan.decisions.dedup
    found = (
        []
        if section is None
        else [
            tuple(feature for feature in group.features if feature in exchanged) for group in section.chosen
        ]
    )
    return [features for features in found if features]


def _shards(
    plan: Plan,
    layout: TowerLayout,
    rank: int,
    dedup: Sequence[Sequence[str]],
    weights: Mapping[str, Any],
    update: Update,
    how: tuple[str, str | Path | None, int | None],
) -> Shards:
    """This rank's shards; ``how`` is kernel, storage and batch_rows of :func:`composed_model`."""
    from codegen.runtime.composed.rows import Shards

    kernel, storage, batch_rows = how
    part_of = {feature: number + 1 for number, features in enumerate(dedup) for feature in features}
    kept = []
    for one in layout.held[rank]:
        found = storage_of(plan, plan.tables[one.table], one.shard.rows, batch_rows, update.optimizer)
        if found.ranges and storage is not None:
            found = replace(found, folder=Path(storage) / f"{one.table}.{one.shard.row}.{one.shard.col}")
        kept.append(found)
    parts = [part_of.get(slot.feature, 0) for slot in layout.slots[rank]]
    return Shards(layout.held[rank], parts, kept, weights, update, kernel == "fused")


def _copies(plan: Plan, weights: Mapping[str, Any]) -> Copies:
    """The tables that every rank holds."""
    from codegen.runtime.composed.lookup import Copies

    return Copies(
        {
            table.name: (weights[table.name], table.features, parse_format(table.format or table.dtype).id)
            for table in plan.table_plans
            if table.sharding_type == "data_parallel"
        }
    )


def _dense(graph: nn.Module) -> list[Any]:
    """Parameters of the dense part and of this rank's tower module."""
    lookup: Any = graph.get_submodule(LOOKUP)
    tables = {id(p) for part in (lookup.lookup, lookup.copies) for p in part.parameters()}
    return [p for p in graph.parameters() if p.requires_grad and id(p) not in tables]


def _parallel(plan: Plan, graph: nn.Module, group: Any) -> nn.Module:
    """The graph with its dense part replicated, or split as the plan says; tables and tower modules are left alone."""
    from torch.nn.parallel import DistributedDataParallel

    from codegen.runtime.dense.shard import dense_mesh, shard_dense

    lookup: Any = graph.get_submodule(LOOKUP)
    copies = {id(p) for p in lookup.copies.parameters()}
    own = {
        key: p for key, p in graph.named_parameters() if key.startswith(f"{LOOKUP}.") and id(p) not in copies
    }
    dense = plan.decisions.dense
    if dense is not None and dense.shard > 1:
        mesh = dense_mesh(dense.shard, dense.replicas, "cpu", group)
        return shard_dense(
            graph,
            dense.units,
            mesh,
            reshard_after_forward=dense.reshard_after_forward,
            ignored=set(own.values()),
        )
    if all(key in own for key, p in graph.named_parameters() if p.requires_grad):
        return graph
    buffers = [key for key, _ in graph.named_buffers() if key.startswith(f"{LOOKUP}.")]
    # DDP's own hook for parameters that are no replicas; TorchRec uses it for its shards
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(graph, [*own, *buffers])  # type: ignore[no-untyped-call]
    return DistributedDataParallel(
        graph, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
    )
