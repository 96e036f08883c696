"""Weights and optimizer state of every runtime under their names before sharding.

============================= =======================================================================================
name                          holds
============================= =======================================================================================
``PATH``                      a parameter or buffer, by its path in the unsharded module, tower modules included
``optimizer/PATH/SLOT``       its state: ``sum`` (Adagrad), ``exp_avg``, ``exp_avg_sq`` and ``step`` (Adam)
``optimizer/PATH/sum/A:B``    row-wise Adagrad's state of columns A to B - 1, where a table is split by columns: each block
                              sums its own squares, so a row has one number a block
``growth/PATH``               which units of a layer are in use, where a phase of growth has pruned some
============================= =======================================================================================

Tables in number formats are float32 masters in this project's runtimes and have the format's own type in TorchRec's;
state is saved as it is held. Error-bounded codecs keep no residual between steps: what they hold is the count of steps
by which bounds decay, and that is the checkpoint's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from codegen.checkpoint_shards import Place, State, add_shards
from codegen.compressed import CompressedModel
from codegen.dense import group_plan
from codegen.runtime.composed.lookup import ComposedLookup
from codegen.runtime.dense.groups import TableSync
from codegen.runtime.optimizers import BlockRowWiseAdagrad
from codegen.torchrec import ShardedModel, in_torchrec_order
from codegen.towers import LOOKUP, TowerModel
from ir.errors import InputError
from ir.plan import Plan, Shard, TablePlan

# FBGEMM's names of a fused optimizer's state -> torch's names of the same, by how many there are
_FUSED = {1: {"momentum1": "sum"}, 2: {"momentum1": "exp_avg", "momentum2": "exp_avg_sq"}}
_COLLECTIONS = ("embedding_bags", "embeddings")  # where TorchRec's collections hold their tables


def model_state(plan: Plan, model: Any) -> dict[str, Any]:
    """What this rank holds of model and optimizers, by name; loading writes into it.

    Args:
        plan: the plan ``model`` was made with.
        model: of any runtime of :mod:`codegen.execution`.

    Raises:
        InputError: tables in a key-value store of TorchRec, whose rows it does not give out as tensors.
    """
    if _is_phased(model):
        found: dict[str, Any] = model.state()
        return found
    if isinstance(model, CompressedModel):
        return _of_coded(plan, model)
    if isinstance(model, TowerModel):
        return _of_towers(plan, model)
    return _of_torchrec(plan, model)


def _is_phased(model: Any) -> bool:
    from codegen.phased import PhasedModel  # which imports this module

    return isinstance(model, PhasedModel)


def phase_of(model: Any) -> dict[str, int]:
    """The phase of growth that a model is in, for ``latest``; nothing where it has none."""
    return {"phase": model.phase} if _is_phased(model) else {}


def enter(model: Any, step: int, phase: int | None) -> None:
    """Bring a model with phases of growth into the one that was saved: that of the last step where none is named."""
    if _is_phased(model):
        if phase is None:
            model.begin_step(max(step - 1, 0))
        else:
            model.enter(phase)


def check_in_step(model: Any) -> None:
    """Raise InputError at a step at which groups of replicated tables differ, so that there is no one state to save."""
    sync = getattr(model, "after_step", None)
    if isinstance(sync, TableSync) and sync.steps % sync.every:
        raise InputError(
            f"groups of tables are synchronised every {sync.every} steps and differ after step {sync.steps} of this run; "
            "save after a multiple"
        )


def settle(model: Any, step: int) -> None:
    """What follows the reading of a checkpoint of ``step``: bounds of codecs decay on, tables in tiers are durable."""
    if _is_phased(model):
        model.restore()
    for exchange in getattr(model, "embeddings", ()):
        exchange.step = step
    lookup = getattr(model, "lookup", None)
    if isinstance(lookup, ComposedLookup):
        lookup.step = step
        lookup.lookup.flush()


# --- TorchRec ---


def _of_torchrec(plan: Plan, model: ShardedModel) -> dict[str, Any]:
    state: dict[str, Any] = dict(model.module.state_dict())
    for path, value in state.items():
        if not isinstance(value, Tensor) and not hasattr(value, "local_shards"):
            raise InputError(
                f"{path!r} is in a key-value store, which is not saved here: use TorchRec's own checkpoints for it, or "
                "plan the table without tiers"
            )
    tables = group_plan(plan).table_plans
    for path, slots in model.module.fused_optimizer.state_dict()["state"].items():
        found = {slot.rpartition(".")[2]: value for slot, value in slots.items()}
        found = {slot: value for slot, value in found.items() if slot.startswith("momentum")}
        for slot, value in found.items():
            table = table_of(tables, path)
            if (
                len(value.size()) == 1
                and table is not None
                and len({shard.col for shard in table.shards}) > 1
            ):
                state.update(_row_states(path, table, value))
            else:
                state[f"optimizer/{path}/{_FUSED[len(found)][slot]}"] = value
    places = {id(parameter): Place(path) for path, parameter in model.module.named_parameters()}
    state.update(_optimizer_state(model.optimizers, places))
    return state


def table_of(tables: Iterable[TablePlan], path: str) -> TablePlan | None:
    """The table behind a parameter's path; None for what is no table."""
    owner, _, name = path.removesuffix(".weight").rpartition(".")
    if owner.rpartition(".")[2] not in _COLLECTIONS:
        return None
    found = [table for table in tables if collection_name(table) == name]
    there = [table for table in found if path.startswith(table.module)]
    return next(iter(there or found), None)


def collection_name(table: TablePlan) -> str:
    """A table's name in its embedding collection, as it stands in the names of parameters."""
    parts = table.parameter.split(".")
    return parts[-2] if len(parts) > 1 else table.name


def _row_states(path: str, table: TablePlan, value: Any) -> dict[str, Any]:
    """Row-wise state of a table that is split by columns.

    TorchRec lays the states of the blocks one below the other, in the order of their columns, as if they were the rows
    of one long tensor.
    """
    starts: dict[int, Shard] = {}
    start = 0
    for shard in sorted(in_torchrec_order(table), key=lambda shard: shard.col):
        if shard.rows:
            starts[start] = shard
        start += shard.rows
    state = State()
    for local in value.local_shards():
        (offset,) = local.metadata.shard_offsets
        if local.tensor.numel():
            state.slot(Place(path, table.rows, table.dim, starts[offset]), "sum", local.tensor)
    return state.found


# --- this project's runtimes ---


def _of_coded(plan: Plan, model: CompressedModel) -> dict[str, Any]:
    state, tables = State(), plan.tables
    paths = {id(part): name for name, part in model.module.named_modules()}
    places: dict[int, Place] = {}
    inside = []
    for exchange in model.embeddings:
        path = paths[id(exchange)]
        inside.append(f"{path}.")
        owner = path.rpartition(".")[0]  # the adapter in the place of the collection
        copies = zip(exchange.copies, exchange.replicated(), strict=True)
        for piece, parameter in (*exchange.held(), *copies):
            name = f"{owner}.embedding_bags.{collection_name(tables[piece.table])}.weight"
            dim = tables[piece.table].dim
            shard = Shard(0, 0, piece.col, piece.rows, piece.cols) if piece.rank >= 0 else None
            places[id(parameter)] = Place(name, piece.rows, dim, shard)
            state.weight(places[id(parameter)], parameter)
        for piece, slots in exchange.fused_state():
            place = places[id(exchange.weights[piece.key])]
            for slot, tensor in slots.items():
                state.slot(place, slot, tensor)
    for path, value in model.module.state_dict().items():
        if not path.startswith(tuple(inside)):
            state.found[path] = value
    for path, parameter in model.module.named_parameters():
        places.setdefault(id(parameter), Place(path))
    return state.found | _optimizer_state(model.optimizers, places)


def _of_towers(plan: Plan, model: TowerModel) -> dict[str, Any]:
    state, lookup = State(), model.lookup
    graph: nn.Module = model.module
    if isinstance(graph, DistributedDataParallel):
        graph = graph.module
    places: dict[int, Place] = {}
    named: Mapping[str, Tensor] = dict(graph.named_parameters())
    for path, value in graph.state_dict().items():
        if not path.startswith(f"{LOOKUP}."):
            state.found[path] = value
            if path in named:
                places[id(named[path])] = Place(path)
    if lookup.module is not None:
        moved = model.moved[lookup.tower]
        for path, value in lookup.module.state_dict().items():
            state.found[f"{moved}.{path}"] = value
        for path, parameter in lookup.module.named_parameters():
            places[id(parameter)] = Place(f"{moved}.{path}")

    def place_of(table: str, shard: Shard | None) -> Place:
        one = plan.tables[table]
        return Place(f"{model.collection}.embedding_bags.{table}.weight", one.rows, one.dim, shard)

    if isinstance(lookup, ComposedLookup):
        copied = [t.name for t in plan.table_plans if t.sharding_type == "data_parallel"]
        for table, parameter in zip(copied, lookup.copies.parameters(), strict=True):
            places[id(parameter)] = place_of(table, None)
            state.weight(places[id(parameter)], parameter)
    add_shards(state, lookup.lookup, place_of, places)
    return state.found | _optimizer_state(model.optimizers, places)


# --- optimizers of torch.optim ---


def _optimizer_state(
    optimizers: Iterable[torch.optim.Optimizer], places: Mapping[int, Place]
) -> dict[str, Any]:
    state = State()
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            for slot, value in _slots(optimizer, parameter):
                state.slot(places[id(parameter)], slot, value)
    return state.found


def _slots(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """State tensors of one parameter; made, as before a first step, where the optimizer has none yet."""
    kept = optimizer.state[parameter]
    if isinstance(optimizer, BlockRowWiseAdagrad):
        kept.setdefault("sum", [parameter.new_zeros(parameter.shape[0], 1)])
        yield "sum", kept["sum"][0].view(-1)  # one state a row, as the fused kernel keeps it
        return
    if not kept and isinstance(optimizer, torch.optim.Adam):
        kept["step"] = torch.tensor(0.0)
        kept["exp_avg"] = torch.zeros_like(parameter)
        kept["exp_avg_sq"] = torch.zeros_like(parameter)
    for slot, value in kept.items():
        # Adagrad counts steps for a decay of the learning rate that is not used; fused kernels do not count
        if isinstance(value, Tensor) and not (slot == "step" and isinstance(optimizer, torch.optim.Adagrad)):
            yield slot, value
