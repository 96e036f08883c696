"""A tower plan as a distributed module: the transform on the graph, and what trains the result.

The transform replaces each lookup of the ``fx`` graph by its tower form. A :class:`TowerModule` that reads
the features of exactly one tower is moved before the exchange between peers, so that its output crosses the
hosts instead of its input; one that does not stays where it is. Both leave outputs and gradients as they
were (:mod:`ir.towers` has the rule).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from codegen.runtime.optimizers import ordinary_optimizers
from codegen.runtime.towers.exchange import Move, all_to_all
from codegen.runtime.towers.layout import TowerLayout, tower_layout
from codegen.runtime.towers.lookup import make_lookup
from codegen.runtime.towers.modules import TowerModule
from codegen.runtime.towers.sptt import TowerLookup, make_groups
from codegen.torchrec_check import group_for
from ir.capture_trace import PlannerTracer
from ir.errors import InputError
from ir.plan import Plan
from ir.towers import TowerDecision, sent_name
from ir.workload import Optimizer

LOOKUP = "tower_lookup"  # name of the module that replaces the flat lookup


class _Tracer(PlannerTracer):
    """Keeps tower modules whole, and modules of torch as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, TowerModule) or super().is_leaf_module(m, module_qualified_name)


def trace_model(module: nn.Module) -> torch.fx.GraphModule:
    """The model as a graph with lookups and tower modules as single nodes; raises InputError."""
    if isinstance(module, torch.fx.GraphModule):
        return module
    try:
        graph = _Tracer().trace(module)
    except Exception as error:
        raise InputError(f"the model cannot be traced, so its lookup cannot be replaced: {error}") from error
    return torch.fx.GraphModule(module, graph)


@dataclass(frozen=True, slots=True)
class Movable:
    """A tower module that may run before the exchange between peers."""

    tower: int
    node: torch.fx.Node
    module: TowerModule


def lookup_node(graph: torch.fx.GraphModule) -> torch.fx.Node:
    """The one lookup of the model.

    Raises:
        InputError: none, several, or one whose ids are not an input of the model.
    """
    from ir.capture_embeddings import is_pooled_collection

    found = [
        node
        for node in graph.graph.find_nodes(op="call_module")
        if is_pooled_collection(graph.get_submodule(str(node.target)))
    ]
    if len(found) != 1:
        raise InputError(
            f"towers need one EmbeddingBagCollection that is called once, the model has {len(found)} such calls; "
            "merge the collections"
        )
    node: torch.fx.Node = found[0]
    if len(node.args) != 1 or node.kwargs or getattr(node.args[0], "op", "") != "placeholder":
        raise InputError(
            f"the ids of {node.name!r} are not an input of the model, so they cannot be exchanged before the step"
        )
    return node


def movable_modules(
    graph: torch.fx.GraphModule, lookup: torch.fx.Node, decision: TowerDecision
) -> list[Movable]:
    """The tower modules that read one tower's features, all of them, in its order, and nothing else does."""
    numbers = {tower.features: number for number, tower in enumerate(decision.towers)}
    found = []
    for node in graph.graph.find_nodes(op="call_module"):
        module = graph.get_submodule(str(node.target))
        if not isinstance(module, TowerModule):
            continue
        reads = _features_read(node, lookup)
        if reads is None:
            continue
        features, readers = reads
        number = numbers.get(features)
        if number is not None and all(len(reader.users) == 1 for reader in readers):
            found.append(Movable(number, node, module))
    return found


def _features_read(
    node: torch.fx.Node, lookup: torch.fx.Node
) -> tuple[tuple[str, ...], list[torch.fx.Node]] | None:
    """The features stacked into a tower module, and the nodes that fetch them; None for anything else."""
    stack = node.args[0] if len(node.args) == 1 else None
    if not isinstance(stack, torch.fx.Node) or stack.target is not torch.stack or len(stack.users) > 1:
        return None
    if stack.kwargs.get("dim", stack.args[1] if len(stack.args) > 1 else 0) != 1:
        return None
    readers: Any = stack.args[0]
    names = []
    for reader in readers:
        if not isinstance(reader, torch.fx.Node) or reader.args[:1] != (lookup,) or len(reader.args) != 2:
            return None
        names.append(str(reader.args[1]))
    return tuple(names), list(readers)


def replace_lookup(graph: torch.fx.GraphModule, lookup: torch.fx.Node, movable: Sequence[Movable]) -> None:
    """Put the tower lookup in the place of the flat one, and its outputs in that of the moved modules."""
    with graph.graph.inserting_before(lookup):
        new = graph.graph.call_module(LOOKUP, lookup.args)
    lookup.replace_all_uses_with(new)
    graph.graph.erase_node(lookup)
    for moved in movable:
        with graph.graph.inserting_before(moved.node):
            part = graph.graph.call_function(operator.getitem, (new, sent_name(moved.tower)))
            shape = (moved.module.out, moved.module.dim_out)
            vectors = graph.graph.call_method("unflatten", (part, 1, shape))
        moved.node.replace_all_uses_with(vectors)
        graph.graph.erase_node(moved.node)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()


@dataclass(slots=True)
class TowerModel:
    """A model in tower form with all of its optimizers; the verbs are those of a flat plan's model.

    Tables with fused kernels are updated inside the backward pass. Gradients of the over-arch are averaged
    over all ranks by DDP, those of a tower module summed over its tower by :meth:`step`.
    """

    module: nn.Module
    lookup: TowerLookup
    optimizers: tuple[torch.optim.Optimizer, ...]
    moved: dict[
        int, str
    ]  # towers whose module runs before the exchange between peers, and its path in the model
    collection: str  # path in the model of the collection that the lookup replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass on this rank's samples; ranks may have different numbers of them."""
        return self.module(*args, **kwargs)

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def synchronise(self) -> None:
        """Sum the gradients of the tower module over the ranks of its tower, in one collective."""
        module, group = self.lookup.module, self.lookup.groups.tower
        if module is None or dist.get_world_size(group) == 1:
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat, group=group)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, torch.split(flat, sizes), strict=True):
            gradient.copy_(part.view_as(gradient))

    def step(self) -> None:
        """Apply the gradients of the backward pass that has just run."""
        self.synchronise()
        for optimizer in self.optimizers:
            optimizer.step()


def tower_model(
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
    move: Move = all_to_all,
) -> TowerModel:
    """``module`` in tower form on the ranks of ``process_group``; its weights are kept.

    Gradients are those of the mean over ranks of the ranks' losses, as with TorchRec and DDP.

    Args:
        plan: with a section ``towers`` that is applied.
        module: the flat model, or one with tower modules (:mod:`planner.zoo.multi_tower`); consumed.
        process_group: default: the default group.
        optimizer, lr: of the tables; default the workload's.
        dense_optimizer, dense_lr: of the rest; default the like of the tables'.
        eps: of Adagrad and Adam.
        device: ``"cpu"`` or ``"cuda"``.
        kernel: "fused" (FBGEMM, updates in the backward pass) or "dense" (ordinary parameters).
        move: how payloads travel between peers, see :data:`codegen.runtime.towers.exchange.Move`.

    Raises:
        InputError: the plan has no towers, is for other ranks or another model, or the model's lookup
            cannot be replaced.
    """
    decision = applied_towers(plan)
    group = group_for(plan, process_group)
    if kernel not in ("fused", "dense"):
        raise InputError(f"kernel must be 'fused' or 'dense', not {kernel!r}")
    graph = trace_model(module)
    node = lookup_node(graph)
    collection: Any = graph.get_submodule(str(node.target))
    check_tables(plan, collection)
    movable = movable_modules(graph, node, decision)
    layout = tower_layout(plan, decision)
    rank = dist.get_rank(group)
    name = optimizer or plan.workload.optimizer
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    lookup = TowerLookup(
        layout,
        make_lookup(
            layout.held[rank],
            kernel=kernel,
            device=where,
            optimizer=name,
            lr=lr,
            eps=eps,
            weights={key: bag.weight for key, bag in collection.embedding_bags.items()},
        ),
        make_groups(group, layout.members),
        mean=frozenset(f for t in plan.table_plans if t.pooling == "mean" for f in t.features),
        keys=[feature for config in collection.embedding_bag_configs() for feature in config.feature_names],
        modules={m.tower: m.module for m in movable},
        widths=sent_widths(layout, movable),
        move=move,
        weighted=collection.is_weighted(),
        device=where,
    )
    graph.add_submodule(LOOKUP, lookup)
    replace_lookup(graph, node, movable)
    graph.to(where)
    tables = [] if kernel == "fused" else [p for p in lookup.lookup.parameters() if p.requires_grad]
    rest = [
        p
        for key, p in graph.named_parameters()
        if not key.startswith(f"{LOOKUP}.lookup.") and p.requires_grad
    ]
    made = ordinary_optimizers(tables, rest, (name, lr), (dense_optimizer, dense_lr), eps)
    moved = {m.tower: str(m.node.target) for m in movable}
    return TowerModel(_replicated(graph, group), lookup, made, moved, str(node.target))


def applied_towers(plan: Plan) -> TowerDecision:
    """The section of a plan whose towers are in force; raises InputError."""
    decision = plan.decisions.towers
    if decision is None or not decision.applied:
        why = "it was compiled without towers" if decision is None else decision.reason
        raise InputError(
            f"the plan of {plan.model.name!r} has no towers to run ({why}); compile with constraints towers, "
            "with always: true to keep them where they do not pay"
        )
    return decision


def check_tables(plan: Plan, collection: Any) -> None:
    """Raise InputError unless the collection has the plan's tables."""
    configs = {config.name: config for config in collection.embedding_bag_configs()}
    planned = set(plan.tables)
    for name in sorted(planned ^ set(configs)):
        where = "the plan" if name in planned else "the model"
        raise InputError(f"table {name!r} is in {where} only; compile the plan for this model")
    for name, config in configs.items():
        table = plan.tables[name]
        if (table.rows, table.dim) != (config.num_embeddings, config.embedding_dim):
            raise InputError(
                f"table {name!r} is {table.rows} x {table.dim} in the plan and {config.num_embeddings} x "
                f"{config.embedding_dim} in the model; compile the plan for this model"
            )


def sent_widths(layout: TowerLayout, movable: Sequence[Movable]) -> list[int]:
    """Columns that each tower sends its peers."""
    moved = {m.tower: m.module.out * m.module.dim_out for m in movable}
    return [moved.get(tower, layout.width(tower)) for tower in range(layout.towers)]


def _replicated(graph: torch.fx.GraphModule, group: Any) -> nn.Module:
    """The graph under DDP, which leaves tables and tower modules alone."""
    own = [key for key, _ in graph.named_parameters() if key.startswith(f"{LOOKUP}.")]
    if all(key in own for key, p in graph.named_parameters() if p.requires_grad):
        return graph
    buffers = [key for key, _ in graph.named_buffers() if key.startswith(f"{LOOKUP}.")]
    # DDP's own hook for parameters that are no replicas; TorchRec uses it for its shards
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(graph, own + buffers)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(
        graph, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def whole_tables(model: TowerModel, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """All tables whole, on every rank, by name: for checkpoints and comparisons of small models.

    Args:
        model: in tower form.
        shapes: table -> (rows, columns).
    """
    found = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for held, weight in zip(model.lookup.lookup.held, model.lookup.lookup.weights(), strict=True):
        shard = held.shard
        columns = slice(shard.col, shard.col + shard.cols)
        found[held.table][shard.row : shard.row + shard.rows, columns] = weight.float().cpu()
    for whole in found.values():
        dist.all_reduce(whole, group=model.lookup.groups.world)
    return found
