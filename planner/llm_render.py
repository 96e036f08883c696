"""Plans of decoders as text: the layout, what the step is made of, the stages, and the layouts not chosen."""

from __future__ import annotations

from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from ir.decoder import LlmWorkload
from ir.errors import InputError
from ir.parallelism import Parallelism
from ir.plan import Plan
from ir.units import format_bytes, format_count, format_seconds
from planner.render import assumption_list, grid, headline, percent, timeline_chart


def parallelism_of(plan: Plan) -> Parallelism:
    """The section; raises InputError where the plan has none."""
    made = plan.decisions.parallelism
    if made is None:
        raise InputError(f"the plan of {plan.model.name} has no parallelism of layers")
    return made


def describe(plan: Plan) -> str:
    """The layout of a decoder in one phrase; empty for a plan without."""
    made, served = plan.decisions.parallelism, plan.decisions.serving
    if served is not None:
        layout = served.chosen.layout
        copies = f"{served.replicas} replica{'s' * (served.replicas != 1)}"
        return f"{layout.label}: {layout.ranks} devices, {copies}"
    return f"{made.layout.label}, {made.layout.details}" if made is not None else ""


def llm_summary(plan: Plan, events: bool = True) -> RenderableType:
    """One screen: the headline numbers, the modelled step, what it is made of, and the next layouts."""
    made = parallelism_of(plan)
    parts: list[RenderableType] = [headline(plan, llm_facts(plan)), Text()]
    if events and plan.timeline.events:
        parts += [Text("modelled step", style="bold"), timeline_chart(plan.timeline), Text()]
    parts += [Text("layouts", style="bold"), _layouts(plan, made)]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in plan.warnings]
    return Group(*parts)


def llm_facts(plan: Plan) -> list[tuple[str, str]]:
    """What is said first of a decoder's training plan, by name."""
    made = parallelism_of(plan)
    layout, search = made.layout, made.search
    fed = plan.workload.llm or LlmWorkload()
    fullest = max(plan.memory, key=lambda rank: rank.total / rank.limit)
    return [
        (
            "model",
            f"{format_count(made.model.params)} parameters, {made.model.layers} layers; {fed.sequence:,} tokens a "
            f"sequence, {format_count(fed.global_tokens)} a step",
        ),
        ("layout", layout.label),
        ("", layout.details),
        ("stages", _stages(made)),
        (
            "step",
            f"{format_seconds(plan.timeline.step)} modelled, {made.tflops:.0f} TFLOP/s a device ({100 * made.mfu:.1f} % "
            f"of peak), bubble {100 * made.bubble:.1f} %",
        ),
        (
            "certificate",
            f"the fastest of {search.legal:,} legal layouts that fit ({search.evaluated:,} priced, "
            f"{search.too_large:,} too large, {search.cut:,} cut by bounds); none of any size is below "
            f"{format_seconds(search.bound)}",
        ),
        (
            "memory",
            f"fullest rank {fullest.rank}: {format_bytes(fullest.total)} of {format_bytes(fullest.limit)} usable "
            f"({percent(fullest.total, fullest.limit)})",
        ),
    ]


def _stages(made: Parallelism) -> str:
    """``"7 | 14 x 8 | 7 layers"``: layers of each pipeline rank, equal neighbours together."""
    totals = [sum(own) for own in made.stages]
    runs = [(layers, len(list(run))) for layers, run in groupby(totals)]
    text = " | ".join(f"{count} x {layers}" if count > 1 else str(layers) for layers, count in runs)
    return f"{text} layers; embedding on the first, output projection on the last"


def _layouts(plan: Plan, made: Parallelism) -> RenderableType:
    table = grid("layout", "schedule", ">step", ">TFLOP/s", ">memory", "against the chosen one")
    fullest = max(rank.total for rank in plan.memory)
    rows = [(made.layout, plan.timeline.step, made.tflops, fullest, "chosen")]
    rows += [(a.layout, a.step, a.tflops, a.memory, a.reason) for a in made.alternatives]
    for layout, step, tflops, memory, reason in rows:
        table.add_row(
            layout.label, layout.details, format_seconds(step), f"{tflops:.0f}", format_bytes(memory), reason
        )
    return table


def explain_llm(plan: Plan) -> RenderableType:
    """The summary, every term of the step with its share, memory by pipeline rank, and the assumptions."""
    return Group(llm_summary(plan), Text(), _details(plan), Text(), assumption_list(plan))


def render_parallelism(plan: Plan) -> RenderableType:
    """The section alone: the layouts, the terms of the step, memory by pipeline rank."""
    layouts = [Text("layouts", style="bold"), _layouts(plan, parallelism_of(plan)), Text()]
    return Group(*layouts, _details(plan))


def _details(plan: Plan) -> RenderableType:
    made = parallelism_of(plan)
    terms = grid("term", ">seconds", ">of the step", ">hidden besides")
    for name, seconds in made.seconds.items():
        behind = made.hidden.get(name, 0.0)
        terms.add_row(
            name,
            format_seconds(seconds),
            percent(seconds, plan.timeline.step),
            format_seconds(behind) if behind else "-",
        )
    return Group(
        Text("the step", style="bold"),
        terms,
        Text(),
        Text("memory of a device, by pipeline rank", style="bold"),
        _memory(plan, made),
    )


def _memory(plan: Plan, made: Parallelism) -> RenderableType:
    layout = made.layout
    used = [plan.memory[rank * layout.tensor * layout.context].used for rank in range(layout.pipeline)]
    table = grid(">rank", "layers by chunk", *(f">{purpose}" for purpose in used[0]), ">sum")
    for rank, sizes in enumerate(used):
        table.add_row(
            str(rank),
            " ".join(str(layers) for layers in made.stages[rank]),
            *(format_bytes(size) for size in sizes.values()),
            format_bytes(sum(sizes.values())),
        )
    return table


def explain_llm_rank(plan: Plan, rank: int) -> RenderableType:
    """Where a rank stands in the mesh, the layers it holds, and its bytes by purpose."""
    made = parallelism_of(plan)
    if not 0 <= rank < plan.world_size:
        raise InputError(f"the plan has ranks 0..{plan.world_size - 1}, not {rank}")
    layout, memory = made.layout, plan.memory[rank]
    tensor, rest = rank % layout.tensor, rank // layout.tensor
    context, rest = rest % layout.context, rest // layout.context
    pipeline, data = rest % layout.pipeline, rest // layout.pipeline
    head = (
        f"rank {rank} (host {plan.topology.host_of(rank)}): tensor {tensor}, context {context}, pipeline {pipeline}, "
        f"data {data}; {format_bytes(memory.total)} of {format_bytes(memory.limit)} usable"
    )
    uses = grid("purpose", ">bytes")
    for purpose, size in sorted(memory.used.items(), key=lambda item: -item[1]):
        uses.add_row(purpose, format_bytes(size))
    held = grid(">chunk", "layers")
    before = 0
    for chunk in range(layout.virtual_stages):
        first = before + sum(made.stages[other][chunk] for other in range(pipeline))
        count = made.stages[pipeline][chunk]
        held.add_row(str(chunk), f"{first}-{first + count - 1}" if count else "none")
        before += sum(own[chunk] for own in made.stages)
    return Group(Text(head, style="bold"), Text(), uses, Text(), held)
