"""What an emitter of another program's configuration gives, and the parts that such emitters share."""

from __future__ import annotations

from dataclasses import dataclass

from ir.decoder import LlmWorkload
from ir.errors import InputError
from ir.parallelism import Parallelism
from ir.plan import Plan

Values = dict[str, dict[str, object]]


@dataclass(frozen=True, slots=True)
class Emission:
    """A configuration file.

    Attributes:
        text: of the file.
        limits: what the target cannot express, or does otherwise than the plan; also comments of the file.
        command: how to use it; ``{path}`` stands for the file.
    """

    text: str
    limits: tuple[str, ...]
    command: str


def trained(plan: Plan, target: str) -> tuple[Parallelism, LlmWorkload]:
    """The decisions of a decoder's training plan; raises InputError where the plan has none."""
    made = plan.decisions.parallelism
    if made is None and plan.decisions.serving is not None:
        raise InputError(
            f"{target} trains, and the plan of {plan.model.name!r} serves; compile it with mode='train', or give the "
            "plan to vLLM"
        )
    if made is None:
        raise InputError(
            f"{target} takes a decoder's training plan, and the plan of {plan.model.name!r} has no parallelism of "
            "layers; compile a decoder such as llama3-8b"
        )
    return made, plan.workload.llm or LlmWorkload()


def stage_layers(made: Parallelism) -> tuple[tuple[int, ...], ...]:
    """Indices of the layers of each stage, in the order a micro-batch passes them: chunk by chunk, rank by rank."""
    found: list[tuple[int, ...]] = []
    first = 0
    for chunk in range(made.layout.virtual_stages):
        for own in made.stages:
            found.append(tuple(range(first, first + own[chunk])))
            first += own[chunk]
    return tuple(found)


def heading(plan: Plan, target: str, limits: tuple[str, ...], comment: str = "#") -> list[str]:
    """Comment lines: which plan, for what version, and what it lacks."""
    made = plan.decisions.parallelism
    lines = [
        f"{plain(plan.model.name)} on {plain(plan.topology.name)}, plan {plan.digest[7:23]}, for {target}"
    ]
    if made is not None:
        lines.append(f"{made.layout.label}: {made.layout.details}")
    if limits:
        lines += ["", "what this file cannot say:", *(f"- {limit}" for limit in limits)]
    return [f"{comment} {line}".rstrip() for line in lines]


def plain(text: str) -> str:
    """Text that cannot end a comment or a string."""
    return "".join(c if c.isalnum() or c in " -_.,:/=" else "_" for c in text)


def schedule_limits(made: Parallelism, schedules: dict[str, str], target: str) -> tuple[str, tuple[str, ...]]:
    """The target's name of the schedule, or that of the nearest one and a sentence about it."""
    layout = made.layout
    name = schedules.get(layout.schedule)
    if layout.pipeline == 1 or name is not None:
        return name or "", ()
    nearest = "interleaved_1f1b" if layout.virtual_stages > 1 else "1f1b"
    return schedules[nearest], (
        f"{target} has no {layout.schedule} schedule of {layout.virtual_stages} chunks a rank; {schedules[nearest]} "
        "is written instead, whose bubble is larger",
    )
