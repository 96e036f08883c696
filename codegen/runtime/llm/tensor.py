"""Tensor parallelism of a stage by DTensor: projections split, norms and residuals split by tokens.

Between layers a rank holds tokens / tensor of every sequence (sequence parallelism, arXiv 2205.05198); attention
and feed-forward gather them and scatter what they add. Logits stay split over the vocabulary and so does the
loss.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from codegen.runtime.llm.stages import Stage

TOKENS = Shard(1)  # of (batch, tokens, hidden)


def split_tensors(stage: Stage, mesh: DeviceMesh) -> None:
    """Split the stage's weights over ``mesh`` in place."""
    outer: dict[str, ParallelStyle] = {}
    if stage.embedding is not None:
        outer["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=TOKENS)
    if stage.output is not None:
        outer["norm"] = SequenceParallel()
        outer["output"] = ColwiseParallel(
            input_layouts=TOKENS, output_layouts=Shard(-1), use_local_output=False
        )
    parallelize_module(stage, mesh, outer)
    for layer in stage.layers.values():
        parallelize_module(layer, mesh, _layer_plan())


def _layer_plan() -> dict[str, ParallelStyle]:
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(TOKENS, None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "attention.q": ColwiseParallel(),
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        "attention.o": RowwiseParallel(output_layouts=TOKENS),
        "ffn_norm": SequenceParallel(),
        "ffn": PrepareModuleInput(input_layouts=(TOKENS,), desired_input_layouts=(Replicate(),)),
        "ffn.gate": ColwiseParallel(),
        "ffn.up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(output_layouts=TOKENS),
    }
