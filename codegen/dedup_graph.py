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
from torch.nn import functional as F

from ir.capture_embeddings import is_collection
from ir.capture_trace import trace
from ir.errors import InputError

BATCH = -1  # one row a sample, all samples
INVERSE = "inverse"  # the argument that the rewritten module takes after the others

_POINTWISE = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.relu, torch.sigmoid, torch.tanh, torch.exp),
    *(torch.where, F.relu, F.gelu, F.silu, F.sigmoid, F.tanh, F.linear, F.layer_norm, F.embedding, torch.abs),
    *("add", "sub", "mul", "div", "relu", "sigmoid", "tanh", "exp", "abs", "float", "to_padded_dense"),
}
# operations along one dimension, with the position of ``dim`` and what it is when it is not given
_ALONG: dict[Any, tuple[int, int | None]] = {
    **dict.fromkeys((torch.cat, torch.stack), (1, 0)),
    **dict.fromkeys((torch.softmax, F.softmax, "softmax", torch.sum, "sum", torch.mean, "mean"), (1, None)),
}
_PRODUCTS = {torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm"}
_MOVES = {torch.transpose: (1, 2), "transpose": (1, 2)}
_RESHAPES = {torch.flatten, "flatten", "unsqueeze", "squeeze", torch.unsqueeze, torch.squeeze}
_ROW_MODULES = (
    *(nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity, nn.Embedding, nn.EmbeddingBag),
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.LeakyReLU, nn.Softplus),
)


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
        self.module, self.groups, self.samples = module, groups, samples
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
        if not others and (group == BATCH or self._by_row(node, inputs)):
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

    def _by_row(self, node: fx.Node, inputs: list[Value]) -> bool:
        """Does the operation treat each sample by itself, sample i of the result being that of the inputs?"""
        jagged = any(value.kind == "jagged" for value in inputs)
        if node.op == "call_module":
            return self._module_by_row(self.module.get_submodule(str(node.target)))
        if node.op == "call_function" and node.target is operator.getitem:
            # one of several results, such as attention's output, or a slice of a tensor
            several = _shape(node.args[0]) is None and isinstance(node.args[1], int)  # type: ignore[arg-type]
            return jagged or several or self._slice_keeps_rows(node)
        if node.op == "call_function" and node.target is F.embedding_bag:
            return jagged or self._leading(node)
        if jagged:
            return node.target == "to_padded_dense"
        return self._leading(node) and self._operation_by_row(node)

    def _operation_by_row(self, node: fx.Node) -> bool:
        target = node.target
        if target in _POINTWISE or target in _RESHAPES:
            return True  # with the shapes checked, dimension 0 is still the samples
        if target in ("view", "reshape", torch.reshape):
            return self._reshape_by_row(node)
        if target in _ALONG:
            position, missing = _ALONG[target]
            dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", missing)
            return self._not_samples(node, dim)
        if target in _MOVES:
            return all(self._not_samples(node, node.args[p]) for p in _MOVES[target] if len(node.args) > p)
        if target in _PRODUCTS:
            second = node.args[1]
            assert isinstance(second, fx.Node)
            return self.values[second] is None or len(_shape(second) or ()) >= 3
        return target is F.scaled_dot_product_attention and not node.kwargs.get("dropout_p")

    def _leading(self, node: fx.Node) -> bool:
        """Inputs with samples and the result have them in dimension 0."""
        shapes = [_shape(n) for n in node.all_input_nodes if self.values[n] is not None] + [_shape(node)]
        return all(shape and shape[0] == self.samples for shape in shapes)

    def _not_samples(self, node: fx.Node, dim: Any) -> bool:
        dims = dim if isinstance(dim, tuple | list) else (dim,)
        first = next(n for n in node.all_input_nodes if self.values[n] is not None)
        rank = len(_shape(first) or ()) + (node.target is torch.stack)
        return all(isinstance(d, int) and d % rank != 0 for d in dims)

    def _reshape_by_row(self, node: fx.Node) -> bool:
        sizes = node.args[1:]
        first = sizes[0][0] if sizes and isinstance(sizes[0], tuple | list) else (sizes[0] if sizes else None)
        return bool(first == -1) and self._leading(
            node
        )  # a literal batch size would not fit the distinct rows

    def _slice_keeps_rows(self, node: fx.Node) -> bool:
        index = node.args[1]
        return isinstance(index, tuple) and index[0] == slice(None) and self._leading(node)

    def _module_by_row(self, module: nn.Module) -> bool:
        if isinstance(module, nn.Dropout):
            return not module.training or module.p == 0
        if isinstance(module, nn.Flatten):
            return bool(module.start_dim >= 1)
        if isinstance(module, nn.Softmax):
            return module.dim is not None and module.dim > 0
        if isinstance(module, nn.MultiheadAttention):
            steady = not module.training or module.dropout == 0
            return bool(module.batch_first and steady)
        return isinstance(module, _ROW_MODULES)
