"""Which nodes of a graph work on each sample by itself, and on the ids of which features alone.

Row i of such a node depends on sample i's ids of its features and on nothing else, so equal samples give equal rows.
Features are followed from where a collection of tables hands out one feature's vectors as far as every operation keeps to
its row; where a value meets the other inputs, or the output, its rows are those of the batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ir.capture_embeddings import is_collection, is_sequence_collection

Shape = Callable[[fx.Node], tuple[int, ...] | None]
"""The shape of a node's tensor; None where its value is no tensor."""

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


class RowRules:
    """Whether sample i of a node's result is made from sample i of its inputs.

    Args:
        module: that the graph belongs to.
        shape: of each node.
        samples: rows of a batch in those shapes.
    """

    def __init__(self, module: nn.Module, shape: Shape, samples: int) -> None:
        self.module, self.shape, self.samples = module, shape, samples

    def by_row(self, node: fx.Node, held: Mapping[fx.Node, str]) -> bool:
        """``held``: the inputs that have samples, and whether as ``"rows"`` of a tensor or as ``"jagged"``."""
        jagged = "jagged" in held.values()
        if node.op == "call_module":
            return self._module_by_row(self.module.get_submodule(str(node.target)))
        if node.op == "call_function" and node.target is operator.getitem:
            # one of several results, such as attention's output, or a slice of a tensor
            source = node.args[0]
            several = (
                isinstance(source, fx.Node) and self.shape(source) is None and isinstance(node.args[1], int)
            )
            return jagged or several or self._slice_keeps_rows(node, held)
        if node.op == "call_function" and node.target is F.embedding_bag:
            return jagged or self._leading(node, held)
        if jagged:
            return node.target == "to_padded_dense"
        return self._leading(node, held) and self._operation_by_row(node, held)

    def _operation_by_row(self, node: fx.Node, held: Mapping[fx.Node, str]) -> bool:
        target = node.target
        if target in _POINTWISE or target in _RESHAPES:
            return True  # with the shapes checked, dimension 0 is still the samples
        if target in ("view", "reshape", torch.reshape):
            return self._reshape_by_row(node, held)
        if target in _ALONG:
            position, missing = _ALONG[target]
            dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", missing)
            return self._not_samples(node, held, dim)
        if target in _MOVES:
            dims = [node.args[p] for p in _MOVES[target] if len(node.args) > p]
            return len(dims) == 2 and self._not_samples(node, held, dims)
        if target in _PRODUCTS:
            second = node.args[1] if len(node.args) > 1 else None
            if not isinstance(second, fx.Node):
                return False
            return second not in held or len(self.shape(second) or ()) >= 3
        return target is F.scaled_dot_product_attention and not node.kwargs.get("dropout_p")

    def _leading(self, node: fx.Node, held: Mapping[fx.Node, str]) -> bool:
        """Inputs with samples and the result have them in dimension 0."""
        shapes = [self.shape(source) for source in held] + [self.shape(node)]
        return all(shape and shape[0] == self.samples for shape in shapes)

    def _not_samples(self, node: fx.Node, held: Mapping[fx.Node, str], dim: Any) -> bool:
        dims = dim if isinstance(dim, tuple | list) else (dim,)
        rank = len(self.shape(next(iter(held))) or ()) + (node.target is torch.stack)
        return all(isinstance(d, int) and d % rank != 0 for d in dims)

    def _reshape_by_row(self, node: fx.Node, held: Mapping[fx.Node, str]) -> bool:
        sizes = node.args[1:]
        first = sizes[0][0] if sizes and isinstance(sizes[0], tuple | list) else (sizes[0] if sizes else None)
        # a literal batch size would not fit the distinct rows
        return bool(first == -1) and self._leading(node, held)

    def _slice_keeps_rows(self, node: fx.Node, held: Mapping[fx.Node, str]) -> bool:
        index = node.args[1]
        return isinstance(index, tuple) and index[0] == slice(None) and self._leading(node, held)

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


@dataclass(frozen=True, slots=True)
class _Held:
    """Samples in a node: of some features alone, or (None) of the batch."""

    features: frozenset[str] | None
    kind: str  # "rows" of a tensor, "jagged" ids or vectors, "keyed" by feature


_BATCH = _Held(None, "rows")


def row_features(
    graph: fx.Graph, module: nn.Module, shape: Shape, samples: int
) -> dict[str, tuple[str, ...]]:
    """Node name -> the features on whose ids alone each of its rows depends; other nodes are not in it.

    Features are those that a TorchRec collection hands out one by one; of a collection that is read as a whole there are
    none, nor of one whose vectors reach another operation before they are rows of a tensor.
    """
    rules, left_out = RowRules(module, shape, samples), frozenset[str]()
    while True:
        held = _walk(graph, rules, left_out)
        spilt = frozenset(
            feature
            for node, value in held.items()
            if value is not None and value.features and shape(node) is None
            for user in node.users
            if (read := held[user]) is None or read.features is None
            for feature in value.features
        )
        if not spilt:
            return {
                node.name: tuple(sorted(value.features))
                for node, value in held.items()
                if value is not None and value.features
            }
        left_out |= spilt


def _walk(graph: fx.Graph, rules: RowRules, left_out: frozenset[str]) -> dict[fx.Node, _Held | None]:
    held: dict[fx.Node, _Held | None] = {}
    for node in graph.nodes:
        held[node] = _held(node, held, rules, left_out)
    return held


def _held(
    node: fx.Node, held: Mapping[fx.Node, _Held | None], rules: RowRules, left_out: frozenset[str]
) -> _Held | None:
    if node.op == "placeholder":
        return _BATCH
    if node.op == "get_attr":
        return None
    inputs = {source: value for source in node.all_input_nodes if (value := held[source]) is not None}
    if not inputs:
        return None
    collection = _read_by_feature(node, rules.module)
    if collection is not None:
        feature = str(node.args[1])
        kind = "jagged" if is_sequence_collection(collection) else "rows"
        return _Held(None if feature in left_out else frozenset((feature,)), kind)
    found: frozenset[str] = frozenset()
    for value in inputs.values():
        if value.features is None:
            return _BATCH
        found |= value.features
    if node.op == "output" or not rules.by_row(
        node, {source: value.kind for source, value in inputs.items()}
    ):
        return _BATCH
    jagged = any(value.kind == "jagged" for value in inputs.values())
    unpacked = node.op == "call_function" and node.target is operator.getitem
    return _Held(found, "jagged" if jagged and unpacked else "rows")


def _read_by_feature(node: fx.Node, module: nn.Module) -> nn.Module | None:
    """The collection whose output this node reads by the name of a feature, if all readers do."""
    if node.op != "call_function" or node.target is not operator.getitem or not isinstance(node.args[1], str):
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return None
    collection = module.get_submodule(str(source.target))
    by_name = all(
        user.op == "call_function" and user.target is operator.getitem and isinstance(user.args[1], str)
        for user in source.users
    )
    return collection if is_collection(collection) and by_name else None
