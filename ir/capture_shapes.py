"""Propagation of shapes through a graph, node by node, on meta tensors.

Lookups and common operators follow rules and run nothing; anything else runs on meta tensors with the
parameters replaced by meta ones, while a dispatch mode notes each contraction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ir.capture_embeddings import (
    TableDraft,
    TableIndex,
    is_collection,
    is_jagged,
    is_pooled_collection,
)
from ir.capture_inputs import to_meta
from ir.capture_rules import FUNCTIONS, NO_WORK, Work, contraction, empty, module_rule
from ir.capture_trace import first_sentence, node_location
from ir.errors import TraceError


@dataclass(slots=True)
class Fact:
    """What is known of one node."""

    value: Any = None
    work: Work = NO_WORK
    tables: tuple[TableDraft, ...] = ()  # filled for lookups
    kernels: frozenset[str] = frozenset()  # contractions that were run, by name


@dataclass(slots=True)
class _Noted:
    work: Work = NO_WORK
    kernels: set[str] = field(default_factory=set)


class _Contractions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the contractions of whatever runs under it; the FLOP formulae are torch's own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry

        self.formulae = flop_registry
        self.noted = _Noted()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in self.formulae:
            flops = float(self.formulae[packet](*args, **(kwargs or {}), out_val=out))
            name = packet.__name__
            self.noted.kernels.add(name)
            self.noted.work += _as_gemm(name, args, flops)
        return out


def _as_gemm(name: str, args: tuple[Any, ...], flops: float) -> Work:
    """Contraction and output width of a matrix multiplication; other kernels keep only their FLOP."""
    pair = {"mm": args[:2], "bmm": args[:2], "addmm": args[1:3], "baddbmm": args[1:3]}.get(name)
    if pair is None:
        return Work(flops)
    a, b = pair
    return contraction(a.numel() / a.shape[-1] if a.shape[-1] else 0.0, int(a.shape[-1]), int(b.shape[-1]))


class Propagation:
    """Runs a graph on shapes.

    Args:
        model: the module that holds the graph's modules and parameters.
        index: its embedding tables; features of plain embedding modules are added to it.
        locations: file and line of each node, for error messages.
    """

    def __init__(self, model: nn.Module, index: TableIndex, locations: Mapping[str, tuple[str, int]]) -> None:
        self.model = model
        self.index = index
        self.locations = dict(locations)
        self.facts: dict[torch.fx.Node, Fact] = {}

    def run(self, graph: torch.fx.Graph, inputs: Mapping[str, Any]) -> dict[torch.fx.Node, Fact]:
        """A fact for each node of the graph; raises TraceError where a node cannot run on shapes."""
        with torch.no_grad():
            for node in graph.nodes:
                if node.op == "placeholder":
                    default = node.args[0] if node.args else None
                    self.facts[node] = Fact(to_meta(inputs.get(str(node.target), default)))
                    continue
                try:
                    fact = self._node(node)
                except TraceError:
                    raise
                except Exception as error:
                    raise TraceError(
                        f"{node_location(node, self.locations)} cannot be run on shapes alone: {_why(error)}"
                    ) from error
                if isinstance(fact.value, Tensor) and fact.value.device.type != "meta":
                    fact.value = to_meta(fact.value)
                self.facts[node] = fact
        return self.facts

    def _node(self, node: torch.fx.Node) -> Fact:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self.facts[n].value)
        if node.op == "get_attr":
            return Fact(to_meta(attribute(self.model, str(node.target))))
        if node.op == "output":
            return Fact(args[0])
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            if id(module) in self.index.of_module:
                return self._lookup(node, module, args, kwargs)
            return _ruled(module_rule(module, args, kwargs)) or self._on_meta(module, args, kwargs)
        name = operator_name(node)
        if name in ("embedding", "embedding_bag", "_embedding_bag"):
            fact = self._functional_lookup(node, name, args, kwargs)
            if fact is not None:
                return fact
        rule = FUNCTIONS.get(name)
        # rules may take what they know out of the keywords, so each gets its own copy
        ruled = _ruled(rule(*args, **dict(kwargs))) if rule is not None and is_torch(node) else None
        if ruled is not None:
            return ruled
        function: Any = node.target if node.op == "call_function" else getattr(args[0], str(node.target))
        rest = args if node.op == "call_function" else args[1:]
        return _noted(function, rest, kwargs)

    def _on_meta(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fact:
        weights = {name: to_meta(tensor) for name, tensor in module.named_parameters()}
        weights.update({name: to_meta(tensor) for name, tensor in module.named_buffers()})
        return _noted(torch.func.functional_call, (module, weights, args, kwargs), {})

    def _lookup(
        self, node: torch.fx.Node, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Fact:
        drafts = tuple(self.index.of_module[id(module)])
        if is_collection(module):
            features = args[0] if args else next(iter(kwargs.values()))
            out = _pooled(module, features) if is_pooled_collection(module) else _sequences(module, features)
            return Fact(out, tables=drafts)
        draft = drafts[0]
        source = node.args[0] if node.args else node.kwargs.get("input")
        draft.add_feature(_feature_name(source))
        ids = args[0] if args else kwargs["input"]
        if isinstance(module, nn.EmbeddingBag):
            offsets = args[1] if len(args) > 1 else kwargs.get("offsets")
            scale = args[2] if len(args) > 2 else kwargs.get("per_sample_weights")
            draft.weighted = draft.weighted or scale is not None
            shape = _bags(ids, offsets, module.include_last_offset)
        else:
            shape = tuple(ids.shape)
        return Fact(empty((*shape, draft.weight.shape[1]), draft.weight.dtype), tables=drafts)

    def _functional_lookup(
        self, node: torch.fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Fact | None:
        """``F.embedding(ids, weight)`` or ``aten.embedding(weight, ids)`` on a parameter of the model."""
        aten = isinstance(node.target, torch._ops.OpOverload)
        named = {"input": 0, "weight": 1} if not aten else {"weight": 0, "indices": 1}
        nodes = {
            key: node.args[at] if len(node.args) > at else node.kwargs.get(key) for key, at in named.items()
        }
        weight = nodes.pop("weight")
        ids_node = next(iter(nodes.values()))
        if (
            not isinstance(weight, torch.fx.Node)
            or weight.op != "get_attr"
            or not isinstance(ids_node, torch.fx.Node)
        ):
            return None
        parameter = attribute(self.model, str(weight.target))
        ids = self.facts[ids_node].value
        if name == "embedding":
            pooling, shape = "none", tuple(ids.shape)
        else:
            offsets = args[2] if len(args) > 2 else kwargs.get("offsets")
            mode = _argument(args, kwargs, 4 if aten else 6, "mode", 0 if aten else "mean")
            pooling = ("sum", "mean", "max")[mode] if isinstance(mode, int) else str(mode)
            last = bool(_argument(args, kwargs, 7 if aten else 9, "include_last_offset", False))
            shape = _bags(ids, offsets, last)
        draft = self.index.of_parameter(str(weight.target), parameter, pooling)
        draft.add_feature(_feature_name(ids_node))
        out = empty((*shape, parameter.shape[1]), parameter.dtype)
        if aten and name != "embedding":  # the operator also returns three tensors that only backward reads
            return Fact((out, *(empty((0,), torch.int64) for _ in range(3))), tables=(draft,))
        return Fact(out, tables=(draft,))


def _why(error: Exception) -> str:
    """The reason that an operator does not run on meta tensors, and what to do."""
    reason = first_sentence(error)
    if isinstance(error, NotImplementedError) or "meta tensors" in reason:
        return f"{reason}; what depends on values, not on shapes, belongs outside forward"
    return f"{reason}; check the shapes of example_inputs against this line"


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], at: int, name: str, default: Any) -> Any:
    return args[at] if len(args) > at else kwargs.get(name, default)


def _ruled(ruled: tuple[Tensor, Work] | None) -> Fact | None:
    return None if ruled is None else Fact(*ruled)


def _noted(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fact:
    with _Contractions() as mode:
        value = function(*args, **kwargs)
    return Fact(value, mode.noted.work, kernels=frozenset(mode.noted.kernels))


def attribute(model: nn.Module, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def operator_name(node: torch.fx.Node) -> str:
    """``"relu"`` for ``torch.relu``, ``F.relu``, ``x.relu()`` and ``aten.relu.default``."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).split("::")[-1]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def is_torch(node: torch.fx.Node) -> bool:
    """Whether a function or method is torch's own rather than a user's of the same name."""
    if node.op == "call_method":
        return True
    module = getattr(node.target, "__module__", None) or ""
    return module.partition(".")[0] in ("torch", "_operator", "operator", "builtins") or isinstance(
        node.target, torch._ops.OpOverload
    )


def _bags(ids: Tensor, offsets: Tensor | None, include_last: bool) -> tuple[int]:
    """Number of bags of an embedding-bag call."""
    if ids.ndim == 2:
        return (int(ids.shape[0]),)
    if offsets is None:
        raise ValueError("embedding_bag on a flat list of ids needs offsets")
    return (int(offsets.shape[0]) - int(include_last),)


# What renames ids without choosing among them, so that the lookup still reads its input's feature.
_SAME_IDS = frozenset(
    (
        "reshape",
        "view",
        "flatten",
        "contiguous",
        "clone",
        "to",
        "long",
        "int",
        "squeeze",
        "unsqueeze",
        "values",
    )
)


def _feature_name(source: object) -> str | None:
    """The feature behind a lookup: the key it was read by, or the name of its input; None if neither."""
    node = source
    while isinstance(node, torch.fx.Node):
        if node.op == "placeholder":
            return str(node.target)
        name = operator_name(node)
        key = node.args[1] if name == "getitem" else None
        if isinstance(key, str):
            return key
        inner = node.args[0] if node.args else None
        # d["C0"][0] are the ids of a (ids, offsets) pair; ids[0] of an input is one feature of several
        part = isinstance(key, int) and isinstance(inner, torch.fx.Node) and inner.op != "placeholder"
        if name not in _SAME_IDS and not part:
            return None
        node = inner
    return None


def _pooled(module: Any, features: Any) -> Any:
    """Output of an ``EmbeddingBagCollection``: (batch, sum of dims over features) by key."""
    from torchrec.modules.embedding_modules import get_embedding_names_by_table
    from torchrec.sparse.jagged_tensor import KeyedTensor

    configs = module.embedding_bag_configs()
    names = [name for names in get_embedding_names_by_table(configs) for name in names]
    widths = [config.embedding_dim for config in configs for _ in config.feature_names]
    _check_keys(features, configs)
    # the reference collection casts every table's output to fp32
    values = empty((int(features.stride()), sum(widths)), torch.float32)
    return KeyedTensor(keys=names, length_per_key=widths, values=values)


def _sequences(module: Any, features: Any) -> Any:
    """Output of an ``EmbeddingCollection``: a jagged tensor (ids, dim) for each feature."""
    from torchrec.sparse.jagged_tensor import JaggedTensor

    _check_keys(features, module.embedding_configs())
    jagged = features.to_dict()
    out = {}
    for names, config in zip(module.embedding_names_by_table(), module.embedding_configs(), strict=True):
        for name, feature in zip(names, config.feature_names, strict=True):
            ids = jagged[feature]
            out[name] = JaggedTensor(
                values=empty((ids.values().numel(), config.embedding_dim), torch.float32),
                lengths=to_meta(ids.lengths()),
            )
    return out


def _check_keys(features: Any, configs: Any) -> None:
    if not is_jagged(features):
        raise ValueError(f"a TorchRec collection takes a KeyedJaggedTensor, not {type(features).__name__}")
    known = set(features.keys())
    missing = [name for config in configs for name in config.feature_names if name not in known]
    if missing:
        raise ValueError(f"the KeyedJaggedTensor lacks feature {missing[0]!r}")
