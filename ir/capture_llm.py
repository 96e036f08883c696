"""Decoder to op records: one layer is traced, and its records are repeated for the others.

A decoder is recognised by its structure: a vocabulary embedding, an output projection of the same size,
and between them a ``ModuleList`` of layers with equal parameters. ``torch.fx`` traces plain modules;
code that it refuses (Hugging Face's ``LlamaForCausalLM``) goes through ``torch.export``. Either way the
``nn_module_stack`` of each node says which layer it belongs to.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ir.capture import capture
from ir.capture_inputs import DEFAULT_BATCH, bind, constants, own_inputs, to_meta
from ir.capture_trace import first_sentence, trace
from ir.decoder import DecoderShape, LlmWorkload
from ir.errors import InputError, TraceError
from ir.llm import AttentionOp, DecoderModel
from ir.ops import Op
from ir.program import Model

_MIN_MATRICES = 4  # query, key and value (or one for all), output, and two of the feed-forward network


def capture_model(
    model: Any, name: str | None = None, *, batch: int | None = None, example_inputs: Any = None
) -> Model:
    """:func:`capture_decoder` for a decoder, else :func:`ir.capture.capture`; arguments and errors of both."""
    if isinstance(model, nn.Module) and find_layers(model) is not None:
        return capture_decoder(model, name, example_inputs=example_inputs)
    return capture(model, name, batch=batch, example_inputs=example_inputs)


def find_layers(model: nn.Module) -> str | None:
    """Path of the layers of a decoder; None where ``model`` is none."""
    if isinstance(model, torch.fx.GraphModule):
        return None
    modules = dict(model.named_modules())
    tables = {tuple(module.weight.shape) for module in modules.values() if isinstance(module, nn.Embedding)}
    heads = {
        path for path, m in modules.items() if isinstance(m, nn.Linear) and tuple(m.weight.shape) in tables
    }
    if not heads:
        return None
    for path, module in modules.items():
        # matrices of a layer may have the vocabulary's shape too
        outside = not all(head.startswith(f"{path}.") for head in heads)
        if isinstance(module, nn.ModuleList) and len(module) and outside and _are_layers(module):
            return str(path)
    return None


def _are_layers(stack: nn.ModuleList) -> bool:
    first, *others = [[tuple(p.shape) for p in layer.parameters()] for layer in stack]
    matrices = sum(len(shape) == 2 for shape in first)
    return matrices >= _MIN_MATRICES and all(shapes == first for shapes in others)


def capture_decoder(model: nn.Module, name: str | None = None, *, example_inputs: Any = None) -> DecoderModel:
    """The op records, attention ops and shape of a decoder.

    Args:
        model: as :func:`find_layers` recognises it; weights on any device (``meta`` costs no memory).
        name: of the model; its class without one.
        example_inputs: arguments of ``forward``; without them the model's own ``example_inputs``, or the
            ids of one sequence of the default length.

    Returns:
        Records of one sequence. Attention counts the FLOP of a causal mask.

    Raises:
        TraceError: code that neither ``torch.fx`` nor ``torch.export`` takes.
        InputError: layers that are not of this kind: one causal attention each, query, key, value and output
            projections, and a feed-forward network of two or three matrices.
    """
    path = find_layers(model)
    if path is None:
        raise InputError(
            f"{type(model).__name__} is no decoder: no layers between an embedding and a projection"
        )
    layers = len(model.get_submodule(path))  # type: ignore[arg-type]
    inputs = example_inputs if example_inputs is not None else own_inputs(model, 1)
    if inputs is None:
        inputs = (torch.empty((1, LlmWorkload().sequence), dtype=torch.int64, device="meta"),)
    reduced = _on_meta(_with_one_layer(model, path))
    graph, given = _graph(reduced, {name: to_meta(value) for name, value in bind(model, inputs).items()})
    one = capture(graph, batch=_samples(given), example_inputs=given)
    member = {node.name for node in graph.graph.nodes if f"{_path(node)}.".startswith(f"{path}.0.")}
    parts = _Parts.split([_dense(op, one) for op in one.ops], member)
    attention, shape = _shape(parts, one, layers)
    pairs = attention.query_length * (attention.query_length + 1) / 2
    counted = replace(
        next(op for op in parts.layer if op.name == attention.op),
        flops=4.0 * shape.query_width * pairs,
        gemm=None,
        gemm_rows=1.0,
    )
    parts = replace(parts, layer=tuple(counted if op.name == counted.name else op for op in parts.layer))
    ops = parts.repeat(layers, path.replace(".", "_"))
    attends = [op.name for op in ops if op.kind == "attention"]
    found = sum(op.params for op in ops)
    if found != shape.params:
        raise InputError(
            f"{type(model).__name__} has {found} parameters where a decoder of its layers has {shape.params}; "
            f"weights outside attention, feed-forward network and norms are not known to the planner"
        )
    return DecoderModel(
        name or type(model).__name__,
        (),
        ops,
        shape=shape,
        attentions=tuple(replace(attention, op=op) for op in attends),
    )


def _with_one_layer(model: nn.Module, path: str) -> nn.Module:
    """A copy of ``model`` that shares all modules but has only its first layer."""

    def shallow(module: nn.Module) -> nn.Module:
        made = copy.copy(module)
        made._modules = dict(module._modules)
        return made

    root = here = shallow(model)
    *parents, last = path.split(".")
    for part in parents:
        child = shallow(getattr(here, part))
        here._modules[part] = child
        here = child
    here._modules[last] = nn.ModuleList([getattr(here, last)[0]])
    return root


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device; none of them is copied on the way."""
    held = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _meta_like(tensor) for tensor in held})


def _meta_like(tensor: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = to_meta(tensor)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _graph(model: nn.Module, given: dict[str, Any]) -> tuple[torch.fx.GraphModule, dict[str, Any]]:
    """The traced model and the arguments of its graph: by ``fx``, else by ``torch.export``."""
    try:
        graph, _ = trace(model, constants(model, given))
        return torch.fx.GraphModule(model, graph), given
    except TraceError:
        pass
    if "use_cache" in inspect.signature(model.forward).parameters:
        given = {**given, "use_cache": False}  # Hugging Face: a training step keeps no cache of keys
    try:
        exported = torch.export.export(model, (), given, strict=False)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} can be traced neither by torch.fx nor by torch.export: {first_sentence(error)}"
        ) from error
    return exported.module(check_guards=False), given


def _samples(given: dict[str, Any]) -> int:
    """Sequences in the example inputs."""
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor) and value.ndim]
    return int(tensors[0].shape[0]) if tensors else DEFAULT_BATCH


def _path(node: torch.fx.Node) -> str:
    """Path of the innermost module that made a node."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _dense(op: Op, model: Model) -> Op:
    """The lookup of the vocabulary as a dense op that owns its table."""
    if op.kind != "lookup":
        return op
    params = sum(table.params for table in model.tables if table.name in op.tables)
    return replace(op, kind="elementwise", tables=(), params=op.params + params)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Records before, in and after the one layer that was traced."""

    before: tuple[Op, ...]
    layer: tuple[Op, ...]
    after: tuple[Op, ...]

    @classmethod
    def split(cls, ops: Sequence[Op], member: set[str]) -> _Parts:
        inside = [i for i, op in enumerate(ops) if op.name in member]
        if not inside or any(ops[i].name not in member for i in range(inside[0], inside[-1])):
            raise InputError(
                "the layers of the decoder do not follow one another; the planner cannot repeat one"
            )
        first, last = inside[0], inside[-1] + 1
        return cls(tuple(ops[:first]), tuple(ops[first:last]), tuple(ops[last:]))

    def repeat(self, layers: int, prefix: str) -> tuple[Op, ...]:
        """All records, the layer's once for each layer, each reading the one before."""
        own = {op.name for op in self.layer}
        out = self.layer[-1]
        outside = {name for op in self.layer for name in op.inputs} - own
        carried = [op.name for op in self.before if op.name in outside and op.out_shape == out.out_shape]
        if len(carried) != 1:
            raise InputError(
                "the layers of the decoder hand on more than one tensor; the planner cannot repeat one"
            )

        def name(op: str, index: int) -> str:
            if op not in own:
                return op
            head = f"{prefix}_0_"
            if op.startswith(head):
                return f"{prefix}_{index}_{op.removeprefix(head)}"
            return f"{prefix}_{index}_{op}"

        ops = list(self.before)
        for index in range(layers):
            source = name(out.name, index - 1) if index else carried[0]
            for op in self.layer:
                inputs = tuple(source if i == carried[0] else name(i, index) for i in op.inputs)
                module = op.module.replace(".0.", f".{index}.", 1) if op.module else ""
                ops.append(replace(op, name=name(op.name, index), inputs=inputs, module=module))
        last = name(out.name, layers - 1)
        for op in self.after:
            ops.append(replace(op, inputs=tuple(last if i == out.name else i for i in op.inputs)))
        return tuple(ops)


def _shape(parts: _Parts, model: Model, layers: int) -> tuple[AttentionOp, DecoderShape]:
    """Sizes from the layer's GEMMs, in graph order, and its attention."""
    attends = [op for op in parts.layer if op.kind == "attention"]
    if len(attends) != 1 or len(attends[0].out_shape) != 4 or len(model.tables) != 1:
        raise InputError(
            f"a decoder layer has one attention over (batch, heads, tokens, dim) and the model one vocabulary; "
            f"found {len(attends)} and {len(model.tables)}"
        )
    at = parts.layer.index(attends[0])
    _, heads, length, head_dim = attends[0].out_shape
    width, table = heads * head_dim, model.tables[0]
    into = [op.gemm for op in parts.layer[:at] if op.gemm is not None and op.params]
    out = [op.gemm for op in parts.layer[at:] if op.gemm is not None and op.params]
    kv = sum(n for _, n in into) - width
    up, down = out[1:-1], out[-1] if out else None
    known = (
        all(k == table.dim for k, _ in (*into, *up))
        and kv > 0
        and kv % (2 * head_dim) == 0
        and out[:1] == [(width, table.dim)]
        and len({n for _, n in up}) == 1
        and len(up) in (1, 2)
        and down == (up[0][1], table.dim)
    )
    if not known:
        raise InputError(
            f"a decoder layer projects to queries, keys, values, back, and through a feed-forward network of two or "
            f"three matrices; found {into} before and {out} after attention"
        )
    head = [op for op in parts.after if op.gemm == (table.dim, table.rows)]
    if len(head) != 1:
        raise InputError(f"a decoder ends in one projection to its {table.rows} tokens; found {len(head)}")
    matrices = sum(k * n for k, n in (*into, *out))
    outer = sum(op.params for op in (*parts.before, *parts.after)) - table.params - head[0].params
    shape = DecoderShape(
        layers=layers,
        hidden=table.dim,
        ffn=up[0][1],
        gated=len(up) == 2,
        heads=heads,
        kv_heads=kv // (2 * head_dim),
        head_dim=head_dim,
        vocab=table.rows,
        tied=head[0].params == 0,
        layer_vectors=sum(op.params for op in parts.layer) - matrices,
        outer_vectors=outer,
    )
    return AttentionOp(attends[0].name, heads, shape.kv_heads, head_dim, True, length), shape
