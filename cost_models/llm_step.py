"""A layout priced: seconds of the step by term, and a bound that needs only part of the layout.

    step = m max_r (seconds of a micro-batch through rank r) + bubble + messages + data parallelism + optimizer

The bound counts the first summand with the fewest layers that some rank must hold, and the least bubble;
every other summand is at least 0. It is therefore below the step of every layout it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.compute import stream_seconds
from cost_models.llm import FP32_BYTES, LayerSeconds, Training, data_seconds
from cost_models.llm_memory import schedule_of, stage_params
from cost_models.pipeline import ChunkSeconds, idle_seconds, pipeline_seconds
from ir.dtypes import nbytes
from ir.parallelism import Layout

Stages = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step; ``terms`` add up to it."""

    step: float
    terms: dict[str, float]
    hidden: dict[str, float]
    bubble: float  # idle over work


def chunk_seconds(layer: LayerSeconds, layout: Layout, layers: int) -> ChunkSeconds:
    """Seconds of ``layers`` equal layers."""
    return _scaled(layer.chunk(layout.recompute), layers)


def _scaled(one: ChunkSeconds, layers: int) -> ChunkSeconds:
    return ChunkSeconds(layers * one.forward, layers * one.backward, layers * one.weight)


def step_cost(training: Training, layout: Layout, stages: Stages) -> StepCost:
    """Modelled seconds of one step; ``stages`` is [rank][chunk] layers."""
    layer, ends = _prices(training, layout)
    slowest = max(range(layout.pipeline), key=lambda rank: _rank_total(layer, ends, layout, stages, rank))
    terms = _rank_terms(layer, ends, layout, stages, slowest)
    most = max(max(own) for own in stages)
    pipe = schedule_of(layout)
    # by the idle time it causes: with split weight gradients the longest chunk need not cause the most
    widest = max(
        chunk_seconds(layer, layout, most),
        _with_ends(chunk_seconds(layer, layout, stages[-1][-1]), ends[layout.pipeline - 1]),
        key=lambda chunk: (idle_seconds(pipe, chunk), chunk.total),
    )
    message = training.ring((layout.pipeline, layout.tensor * layout.context)).send(
        training.tokens(layout.context, layout.micro_batch)
        * training.shape.hidden
        / layout.tensor
        * nbytes(training.dtype)
    )
    timed = pipeline_seconds(pipe, sum(terms.values()), widest, message)
    params = [stage_params(training, layout, sum(own), rank) for rank, own in enumerate(stages)]
    chunk_params = (
        max(params) if layout.virtual_stages == 1 else most * training.shape.layer_params / layout.tensor
    )
    window = _scaled(layer.window(layout.recompute), most)
    exchange = data_seconds(training, layout, chunk_params, window)
    shard = max(params) / layout.shards
    state = FP32_BYTES + training.state_bytes
    update = stream_seconds(
        (state + FP32_BYTES) * shard,
        (state + nbytes(training.dtype)) * shard,
        training.topology.device,
        training.calibration,
    )
    whole = {name: layout.micro_batches * seconds for name, seconds in terms.items()}
    whole |= {
        "bubble": timed.bubble,
        "pipeline_parallel": timed.messages,
        "data_parallel": exchange.exposed,
        "optimizer": update,
    }
    sent = 2 * layout.virtual_stages * layout.micro_batches * message if layout.pipeline > 1 else 0.0
    hidden = {
        "pipeline_parallel": max(0.0, sent - timed.messages),
        "data_parallel": exchange.hidden,
        # the gathers that weight gradients need: half of what the forward pass exposes
        "tensor_parallel": layout.micro_batches * sum(stages[slowest]) * layer.tensor[0] / 2,
    }
    return StepCost(sum(whole.values()), whole, hidden, timed.bubble / timed.work)


def _with_ends(chunk: ChunkSeconds, ends: list[LayerSeconds]) -> ChunkSeconds:
    """A chunk that also holds the embedding or the output projection."""
    others = [end.chunk("none") for end in ends]
    return ChunkSeconds(
        chunk.forward + sum(other.forward for other in others),
        chunk.backward + sum(other.backward for other in others),
        chunk.weight + sum(other.weight for other in others),
    )


def _prices(training: Training, layout: Layout) -> tuple[LayerSeconds, dict[int, list[LayerSeconds]]]:
    """A layer, and what pipeline ranks have besides layers."""
    key = (layout.tensor, layout.context, layout.micro_batch)
    ends: dict[int, list[LayerSeconds]] = {0: [training.embedding(*key)]}
    ends.setdefault(layout.pipeline - 1, []).append(training.head(*key))
    return training.layer(*key), ends


def _rank_total(
    layer: LayerSeconds, ends: dict[int, list[LayerSeconds]], layout: Layout, stages: Stages, rank: int
) -> float:
    own = sum(stages[rank]) * layer.chunk(layout.recompute).total
    return own + sum(end.chunk("none").total for end in ends.get(rank, []))


def _rank_terms(
    layer: LayerSeconds, ends: dict[int, list[LayerSeconds]], layout: Layout, stages: Stages, rank: int
) -> dict[str, float]:
    layers = sum(stages[rank])
    terms = {name: layers * seconds for name, seconds in layer.terms(layout.recompute).items()}
    for end in ends.get(rank, []):
        for name, seconds in end.terms("none").items():
            terms[name] += seconds
    return terms


def step_bound(layers: int, layout: Layout, one: ChunkSeconds) -> float:
    """Seconds below which no division of ``layers`` over the layout's stages can come; ``one`` is a layer's."""
    work = layout.micro_batches * -(-layers // layout.pipeline) * one.total
    if layout.pipeline == 1:
        return work
    smallest = -(-layers // (layout.pipeline * layout.virtual_stages))
    return work + (layout.pipeline - 1) * smallest * idle_seconds(schedule_of(layout), one)


def work_bound(
    training: Training, tensor: int, context: int, pipeline: int, micro_batch: int, count: int
) -> float:
    """The first summand without recomputation: below every layout of these degrees with ``count`` micro-batches."""
    layer = training.layer(tensor, context, micro_batch)
    return count * -(-training.shape.layers // pipeline) * layer.chunk("none").total
