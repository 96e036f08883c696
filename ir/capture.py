"""Model to typed op records: ``capture(model)`` traces a module and says what each node is.

The graph comes from ``torch.fx`` (:mod:`ir.capture_trace`), shapes from propagation on meta tensors
(:mod:`ir.capture_shapes`); weights are never allocated or read, so tables of any size cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ir.capture_embeddings import TableIndex, dtype_name, is_collection, is_jagged
from ir.capture_inputs import DEFAULT_BATCH, batch_of, bind, constants, infer, own_inputs
from ir.capture_shapes import Fact, Propagation, attribute, operator_name
from ir.capture_trace import trace
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
        model: an ``nn.Module`` (weights on any device; ``meta`` costs no memory), an ``fx.GraphModule``,
            or what ``torch.export.export`` returns. Embeddings are ``nn.Embedding``, ``nn.EmbeddingBag``
            and TorchRec's ``EmbeddingBagCollection`` and ``EmbeddingCollection``.
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
        example_inputs = model.example_inputs[0] if example_inputs is None else example_inputs
        name, model = name or "exported", model.module()
    if not isinstance(model, nn.Module):
        raise InputError(f"a model must be an nn.Module or a traced graph, not {type(model).__name__}")
    if batch is not None and batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}")
    name = name or type(model).__name__
    strip = ""
    if is_collection(model):
        model, strip = _Wrapper(model), f"{_ROOT}."

    inputs = example_inputs if example_inputs is not None else own_inputs(model, batch)
    given = None if inputs is None else bind(model, inputs)
    locations: dict[str, tuple[str, int]] = {}
    if isinstance(model, torch.fx.GraphModule):
        graph = model.graph
    else:
        graph, locations = trace(model, constants(model, given))
    if given is None:
        given = infer(graph, model, batch or DEFAULT_BATCH)
    batch = batch or batch_of(given) or DEFAULT_BATCH

    index = TableIndex(model, strip)
    facts = Propagation(model, index, locations).run(graph, given)
    tables = index.tables()
    return Model(name, tables, _Records(model, index, facts, batch, strip).ops(graph))


class _Wrapper(nn.Module):
    """Holds a collection that is the whole model, so that the trace keeps it as one node."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.root = collection

    def forward(self, features: Any) -> Any:
        return self.root(features)


class _Records:
    """Turns nodes with facts into op records."""

    def __init__(
        self,
        model: nn.Module,
        index: TableIndex,
        facts: Mapping[torch.fx.Node, Fact],
        batch: int,
        strip: str,
    ) -> None:
        self.model = model
        self.facts = facts
        self.batch = batch
        self.strip = strip
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
            if not tensors and node.op != "output":
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
        moves = kind not in ("input", "output") and not all(_is_view(t) for t in tensors)
        return Op(
            name=node.name,
            kind=kind,
            module=str(node.target).removeprefix(self.strip) if self._is_inner(node) else "",
            target=self._target(node),
            inputs=inputs,
            out_shape=_shape(fact.value, tensors),
            dtype=_dtype(fact.value, tensors),
            flops=fact.work.flops / self.batch,
            params=self._unread() if node.op == "output" else self._params(node),
            activation_bytes=sum(t.numel() * t.element_size() for t in tensors) / self.batch
            if moves
            else 0.0,
            tables=tuple(draft.name for draft in fact.tables),
            phase=phase,
            gemm=fact.work.gemm,
            gemm_rows=fact.work.rows / self.batch if fact.work.gemm else 1.0,
        )

    def _is_inner(self, node: torch.fx.Node) -> bool:
        return node.op == "call_module" and str(node.target) != self.strip.removesuffix(".")

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


def _is_view(tensor: Tensor) -> bool:
    return tensor._is_view()


def _shape(value: Any, tensors: list[Tensor]) -> tuple[int, ...]:
    """Of the first tensor; (batch, features) for a jagged tensor of ids."""
    if is_jagged(value) and hasattr(value, "stride") and hasattr(value, "lengths"):
        return (int(value.stride()), len(value.keys()))
    return tuple(int(size) for size in tensors[0].shape) if tensors else ()


def _dtype(value: Any, tensors: list[Tensor]) -> str:
    return dtype_name(tensors[0].dtype) if tensors else "fp32"
