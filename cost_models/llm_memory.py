"""Bytes of device memory of one pipeline rank of a decoder's training, by purpose.

Elements kept of a layer for each token and micro-batch in flight, over t tensor-parallel ranks (symbols of
:mod:`cost_models.llm`; g is 2 where the feed-forward network is gated, else 1):

============ ==================== ==================================================================
recompute    elements             what
============ ==================== ==================================================================
none         4 h + 2 q + 2 k +    both norms' inputs and outputs; queries, keys, values and the
             (g+1) f              attention's output; into and out of the activation function
elementwise  2 h + 2 q + 2 k + gf without the norms' outputs and the (gated) product
full         h                    the layer's input
============ ==================== ==================================================================

plus 4 bytes a head for the log-sum-exp of fused attention, which keeps no scores. A deferred weight
gradient holds the inputs and the output gradients of the GEMMs: 4 h + 2 q + 2 k + (g+1) f elements.

========== ============================= ==================== =====================================
ZeRO       weights, e bytes each         gradients, 4 bytes   optimizer, 4 + state bytes
========== ============================= ==================== =====================================
1          all                           all                  1 / shards
2          all                           1 / shards + 2 u     1 / shards
3          1 / shards + 2 u              1 / shards + 2 u     1 / shards
========== ============================= ==================== =====================================

u is the unit that is gathered or scattered as a whole: a chunk of a virtual stage, else a layer. Gradients
are accumulated in fp32 (Llama 3, arXiv 2407.21783, section 3.3.2). ZeRO-2 under GPipe keeps them whole: all
micro-batches of a rank go backward in one run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cost_models.llm import FP32_BYTES, Training, kv_width
from cost_models.pipeline import Pipeline, deferred, in_flight, peak_held
from ir.dtypes import nbytes
from ir.parallelism import Layout, Recompute


def layer_activation(training: Training, layout: Layout, recompute: Recompute) -> int:
    """Bytes one layer keeps of one micro-batch on one rank."""
    shape, t = training.shape, layout.tensor
    gated = 2 if shape.gated else 1
    h, q, f = shape.hidden / t, shape.query_width / t, shape.ffn / t
    inner = 2 * q + 2 * kv_width(shape, t)
    elements = {"none": 4 * h + inner + (gated + 1) * f, "elementwise": 2 * h + inner + gated * f, "full": h}
    size = elements[recompute] * nbytes(training.dtype)
    if recompute != "full":
        size += FP32_BYTES * shape.heads / t
    return math.ceil(training.tokens(layout.context, layout.micro_batch) * size)


def schedule_of(layout: Layout) -> Pipeline:
    """The layout's pipeline."""
    return Pipeline(
        layout.schedule, layout.pipeline, layout.virtual_stages, layout.micro_batches, layout.contiguous
    )


def stage_params(training: Training, layout: Layout, layers: int, rank: int) -> float:
    """Parameters of a pipeline rank that holds ``layers`` layers, on one of its devices."""
    shape = training.shape
    own = float(layers * (shape.layer_matrices / layout.tensor + shape.layer_vectors))
    if rank == 0:
        own += shape.vocab_matrix / layout.tensor
    if rank == layout.pipeline - 1:
        own += shape.outer_vectors
        own += 0 if shape.tied and rank == 0 else shape.vocab_matrix / layout.tensor
    return own


def stage_memory(
    training: Training, layout: Layout, stages: Sequence[Sequence[int]], rank: int
) -> dict[str, int]:
    """Bytes by purpose on each device of one pipeline rank; ``stages`` is [rank][chunk] layers."""
    shape, own = training.shape, stages[rank]
    params = stage_params(training, layout, sum(own), rank)
    shared = params / layout.shards
    if layout.virtual_stages > 1:
        unit = max(own) * shape.layer_params / layout.tensor
    else:
        unit = min(params, shape.layer_params / layout.tensor)
    if rank in (0, layout.pipeline - 1):
        unit = max(unit, shape.vocab_matrix / layout.tensor)
    window = min(params, 2 * unit)
    whole_gradients = layout.zero == 1 or (layout.zero == 2 and layout.schedule == "gpipe")
    return {
        "weights": math.ceil(nbytes(training.dtype) * (shared + window if layout.zero == 3 else params)),
        "gradients": math.ceil(FP32_BYTES * (params if whole_gradients else shared + window)),
        "optimizer": math.ceil((FP32_BYTES + training.state_bytes) * shared),
        "activations": _activations(training, layout, tuple(own), rank),
        "workspace": _workspace(training, layout, rank),
    }


def _activations(training: Training, layout: Layout, own: tuple[int, ...], rank: int) -> int:
    pipe = schedule_of(layout)
    kept = layer_activation(training, layout, layout.recompute)
    held = kept * peak_held(pipe, rank, own)
    if layout.pipeline > 1:
        # what a stage received stays until its backward pass: the input of its first layer, counted there
        held += deferred(pipe, rank) * max(own) * layer_activation(training, layout, "none")
    if rank == 0 and own[0] == 0:
        held += in_flight(pipe, rank) * 8 * training.tokens(layout.context, layout.micro_batch)  # int64 ids
    return held


def _workspace(training: Training, layout: Layout, rank: int) -> int:
    """Buffers of the op that runs: gathered activations, gradients inside a layer, keys and values, logits."""
    shape, t, item = training.shape, layout.tensor, nbytes(training.dtype)
    tokens = training.tokens(layout.context, layout.micro_batch)
    gathered = 2 * tokens * shape.hidden * item if t > 1 else 0.0
    inside = float(
        layer_activation(training, layout, "none")
    )  # gradients of the widest layer, or its recomputation
    keys = layout.micro_batch * training.sequence * 2 * kv_width(shape, t) * (item + FP32_BYTES)
    messages = 4 * tokens * shape.hidden / t * item if layout.pipeline > 1 else 0.0
    size = gathered + inside + messages + (keys if layout.context > 1 else 0.0)
    if rank == layout.pipeline - 1:
        size += (
            tokens * shape.vocab / t * (item + FP32_BYTES)
        )  # logits in the compute type, their fp32 gradient
    return math.ceil(size)
