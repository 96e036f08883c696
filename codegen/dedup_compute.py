"""A plan's deduplicated compute: the model rewritten to run operations of one feature group on its distinct rows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ir.dedup import DedupGroup
from ir.errors import InputError
from ir.plan import Plan

if TYPE_CHECKING:
    from torch import fx, nn


def computes_on_distinct_rows(plan: Plan) -> tuple[DedupGroup, ...]:
    """The groups of the plan that operations of the model run once a distinct row for."""
    section = plan.decisions.dedup
    return () if section is None else tuple(group for group in section.chosen if group.compute)


def distinct_module(plan: Plan, module: nn.Module) -> nn.Module:
    """``module`` with the operations that the plan names on distinct rows; the same module where it names none.

    It takes batches as they are, or deduplicated by :func:`codegen.dedup.deduplicator`; weights are shared, and keep their
    names. Rows are repeated where a value of a group meets other inputs.

    Raises:
        InputError: a module without those operations.
        TraceError: it cannot be traced.
    """
    groups = computes_on_distinct_rows(plan)
    if not groups:
        return module
    from torch import fx

    from ir.capture_inputs import bind, constants, own_inputs
    from ir.capture_trace import trace

    inputs = own_inputs(module, None)
    graph, _ = trace(module, constants(module, None if inputs is None else bind(module, inputs)))
    made = fx.GraphModule(module, graph)
    of = {name: number for number, group in enumerate(groups) for name in group.compute}
    missing = sorted(set(of) - {node.name for node in made.graph.nodes})
    if missing:
        raise InputError(
            f"the model has no operation {missing[0]!r}, which the plan runs on distinct rows; compile the plan for this "
            "model"
        )
    assert plan.decisions.dedup is not None
    others = [group.features for group in plan.decisions.dedup.chosen if not group.compute]
    _rewrite(made, of, [group.features for group in groups], others)
    made.graph.lint()
    made.recompile()
    return made


def _rewrite(
    made: fx.GraphModule, of: dict[str, int], groups: Sequence[Sequence[str]], others: Sequence[Sequence[str]]
) -> None:
    from codegen.runtime.dedup.distinct import distinct, distinct_rows, repeated
    from ir.capture_embeddings import is_sequence_collection

    graph = made.graph
    inside = [node for node in graph.nodes if node.name in of]
    meets = [(node, user) for node in inside for user in node.users if of.get(user.name) != of[node.name]]
    lookups = {node: lookup for node in inside if (lookup := _lookup(made, node)) is not None}
    features = tuple(dict.fromkeys(str(node.args[1]) for node in lookups))
    given: dict[fx.Node, fx.Node] = {}  # ids -> the batch in its two forms
    taken: dict[fx.Node, fx.Node] = {}  # a feature's vectors -> of distinct rows
    fed: set[fx.Node] = set()
    for node, lookup in lookups.items():
        if lookup not in fed:
            fed.add(lookup)
            ids = lookup.args[0]
            if ids not in given:
                with graph.inserting_before(lookup):
                    given[ids] = graph.call_function(distinct, (ids, tuple(groups), features, tuple(others)))
            sequence = is_sequence_collection(made.get_submodule(str(lookup.target)))
            with graph.inserting_before(lookup):
                form = graph.call_function(getattr, (given[ids], "sequences" if sequence else "bags"))
            lookup.args = (form,)
        batch: Any = lookup.args[0]
        with graph.inserting_after(node):
            rows = graph.call_function(distinct_rows, (node, batch.args[0], of[node.name]))
        taken[node] = rows
        node.replace_all_uses_with(rows, delete_user_cb=lambda user, rows=rows: user is not rows)
    (batch,) = given.values()
    whole: dict[fx.Node, fx.Node] = {}
    for node, user in meets:
        source = taken.get(node, node)
        if source not in whole:
            with graph.inserting_after(source):
                whole[source] = graph.call_function(repeated, (source, batch, of[node.name]))
        user.replace_input_with(source, whole[source])


def _lookup(made: fx.GraphModule, node: fx.Node) -> Any:
    """The call of a collection whose output ``node`` reads by feature; None for other nodes."""
    from ir.capture_embeddings import is_collection

    if node.op != "call_function" or node.target is not operator.getitem or not isinstance(node.args[1], str):
        return None
    source: Any = node.args[0]
    called = source.op == "call_module" and is_collection(made.get_submodule(str(source.target)))
    return source if called else None
