"""Deduplicated compute: run what depends on one feature group once per distinct row, repeat rows after it.

RecD (MLSys 23) carries deduplication past the lookup where the model allows: pooling, attention and MLPs over
the features of one group give equal results for equal rows. The rewrite follows each group through the
graph as far as every operation works on each sample by itself, and repeats rows (``index_select`` by the
inverse index) where a value meets another group, the other inputs or the output. Its gradient adds up the
repeated samples, so training is exact.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ir.capture_embeddings import is_collection
from ir.capture_rows import RowRules
from ir.capture_trace import trace
from ir.errors import InputError

BATCH = -1  # one row a sample, all samples
INVERSE = "inverse"  # the argument that the rewritten module takes after the others


@dataclass(frozen=True, slots=True)
class Value:
    """What a node holds: rows of one group (or BATCH), as rows, as jagged ids, or keyed by feature."""

    group: int
    kind: str = "rows"  # "rows": (rows, ...) tensors; "jagged": ids and offsets; "keyed": by feature


def deduplicate_compute(
    module: nn.Module, groups: Mapping[str, int], example_inputs: tuple[Any, ...]
) -> fx.GraphModule:
    """``module`` rewritten to take the features of ``groups`` as distinct rows.

    Args:
        module: traceable; its weights are shared with the result.
        groups: feature -> group number from 0. A feature is an argument of ``forward``, or a key of an
            argument that is a mapping or a ``KeyedJaggedTensor``.
        example_inputs: arguments of the original ``forward``, not deduplicated, for the shapes.

    Returns:
        A module with one more argument ``inverse``: for each group, the distinct row of each sample. The
        names of the nodes that run on distinct rows are in ``meta["deduplicated"]``.

    Raises:
        InputError: a feature that the model does not have, or jagged ids that meet another group before
            they are pooled.
        TraceError: the module cannot be traced.
    """
    graph, _ = trace(module, {})
    made = fx.GraphModule(module, graph)
    ShapeProp(made).propagate(*example_inputs)
    samples = _samples(made.graph)
    rewrite = _Rewrite(made, dict(groups), samples)
    rewrite.run()
    missing = sorted(set(groups) - rewrite.seen)
    if missing:
        raise InputError(
            f"the model does not read feature {missing[0]!r} by itself; leave it out of the groups"
        )
    made.graph.lint()
    made.recompile()
    made.meta["deduplicated"] = tuple(rewrite.deduplicated)
    return made


def _samples(graph: fx.Graph) -> int:
    for node in graph.find_nodes(op="output"):
        for value in node.all_input_nodes:
            shape = _shape(value)
            if shape:
                return shape[0]
    raise InputError("the model returns no tensor with a row a sample")


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta: Any = node.meta.get("tensor_meta")
    return tuple(meta.shape) if hasattr(meta, "shape") else None


class _Rewrite:
    """One walk over the graph; ``values`` holds what is known of each node (None: no samples in it)."""

    def __init__(self, module: fx.GraphModule, groups: dict[str, int], samples: int) -> None:
        self.module, self.groups = module, groups
        self.rules = RowRules(module, _shape, samples)
        self.values: dict[fx.Node, Value | None] = {}
        self.expanded: dict[fx.Node, fx.Node] = {}
        self.seen: set[str] = set()
        self.deduplicated: list[str] = []

    def run(self) -> None:
        nodes = list(self.module.graph.nodes)
        last = [node for node in nodes if node.op == "placeholder"][-1]
        with self.module.graph.inserting_after(last):
            self.inverse = self.module.graph.placeholder(INVERSE)
        for node in nodes:
            self.values[node] = self._value(node)
            found = self.values[node]
            if found is not None and found.group != BATCH and node.op not in ("placeholder", "output"):
                self.deduplicated.append(node.name)

    def _value(self, node: fx.Node) -> Value | None:
        if node.op == "placeholder":
            name = str(node.target)
            if name in self.groups:
                self.seen.add(name)
                return Value(self.groups[name])
            return Value(BATCH, "rows" if _shape(node) is not None else "keyed")
        if node.op == "get_attr":
            return None
        inputs = [v for n in node.all_input_nodes if (v := self.values[n]) is not None]
        if any(value.kind == "keyed" for value in inputs):
            return self._of_keyed(node)
        held = {value.group for value in inputs}
        if not held:
            return None
        (group, *others) = held
        if not others and (group == BATCH or self._by_row(node)):
            return self._result(node, group, inputs)
        for source in node.all_input_nodes:
            value = self.values[source]
            if value is not None and value.group != BATCH:
                node.replace_input_with(source, self._expand(source, value))
        return Value(BATCH)

    def _of_keyed(self, node: fx.Node) -> Value:
        """Reading one feature, or a collection of tables that looks all of them up."""
        if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], str):
            feature = node.args[1]
            self.seen.add(feature)
            kind = "rows" if _shape(node) is not None else "jagged"
            return Value(self.groups.get(feature, BATCH), kind)
        if node.op == "call_module" and is_collection(self.module.get_submodule(str(node.target))):
            return Value(BATCH, "keyed")
        if node.op == "output" or not self.groups:
            return Value(BATCH)
        raise InputError(
            f"node {node.name!r} reads several features at once, so it cannot be told which group it belongs "
            "to; read them by key first"
        )

    def _result(self, node: fx.Node, group: int, inputs: list[Value]) -> Value:
        jagged = any(value.kind == "jagged" for value in inputs)
        unpacked = node.op == "call_function" and node.target is operator.getitem
        return Value(group, "jagged" if jagged and unpacked else "rows")

    def _expand(self, source: fx.Node, value: Value) -> fx.Node:
        if value.kind != "rows" or _shape(source) is None:
            raise InputError(
                f"the ids of {source.name!r} meet other samples before they are pooled; take the feature out of "
                "the groups"
            )
        if source not in self.expanded:
            graph = self.module.graph
            with graph.inserting_after(source):
                index = graph.call_function(operator.getitem, (self.inverse, value.group))
            with graph.inserting_after(index):
                self.expanded[source] = graph.call_function(torch.index_select, (source, 0, index))
        return self.expanded[source]

    def _by_row(self, node: fx.Node) -> bool:
        """Does the operation treat each sample by itself, sample i of the result being that of the inputs?"""
        held = {n: value.kind for n in node.all_input_nodes if (value := self.values[n]) is not None}
        return self.rules.by_row(node, held)
