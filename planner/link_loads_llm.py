"""Bytes that links carry in a training step, or in a prompt, of a decoder: counted from the layout.

n tokens of a micro-batch on a rank, h width, L layers of the rank, m micro-batches, x bytes of an element, C chunks.

===================  =========================================================================================
tensor parallel      a layer: 4 all-gathers or reduce-scatters of n h x forward, 4 backward, 2 more for weight
                     gradients (sequence parallelism, arXiv 2205.05198); the embedding and the projection 2 each
context parallel     a layer: keys and values of the whole sequence gathered forward and again backward, their fp32
                     gradients scattered
pipeline parallel    n h x / t to the next chunk and back, C m times each
data parallel        weights gathered and fp32 gradients scattered over the shards, once for each run of micro-batches
                     that the ZeRO level asks for; shards summed over copies
===================  =========================================================================================
"""

from __future__ import annotations

import numpy as np

from cost_models.attention import GRADIENT_BYTES
from cost_models.llm import FP32_BYTES, run_length
from ir.dtypes import nbytes
from ir.parallelism import Layout
from ir.plan import Plan
from planner.link_loads import Bytes, Dimensions, LinkCounter

_TENSOR_COLLECTIVES = 10  # of a layer and micro-batch, see the table above
_END_COLLECTIVES = 2  # of the embedding, and of the projection
_PROMPT_REDUCES = 2  # of a layer: after attention and after the feed-forward part
_SERVED_BYTES = 2.0  # bf16 activations
_LSE_BYTES = 4.0  # fp32 log-sum-exp of a head's partial output


def count_training(plan: Plan, counter: LinkCounter) -> None:
    """What each rank of the mesh sends, by the layers of its pipeline rank."""
    made = plan.decisions.parallelism
    fed = plan.workload.llm
    assert made is not None
    assert fed is not None
    layout, shape, item = made.layout, made.model, nbytes(plan.workload.compute_dtype)
    stage = np.array([layout.stage_of(rank) for rank in range(layout.world)])
    layers = np.array([sum(own) for own in made.stages], dtype=float)[stage]
    ends = (stage == 0).astype(float) + (stage == layout.pipeline - 1)  # the embedding, the projection
    tokens = layout.micro_batch * fed.sequence / layout.context
    width = max(shape.kv_width / layout.tensor, shape.head_dim)
    times = (_TENSOR_COLLECTIVES * layers + _END_COLLECTIVES * ends) * layout.micro_batches
    counter.gather("tensor parallel", ((layout.tensor, 1),), tokens * shape.hidden * item * times)
    gathered = layout.micro_batch * fed.sequence * 2 * width * (2 * item + GRADIENT_BYTES)
    context: Dimensions = ((layout.context, layout.tensor),)
    counter.gather("context parallel", context, gathered * layers, layout.micro_batches)
    message = tokens * shape.hidden / layout.tensor * item
    sent = 2 * layout.virtual_stages * layout.micro_batches * message
    counter.ring("pipeline parallel", ((layout.pipeline, layout.tensor * layout.context),), sent)
    params = (layers * shape.layer_params + ends * shape.vocab_matrix) / layout.tensor
    _count_data(layout, item, params, counter)


def _count_data(layout: Layout, item: float, params: Bytes, counter: LinkCounter) -> None:
    stride = layout.tensor * layout.context * layout.pipeline
    inner = layout.data // layout.replicate
    over: Dimensions = ((layout.context, layout.tensor), (inner, stride))
    runs = layout.micro_batches // run_length(layout) if layout.zero >= 2 else 1
    counter.gather("data parallel", over, params * item, _weight_gathers(layout, runs))
    counter.gather("data parallel", over, params * FP32_BYTES, runs)
    copies: Dimensions = ((layout.replicate, stride * inner),)
    counter.gather("data parallel", copies, params * FP32_BYTES / layout.shards, 2 * runs)


def _weight_gathers(layout: Layout, runs: int) -> int:
    """Once before the step; with ZeRO-3 for the forward and the backward pass of every run."""
    return 2 * runs if layout.zero == 3 else 1


def count_prompt(plan: Plan, counter: LinkCounter) -> None:
    """A prompt's way to its first token."""
    made = plan.decisions.serving
    assert made is not None
    layout, shape, request = made.chosen.layout, made.model, made.request
    layers = -(-shape.layers // layout.pipeline)
    tokens, total = request.new / layout.context, (request.new + request.cached) / layout.context
    hidden = tokens * shape.hidden * _SERVED_BYTES
    counter.gather("tensor parallel", ((layout.tensor, 1),), hidden, 2 * _PROMPT_REDUCES * layers)
    heads = max(1.0, shape.heads / layout.tensor)
    width = max(shape.kv_width / layout.tensor, shape.head_dim)
    keys = 2 * total * width * (1.0 if layout.cache == "fp8" else _SERVED_BYTES)
    queries = tokens * heads * shape.head_dim * _SERVED_BYTES
    partial = queries + tokens * heads * _LSE_BYTES
    context: Dimensions = ((layout.context, layout.tensor),)
    steps = layers * (layout.context - 1)
    if made.chosen.exchange in ("pass_kv", "all_gather"):
        counter.ring("context parallel", context, steps * keys)
    elif made.chosen.exchange in ("pass_q", "pass_q_eager"):
        counter.ring("context parallel", context, steps * queries)
        counter.all_to_all("partial attention", context, layers * layout.context * partial)
    passed = hidden / layout.tensor
    counter.ring("pipeline parallel", ((layout.pipeline, layout.tensor * layout.context),), passed)
