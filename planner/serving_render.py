"""Serving plans as text: the layout, both latencies and what they are made of, and which ring when."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ir.errors import InputError
from ir.plan import Plan
from ir.serving import Serving
from ir.units import format_bytes, format_count, format_seconds
from planner.render import assumption_list, grid, headline, percent


def serving_of(plan: Plan) -> Serving:
    """The section; raises InputError where the plan has none."""
    made = plan.decisions.serving
    if made is None:
        raise InputError(f"the plan of {plan.model.name} does not serve a decoder")
    return made


def serving_summary(plan: Plan) -> RenderableType:
    """One screen: the layout, the latencies, memory, the exchange, the next layouts."""
    layouts = _layouts(serving_of(plan))
    return Group(headline(plan, serving_facts(plan)), Text(), Text("layouts", style="bold"), layouts)


def serving_facts(plan: Plan) -> list[tuple[str, str]]:
    """What is said first of a serving plan, by name."""
    made = serving_of(plan)
    request, chosen = made.request, made.chosen
    targets = [
        f"{name} at most {format_seconds(value)}"
        for name, value in (("ttft", request.ttft), ("ttit", request.ttit))
        if value is not None
    ]
    copies = "1 replica" if made.replicas == 1 else f"{made.replicas} replicas"
    return [
        (
            "request",
            f"{request.new:,} new tokens after {request.cached:,} cached, {_sequences(request.batch)}; "
            + (", ".join(targets) or "no latency target"),
        ),
        ("layout", f"{chosen.layout.label}: {chosen.layout.ranks} devices, {copies}"),
        (
            "attention",
            f"{chosen.exchange} for this request" if chosen.layout.context > 1 else "on each device alone",
        ),
        ("ttft", f"{format_seconds(chosen.ttft)} modelled"),
        ("ttit", f"{format_seconds(chosen.ttit)} modelled"),
        (
            "certificate",
            f"the fewest devices: {made.evaluated:,} layouts priced, {made.too_large:,} too large, "
            f"{made.too_slow:,} too slow",
        ),
        (
            "memory",
            f"{format_bytes(chosen.memory)} of {format_bytes(plan.memory[0].limit)} usable; sequences of up to "
            f"{format_count(made.longest)} tokens fit",
        ),
    ]


def _sequences(count: int) -> str:
    return f"{count} sequences decoded together" if count > 1 else "one sequence decoded"


def _layouts(made: Serving) -> RenderableType:
    table = grid("layout", ">devices", "attention", ">ttft", ">ttit", ">memory", "against the chosen one")
    for one in (made.chosen, *made.alternatives):
        table.add_row(
            one.layout.label,
            str(one.layout.ranks),
            one.exchange,
            format_seconds(one.ttft),
            format_seconds(one.ttit),
            format_bytes(one.memory),
            one.note or "chosen",
        )
    return table


def render_serving(plan: Plan) -> RenderableType:
    """The section alone: the layouts, what latencies and memory are made of, and the decision table."""
    return Group(Text("layouts", style="bold"), _layouts(serving_of(plan)), Text(), _details(plan))


def _details(plan: Plan) -> RenderableType:
    made = serving_of(plan)
    terms = grid("term", ">to the first token", ">between tokens")
    for name in dict.fromkeys((*made.prefill, *made.decode)):
        cells = [
            format_seconds(part[name]) if part.get(name) else "-" for part in (made.prefill, made.decode)
        ]
        terms.add_row(name, *cells)
    memory = grid("memory of a device", ">bytes", ">share")
    for name, size in made.memory.items():
        memory.add_row(name, format_bytes(size), percent(size, made.chosen.memory))
    parts: list[RenderableType] = [terms, Text(), memory]
    if made.crossovers:
        table = grid(">tokens in all", ">pass-KV from so many new", "whole prompt", "one token")
        for row in made.crossovers:
            start = "never" if row.pass_kv_from is None else f"{row.pass_kv_from:,}"
            table.add_row(f"{row.total:,}", start, row.full, row.one)
        parts += [Text(), Text("attention over context ranks, by request", style="bold"), table]
    return Group(*parts)


def explain_serving(plan: Plan) -> RenderableType:
    """The summary, the terms, the decision table and the assumptions."""
    return Group(serving_summary(plan), Text(), _details(plan), Text(), assumption_list(plan))


def explain_serving_rank(plan: Plan, rank: int) -> RenderableType:
    """Which replica a rank is of, where it stands in it, and its bytes by purpose; raises InputError for no rank."""
    made = serving_of(plan)
    if not 0 <= rank < plan.world_size:
        raise InputError(f"the plan has ranks 0..{plan.world_size - 1}, not {rank}")
    layout, memory = made.chosen.layout, plan.memory[rank]
    replica, inside = divmod(rank, layout.ranks)
    place = f"rank {rank} (host {plan.topology.host_of(rank)})"
    if replica >= made.replicas:
        return Text(f"{place} serves nothing: {made.replicas} replicas of {layout.ranks} ranks leave it idle")
    context, tensor = divmod(inside % (layout.tensor * layout.context), layout.tensor)
    head = (
        f"{place}: replica {replica}, tensor {tensor}, context {context}, pipeline "
        f"{inside // (layout.tensor * layout.context)}; {format_bytes(memory.total)} of {format_bytes(memory.limit)} "
        "usable"
    )
    uses = grid("purpose", ">bytes")
    for purpose, size in sorted(memory.used.items(), key=lambda item: -item[1]):
        uses.add_row(purpose, format_bytes(size))
    return Group(Text(head, style="bold"), Text(), uses)
