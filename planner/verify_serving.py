"""Independent check of a serving plan: divisibility, memory, targets and physical lower bounds, from the file alone."""

from __future__ import annotations

from collections.abc import Iterator

from ir.plan import Plan
from ir.serving import Serving
from ir.units import format_bytes, format_seconds

_CLOSE = 1e-6  # relative, for sums of floats


def check_serving(plan: Plan) -> Iterator[str]:
    """Every fault of the section ``serving``."""
    made = plan.decisions.serving
    if made is None:
        return
    yield from _shape(plan, made)
    yield from _targets(made)
    yield from _memory(plan, made)
    yield from _physics(plan, made)
    yield from _table(made)


def _shape(plan: Plan, made: Serving) -> Iterator[str]:
    layout, model, host = made.chosen.layout, made.model, plan.topology.host_size
    if model.params != plan.model.dense_params:
        yield f"the section's model has {model.params} parameters, the plan's {plan.model.dense_params}"
    used = layout.tensor * layout.context * layout.pipeline
    if not 1 <= made.replicas * used <= plan.world_size:
        yield f"{made.replicas} replicas of {used} devices do not fit on {plan.world_size}"
    if model.heads % layout.tensor or model.ffn % layout.tensor:
        yield f"tensor {layout.tensor} does not divide {model.heads} heads and a width of {model.ffn}"
    if max(model.kv_heads, layout.tensor) % min(model.kv_heads, layout.tensor):
        yield f"{model.kv_heads} key-value heads cannot be spread over tensor {layout.tensor}"
    if layout.pipeline > model.layers:
        yield f"{layout.pipeline} pipeline ranks have only {model.layers} layers"
    if used % host and host % used:
        yield f"{used} devices are neither whole hosts nor a part of one of {host}"
    if (made.chosen.exchange == "none") != (layout.context == 1):
        yield f"context {layout.context} does not go with exchange {made.chosen.exchange}"
    allowed = plan.constraints.serving
    if allowed is not None and made.request != allowed:
        yield "the section answers another request than constraints.serving"
    for name in ("tensor", "context", "pipeline"):
        pinned = getattr(made.request, name)
        if pinned is not None and pinned != getattr(layout, name):
            yield f"{name} is pinned to {pinned}, the plan has {getattr(layout, name)}"
    if layout.weights not in made.request.weights or layout.cache not in made.request.cache:
        yield f"formats {layout.weights} and {layout.cache} are not among those asked for"


def _targets(made: Serving) -> Iterator[str]:
    for name, terms, target in (
        ("ttft", made.prefill, made.request.ttft),
        ("ttit", made.decode, made.request.ttit),
    ):
        claimed = getattr(made.chosen, name)
        if abs(sum(terms.values()) - claimed) > _CLOSE * claimed:
            yield f"the terms of {name} add up to {sum(terms.values())} s, the plan says {claimed} s"
        if target is not None and claimed > target * (1 + _CLOSE):
            yield f"{name} is {format_seconds(claimed)}, the target {format_seconds(target)}"


def _memory(plan: Plan, made: Serving) -> Iterator[str]:
    """Weights and cache counted again, without scales and buffers: no device may claim less."""
    layout, model, request = made.chosen.layout, made.model, made.request
    narrow = model.layers * model.hidden * model.ffn * (3 if model.gated else 2)
    weights = 2 * (model.params - narrow) + (1 if layout.weights == "fp8_row" else 2) * narrow
    tokens = request.new + request.cached + request.output
    kv_heads = max(model.kv_heads / layout.tensor, 1)
    cache = 2 * kv_heads * model.head_dim * (1 if layout.cache == "fp8" else 2)
    cache *= model.layers / layout.pipeline * tokens / layout.context * request.batch
    least = weights / (layout.tensor * layout.pipeline) + cache
    if made.chosen.memory < least * (1 - _CLOSE):
        yield f"a device claims {format_bytes(made.chosen.memory)}, weights and cache need {format_bytes(least)}"
    if sum(made.memory.values()) != made.chosen.memory:
        yield "the purposes of memory do not add up to the device's"
    for entry in plan.memory:
        if entry.used and entry.total != made.chosen.memory:
            yield f"rank {entry.rank} holds {entry.total} bytes, the section says {made.chosen.memory}"
            return


def _physics(plan: Plan, made: Serving) -> Iterator[str]:
    """No request is faster than its FLOP at the peak, no token than its weights through memory."""
    layout, model, request, device = made.chosen.layout, made.model, made.request, plan.topology.device
    peak = max(device.flops.values())
    matrices = model.layers * model.layer_matrices
    pairs = request.new * request.cached + request.new * (request.new + 1) / 2
    flops = 2 * matrices * request.new + 4 * model.layers * model.heads * model.head_dim * pairs
    least = flops / peak / (layout.tensor * layout.context)
    if made.chosen.ttft < least:
        yield f"ttft {made.chosen.ttft:.4g} s is below {least:.4g} s, its FLOP at the device's peak"
    narrow = model.layers * model.hidden * model.ffn * (3 if model.gated else 2)
    read = 2 * (matrices - narrow) + (1 if layout.weights == "fp8_row" else 2) * narrow
    least = read / layout.tensor / device.tiers[0].read_bandwidth
    if made.chosen.ttit < least:
        yield f"ttit {made.chosen.ttit:.4g} s is below {least:.4g} s, its weights through the device's memory"


def _table(made: Serving) -> Iterator[str]:
    totals = [row.total for row in made.crossovers]
    if totals != sorted(set(totals)):
        yield "the decision table is not in the order of its tokens"
    if bool(made.crossovers) != (made.chosen.layout.context > 1):
        yield "a decision table goes with context ranks, and only with them"
    for row in made.crossovers:
        if row.pass_kv_from is not None and not 0 < row.pass_kv_from <= row.total:
            yield f"of {row.total} tokens, pass-KV is said to begin at {row.pass_kv_from}"
