"""Model to typed op records: ``capture(model)`` traces a module and says what each node is.

The graph comes from ``torch.fx`` (:mod:`ir.capture_trace`), shapes from propagation on meta tensors
(:mod:`ir.capture_shapes`); weights are never allocated or read, so tables of any size cost nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ir.capture_embeddings import TableIndex, dtype_name, is_jagged
from ir.capture_inputs import DEFAULT_BATCH, batch_of, bind, constants, infer, own_inputs
from ir.capture_rows import row_features
from ir.capture_shapes import Fact, Propagation, attribute, operator_name
from ir.capture_trace import PlannerTracer, trace, whole
from ir.capture_untouched import untouched
from ir.errors import InputError
from ir.ops import Op
from ir.program import Model

_ROOT = "root"  # where a model that is itself a collection hangs in the wrapper that is traced

RESHAPES = frozenset(
    (
        *("getitem", "getattr", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "t"),
        *("unsqueeze", "squeeze", "narrow", "split", "split_with_sizes", "chunk", "expand", "expand_as"),
        *("select", "slice", "unbind", "index_select", "index", "gather", "contiguous", "clone", "pad"),
        *("cat", "concat", "stack", "repeat", "repeat_interleave", "tile", "roll", "movedim", "to_dict"),
        *("swapaxes", "view_as", "reshape_as", "to_padded_dense", "values", "lengths", "offsets"),
        *("detach", "regroup", "regroup_as_dict", "Flatten", "Unflatten", "Identity"),
    )
)
NORMS = frozenset(
    (
        *("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "normalize"),
        *("LayerNorm", "RMSNorm", "BatchNorm1d", "BatchNorm2d", "GroupNorm", "SyncBatchNorm"),
    )
)
_ATTENTION_KERNELS = ("scaled_dot_product", "flash_attention", "efficient_attention")


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    name: str | None = None,
    *,
    batch: int | None = None,
    example_inputs: Any = None,
) -> Model:
    """The tables and op records of a model.

    Args:
        model: an ``nn.Module`` (weights on any device; ``meta`` costs no memory; left as it was, whatever its
            ``forward`` writes), an ``fx.GraphModule``, or what ``torch.export.export`` returns. Embeddings
            are ``nn.Embedding``, ``nn.EmbeddingBag`` and TorchRec's ``EmbeddingBagCollection`` and
            ``EmbeddingCollection``.
        name: of the model; its class without one.
        batch: samples in ``example_inputs``, or to trace with; found from the inputs, or 16.
        example_inputs: arguments of ``forward``, positional (tuple, list, or the only one) or by name
            (mapping). Only shapes and types are used. Without them: the model's own
            ``example_inputs(batch_size)``, or what the modules that read each input accept.

    Returns:
        The model in the planner's IR. Records are per sample; FLOP are those of contractions, 2 per
        multiply-add (element-wise operators are priced by their bytes). Parameters that no op reads
        are counted on the output op. A view moves no bytes: its ``activation_bytes`` is 0.

    Raises:
        TraceError: code that cannot be traced, with file, line and what to do.
        InputError: inputs that do not fit or cannot be inferred; duplicate or empty tables.
    """
    if isinstance(model, torch.export.ExportedProgram):
        if example_inputs is None and model.example_inputs is not None:
            positional, named = model.example_inputs
            example_inputs = (*positional, *named.values())
        name, model = name or "exported", model.module()
    if not isinstance(model, nn.Module):
        raise InputError(f"a model must be an nn.Module or a traced graph, not {type(model).__name__}")
    if batch is not None and batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}")
    name = name or type(model).__name__
    inputs = example_inputs if example_inputs is not None else own_inputs(model, batch)
    given = None if inputs is None else bind(model, inputs)
    with untouched(model):
        return _captured(model, name, batch, given)


def _captured(model: nn.Module, name: str, batch: int | None, given: Mapping[str, Any] | None) -> Model:
    root, graph, locations, wrapper = _graph(model, given)
    if given is None:
        given = infer(graph, root, batch or DEFAULT_BATCH)

    index = TableIndex(root, wrapper)
    facts = Propagation(root, index, locations).run(graph, given)
    tables = index.tables()
    samples = batch or batch_of(given) or _looked_up(facts) or DEFAULT_BATCH
    alone = row_features(graph, root, lambda node: _rows(facts, node), samples)
    return Model(name, tables, _Records(root, index, facts, samples).ops(graph), alone=alone)


def _rows(facts: Mapping[torch.fx.Node, Fact], node: torch.fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's tensor; None where it has none, or several."""
    value = facts[node].value
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _graph(
    model: nn.Module, given: Mapping[str, Any] | None
) -> tuple[nn.Module, torch.fx.Graph, dict[str, tuple[str, int]], str]:
    """The module to propagate through, its graph, the source of each node, and the name of a wrapper."""
    if isinstance(model, torch.fx.GraphModule):
        return model, model.graph, {}, ""
    fixed = constants(model, given)
    if not PlannerTracer().is_leaf_module(model, ""):
        return model, *trace(model, fixed), ""
    names = [name for name in inspect.signature(model.forward).parameters if name not in fixed]
    holder = nn.Module()
    holder.add_module(_ROOT, model)
    return holder, whole(names, _ROOT), {}, _ROOT


def _looked_up(facts: Mapping[torch.fx.Node, Fact]) -> int | None:
    """Samples of the first lookup."""
    shapes = (_shape(fact.value, list(_tensors(fact.value))) for fact in facts.values() if fact.tables)
    return next((shape[0] for shape in shapes if shape), None)


class _Records:
    """Turns nodes with facts into op records."""

    def __init__(
        self,
        model: nn.Module,
        index: TableIndex,
        facts: Mapping[torch.fx.Node, Fact],
        batch: int,
    ) -> None:
        self.model = model
        self.facts = facts
        self.index = index
        self.batch = batch
        self.counted = set(index.drafts)  # parameters already on a table or an op, by id
        self.weights: set[torch.fx.Node] = set()  # nodes that depend on parameters only
        self.carriers: dict[torch.fx.Node, tuple[str, ...]] = {}  # names of the ops behind each node
        self.top: set[str] = set()  # ops that depend on a lookup, lookups included

    def ops(self, graph: torch.fx.Graph) -> tuple[Op, ...]:
        """One record for each node that carries tensors, in graph order."""
        made = []
        for node in graph.nodes:
            if node.op == "get_attr":
                self.weights.add(node)
                self.carriers[node] = ()
                continue
            tensors = list(_tensors(self.facts[node].value))
            unread = not node.users and operator_name(node) in ("getitem", "getattr")
            if (not tensors or unread) and node.op != "output":
                self.carriers[node] = ()
                continue
            if node.op not in ("placeholder", "output") and self._only_weights(node):
                self.weights.add(node)
            op = self._op(node, tensors)
            self.carriers[node] = (op.name,)
            made.append(op)
        return tuple(made)

    def _only_weights(self, node: torch.fx.Node) -> bool:
        sources = [source for source in node.all_input_nodes if self._carries(source)]
        return node.op != "call_module" and bool(sources) and all(s in self.weights for s in sources)

    def _carries(self, node: torch.fx.Node) -> bool:
        return node.op == "get_attr" or bool(self.carriers[node])

    def _op(self, node: torch.fx.Node, tensors: list[Tensor]) -> Op:
        fact = self.facts[node]
        inputs = tuple(
            dict.fromkeys(name for source in node.all_input_nodes for name in self.carriers[source])
        )
        kind = self._kind(node, fact)
        phase = "top" if any(name in self.top for name in inputs) else "bottom"
        if phase == "top" or kind == "lookup":
            self.top.add(node.name)
        made = [] if kind in ("input", "output") else self._made(node, tensors)
        return Op(
            name=node.name,
            kind=kind,
            module=self.index.own_path(str(node.target)) if node.op == "call_module" else "",
            target=self._target(node),
            inputs=inputs,
            out_shape=_shape(fact.value, tensors),
            dtype=_dtype(fact.value, tensors),
            flops=fact.work.flops / self.batch,
            params=self._unread() if node.op == "output" else self._params(node),
            activation_bytes=sum(t.numel() * t.element_size() for t in made) / self.batch,
            tables=tuple(draft.name for draft in fact.tables),
            phase=phase,
            gemm=fact.work.gemm,
            gemm_rows=fact.work.rows / self.batch if fact.work.gemm else 1.0,
        )

    def _made(self, node: torch.fx.Node, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors that are new: neither views of an input nor an input itself."""
        read = {
            id(_storage(t)) for source in node.all_input_nodes for t in _tensors(self.facts[source].value)
        }
        return [tensor for tensor in tensors if id(_storage(tensor)) not in read]

    def _params(self, node: torch.fx.Node) -> int:
        """Parameters that this node is the first to read."""
        total = 0
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                total += self._count([attribute(self.model, str(source.target))])
        if node.op == "call_module":
            total += self._count(self.model.get_submodule(str(node.target)).parameters())
        return total

    def _unread(self) -> int:
        return self._count(self.model.parameters())

    def _count(self, tensors: Any) -> int:
        total = 0
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter) and id(tensor) not in self.counted:
                self.counted.add(id(tensor))
                total += tensor.numel()
        return total

    def _kind(self, node: torch.fx.Node, fact: Fact) -> str:
        if node.op in ("placeholder", "output"):
            return {"placeholder": "input", "output": "output"}[node.op]
        if fact.tables:
            return "lookup"
        name = operator_name(node)
        module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if _is_attention(name, module, fact):
            return "attention"
        if fact.work.flops or fact.work.gemm:
            weighted = module is not None or any(s in self.weights for s in node.all_input_nodes)
            return "gemm" if weighted else "interaction"
        name = name if module is None else type(module).__name__
        return "norm" if name in NORMS else "reshape" if name in RESHAPES else "elementwise"

    def _target(self, node: torch.fx.Node) -> str:
        if node.op == "call_module":
            return type(self.model.get_submodule(str(node.target))).__name__
        if node.op in ("placeholder", "output"):
            return ""
        if isinstance(node.target, torch._ops.OpOverload):
            return f"aten.{operator_name(node)}"
        return operator_name(node)


def _is_attention(name: str, module: nn.Module | None, fact: Fact) -> bool:
    if isinstance(module, nn.MultiheadAttention) or name == "scaled_dot_product_attention":
        return True
    return any(kernel.lstrip("_").startswith(_ATTENTION_KERNELS) for kernel in fact.kernels)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that a node's value carries."""
    if isinstance(value, Tensor):
        yield value
    elif is_jagged(value):
        yield value.values()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _storage(tensor: Tensor) -> Tensor:
    """The tensor that a view looks into."""
    return tensor if tensor._base is None else tensor._base


def _shape(value: Any, tensors: list[Tensor]) -> tuple[int, ...]:
    """Of the first tensor; (batch, features) for a jagged tensor of ids."""
    if is_jagged(value) and hasattr(value, "stride") and hasattr(value, "lengths"):
        return (int(value.stride()), len(value.keys()))
    return tuple(int(size) for size in tensors[0].shape) if tensors else ()


def _dtype(value: Any, tensors: list[Tensor]) -> str:
    return dtype_name(tensors[0].dtype) if tensors else "fp32"
