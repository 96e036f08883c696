"""Independent check of a decoder's parallelism: rules, arithmetic and memory, from the plan file alone.

Nothing here calls the pass or the cost models. Activations in flight are counted by replaying each rank's
order of forwards and backwards (:mod:`planner.pipeline_replay`); weights, gradients and optimizer state are
added up again from the model's sizes. Buffers of single ops are not: the plan's figure may not be below what
is counted here, nor above the device's.
"""

from __future__ import annotations

from collections.abc import Iterator

from ir.decoder import LlmWorkload
from ir.parallelism import Parallelism
from ir.plan import Plan
from ir.units import format_bytes
from planner.pipeline_replay import peak_layers

_ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}
_STATE = {"adam": 12, "sgd": 4}  # bytes a parameter: fp32 weights and moments
_CLOSE = 1e-6  # relative, for sums of floats


def check_parallelism(plan: Plan) -> Iterator[str]:
    """Degrees, divisibility, stages, schedule and the arithmetic of the step."""
    made = plan.decisions.parallelism
    if made is None:
        return
    fed = plan.workload.llm or LlmWorkload()
    yield from _degrees(plan, made, fed)
    yield from _stages(made)
    yield from _schedule(made)
    yield from _arithmetic(plan, made, fed)


def _degrees(plan: Plan, made: Parallelism, fed: LlmWorkload) -> Iterator[str]:
    layout, model = made.layout, made.model
    product = layout.tensor * layout.context * layout.pipeline * layout.data
    if product != plan.world_size:
        yield f"{layout.label} needs {product} ranks, the topology has {plan.world_size}"
    if model.heads % layout.tensor or model.ffn % layout.tensor:
        yield f"tensor {layout.tensor} does not divide {model.heads} heads and a width of {model.ffn}"
    if max(model.kv_heads, layout.tensor) % min(model.kv_heads, layout.tensor):
        yield f"{model.kv_heads} key-value heads cannot be spread over tensor {layout.tensor}"
    halves = 2 * layout.context if layout.context > 1 else 1
    if fed.sequence % halves or fed.sequence // layout.context % layout.tensor:
        yield f"{fed.sequence} tokens cannot be split over context {layout.context} and tensor {layout.tensor}"
    if layout.data % layout.replicate:
        yield f"{layout.replicate} copies do not divide {layout.data} data ranks"
    sequences = layout.data * layout.micro_batches * layout.micro_batch
    if sequences * fed.sequence != fed.global_tokens:
        yield f"{sequences} sequences of {fed.sequence} tokens are not {fed.global_tokens} tokens"
    if model.params != plan.model.dense_params:
        yield f"the section's model has {model.params} parameters, the plan's {plan.model.dense_params}"


def _stages(made: Parallelism) -> Iterator[str]:
    layout = made.layout
    if [len(own) for own in made.stages] != [layout.virtual_stages] * layout.pipeline:
        yield f"stages are not {layout.pipeline} ranks of {layout.virtual_stages} chunks"
        return
    placed = sum(sum(own) for own in made.stages)
    if placed != made.model.layers:
        yield f"the stages hold {placed} layers, the model has {made.model.layers}"
    ends = {(0, 0), (layout.pipeline - 1, layout.virtual_stages - 1)}
    for rank, own in enumerate(made.stages):
        for chunk, layers in enumerate(own):
            if layers < 1 and (rank, chunk) not in ends:
                yield f"chunk {chunk} of pipeline rank {rank} is empty"


def _schedule(made: Parallelism) -> Iterator[str]:
    layout = made.layout
    several = layout.virtual_stages > 1
    if several and layout.schedule in ("gpipe", "1f1b"):
        yield f"schedule {layout.schedule} has one chunk a rank, not {layout.virtual_stages}"
    if not several and layout.schedule == "interleaved_1f1b":
        yield "schedule interleaved_1f1b needs several chunks a rank"
    if several and (layout.micro_batches % layout.contiguous or layout.contiguous < layout.pipeline):
        yield (
            f"N={layout.contiguous} must divide {layout.micro_batches} micro-batches and be at least the "
            f"pipeline's {layout.pipeline} ranks"
        )


def _arithmetic(plan: Plan, made: Parallelism, fed: LlmWorkload) -> Iterator[str]:
    model, step = made.model, plan.timeline.step
    if abs(sum(made.seconds.values()) - step) > _CLOSE * step:
        yield f"the terms add up to {sum(made.seconds.values())} s, the step is {step} s"
    attended = 12 * model.layers * model.heads * model.head_dim * fed.sequence / 2
    flops = (6 * plan.model.dense_params + attended) * fed.global_tokens
    if abs(flops - made.flops) > _CLOSE * flops:
        yield f"a step has {flops:.6g} model FLOP, the plan says {made.flops:.6g}"
    if step <= 0:
        yield "a step takes no time, and its matrix products take some"
        return
    rate = flops / step / plan.world_size / 1e12
    if abs(rate - made.tflops) > _CLOSE * rate:
        yield f"{flops:.6g} FLOP in {step} s are {rate:.2f} TFLOP/s a device, the plan says {made.tflops:.2f}"


def check_parallel_memory(plan: Plan) -> Iterator[str]:
    """What each rank must hold at least; the plan's figure may not be below."""
    made = plan.decisions.parallelism
    if made is None or any(_stages(made)) or any(_schedule(made)):
        return  # what cannot be replayed is reported above
    layout = made.layout
    needed = [_stage_bytes(plan, made, stage) for stage in range(layout.pipeline)]
    for entry in plan.memory:
        least = needed[entry.rank // (layout.tensor * layout.context) % layout.pipeline]
        if entry.total < least * (1 - _CLOSE):
            yield (
                f"rank {entry.rank} claims {format_bytes(entry.total)}, its weights, gradients, optimizer state and "
                f"activations in flight need {format_bytes(least)}"
            )


def _stage_bytes(plan: Plan, made: Parallelism, stage: int) -> float:
    layout, model = made.layout, made.model
    fed = plan.workload.llm or LlmWorkload()
    item, copies = _ITEM[fed.dtype], layout.context * layout.data / layout.replicate
    matrices = sum(made.stages[stage]) * model.layer_matrices
    matrices += (
        model.vocab * model.hidden * ((stage == 0) + (stage == layout.pipeline - 1 and not model.tied))
    )
    params = matrices / layout.tensor
    # a rank holds a share of what is sharded and all of what is not
    weights = item * (params / copies if layout.zero == 3 else params)
    gradients = 4 * (params if layout.zero == 1 else params / copies)
    state = _STATE[fed.optimizer] * params / copies
    held, deferred = peak_layers(layout, made.stages[stage], stage)
    tokens = layout.micro_batch * fed.sequence / layout.context
    query, keys = model.heads * model.head_dim, max(model.kv_heads / layout.tensor, 1) * model.head_dim
    into = (3 if model.gated else 2) * model.ffn
    all_kept = (4 * model.hidden + 2 * query + into) / layout.tensor + 2 * keys
    kept = {
        "none": all_kept,
        "elementwise": all_kept - (2 * model.hidden + model.ffn) / layout.tensor,
        "full": model.hidden / layout.tensor,
    }[layout.recompute]
    return weights + gradients + state + tokens * item * (held * kept + deferred * all_kept)
