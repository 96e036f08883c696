"""What a layer's backward pass computes again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from codegen.runtime.llm.stages import Stage
from ir.parallelism import Recompute

# matrix products and fused attention, whose outputs "elementwise" keeps
_KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
)


def recompute_layers(stage: Stage, recompute: Recompute) -> None:
    """Wrap the forward pass of each layer of the stage, in place."""
    if recompute == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if recompute == "elementwise":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for layer in stage.layers.values():
        _wrap(layer, options)


def _wrap(layer: nn.Module, options: dict[str, Any]) -> None:
    inner = layer.forward

    def forward(*args: Any) -> Any:
        return checkpoint(inner, *args, **options)

    layer.forward = forward


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
